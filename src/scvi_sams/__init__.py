"""Sparse additive mechanism shift variational autoencoders for perturbation screens."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from scvi_sams import data
from scvi_sams._versions import __version__
from scvi_sams.model._comparators import CPAVAE, ConditionalVAE, SVAEPlus
from scvi_sams.model._paper import paper_settings
from scvi_sams.model._sams_vae import SAMSVAE

if TYPE_CHECKING:
    from scvi_sams import datasets, evaluation, features
    from scvi_sams import interpretation as tl
    from scvi_sams import plotting as pl

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

_NAMESPACES = {
    "datasets": "datasets",
    "evaluation": "evaluation",
    "features": "features",
    "pl": "plotting",
    "tl": "interpretation",
}
"""Namespaces that are imported on first use: models do not need them, and together they take longer
to import than models do."""


def __getattr__(name: str) -> ModuleType:
    if name not in _NAMESPACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = globals()[name] = import_module(f"{__name__}.{_NAMESPACES[name]}")
    return module


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMESPACES})
