"""How close predicted effects are to observed ones: the metrics of the SAMS-VAE paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd

from scvi_sams._checks import check_ate, check_integer
from scvi_sams._scale import check_same_scale
from scvi_sams.exceptions import MissingKeyError, SAMSError, ScaleMismatchError
from scvi_sams.labels._rows import dosage_text
from scvi_sams.labels._spelling import Spelling
from scvi_sams.metrics._comparison import Comparison, Metric
from scvi_sams.metrics._observed import check_predicted, check_unique
from scvi_sams.metrics._profiles import centred, cosine, largest, pearson, r2, ratio, rmse

Pair: TypeAlias = tuple[np.ndarray, np.ndarray]


def compare_ate(
    predicted: ad.AnnData,
    observed: ad.AnnData,
    *,
    n_top_genes: int = 20,
    control: str | Sequence[str] = "control",
    delimiter: str | None = "+",
) -> pd.DataFrame:
    """Compare predicted with observed effects, per perturbation and over all of them.

    A perturbation that is missing in ``predicted``, or has a value there that is not finite, is a
    failed prediction. It is not skipped: it is scored as a prediction of no effect, in its own
    row and in ``"all"``, and counted in ``missing``.

    Parameters
    ----------
    predicted
        ATE table of predictions. Genes and perturbations that are not in ``observed`` are ignored.
    observed
        ATE table of observations, for example of :func:`observed_ate`.
    n_top_genes
        Number of genes with the largest absolute observed effect, chosen separately for each
        perturbation, used in the ``_top`` columns (all genes if there are fewer).
    control, delimiter
        How labels are written: ``"B+A"`` is scored against ``"A+B"``, and ``"A+control"`` against
        ``"A"``.

    Returns
    -------
    One row per row of ``observed``, in its order (where both tables have doses, rows of the same
    perturbation and dose are compared), and a row ``"all"``, which flattens perturbations x genes
    into one vector (the value reported in the paper). Columns, with ``x`` the predicted and ``y``
    the observed effects:

    - ``pearson``, ``r2``, ``slope``, ``cosine``, ``rmse``: see :func:`effect_metrics`.
    - ``pearson_top``, ``r2_top``: the same over the top genes of each perturbation; in ``"all"``
      flattened over perturbations x top genes.
    - ``n_cells``: observed cells (their sum in ``"all"``); NaN if not in ``observed``.
    - ``missing``: number of failed predictions in the row (0 or 1; their sum in ``"all"``).

    Raises
    ------
    ScaleMismatchError
        If the tables have different methods, target sums or size factors, or a perturbation was
        predicted at other doses than observed. What a table does not record is not compared.
    SAMSError
        If a row occurs twice, an observed effect is not finite, or there are no perturbations or
        fewer than two genes to compare.
    MissingKeyError
        If a gene of ``observed`` is not in ``predicted``, or a table has no ``uns["ate"]``.

    Examples
    --------
    >>> from scvi_sams import evaluation
    >>> observed = evaluation.observed_ate(adata, perturbations=["P001", "P003"])
    >>> scores = evaluation.compare_ate(observed, observed)
    >>> scores[["pearson", "rmse", "n_cells"]].round(6).values.tolist()
    [[1.0, 0.0, 60.0], [1.0, 0.0, 60.0], [1.0, 0.0, 120.0]]

    A missing prediction counts as no effect:

    >>> scores = evaluation.compare_ate(observed[:1], observed)
    >>> scores.loc["P003", ["pearson", "missing"]].tolist()
    [0.0, 1.0]
    """
    check_integer(n_top_genes=n_top_genes)
    x, y, missing = align_ate(predicted, observed, control=control, delimiter=delimiter)
    # One more "perturbation" for the row "all": everything, flattened.
    rows = [*observed.obs_names, "all"]
    scores, top_scores = (
        pd.DataFrame([*map(effect_metrics, *pair), effect_metrics(*pair)], index=rows)
        for pair in ((x, y), _over_top_genes(x, y, n_top_genes))
    )
    scores["pearson_top"] = top_scores["pearson"]
    scores["r2_top"] = top_scores["r2"]
    unknown = np.full(observed.n_obs, np.nan)
    n_cells = np.asarray(observed.obs.get("n_cells", unknown))
    scores["n_cells"] = np.append(n_cells, n_cells.sum())
    scores["missing"] = np.append(missing, missing.sum()).astype(int)
    return scores


def effect_metrics(predicted: np.ndarray, observed: np.ndarray) -> dict[str, float]:
    """Score predicted effects ``x`` against observed effects ``y``, both flattened.

    Parameters
    ----------
    predicted, observed
        Finite numbers of one shape and at least two entries, in the same units.

    Returns
    -------
    - ``pearson``: correlation of ``x`` and ``y``.
    - ``r2``: ``1 - sum((y - x)^2) / sum((y - mean(y))^2)``
      (``sklearn.metrics.r2_score(observed, predicted)``); not the square of ``pearson``.
    - ``slope``: ``cov(x, y) / var(y)``, the least-squares slope of predicted on observed effects;
      below 1 where predictions are shrunken.
    - ``cosine``: ``sum(x * y) / (|x| * |y|)``.
    - ``rmse``: ``sqrt(mean((x - y)^2))``, in the units of the effects.

    Ratios that are undefined because one side is constant (or zero, for ``cosine``) are 0
    (``r2`` is 1 if the prediction is exact). No value is ever NaN.

    Examples
    --------
    Predicting half of each effect correlates perfectly but is too small by half:

    >>> observed = np.array([1.0, -2.0, 3.0])
    >>> metrics = scvi_sams.evaluation.effect_metrics(observed / 2, observed)
    >>> round(metrics["pearson"], 6), round(metrics["slope"], 6)
    (1.0, 0.5)
    """
    x, y = (np.ravel(effects).astype(np.float64) for effects in (predicted, observed))
    deviations = centred(y)
    covariance, spread = np.vdot(centred(x), deviations), np.vdot(deviations, deviations)
    values: dict[str, SupportsFloat] = {
        "pearson": pearson(x, y),
        "r2": r2(x, y),
        "slope": ratio(covariance, spread),
        "cosine": cosine(x, y),
        "rmse": rmse(x, y),
    }
    return {name: float(value) for name, value in values.items()}


def align_ate(
    predicted: ad.AnnData,
    observed: ad.AnnData,
    *,
    control: str | Sequence[str] = "control",
    delimiter: str | None = "+",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bring two ATE tables to the perturbations and genes of the observed one.

    Parameters
    ----------
    predicted, observed, control, delimiter
        As for :func:`compare_ate`.

    Returns
    -------
    Predicted and observed effects, both perturbations x genes in the order of ``observed``, and
    which perturbations have no finite prediction (boolean). Their predicted effect is zero.

    Raises
    ------
    SAMSError, MissingKeyError
        As for :func:`compare_ate`.
    """
    check_ate(predicted=predicted, observed=observed)
    spelling = Spelling.of(control, delimiter)
    _check_described(predicted, observed)
    check_same_scale(predicted=predicted.uns["ate"], observed=observed.uns["ate"])
    check_predicted(observed.var_names, predicted.var_names)
    y = np.asarray(observed.X, np.float64)
    if y.size == 0:
        raise SAMSError("The observed table is empty: there is nothing to compare with.")
    if not np.isfinite(y).all():
        raise SAMSError("The observed table has effects that are not finite: nothing to score.")

    predicted_rows, observed_rows = _rows_to_match(predicted, observed, spelling)
    check_unique(predicted_rows)
    check_unique(observed_rows)
    effects = pd.DataFrame(predicted.X, index=predicted_rows, columns=predicted.var_names)
    x = effects.reindex(index=observed_rows, columns=observed.var_names).to_numpy(np.float64)
    missing = ~np.isfinite(x).all(axis=1)
    return np.where(missing[:, None], 0, x), y, missing


