"""Figures: each function draws on the given axes, returns them, and never shows them.

Sizes of text and colours of the background are those of ``matplotlib.rcParams``; the size of a new
figure scales with its text.
"""

from scvi_sams.plotting._benchmark import (
    benchmark_metric,
    benchmark_perturbations,
    benchmark_specificity,
)
from scvi_sams.plotting._contexts import context_effects
from scvi_sams.plotting._diagnostics import mask_calibration, training_curves
from scvi_sams.plotting._features import feature_importance
from scvi_sams.plotting._genes import ate_scatter, dose_response, effect_volcano, program_genes
from scvi_sams.plotting._guides import guide_efficacy
from scvi_sams.plotting._latent import latent
from scvi_sams.plotting._learning_curve import learning_curve
from scvi_sams.plotting._matrices import direct_effects, interaction_matrix, masks, similarity

__all__ = [
    "ate_scatter",
    "benchmark_metric",
    "benchmark_perturbations",
    "benchmark_specificity",
    "context_effects",
    "direct_effects",
    "dose_response",
    "effect_volcano",
    "feature_importance",
    "guide_efficacy",
    "interaction_matrix",
    "latent",
    "learning_curve",
    "mask_calibration",
    "masks",
    "program_genes",
    "similarity",
    "training_curves",
]
