"""The metrics of each mode, computed from one group of cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from scvi_sams.metrics import _cell_eval as cell_eval
from scvi_sams.metrics import _distances as distances
from scvi_sams.metrics import _perturbench as perturbench
from scvi_sams.metrics import _systema as systema
from scvi_sams.metrics._expression import Comparison
from scvi_sams.metrics._matrix import Matrix, stack
from scvi_sams.metrics._similarity import cosine, mae, pearson, rmse


@dataclass(frozen=True)
class Options:
    """What the user chose; see :func:`score_predictions`."""

    target_genes: Mapping[str, str | Sequence[str]] | None
    perturbed_centroid: np.ndarray | None
    delimiter: str | None
    n_top_genes: int
    rank_version: perturbench.RankVersion
    n_components: int | None
    seed: int
    from_cells: bool


class Scores(NamedTuple):
    """Values of a metric per perturbation, and where chance is."""

    metric: str
    values: np.ndarray
    chance: float | np.ndarray = np.nan
    defined: bool | np.ndarray = True


def perturbench_scores(group: Comparison, options: Options) -> list[Scores]:
    """Fit, specificity and differential expression as PerturBench measures them."""
    predicted, observed = group.predicted, group.observed
    x, y = (perturbench.logfc(means, group.control_mean) for means in (predicted, observed))
    version = options.rank_version
    n, n_genes = observed.shape
    chance = 0.5 if version == "2025" else (n - 1) / (2 * n)
    recall = perturbench.deg_recall(
        predicted,
        observed,
        group.control_mean,
        group.control_variance,
        n_genes=options.n_top_genes,
    )
    rank = perturbench.rank_scores
    return [
        Scores("rmse_average", rmse(predicted, observed)),
        Scores("mae_average", mae(predicted, observed)),
        Scores("cosine_logfc", cosine(x, y)),
        Scores("pearson_logfc", pearson(x, y)),
        Scores("rank_rmse_average", rank(predicted, observed, "rmse", version=version), chance),
        Scores("rank_cosine_logfc", rank(x, y, "cosine", version=version), chance),
        Scores("deg_recall", recall, min(options.n_top_genes / n_genes, 1)),
    ]


def cell_eval_scores(group: Comparison, options: Options) -> list[Scores]:
    """Fit, specificity and differential expression as cell-eval measures them."""
    n = len(group.perturbations)
    discrimination = cell_eval.discrimination_scores(
        group.predicted - group.control_mean,
        group.observed - group.control_mean,
        target_genes=[
            _targets(perturbation, group.genes, options) for perturbation in group.perturbations
        ],
    )
    return [
        Scores("mae", mae(group.predicted, group.observed)),
        Scores("discrimination_l1", discrimination, (n + 1) / (2 * n)),
        _de_overlap(group, options.from_cells),
    ]


def systema_scores(group: Comparison, options: Options) -> list[Scores]:
    """What is specific to a perturbation, as Systema measures it."""
    predicted, observed = group.predicted, group.observed
    reference = options.perturbed_centroid
    if reference is None:
        reference = systema.perturbed_centroid(observed)
    top = systema.pearson_delta_top(
        predicted, observed, reference, group.control_mean, n_genes=options.n_top_genes
    )
    return [
        Scores("pearson_delta", systema.pearson_delta(predicted, observed, reference)),
        Scores("pearson_delta_top", top),
        Scores("centroid_accuracy", systema.centroid_accuracy(predicted, observed), 0.5),
    ]


def distance_scores(group: Comparison, options: Options) -> list[Scores]:
    """Distances between the distributions of predicted and observed cells."""
    observed = stack(group.observed_cells)
    predicted_cells, observed_cells = group.predicted_cells, group.observed_cells
    if options.n_components is not None:
        axes = distances.principal_axes(observed, options.n_components, seed=options.seed)
        observed = observed @ axes
        predicted_cells = [cells @ axes for cells in predicted_cells]
        observed_cells = [cells @ axes for cells in observed_cells]
    bandwidth = distances.median_bandwidth(observed, seed=options.seed)
    functions: dict[str, Callable[[Matrix, Matrix], float]] = {
        "energy_distance_squared": distances.energy_distance,
        "energy_distance": lambda x, y: distances.energy_distance(x, y, metric="euclidean"),
        "mmd": lambda x, y: distances.mmd(x, y, bandwidth=bandwidth),
    }
    scores = []
    for metric, function in functions.items():
        values = np.full(len(group.perturbations), np.nan)
        for row in np.flatnonzero(group.succeeded):
            values[row] = function(predicted_cells[row], observed_cells[row])
        scores.append(Scores(metric, values))
    return scores


SCORERS: dict[str, Callable[[Comparison, Options], list[Scores]]] = {
    "perturbench": perturbench_scores,
    "cell-eval": cell_eval_scores,
    "systema": systema_scores,
    "distances": distance_scores,
}


def _de_overlap(group: Comparison, from_cells: bool) -> Scores:
    rows = np.flatnonzero(group.succeeded).tolist()
    observed_fdr = cell_eval.wilcoxon_fdr(group.observed_cells, group.control_cells)
    predicted_fdr: dict[int, np.ndarray] = {}
    if from_cells:
        tested = cell_eval.wilcoxon_fdr(
            [group.predicted_cells[row] for row in rows], group.control_cells
        )
        predicted_fdr = dict(zip(rows, tested, strict=True))
    values = np.full(len(group.perturbations), np.nan)
    for row in rows:
        values[row] = cell_eval.de_overlap(
            cell_eval.log2_fold_change(group.predicted[row], group.control_mean),
            observed_fdr[row],
            predicted_fdr=predicted_fdr.get(row),
        )
    n_wanted = np.count_nonzero(observed_fdr < cell_eval.FDR, axis=1)
    name = "de_overlap" if from_cells else "de_overlap_profile"
    return Scores(name, values, n_wanted / len(group.genes), n_wanted > 0)


def _targets(perturbation: str, genes: pd.Index, options: Options) -> np.ndarray:
    """Positions of the genes that a perturbation targets; those not measured are left out."""
    if options.target_genes is not None:
        named = options.target_genes.get(perturbation, ())
        targets = [named] if isinstance(named, str) else list(named)
    else:
        targets = perturbation.split(options.delimiter) if options.delimiter else [perturbation]
    positions = genes.get_indexer(pd.Index(targets, dtype=object))
    return positions[positions >= 0]
