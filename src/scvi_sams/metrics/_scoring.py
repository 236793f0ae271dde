"""One call for all metrics: every perturbation in a tidy table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, get_args

import anndata as ad
import numpy as np
import pandas as pd

from scvi_sams._checks import (
    as_names,
    as_numbers,
    check_anndata,
    check_choice,
    check_integer,
)
from scvi_sams._scale import warn_of_other_levels
from scvi_sams.exceptions import InvalidArgumentError, SAMSError
from scvi_sams.labels._spelling import Control
from scvi_sams.metrics import _ate, _cell_eval, _distances, _perturbench, _systema
from scvi_sams.metrics._cell_scale import check_same_cell_doses, check_same_cell_scale
from scvi_sams.metrics._comparison import (
    Comparison,
    Metric,
    Options,
    RankVersion,
    Scores,
    Side,
    check_predicted_genes,
    compare_sides,
    read_side,
)
from scvi_sams.metrics._observed import registered_levels, spelling_of

Value: TypeAlias = float | np.ndarray | pd.Series
"""One metric or several."""

_COLUMNS = ["perturbation", "covariate", "mode", "metric", "value", "n_cells", "higher_is_better"]
_COLUMNS += ["chance", "status"]

METRICS: dict[tuple[str, str], Metric] = {
    (metric.mode, metric.metric): metric
    for metric in (
        *_ate.METRICS,
        *_perturbench.METRICS,
        *_cell_eval.METRICS,
        *_systema.METRICS,
        *_distances.METRICS,
    )
}
"""In the order of tables. A new metric is declared in its own file and added here."""


def metrics_by_mode() -> dict[str, list[Metric]]:
    """Metrics by mode."""
    modes: dict[str, list[Metric]] = {}
    for metric in METRICS.values():
        modes.setdefault(metric.mode, []).append(metric)
    return modes


def describe_metrics() -> pd.DataFrame:
    """Describe every metric of :func:`score_predictions`.

    Returns
    -------
    One row per metric: ``mode``, ``metric``, ``definition`` (``x`` is the prediction, ``y`` the
    observation), ``source``, ``higher_is_better``, and ``chance``: the value of the same prediction
    for all perturbations, if it does not depend on the data (otherwise NaN; it is for many
    perturbations, :func:`score_predictions` returns the exact value).

    Examples
    --------
    >>> metrics = scvi_sams.evaluation.describe_metrics()
    >>> metrics["mode"].unique().tolist()
    ['sams', 'perturbench', 'cell-eval', 'systema', 'distances']
    """
    columns = ["mode", "metric", "definition", "source", "higher_is_better", "chance"]
    return pd.DataFrame([vars(metric) for metric in METRICS.values()])[columns]


def score_predictions(
    predicted: ad.AnnData,
    observed: ad.AnnData,
    *,
    modes: Sequence[str] = ("sams", "perturbench", "cell-eval", "systema"),
    perturbation_key: str = "perturbation",
    control: Control = "control",
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

    Good fit alone is not sufficient: predicting the mean of all perturbations fits well. Also check
    the metrics of specificity (``rank_*``, ``discrimination_l1``, ``centroid_accuracy``), in which
    such a model is at chance level. :func:`describe_metrics` defines all metrics.

    Parameters
    ----------
    predicted
        Predictions with log1p-normalised expression (natural logarithm) in ``X``, dense or sparse,
        and labels in ``obs[perturbation_key]``: one row per perturbation (its mean profile) or
        several (cells). Control rows, and perturbations and genes that are not in ``observed``, are
        ignored.
    observed
        Held-out cells and control cells, normalised in the same way. The control cells are the
        reference of both predicted and observed effects; where cells were registered with doses,
        cells of dose 0 are controls. Neither AnnData is changed.
    modes
        Modes to compute: ``"sams"``, ``"perturbench"``, ``"cell-eval"``, ``"systema"``, and
        ``"distances"``, which requires predicted cells.
    perturbation_key, control, delimiter
        As for :func:`observed_ate`, in both.
    covariate_key
        Column of ``obs``, in both, with groups such as cell types, which are compared separately,
        each with its own control cells; ``None`` if there is one group.
    target_genes
        Genes that each perturbation targets, excluded from its discrimination score; ``None``:
        the names in the label (``"A+B"``: genes ``A`` and ``B``), if they are genes.
    perturbed_centroid
        Reference of mode ``"systema"``: mean over training perturbations of their mean profiles,
        in the order of the observed genes (a Series is aligned). ``None``: the mean of the observed
        perturbations of the group.
    n_top_genes
        Number of genes for the ``_top`` metrics and the recall of DE genes.
    rank_version
        ``"2025"`` divides PerturBench's ranks by ``n - 1``, ``"2024"`` by ``n``.
    n_components
        Number of principal components of the observed test cells in mode ``"distances"``;
        ``None``: all genes.
    seed
        Seed of the principal components and of the cells whose distances set the bandwidth.

    Returns
    -------
    One row per perturbation, mode and metric, with columns

    - ``perturbation``; ``"all"`` in the rows of mode ``"sams"`` that flatten perturbations x genes,
      as reported in the paper (over all covariates).
    - ``covariate``, if there is a ``covariate_key`` (``"all"`` where flattened).
    - ``mode``, ``metric``, ``value``, ``n_cells`` (observed cells), ``higher_is_better``.
    - ``chance``: value of a prediction that is the same for all perturbations (ranks), or of a
      random choice of genes (recall and overlap); NaN if there is no such value.
    - ``status``: ``"ok"``; ``"missing"`` or ``"nan"`` for a perturbation whose prediction is
      missing or not finite; ``"undefined"`` where the metric is not defined (a rank among one, no
      DE gene, a single cell).

    A failed prediction is never omitted: its ranks have the worst value, its other metrics are
    NaN, it counts as farther than all others in their ranks, and as no effect in ``"all"``, whose
    status then names the failure. Average with ``skipna=False`` to keep failures visible.

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
    ScaleMismatchError
        If cells of ``predict`` have another ``output``, target sum, size factor or dose than the
        observed ones. What a side does not record, or does not show, is not compared.
    SAMSError
        If a mode or version is unknown, ``"distances"`` is requested for profiles, no observed
        cell is perturbed, or ``perturbed_centroid`` does not fit the genes.

    Examples
    --------
    Each half of the cells predicts the other:

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
    check_integer(n_top_genes=n_top_genes)
    check_integer(at_least=0, seed=seed)
    modes = as_names("modes", modes)
    check_choice("rank_version", rank_version, get_args(RankVersion))
    if target_genes is not None and not isinstance(target_genes, Mapping):
        raise InvalidArgumentError(
            "`target_genes` must be a dict of perturbations and the genes that they target."
        )
    check_modes(modes)
    check_predicted_genes(predicted, observed)
    spelling = spelling_of(observed, perturbation_key, control, delimiter)
    sides = [
        read_side(data, observed.var_names, side, perturbation_key, covariate_key, spelling)
        for side, data in (("predicted", predicted), ("observed", observed))
    ]
    check_same_cell_scale(predicted, observed)
    check_same_cell_doses(predicted, observed, sides[0].labels, sides[1].labels)
    if covariate_key is None:
        record = predicted.uns.get("prediction", {})
        warn_of_other_levels(
            predicted=record, observed=registered_levels(observed, sides[1].labels)
        )
    options = Options(
        target_genes=target_genes,
        perturbed_centroid=_fitting_centroid(perturbed_centroid, observed.var_names),
        n_top_genes=n_top_genes,
        rank_version=rank_version,
        n_components=n_components,
        seed=seed,
    )
    table = score_sides(sides[0], sides[1], observed.var_names, modes, options)
    return table if covariate_key is not None else table.drop(columns="covariate")


def check_modes(modes: Sequence[str]) -> None:
    """Raise if a mode is unknown, or none was given."""
    known = metrics_by_mode()
    unknown = [mode for mode in modes if mode not in known]
    if unknown or not modes:
        raise SAMSError(
            f"There is no mode {', '.join(map(repr, unknown)) or '(none given)'}; choose "
            f"`modes` from {', '.join(map(repr, known))}."
        )


def score_sides(
    predicted: Side, observed: Side, genes: pd.Index, modes: Sequence[str], options: Options
) -> pd.DataFrame:
    """Score as :func:`score_predictions` does, with parsed labels.

    Returns
    -------
    Its table, always with a column ``covariate``, which is ``None`` if there is one group.
    """
    groups = compare_sides(predicted, observed, genes, options)
    given = "cells" if groups[0].from_cells else "profiles"
    tables = []
    for mode in dict.fromkeys(modes):
        metrics = [m for m in metrics_by_mode()[mode] if m.needs in (None, given)]
        if not metrics:
            raise SAMSError(
                f"Mode {mode!r} compares cells with cells, but there is one predicted row per "
                "perturbation. Predict cells, or omit this mode."
            )
        for group in groups:
            tables += [_rows(group, metric) for metric in metrics if metric.pooled is None]
        for metric in metrics:
            if metric.pooled is not None:
                tables += [_rows(group, metric) for group in groups]
                tables.append(_pooled_row(groups, metric, metric.pooled(groups)))
    return pd.concat(tables, ignore_index=True)


def position(value: Value, negative: Value, positive: Value) -> Value:
    """Position of a value between a negative and a positive control.

    Parameters
    ----------
    value
        Value of a metric, in either direction.
    negative
        Value that a method must beat, such as that of the mean of the training perturbations.
    positive
        Value that no method can be expected to beat, such as that of one half of the observed cells
        predicting the other.

    Returns
    -------
    ``(value - negative) / (positive - negative)``, not clipped: below 0 is worse than the negative
    control, above 1 better than the positive control. NaN if the controls are equal: the metric
    then does not distinguish methods.

    Examples
    --------
    >>> round(float(scvi_sams.evaluation.position(0.7, negative=0.4, positive=0.8)), 6)
    0.75
    """
    span = np.subtract(positive, negative)
    return np.subtract(value, negative) / np.where(span == 0, np.nan, span)


def _rows(group: Comparison, metric: Metric) -> pd.DataFrame:
    assert metric.score is not None
    found = metric.score(group)
    scores = found if isinstance(found, Scores) else Scores(found)
    values = scores.values
    if not metric.worst_if_failed:
        values = np.where(group.succeeded, values, np.nan)
    undefined = group.succeeded & (np.isnan(values) | ~np.asarray(scores.defined))
    status = np.where(undefined, "undefined", group.status)
    chance = metric.chance if scores.chance is None else scores.chance
    return _table(
        metric,
        perturbation=group.perturbations,
        covariate=group.covariate,
        value=values,
        n_cells=group.n_cells,
        chance=chance,
        status=status,
    )


def _pooled_row(groups: Sequence[Comparison], metric: Metric, value: float) -> pd.DataFrame:
    statuses = np.concatenate([group.status for group in groups])
    failures = [failure for failure in ("missing", "nan") if failure in statuses]
    return _table(
        metric,
        perturbation=["all"],
        covariate="all",
        value=value,
        n_cells=sum(group.n_cells.sum() for group in groups),
        chance=metric.chance,
        status=[*failures, "ok"][0],
    )


def _table(metric: Metric, **columns: Any) -> pd.DataFrame:
    declared = {key: getattr(metric, key) for key in ("mode", "metric", "higher_is_better")}
    return pd.DataFrame(columns | declared)[_COLUMNS]


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
