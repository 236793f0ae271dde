"""Figures: each function draws on the axes it is given, returns them, and never shows them."""

from scvi_sams.plotting._ate import ate_scatter
from scvi_sams.plotting._benchmark import (
    benchmark_metric,
    benchmark_perturbations,
    benchmark_specificity,
)
from scvi_sams.plotting._calibration import mask_calibration
from scvi_sams.plotting._latent import latent
from scvi_sams.plotting._masks import masks

__all__ = [
    "ate_scatter",
    "benchmark_metric",
    "benchmark_perturbations",
    "benchmark_specificity",
    "latent",
    "mask_calibration",
    "masks",
]
