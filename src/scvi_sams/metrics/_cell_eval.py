"""Metrics of cell-eval (Arc Institute, Virtual Cell Challenge 2025), as version 0.8 computes them.

Mean absolute error is :func:`~scvi_sams.metrics._profiles.mae` of mean profiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, norm

from scvi_sams.metrics._comparison import Comparison, Metric, Scores
from scvi_sams.metrics._profiles import Matrix, mae, not_finite, own_positions, to_dense

FDR = 0.05
"""False discovery rate below which a gene is differentially expressed."""
_GENES_AT_ONCE = 500
"""Genes tested together, to limit the memory for dense values."""


def discrimination_scores(
    predicted: np.ndarray,
    observed: np.ndarray,
    *,
    target_genes: Sequence[Sequence[int] | np.ndarray] | None = None,
) -> np.ndarray:
    """Perturbation discrimination score (PDS): how close a prediction is to its own observation.

    ``1 - position / n``, with the position, from 0, of the true effect among the ``n`` observed
    effects sorted by their L1 distance to the predicted one. It is PerturBench's rank with
    predictions and observations exchanged.

    Parameters
    ----------
    predicted, observed
        Effects (or means: the control cancels), perturbations x genes, in the same order. A row of
        ``predicted`` with NaN is a failed prediction and gets the last position.
    target_genes
        For each perturbation, positions of genes excluded from its distances: its own targets,
        which are too easy to predict. ``None`` excludes nothing.

    Returns
    -------
    One score per perturbation: 1 is best, ``1 / n`` worst, and chance is ``(n + 1) / (2 n)``.

    Notes
    -----
    Ties get their mean position; cell-eval breaks them by the order of perturbations.

    Examples
    --------
    The predictions of the last two of three perturbations are swapped:

    >>> observed = np.array([[0.0, 0.0], [5.0, 0.0], [0.0, 7.0]])
    >>> scvi_sams.evaluation.discrimination_scores(observed[[0, 2, 1]], observed).round(2).tolist()
    [1.0, 0.33, 0.33]
    """
    excluded = target_genes if target_genes is not None else [()] * len(predicted)
    distances = np.empty((len(observed), len(predicted)))
    for column, (effect, genes) in enumerate(zip(predicted, excluded, strict=True)):
        gaps = np.abs(observed - effect)
        gaps[:, list(genes)] = 0
        distances[:, column] = gaps.sum(axis=1)
    return 1 - own_positions(distances, not_finite(predicted)) / len(observed)


def log2_fold_change(mean: np.ndarray, control_mean: np.ndarray) -> np.ndarray:
    """Log fold change of geometric means, ``log2(expm1(mean)) - log2(expm1(control_mean))``.

    Inputs are mean log1p expression. Infinite where only one side is expressed, 0 where neither is
    (as in pdex with ``epsilon=0``, which cell-eval calls). Means below 0 count as not expressed.
    """
    perturbed, control = (np.expm1(np.maximum(means, 0)) for means in (mean, control_mean))
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.log2(perturbed) - np.log2(control)
    return np.where((perturbed == 0) & (control == 0), 0, change)


def wilcoxon_fdr(groups: Sequence[Matrix], control_cells: Matrix) -> np.ndarray:
    """False discovery rate of each gene's difference between groups of cells and control cells.

    Two-sided Wilcoxon rank-sum (Mann-Whitney) test by normal approximation with corrections for
    ties and continuity, adjusted over the genes of each group by Benjamini and Hochberg. P-values
    equal those of :func:`scipy.stats.mannwhitneyu` (``method="asymptotic"``) and of pdex, which
    cell-eval calls; scanpy's test does not correct for continuity, and for ties only on request.

    Parameters
    ----------
    groups
        Cells x genes of each group, dense or sparse.
    control_cells
        Cells x genes.

    Returns
    -------
    Groups x genes; 1 for a gene that is the same in all cells.
    """
    p_values = np.ones((len(groups), control_cells.shape[1]))
    for start in range(0, control_cells.shape[1], _GENES_AT_ONCE):
        genes = slice(start, start + _GENES_AT_ONCE)
        # Control cells are sorted once, not for each group as in scipy's test: 25 times as fast
        # for groups of 400 cells with 8,000 control cells.
        control = np.ascontiguousarray(np.sort(to_dense(control_cells[:, genes]), axis=0).T)
        control_ties = np.array([_ties(np.unique(x, return_counts=True)[1]) for x in control])
        for row, cells in enumerate(groups):
            p_values[row, genes] = _rank_sum_p_values(
                to_dense(cells[:, genes]).T, control, control_ties
            )
    return false_discovery_control(p_values, axis=1)


def de_overlap(
    predicted_change: np.ndarray,
    observed_fdr: np.ndarray,
    *,
    predicted_fdr: np.ndarray | None = None,
    fdr: float = FDR,
) -> float:
    """Proportion of differentially expressed (DE) genes that the prediction finds: overlap at N.

    ``N`` observed genes are below ``fdr``. The result is the number of these among the ``N``
    predicted genes with the largest absolute fold change, divided by ``N``.

    Parameters
    ----------
    predicted_change
        Log fold changes, genes (:func:`log2_fold_change`).
    observed_fdr
        False discovery rates of the observed cells, genes (:func:`wilcoxon_fdr`).
    predicted_fdr
        Those of predicted cells: only predicted genes below ``fdr`` are candidates, as in
        cell-eval. ``None``, for predicted profiles, which cannot be tested: every gene that
        changes is a candidate.
    fdr
        Threshold on the false discovery rate.

    Returns
    -------
    From 0 to 1; also 0 if no observed gene is DE, as in cell-eval. Among equal fold changes, genes
    are chosen in their order.

    Examples
    --------
    Two genes are differential; one of them is among the two with the largest predicted change:

    >>> scvi_sams.evaluation.de_overlap(np.array([3.0, 0.1, -2.0]), np.array([0.01, 0.02, 0.8]))
    0.5
    """
    wanted = np.flatnonzero(observed_fdr < fdr)
    if not len(wanted):
        return 0.0
    candidates = predicted_change != 0 if predicted_fdr is None else predicted_fdr < fdr
    found = np.flatnonzero(candidates)
    order = np.argsort(-np.abs(predicted_change[found]), kind="stable")
    return len(np.intersect1d(found[order][: len(wanted)], wanted)) / len(wanted)


def _rank_sum_p_values(
    cells: np.ndarray, control: np.ndarray, control_ties: np.ndarray
) -> np.ndarray:
    """Test each row, a gene, of the cells against that of the control cells, which is sorted."""
    statistics = np.array([_rank_sum(x, y) for x, y in zip(cells, control, strict=True)])
    u, ties = statistics.T
    n_cells, n_control = cells.shape[1], control.shape[1]
    product, n = n_cells * n_control, n_cells + n_control
    deviation = np.sqrt(product / 12 * (n + 1 - (control_ties + ties) / (n * (n - 1))))
    excess = np.abs(u - product / 2) - 0.5
    # A gene with the same value in all cells has SD 0, and no difference either.
    z = np.divide(excess, deviation, out=np.zeros_like(excess), where=deviation > 0)
    return np.minimum(2 * norm.sf(z), 1)


def _rank_sum(x: np.ndarray, control: np.ndarray) -> tuple[float, float]:
    """Mann-Whitney U of ``x``, and the ties that its cells add to the sorted control cells."""
    values, counts = np.unique(x, return_counts=True)
    below = np.searchsorted(control, values, side="left")
    shared = np.searchsorted(control, values, side="right") - below
    return float(counts @ (below + shared / 2)), _ties(counts + shared) - _ties(shared)


def _ties(counts: np.ndarray) -> float:
    """Sum of ``t^3 - t`` over values, with ``t`` the number of cells that have the value."""
    sizes = counts.astype(np.float64)
    return float(np.sum(sizes**3 - sizes))


def _discrimination(group: Comparison) -> Scores:
    n = len(group.perturbations)
    values = discrimination_scores(
        group.predicted - group.control_mean,
        group.observed - group.control_mean,
        target_genes=[_targets(perturbation, group) for perturbation in group.perturbations],
    )
    return Scores(values, (n + 1) / (2 * n))


def _targets(perturbation: str, group: Comparison) -> np.ndarray:
    """Positions of the measured genes that a perturbation targets."""
    if group.options.target_genes is not None:
        named = group.options.target_genes.get(perturbation, ())
        targets = [named] if isinstance(named, str) else list(named)
    else:
        targets = group.spelling.perturbations(perturbation)
    positions = group.genes.get_indexer(pd.Index(targets, dtype=object))
    return positions[positions >= 0]


def _overlap(group: Comparison) -> Scores:
    rows = np.flatnonzero(group.succeeded).tolist()
    observed_fdr = wilcoxon_fdr(group.observed_cells, group.control_cells)
    predicted_fdr: dict[int, np.ndarray] = {}
    if group.from_cells:
        tested = wilcoxon_fdr([group.predicted_cells[row] for row in rows], group.control_cells)
        predicted_fdr = dict(zip(rows, tested, strict=True))
    values = np.full(len(group.perturbations), np.nan)
    for row in rows:
        values[row] = de_overlap(
            log2_fold_change(group.predicted[row], group.control_mean),
            observed_fdr[row],
            predicted_fdr=predicted_fdr.get(row),
        )
    n_wanted = np.count_nonzero(observed_fdr < FDR, axis=1)
    return Scores(values, n_wanted / len(group.genes), n_wanted > 0)


_MODE, _SOURCE = "cell-eval", "cell-eval 0.8, Arc Institute, Virtual Cell Challenge 2025"

METRICS = (
    Metric(
        _MODE, "mae", "fit", "mean absolute error of mean log1p expression", _SOURCE,
        False, lambda group: mae(group.predicted, group.observed),
    ),
    Metric(
        _MODE, "discrimination_l1", "specificity", "1 - position / n of the own observed effect "
        "among all observed effects by L1 distance to the prediction, without the target genes; "
        "ties at their mean (chance: (n + 1) / 2n)", _SOURCE,
        True, _discrimination, chance=0.5, worst_if_failed=True, is_headline=True,
    ),
    Metric(
        _MODE, "de_overlap", "fit", "|top N predicted genes by |log fold change| with FDR < 0.05 "
        "that are among the N observed ones| / N, by Wilcoxon tests of cells; 0 if N is 0",
        _SOURCE, True, _overlap, needs="cells",
    ),
    Metric(
        _MODE, "de_overlap_profile", "fit", "de_overlap of a predicted profile, which has no cells "
        "to test: every gene that changes is a candidate", _SOURCE + ", adapted",
        True, _overlap, needs="profiles",
    ),
)  # fmt: skip
