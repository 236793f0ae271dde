"""The probabilistic models, in the symbols of the paper."""

from scvi_sams.module._comparators import ConditionalVAEModule, CPAVAEModule, SVAEPlusModule
from scvi_sams.module._curvature import LatentSurvey
from scvi_sams.module._latent_shift import LatentShiftModule
from scvi_sams.module._likelihoods import LIKELIHOODS, Likelihood
from scvi_sams.module._masks import MASK_PRIORS, MaskPrior
from scvi_sams.module._minibatch import (
    CellBatch,
    perturbations_of_batch,
    positions_in,
    sum_of_rows,
    sum_over_slots,
)
from scvi_sams.module._networks import draw_particles
from scvi_sams.module._perturbation_module import (
    GlobalDraw,
    PerturbationModule,
)
from scvi_sams.module._rotation import sparsest_rotation
from scvi_sams.module._sams_vae import SAMSVAEModule
from scvi_sams.module._training_statistics import TrainingStatistics

__all__ = [
    "LIKELIHOODS",
    "MASK_PRIORS",
    "CPAVAEModule",
    "CellBatch",
    "ConditionalVAEModule",
    "GlobalDraw",
    "LatentShiftModule",
    "LatentSurvey",
    "Likelihood",
    "MaskPrior",
    "PerturbationModule",
    "SAMSVAEModule",
    "SVAEPlusModule",
    "TrainingStatistics",
    "draw_particles",
    "perturbations_of_batch",
    "positions_in",
    "sparsest_rotation",
    "sum_of_rows",
    "sum_over_slots",
]
