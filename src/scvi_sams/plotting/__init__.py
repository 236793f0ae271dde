"""Figures: each function draws on the axes it is given, returns them, and never shows them."""

from scvi_sams.plotting._ate import ate_scatter
from scvi_sams.plotting._benchmark import (
    benchmark_metric,
    benchmark_perturbations,
    benchmark_specificity,
)
from scvi_sams.plotting._calibration import mask_calibration
from scvi_sams.plotting._genes import dose_response, effect_volcano, program_genes
from scvi_sams.plotting._latent import latent
from scvi_sams.plotting._masks import masks
from scvi_sams.plotting._similarity import interaction_matrix, similarity
from scvi_sams.plotting._training import training_curves

__all__ = [
    "ate_scatter",
    "benchmark_metric",
    "benchmark_perturbations",
    "benchmark_specificity",
    "dose_response",
    "effect_volcano",
    "interaction_matrix",
    "latent",
    "mask_calibration",
    "masks",
    "program_genes",
    "similarity",
    "training_curves",
]
