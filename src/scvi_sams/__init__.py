"""Sparse additive mechanism shift variational autoencoders for perturbation screens."""

from scvi_sams import data, datasets, evaluation
from scvi_sams import interpretation as tl
from scvi_sams import plotting as pl
from scvi_sams._versions import __version__
from scvi_sams.model._conditional_vae import ConditionalVAE
from scvi_sams.model._cpa_vae import CPAVAE
from scvi_sams.model._sams_vae import SAMSVAE
from scvi_sams.model._svae_plus import SVAEPlus

__all__ = [
    "CPAVAE",
    "SAMSVAE",
    "ConditionalVAE",
    "SVAEPlus",
    "__version__",
    "data",
    "datasets",
    "evaluation",
    "pl",
    "tl",
]