def _check_described(predicted: ad.AnnData, observed: ad.AnnData) -> None:
    for name, table in (("predicted", predicted), ("observed", observed)):
        if "ate" not in table.uns:
            raise MissingKeyError(
                f"The {name} table has no uns['ate'] that describes its effects. Make it with "
                "observed_ate or predict_ate."
            )


def _rows_to_match(
    predicted: ad.AnnData, observed: ad.AnnData, spelling: Spelling
) -> tuple[list[str], list[str]]:
    """Rows by label and dosage where both tables have them, otherwise by name."""
    if not all({"perturbation", "dosage"} <= set(table.obs) for table in (predicted, observed)):
        rows = [[spelling.canonical(n) for n in table.obs_names] for table in (predicted, observed)]
        return rows[0], rows[1]
    sides = [
        pd.DataFrame(
            {
                "label": [spelling.canonical(label) for label in table.obs["perturbation"]],
                "dosage": [dosage_text(dosage) for dosage in table.obs["dosage"]],
            }
        )
        for table in (predicted, observed)
    ]
    _check_same_doses(*sides)
    rows = [(side["label"] + "@" + side["dosage"]).tolist() for side in sides]
    return rows[0], rows[1]


def _check_same_doses(predicted: pd.DataFrame, observed: pd.DataFrame) -> None:
    """Raise if a perturbation was predicted only at other doses."""
    doses = predicted.groupby("label")["dosage"].agg(list)
    for label, dosage in zip(observed["label"], observed["dosage"], strict=True):
        if label in doses and dosage not in doses[label]:
            raise ScaleMismatchError(
                f"The tables cannot be compared: the dosage of {label!r} is "
                f"{', '.join(doses[label])} in the predicted and {dosage} in the observed one. "
                "Predict the observed doses: predict_ate(observed.obs['perturbation'], "
                "dosages=observed.obs['dosage'])."
            )


