"""Metrics, each by the definition of its source: fit, specificity and distribution."""

from scvi_sams.metrics._ate import align_ate, compare_ate, effect_metrics
from scvi_sams.metrics._cell_eval import de_overlap, discrimination_scores, wilcoxon_fdr
from scvi_sams.metrics._distances import energy_distance, median_bandwidth, mmd
from scvi_sams.metrics._perturbench import deg_recall, logfc, rank_scores
from scvi_sams.metrics._recovery import mask_recovery, match_latents, mean_correlation_coefficient
from scvi_sams.metrics._registry import describe_metrics
from scvi_sams.metrics._scoring import position, score_predictions
from scvi_sams.metrics._similarity import cosine, mae, pearson, rmse
from scvi_sams.metrics._systema import centroid_accuracy, pearson_delta, perturbed_centroid

__all__ = [
    "align_ate",
    "centroid_accuracy",
    "compare_ate",
    "cosine",
    "de_overlap",
    "deg_recall",
    "describe_metrics",
    "discrimination_scores",
    "effect_metrics",
    "energy_distance",
    "logfc",
    "mae",
    "mask_recovery",
    "match_latents",
    "mean_correlation_coefficient",
    "median_bandwidth",
    "mmd",
    "pearson",
    "pearson_delta",
    "perturbed_centroid",
    "position",
    "rank_scores",
    "rmse",
    "score_predictions",
    "wilcoxon_fdr",
]
