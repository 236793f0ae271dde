"""Metrics of PerturBench (Wu et al., arXiv:2408.10609), as computed by its code.

Profiles are means over cells of log1p-normalised expression, perturbations x genes, of one group
of cells (such as a cell type); :func:`~scvi_sams.metrics._profiles.rmse`, ``mae``,
``pearson`` and ``cosine`` compare them or their log fold changes row by row.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from scipy.spatial.distance import cdist

from scvi_sams._checks import check_choice
from scvi_sams.exceptions import SAMSError
from scvi_sams.metrics._comparison import Comparison, Metric, RankVersion, Scores
from scvi_sams.metrics._profiles import (
    centred,
    cosine,
    mae,
    not_finite,
    own_positions,
    pearson,
    rmse,
)

RankMetric = Literal["rmse", "mae", "cosine", "pearson"]

_DISTANCE = {"rmse": "euclidean", "mae": "cityblock", "cosine": "euclidean", "pearson": "euclidean"}
"""Distances with the same order as the metric; similarities use unit vectors."""


def logfc(mean: np.ndarray, control_mean: np.ndarray, *, pseudocount: float = 0.1) -> np.ndarray:
    """Log fold change, ``log2(mean + 0.1) - log2(control_mean + 0.1)``, of means of log1p values.

    The pseudocount is added to means that are already logarithms, as in PerturBench
    (``logFC_adata``, ``exp=False``); this is not the log fold change of normalised counts.

    Parameters
    ----------
    mean
        Mean log1p expression, perturbations x genes (or genes).
    control_mean
        Mean log1p expression of the control cells, genes.
    pseudocount
        Added to both.

    Returns
    -------
    Effects of the shape of ``mean``. NaN stays NaN; a mean so negative that its logarithm is
    undefined counts as no change (0), as in their code.

    Examples
    --------
    >>> scvi_sams.evaluation.logfc(np.array([0.3]), np.array([0.1])).tolist()  # log2(0.4 / 0.2)
    [1.0]
    """
    shifted, control = mean + pseudocount, control_mean + pseudocount
    defined = (shifted > 0) & (control > 0)
    change = np.log2(np.where(defined, shifted, 1)) - np.log2(np.where(defined, control, 1))
    return np.where(np.isnan(mean), np.nan, change)


def rank_scores(
    predicted: np.ndarray,
    observed: np.ndarray,
    metric: RankMetric = "cosine",
    *,
    version: RankVersion = "2025",
) -> np.ndarray:
    """Rank of each perturbation's own prediction among all predictions; 0 is closest.

    Position, from 0, of the prediction for perturbation ``p`` among all predictions sorted by their
    closeness to the observation of ``p``, divided by the number of perturbations. A model with the
    same prediction for all of them scores 0.5, however well it fits.

    Parameters
    ----------
    predicted, observed
        Perturbations x genes, in the same order: means, or log fold changes (:func:`logfc`). A row
        of ``predicted`` with NaN is a failed prediction: it gets the last position, and counts as
        farther from other observations than any prediction.
    metric
        Closeness of two profiles: distances ``"rmse"`` and ``"mae"``, or similarities ``"cosine"``
        and ``"pearson"``. A similarity that is undefined because a profile is zero (or constant)
        counts as the lowest.
    version
        ``"2025"`` divides by ``n - 1``, the ``"2024"`` code by ``n``.

    Returns
    -------
    One value per perturbation: 0 is best; chance is 0.5 (2024: ``(n - 1) / (2 n)``). NaN for a
    single perturbation (2025).

    Raises
    ------
    SAMSError
        If the shapes differ, or ``metric`` or ``version`` is unknown.

    Notes
    -----
    Ties get their mean position. PerturBench's code breaks them at random without a seed; its
    paper counts them against the model.

    Examples
    --------
    The same prediction for all three scores at chance level:

    >>> observed = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> scvi_sams.evaluation.rank_scores(observed, observed).tolist()
    [0.0, 0.0, 0.0]
    >>> scvi_sams.evaluation.rank_scores(np.ones((3, 2)), observed).tolist()
    [0.5, 0.5, 0.5]
    """
    if predicted.shape != observed.shape or predicted.ndim != 2:
        raise SAMSError(
            "Pass one profile per perturbation on both sides; the shapes are "
            f"{predicted.shape} and {observed.shape}."
        )
    check_choice("metric", metric, list(_DISTANCE))
    check_choice("version", version, get_args(RankVersion))
    failed = not_finite(predicted)
    if metric == "pearson":
        predicted, observed = centred(predicted), centred(observed)
    if metric in ("cosine", "pearson"):
        predicted, observed = _directions(predicted), _directions(observed)
    positions = own_positions(cdist(predicted, observed, _DISTANCE[metric]), failed)
    n = len(observed) - 1 if version == "2025" else len(observed)
    return positions / n if n else np.full(len(observed), np.nan)


def deg_recall(
    predicted: np.ndarray,
    observed: np.ndarray,
    control_mean: np.ndarray,
    control_variance: np.ndarray,
    *,
    n_genes: int = 20,
) -> np.ndarray:
    """Proportion of the top differentially expressed genes found among the predicted top genes.

    Genes are sorted by the absolute t-statistic with the variance of the control cells, as in
    PerturBench. For one perturbation it is ``(mean - control_mean) / sqrt(control_variance)`` up to
    a constant, so the number of cells does not matter and profiles are sufficient.

    Parameters
    ----------
    predicted, observed
        Mean log1p expression, perturbations x genes.
    control_mean, control_variance
        Mean and variance of log1p expression over control cells, genes.
    n_genes
        Number of top genes: 20 in the paper of 2025, 50 in its code.

    Returns
    -------
    One proportion per perturbation, from 0 to 1; chance is ``n_genes`` over the number of genes.
    Genes that do not change are never among the top genes: predicting no effect recovers nothing.
    0 if no observed gene changes.

    Notes
    -----
    Equal t-statistics, such as infinite ones of genes that do not vary over control cells, are
    sorted by the absolute difference.

    Examples
    --------
    >>> observed, control = np.array([[3.0, 0.0, 0.0]]), np.zeros(3)
    >>> predicted = np.array([[2.0, 1.0, 0.0]])
    >>> scvi_sams.evaluation.deg_recall(
    ...     predicted, observed, control, np.ones(3), n_genes=1
    ... ).tolist()
    [1.0]
    """
    shares = np.zeros(len(observed))
    for row, (x, y) in enumerate(zip(predicted, observed, strict=True)):
        found, wanted = (
            _top_genes(mean - control_mean, control_variance, n_genes) for mean in (x, y)
        )
        if len(wanted):
            shares[row] = len(np.intersect1d(found, wanted)) / len(wanted)
    return shares


def _directions(profiles: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(profiles, axis=1, keepdims=True)
    return profiles / np.where(norms > 0, norms, np.nan)


def _top_genes(difference: np.ndarray, variance: np.ndarray, n_genes: int) -> np.ndarray:
    size = np.abs(difference)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(size > 0, size / np.sqrt(variance), 0)
    return np.lexsort((-size, -t))[: min(n_genes, np.count_nonzero(t))]


def _changes(group: Comparison) -> tuple[np.ndarray, np.ndarray]:
    predicted, observed = (
        logfc(means, group.control_mean) for means in (group.predicted, group.observed)
    )
    return predicted, observed


def _ranks(
    predicted: np.ndarray, observed: np.ndarray, metric: RankMetric, by: Comparison
) -> Scores:
    version, n = by.options.rank_version, len(observed)
    values = rank_scores(predicted, observed, metric, version=version)
    return Scores(values, 0.5 if version == "2025" else (n - 1) / (2 * n))


def _recall(group: Comparison) -> Scores:
    n_genes = group.options.n_top_genes
    values = deg_recall(
        group.predicted,
        group.observed,
        group.control_mean,
        group.control_variance,
        n_genes=n_genes,
    )
    return Scores(values, min(n_genes / len(group.genes), 1))


_MODE, _SOURCE = "perturbench", "PerturBench, Wu et al., arXiv:2408.10609"

METRICS = (
    Metric(
        _MODE, "rmse_average", "fit", "root mean squared error of mean log1p expression", _SOURCE,
        False, lambda group: rmse(group.predicted, group.observed), is_headline=True,
    ),
    Metric(
        _MODE, "mae_average", "fit", "mean absolute error of mean log1p expression", _SOURCE,
        False, lambda group: mae(group.predicted, group.observed),
    ),
    Metric(
        _MODE, "cosine_logfc", "fit", "cosine similarity of logfc = log2(mean + 0.1) - "
        "log2(control mean + 0.1), on means of log1p values", _SOURCE,
        True, lambda group: cosine(*group.once(_changes)), is_headline=True,
    ),
    Metric(
        _MODE, "pearson_logfc", "fit", "Pearson correlation of the same logfc", _SOURCE,
        True, lambda group: pearson(*group.once(_changes)),
    ),
    Metric(
        _MODE, "rank_rmse_average", "specificity", "position of its own prediction among all "
        "predictions by rmse_average to the observation, / (n - 1); ties at their mean", _SOURCE,
        False, lambda group: _ranks(group.predicted, group.observed, "rmse", group),
        chance=0.5, worst_if_failed=True, is_headline=True,
    ),
    Metric(
        _MODE, "rank_cosine_logfc", "specificity", "position of its own prediction among all "
        "predictions by cosine_logfc to the observation, / (n - 1); ties at their mean", _SOURCE,
        False, lambda group: _ranks(*group.once(_changes), "cosine", group),
        chance=0.5, worst_if_failed=True, is_headline=True,
    ),
    Metric(
        _MODE, "deg_recall", "fit", "proportion of the genes with the largest observed |t| "
        "(variance of control cells; 20 by default) that have the largest predicted |t|",
        _SOURCE, True, _recall,
    ),
)  # fmt: skip
