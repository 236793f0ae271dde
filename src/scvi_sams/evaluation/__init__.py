"""Splits, observed effects, baselines and metrics: plain functions that know no model.

An *ATE table*, which models predict and these functions make and compare, is an
:class:`~anndata.AnnData` of perturbations x genes: ``X`` is the average treatment effect,
``obs_names`` the labels as they were asked for, ``layers["standard_error"]`` its uncertainty,
``obs["n_cells"]`` the cells behind an observation, and ``uns["ate"]`` names ``method``,
``target_sum`` and ``units``.
"""

from scvi_sams.evaluation._baselines import additive_ate, mean_ate
from scvi_sams.evaluation._metrics import (
    align_ate,
    compare_ate,
    effect_metrics,
    mask_recovery,
    match_latents,
)
from scvi_sams.evaluation._observed import observed_ate
from scvi_sams.evaluation._splits import canonical_labels, hold_out_combinations, split_cells

__all__ = [
    "additive_ate",
    "align_ate",
    "canonical_labels",
    "compare_ate",
    "effect_metrics",
    "hold_out_combinations",
    "mask_recovery",
    "match_latents",
    "mean_ate",
    "observed_ate",
    "split_cells",
]
