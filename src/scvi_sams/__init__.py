"""Sparse additive mechanism shift variational autoencoders for perturbation screens."""

from scvi_sams import data, datasets, evaluation
from scvi_sams import interpretation as tl
from scvi_sams import plotting as pl
from scvi_sams.model import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus

__version__ = "0.1.0"

__all__ = [
    "CPAVAE",
    "SAMSVAE",
    "ConditionalVAE",
    "SVAEPlus",
    "data",
    "datasets",
    "evaluation",
    "pl",
    "tl",
]
