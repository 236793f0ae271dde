"""What every metric is: definition, source, direction and chance."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

_SAMS = "Bereket and Karaletsos, NeurIPS 2023"
_PERTURBENCH = "PerturBench, Wu et al., arXiv:2408.10609"
_CELL_EVAL = "cell-eval 0.8, Arc Institute, Virtual Cell Challenge 2025"
_SYSTEMA = "Systema, Vinas Torne et al., Nature Biotechnology 2025"


@dataclass(frozen=True)
class Metric:
    """A metric of :func:`score_predictions`.

    Attributes
    ----------
    mode, metric
        Where it belongs, and its name.
    definition
        What is computed; x is the prediction and y the observation.
    source
        Who defines it.
    higher_is_better
        Its direction.
    chance
        What a prediction gets that is the same for all perturbations; NaN where this depends on
        the data.
    worst_if_failed
        Whether a failed prediction takes the worst value rather than NaN.
    """

    mode: str
    metric: str
    definition: str
    source: str
    higher_is_better: bool
    chance: float = np.nan
    worst_if_failed: bool = False


METRICS = (
    Metric(
        "sams", "pearson", "Pearson correlation of the ATE, difference of mean log2(1 + x) from "
        "control; 'all' flattens perturbations x genes, with no effect for failed predictions",
        _SAMS, True,
    ),
    Metric("sams", "r2", "1 - sum (y - x)^2 / sum (y - mean y)^2 of the same ATE", _SAMS, True),
    Metric(
        "sams", "pearson_top", "pearson over the genes with the largest |observed ATE| of each "
        "perturbation (20 unless asked otherwise)", _SAMS, True,
    ),
    Metric("sams", "r2_top", "r2 over the same genes as pearson_top", _SAMS, True),
    Metric(
        "perturbench", "rmse_average", "root mean squared error of mean log1p expression",
        _PERTURBENCH, False,
    ),
    Metric(
        "perturbench", "mae_average", "mean absolute error of mean log1p expression",
        _PERTURBENCH, False,
    ),
    Metric(
        "perturbench", "cosine_logfc", "cosine similarity of logfc = log2(mean + 0.1) - "
        "log2(control mean + 0.1), on means of log1p values", _PERTURBENCH, True,
    ),
    Metric(
        "perturbench", "pearson_logfc", "Pearson correlation of the same logfc", _PERTURBENCH, True
    ),
    Metric(
        "perturbench", "rank_rmse_average", "position of the own prediction among all predictions "
        "by rmse_average to the observation, / (n - 1); ties at their mean", _PERTURBENCH,
        False, 0.5, True,
    ),
    Metric(
        "perturbench", "rank_cosine_logfc", "position of the own prediction among all predictions "
        "by cosine_logfc to the observation, / (n - 1); ties at their mean", _PERTURBENCH,
        False, 0.5, True,
    ),
    Metric(
        "perturbench", "deg_recall", "share of the genes with the largest observed |t| (variance "
        "of control cells; 20 unless asked otherwise) that have the largest predicted |t|",
        _PERTURBENCH, True,
    ),
    Metric("cell-eval", "mae", "mean absolute error of mean log1p expression", _CELL_EVAL, False),
    Metric(
        "cell-eval", "discrimination_l1", "1 - position / n of the own observed effect among all "
        "observed effects by L1 distance to the prediction, without the target genes; ties at "
        "their mean (chance: (n + 1) / 2n)", _CELL_EVAL, True, 0.5, True,
    ),
    Metric(
        "cell-eval", "de_overlap", "|top N predicted genes by |log fold change| with FDR < 0.05 "
        "that are among the N observed ones| / N, by Wilcoxon tests of cells; 0 if N is 0",
        _CELL_EVAL, True,
    ),
    Metric(
        "cell-eval", "de_overlap_profile", "de_overlap of a predicted profile, which has no cells "
        "to test: every gene that changes is a candidate", _CELL_EVAL + ", adapted", True,
    ),
    Metric(
        "systema", "pearson_delta", "Pearson correlation of the differences from the perturbed "
        "centroid, the mean over perturbations of their means", _SYSTEMA, True,
    ),
    Metric(
        "systema", "pearson_delta_top", "pearson_delta over the genes with the largest "
        "|observed - control| (20 unless asked otherwise)", _SYSTEMA, True,
    ),
    Metric(
        "systema", "centroid_accuracy", "share of the other perturbations whose observed centroid "
        "is farther from the prediction than the own one; ties count half", _SYSTEMA,
        True, 0.5, True,
    ),
    Metric(
        "distances", "energy_distance_squared", "2 E|x - y|^2 - E|x - x'|^2 - E|y - y'|^2 over "
        "cells, n (n - 1) pairs within a side: twice the squared distance of the means",
        "scPerturb, Peidli et al., Nature Methods 2024", False,
    ),
    Metric(
        "distances", "energy_distance", "2 E|x - y| - E|x - x'| - E|y - y'| over cells, n (n - 1) "
        "pairs within a side: 0 only for equal distributions",
        "Szekely and Rizzo, J. Stat. Plan. Inference 2013", False,
    ),
    Metric(
        "distances", "mmd", "squared maximum mean discrepancy, Gaussian kernel whose bandwidth is "
        "the median distance of observed cells, n (n - 1) pairs within a side",
        "Gretton et al., JMLR 2012", False,
    ),
)  # fmt: skip

MODES = tuple(dict.fromkeys(metric.mode for metric in METRICS))


def describe_metrics() -> pd.DataFrame:
    """Describe every metric of :func:`score_predictions`.

    Returns
    -------
    One row per metric: ``mode``, ``metric``, ``definition`` (``x`` is the prediction, ``y`` the
    observation), ``source``, ``higher_is_better``, and ``chance``, the value of predicting the same
    for all perturbations where it does not depend on the data (NaN elsewhere; for many
    perturbations, :func:`score_predictions` states the exact one).

    Examples
    --------
    >>> metrics = scvi_sams.evaluation.describe_metrics()
    >>> metrics["mode"].unique().tolist()
    ['sams', 'perturbench', 'cell-eval', 'systema', 'distances']
    """
    described = pd.DataFrame([asdict(metric) for metric in METRICS])
    return described.drop(columns="worst_if_failed")