def _over_top_genes(x: np.ndarray, y: np.ndarray, n_top_genes: int) -> Pair:
    """Effects on the genes with the largest observed effects, separately per perturbation."""
    n_top = min(n_top_genes, y.shape[1])
    if n_top < 2:
        raise SAMSError(f"At least two genes are needed to compare effects, not {n_top}.")
    top = largest(y, n_top)
    return np.take_along_axis(x, top, axis=1), np.take_along_axis(y, top, axis=1)


def _effects(group: Comparison) -> Pair:
    """The paper's effects, differences of mean log2(1 + x); zero where a prediction failed."""
    x, y = ((means - group.control_mean) / np.log(2) for means in (group.predicted, group.observed))
    return np.where(group.succeeded[:, None], x, 0), y


def _top_effects(group: Comparison) -> Pair:
    return _over_top_genes(*group.once(_effects), group.options.n_top_genes)


def _flattened(
    similarity: Callable[[np.ndarray, np.ndarray], np.ndarray],
    effects: Callable[[Comparison], Pair] = _effects,
) -> dict[str, Any]:
    """A similarity per perturbation, and one of everything flattened into one vector."""

    def pooled(groups: Sequence[Comparison]) -> float:
        sides = zip(*(group.once(effects) for group in groups), strict=True)
        return float(similarity(*(np.concatenate([g.ravel() for g in side]) for side in sides)))

    return {"score": lambda group: similarity(*group.once(effects)), "pooled": pooled}


_MODE, _SOURCE = "sams", "Bereket and Karaletsos, NeurIPS 2023"

METRICS = (
    Metric(
        _MODE, "pearson", "fit", "Pearson correlation of the ATE, difference of mean log2(1 + x) "
        "from control; 'all' flattens perturbations x genes, with no effect for failed predictions",
        _SOURCE, True, **_flattened(pearson), is_headline=True,
    ),
    Metric(
        _MODE, "r2", "fit", "1 - sum (y - x)^2 / sum (y - mean y)^2 of the same ATE",
        _SOURCE, True, **_flattened(r2),
    ),
    Metric(
        _MODE, "rmse", "fit", "root mean squared error of the same ATE, in units of log2",
        _SOURCE, False, **_flattened(rmse),
    ),
    Metric(
        _MODE, "pearson_top", "fit", "pearson over the genes with the largest |observed ATE| of "
        "each perturbation (20 by default)",
        _SOURCE, True, **_flattened(pearson, _top_effects), is_headline=True,
    ),
    Metric(
        _MODE, "r2_top", "fit", "r2 over the same genes as pearson_top",
        _SOURCE, True, **_flattened(r2, _top_effects),
    ),
)  # fmt: skip
