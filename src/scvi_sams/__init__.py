"""Sparse additive mechanism shift variational autoencoders for perturbation screens."""

from scvi_sams import data, datasets, evaluation, features
from scvi_sams import interpretation as tl
from scvi_sams import plotting as pl
from scvi_sams._versions import __version__
from scvi_sams.model._comparators import CPAVAE, ConditionalVAE, SVAEPlus
from scvi_sams.model._paper import paper_settings
from scvi_sams.model._sams_vae import SAMSVAE

__all__ = [
    "CPAVAE",
    "SAMSVAE",
    "ConditionalVAE",
    "SVAEPlus",
    "__version__",
    "data",
    "datasets",
    "evaluation",
    "features",
    "paper_settings",
    "pl",
    "tl",
]
