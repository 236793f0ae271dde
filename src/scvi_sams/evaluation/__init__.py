"""Splits, observed effects, baselines and metrics, and what can be asked of trained models.

Splits, effects, baselines and metrics are plain functions that know no model.
:func:`mask_stability`, :func:`consensus_masks` and :func:`basal_leakage` take trained models;
:func:`mask_calibration` takes simulated truth.

An *ATE table*, which models predict and these functions make and compare, is an
:class:`~anndata.AnnData` of perturbations x genes: ``X`` is the average treatment effect,
``obs_names`` the labels as they were asked for, ``layers["standard_error"]`` its uncertainty,
``obs["n_cells"]`` the cells behind an observation, and ``uns["ate"]`` names ``method``,
``target_sum`` and ``units``.
"""

from scvi_sams.evaluation._baselines import additive_ate, mean_ate
from scvi_sams.evaluation._calibration import Calibration, active_at_fdr, mask_calibration
from scvi_sams.evaluation._leakage import basal_leakage
from scvi_sams.evaluation._metrics import (
    align_ate,
    compare_ate,
    effect_metrics,
    mask_recovery,
    match_latents,
)
from scvi_sams.evaluation._observed import observed_ate
from scvi_sams.evaluation._splits import canonical_labels, hold_out_combinations, split_cells
from scvi_sams.evaluation._stability import (
    ConsensusMasks,
    MaskStability,
    align_latents,
    consensus_masks,
    mask_stability,
)

__all__ = [
    "Calibration",
    "ConsensusMasks",
    "MaskStability",
    "active_at_fdr",
    "additive_ate",
    "align_ate",
    "align_latents",
    "basal_leakage",
    "canonical_labels",
    "compare_ate",
    "consensus_masks",
    "effect_metrics",
    "hold_out_combinations",
    "mask_calibration",
    "mask_recovery",
    "mask_stability",
    "match_latents",
    "mean_ate",
    "observed_ate",
    "split_cells",
]
