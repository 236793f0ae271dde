"""One call for all metrics: every perturbation in a tidy table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

import anndata as ad
import numpy as np
import pandas as pd

from scvi_sams._checks import (
    as_names,
    as_numbers,
    check_anndata,
    check_choice,
    check_integer,
    check_key,
    check_text,
)
from scvi_sams.exceptions import InvalidArgumentError, SAMSError
from scvi_sams.metrics._ate import compare_ate
from scvi_sams.metrics._expression import Comparison, compare_expression
from scvi_sams.metrics._modes import SCORERS, Options, Scores
from scvi_sams.metrics._observed import ate_table
from scvi_sams.metrics._perturbench import RankVersion
from scvi_sams.metrics._registry import METRICS, MODES

_COLUMNS = [
    "perturbation",
    "covariate",
    "mode",
    "metric",
    "value",
    "n_cells",
    "higher_is_better",
    "chance",
    "status",
]
_REGISTERED = {(metric.mode, metric.metric): metric for metric in METRICS}


def score_predictions(
    predicted: ad.AnnData,
    observed: ad.AnnData,
    *,
    modes: Sequence[str] = ("sams", "perturbench", "cell-eval", "systema"),
    perturbation_key: str = "perturbation",
    control: str | Sequence[str] = "control",
    covariate_key: str | None = None,
    delimiter: str | None = "+",
    target_genes: Mapping[str, str | Sequence[str]] | None = None,
    perturbed_centroid: np.ndarray | pd.Series | None = None,
    n_top_genes: int = 20,
    rank_version: RankVersion = "2025",
    n_components: int | None = 50,
    seed: int = 0,
) -> pd.DataFrame:
    """Score predicted against observed expression, per perturbation and with every metric.

    Fit alone says little: a model that predicts the mean of all perturbations fits well. Read it
    beside the metrics of specificity (``rank_*``, ``discrimination_l1``, ``centroid_accuracy``),
    where such a model is at chance. :func:`describe_metrics` defines all metrics.

    Parameters
    ----------
    predicted
        Predictions with log1p-normalised expression (natural logarithm) in ``X``, dense or sparse,
        and labels in ``obs[perturbation_key]``: a single row per perturbation (its mean profile) or
        many (cells). Control rows and perturbations and genes that ``observed`` lacks are ignored.
    observed
        Held-out cells and control cells, normalised in the same way. The control cells stand on
        both sides of every effect. Neither is changed.
    modes
        Which metrics: ``"sams"``, ``"perturbench"``, ``"cell-eval"``, ``"systema"``, and
        ``"distances"``, which needs predicted cells.
    perturbation_key
        Column of ``obs`` with the label of each row, in both.
    control
        Label or labels of the control cells.
    covariate_key
        Column of ``obs``, in both, with groups such as cell types that are compared one by one,
        each with its own control cells; ``None`` if there is one group.
    delimiter
        What joins the perturbations of a combination; ``None`` if labels are never split.
    target_genes
        Genes that each perturbation targets, which the discrimination score leaves out; ``None``
        takes the names in the label (``"A+B"``: genes ``A`` and ``B``), as far as they are genes.
    perturbed_centroid
        Reference of mode ``"systema"``: mean over training perturbations of their mean profiles,
        in the order of the observed genes (a Series is brought to it). ``None`` takes the mean of
        the observed perturbations of the group.
    n_top_genes
        Number of genes for the ``_top`` metrics and the recall of DE genes.
    rank_version
        ``"2025"`` divides PerturBench's ranks by ``n - 1``, ``"2024"`` by ``n``.
    n_components
        Principal components of the observed test cells that mode ``"distances"`` uses; ``None``
        takes all genes.
    seed
        Of the principal components and of the cells whose distances give the bandwidth.

    Returns
    -------
    One row per perturbation, mode and metric, with columns

    - ``perturbation``; ``"all"`` in the rows of mode ``"sams"`` that flatten perturbations x genes,
      the numbers that the paper reports (over all covariates).
    - ``covariate``, if there is a ``covariate_key`` (``"all"`` where flattened).
    - ``mode``, ``metric``, ``value``, ``n_cells`` (observed cells), ``higher_is_better``.
    - ``chance``: what a prediction that is the same for all perturbations gets (ranks), or a random
      choice of genes (recall and overlap); NaN where there is no such value.
    - ``status``: ``"ok"``; ``"missing"`` or ``"nan"`` for a perturbation without a prediction or
      with one that is not finite; ``"undefined"`` where the metric has no value here (a rank among
      one, no DE gene, a single cell).

    A failed prediction is never left out: its ranks take the worst value, its other metrics are
    NaN, it is farther than others in the ranks of others, and counts as no effect in ``"all"``,
    whose status then names the failure. Average with ``skipna=False``, or failures go unseen.

    Raises
    ------
    MissingKeyError
        If a column is missing, ``X`` is empty, or observed genes have no prediction.
    MissingControlError
        If a group has no control cell.
    InvalidCountsError
        If values cannot be log1p-normalised expression, or observed ones are not finite.
    InvalidCovariateError
        If a cell has no covariate.
    SAMSError
        If a mode or version is unknown, ``"distances"`` is asked of profiles, no observed cell is
        perturbed, or ``perturbed_centroid`` does not fit the genes.

    Examples
    --------
    Halves of the cells predict each other:

    >>> import scanpy as sc
    >>> cells = adata.copy()
    >>> sc.pp.normalize_total(cells)
    >>> sc.pp.log1p(cells)
    >>> halves, scored = scvi_sams.evaluation.split_half(cells)
    >>> scores = scvi_sams.evaluation.score_predictions(
    ...     halves, cells[scored], modes=["perturbench"]
    ... )
    >>> scores["metric"].unique().tolist()[:3]
    ['rmse_average', 'mae_average', 'cosine_logfc']
    >>> scores["perturbation"].nunique(), set(scores["status"])
    (14, {'ok'})
    """
    check_anndata(predicted=predicted, observed=observed)
    check_text(perturbation_key=perturbation_key)
    check_key(covariate_key=covariate_key, delimiter=delimiter)
    check_integer(n_top_genes=n_top_genes)
    check_integer(at_least=0, seed=seed)
    modes = as_names("modes", modes)
    check_choice("rank_version", rank_version, get_args(RankVersion))
    if target_genes is not None and not isinstance(target_genes, Mapping):
        raise InvalidArgumentError(
            "`target_genes` must be a dict of perturbations and the genes that they target."
        )
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown or not modes:
        raise SAMSError(
            f"There is no mode {', '.join(map(repr, unknown)) or '(none given)'}; choose from "
            f"{', '.join(map(repr, MODES))}."
        )
    groups = compare_expression(
        predicted,
        observed,
        perturbation_key=perturbation_key,
        control=control,
        covariate_key=covariate_key,
        delimiter=delimiter,
    )
    from_cells = any(cells.shape[0] > 1 for group in groups for cells in group.predicted_cells)
    if "distances" in modes and not from_cells:
        raise SAMSError(
            "Mode 'distances' compares cells with cells, but there is one predicted row per "
            "perturbation. Predict cells, or leave out this mode."
        )
    options = Options(
        target_genes=target_genes,
        perturbed_centroid=_fitting_centroid(perturbed_centroid, observed.var_names),
        delimiter=delimiter,
        n_top_genes=n_top_genes,
        rank_version=rank_version,
        n_components=n_components,
        seed=seed,
        from_cells=from_cells,
    )
    tables = []
    for mode in dict.fromkeys(modes):
        if mode == "sams":
            tables.append(_sams_rows(groups, n_top_genes))
            continue
        for group in groups:
            tables += [_rows(group, mode, scores) for scores in SCORERS[mode](group, options)]
    table = pd.concat(tables, ignore_index=True)[_COLUMNS]
    return table if covariate_key is not None else table.drop(columns="covariate")


def position(
    value: float | np.ndarray | pd.Series,
    negative: float | np.ndarray | pd.Series,
    positive: float | np.ndarray | pd.Series,
) -> float | np.ndarray | pd.Series:
    """Where a value lies between a negative and a positive control.

    Parameters
    ----------
    value
        Value of a metric, in either direction.
    negative
        The metric of what a method must beat, such as the mean of the training perturbations.
    positive
        The metric of what nobody can be expected to beat, such as one half of the observed cells
        predicting the other.

    Returns
    -------
    ``(value - negative) / (positive - negative)``, not clipped: below 0 is worse than the negative
    control, above 1 better than the positive one. NaN where the controls are equal: the metric
    tells nothing apart.

    Examples
    --------
    >>> round(float(scvi_sams.evaluation.position(0.7, negative=0.4, positive=0.8)), 6)
    0.75
    """
    span = np.subtract(positive, negative)
    return np.subtract(value, negative) / np.where(span == 0, np.nan, span)


def _rows(group: Comparison, mode: str, scores: Scores) -> pd.DataFrame:
    metric = _REGISTERED[mode, scores.metric]
    values = scores.values
    if not metric.worst_if_failed:
        values = np.where(group.succeeded, values, np.nan)
    undefined = group.succeeded & (np.isnan(values) | ~np.asarray(scores.defined))
    return pd.DataFrame(
        {
            "perturbation": group.perturbations,
            "covariate": group.covariate,
            "mode": mode,
            "metric": scores.metric,
            "value": values,
            "n_cells": group.n_cells,
            "higher_is_better": metric.higher_is_better,
            "chance": scores.chance,
            "status": np.where(undefined, "undefined", group.status),
        }
    )


def _sams_rows(groups: Sequence[Comparison], n_top_genes: int) -> pd.DataFrame:
    """Score the average treatment effects of all groups by :func:`compare_ate`."""
    n_cells = np.concatenate([group.n_cells for group in groups])
    rows = [str(row) for row in range(len(n_cells))]
    tables = [
        ate_table(
            # The paper's effects are differences of log2(1 + x).
            np.concatenate([(means - g.control_mean) / np.log(2) for g, means in sides]),
            rows,
            groups[0].genes,
            description={"method": "log1p", "target_sum": None, "units": "log2(1 + x)"},
            layers={},
            obs={"n_cells": n_cells},
        )
        for sides in (
            [(group, group.predicted) for group in groups],
            [(group, group.observed) for group in groups],
        )
    ]
    scores = compare_ate(*tables, n_top_genes=n_top_genes, delimiter=None)
    status = np.concatenate([group.status for group in groups])
    failures = [failure for failure in ("missing", "nan") if failure in status]
    index = pd.DataFrame(
        {
            "perturbation": [*(p for group in groups for p in group.perturbations), "all"],
            "covariate": [*(g.covariate for g in groups for _ in g.perturbations), "all"],
            "n_cells": [*n_cells, n_cells.sum()],
            "status": [*status, *(failures or ["ok"])[:1]],
        }
    )
    failed = np.append(status != "ok", False)
    return pd.concat(
        [
            index.assign(
                mode="sams",
                metric=metric.metric,
                value=np.where(failed, np.nan, scores[metric.metric]),
                higher_is_better=metric.higher_is_better,
                chance=metric.chance,
            )
            for metric in METRICS
            if metric.mode == "sams"
        ]
    )


def _fitting_centroid(
    centroid: np.ndarray | pd.Series | None, genes: pd.Index
) -> np.ndarray | None:
    if centroid is None:
        return None
    if isinstance(centroid, pd.Series):
        centroid = centroid.reindex(genes)
    values = as_numbers("perturbed_centroid", centroid)
    if values.shape != (len(genes),) or not np.isfinite(values).all():
        raise SAMSError(
            f"`perturbed_centroid` must be one finite number for each of the {len(genes)} observed "
            f"genes; its shape is {values.shape}."
        )
    return values
