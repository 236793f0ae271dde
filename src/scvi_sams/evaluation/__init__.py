"""Splits, observed effects, baselines and metrics, and diagnostics of trained models.

Splits, effects, baselines and metrics do not depend on any model.
:func:`mask_stability`, :func:`consensus_masks` and :func:`basal_leakage` take trained models;
:func:`mask_calibration` takes simulated truth.

An *ATE table*, which models predict and these functions make and compare, is an
:class:`~anndata.AnnData` of perturbations x genes: ``X`` is the average treatment effect,
``obs_names`` and ``obs["perturbation"]`` the canonical labels, ``obs["dosage"]`` their doses,
``layers["standard_error"]`` the standard error, ``obs["n_cells"]`` the number of observed cells,
and ``uns["ate"]`` contains ``method``, ``target_sum``, ``size_factor_key`` and ``units``.
"""

from scvi_sams._fdr import active_at_fdr
from scvi_sams.baselines._base import BaselineMethod
from scvi_sams.baselines._features import FeatureBaseline, FeatureNeighbours, FeatureRidge
from scvi_sams.baselines._levels import LevelBaseline, OtherLevelsMean, VectorArithmetic
from scvi_sams.baselines._shrunken import AshMean, EBMean, ShrunkenAdditive
from scvi_sams.baselines._simple import (
    Additive,
    ControlMean,
    MatchingMean,
    PCARidge,
    PerturbationMean,
    TrainingMean,
    additive_ate,
    mean_ate,
    split_half,
)
from scvi_sams.baselines._trained import DecoderOnly, LatentAdditive, LinearAdditive
from scvi_sams.benchmark._learning_curve import learning_curve
from scvi_sams.benchmark._model import ModelMethod
from scvi_sams.benchmark._result import BenchmarkResult
from scvi_sams.benchmark._run import benchmark
from scvi_sams.interpretation._leakage import basal_leakage
from scvi_sams.interpretation._stability import (
    ConsensusMasks,
    MaskStability,
    align_latents,
    consensus_masks,
    mask_stability,
)
from scvi_sams.metrics._ate import align_ate, compare_ate, effect_metrics
from scvi_sams.metrics._cell_eval import de_overlap, discrimination_scores, wilcoxon_fdr
from scvi_sams.metrics._distances import energy_distance, median_bandwidth, mmd
from scvi_sams.metrics._observed import observed_ate
from scvi_sams.metrics._perturbench import deg_recall, logfc, rank_scores
from scvi_sams.metrics._recovery import (
    Calibration,
    mask_calibration,
    mask_recovery,
    match_latents,
    mean_correlation_coefficient,
)
from scvi_sams.metrics._scoring import describe_metrics, position, score_predictions
from scvi_sams.metrics._systema import centroid_accuracy, pearson_delta, perturbed_centroid
from scvi_sams.splits._combinations import canonical_labels, hold_out_combinations, split_cells
from scvi_sams.splits._makers import norman_data_efficiency, norman_ood, random_cells
from scvi_sams.splits._perturbations import perturbation_hold_out
from scvi_sams.splits._perturbench import (
    combination_hold_out,
    covariate_transfer,
    single_hold_out,
)
from scvi_sams.splits._split import Split, check_split, make_split

__all__ = [
    "Additive",
    "AshMean",
    "BaselineMethod",
    "BenchmarkResult",
    "Calibration",
    "ConsensusMasks",
    "ControlMean",
    "DecoderOnly",
    "EBMean",
    "FeatureBaseline",
    "FeatureNeighbours",
    "FeatureRidge",
    "LatentAdditive",
    "LevelBaseline",
    "LinearAdditive",
    "MaskStability",
    "MatchingMean",
    "ModelMethod",
    "OtherLevelsMean",
    "PCARidge",
    "PerturbationMean",
    "ShrunkenAdditive",
    "Split",
    "TrainingMean",
    "VectorArithmetic",
    "active_at_fdr",
    "additive_ate",
    "align_ate",
    "align_latents",
    "basal_leakage",
    "benchmark",
    "canonical_labels",
    "centroid_accuracy",
    "check_split",
    "combination_hold_out",
    "compare_ate",
    "consensus_masks",
    "covariate_transfer",
    "de_overlap",
    "deg_recall",
    "describe_metrics",
    "discrimination_scores",
    "effect_metrics",
    "energy_distance",
    "hold_out_combinations",
    "learning_curve",
    "logfc",
    "make_split",
    "mask_calibration",
    "mask_recovery",
    "mask_stability",
    "match_latents",
    "mean_ate",
    "mean_correlation_coefficient",
    "median_bandwidth",
    "mmd",
    "norman_data_efficiency",
    "norman_ood",
    "observed_ate",
    "pearson_delta",
    "perturbation_hold_out",
    "perturbed_centroid",
    "position",
    "random_cells",
    "rank_scores",
    "score_predictions",
    "single_hold_out",
    "split_cells",
    "split_half",
    "wilcoxon_fdr",
]
