"""The probabilistic models: one small file each, in the paper's symbols."""

from scvi_sams.module._likelihoods import Likelihood
from scvi_sams.module._perturbation_module import (
    CellBatch,
    GlobalDraw,
    PerturbationModule,
    TrainingStatistics,
    draw_particles,
)
from scvi_sams.module._rotation import sparsest_rotation
from scvi_sams.module._sams_vae import SAMSVAEModule
from scvi_sams.module._slots import perturbations_of_batch, positions_in, sum_over_slots

__all__ = [
    "CellBatch",
    "GlobalDraw",
    "Likelihood",
    "PerturbationModule",
    "SAMSVAEModule",
    "TrainingStatistics",
    "draw_particles",
    "perturbations_of_batch",
    "positions_in",
    "sparsest_rotation",
    "sum_over_slots",
]
