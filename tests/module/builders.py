"""Tiny modules and mini-batches for the tests of modules and objective."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.module import (
    ConditionalVAEModule,
    CPAVAEModule,
    PerturbationModule,
    SAMSVAEModule,
    SVAEPlusModule,
)

# With and without a size factor.
LIKELIHOODS = [
    ("nb", False),
    ("nb", True),
    ("poisson", False),
    ("poisson", True),
    ("normal", False),
]
VARIANTS = [(False, False), (True, False), (False, True), (True, True)]
"""``correlated_basal``, ``correlated_effects``: the rows of the paper's table."""

N_GENES = 5
CELLS_PER_PERTURBATION = [13.0, 7.0, 4.0, 2.0, 0.0]
"""N_t of the tiny screen; the last perturbation has no training cells."""
CODES = [[-1, -1, -1], [0, -1, -1], [1, -1, -1], [0, 2, -1], [1, 2, 3], [4, -1, -1], [-1, -1, -1]]
DOSES = [[0, 0, 0], [1, 0, 0], [0.5, 0, 0], [1, 2, 0], [0.5, 1.5, 3], [1, 0, 0], [0, 0, 0]]
"""Control cells, single perturbations and combinations of two and three, with doses."""

_SHARED: dict[str, Any] = {
    "n_genes": N_GENES,
    "n_perturbations": len(CELLS_PER_PERTURBATION),
    "n_latent": 3,
    "n_hidden": 6,
    "n_layers": 1,
    "n_batch": 1,
    "n_categories": [],
    "n_continuous": 0,
    "gene_likelihood": "nb",
    "uses_size_factor": False,
    "n_particles": 3,
    "kl_estimator": "closed_form",
}
_GLOBALS: dict[str, Any] = {"global_kl_weight": 1.0, "evidence_cells": None}
_EFFECTS: dict[str, Any] = {"correlated_basal": True, "effect_prior_scale": 1.7}
_MASKS: dict[str, Any] = {"mask_initial_probability": 0.5, "mask_temperature": 1.0}
_SETTINGS: dict[type[PerturbationModule], dict[str, Any]] = {
    SAMSVAEModule: _SHARED
    | _GLOBALS
    | _EFFECTS
    | _MASKS
    | {
        "correlated_effects": True,
        "mask_prior_probability": 0.2,
        "mask_prior_concentration": None,
        "effect_n_hidden": 4,
        "effect_n_layers": 2,
    },
    CPAVAEModule: _SHARED | _GLOBALS | _EFFECTS,
    SVAEPlusModule: _SHARED | _GLOBALS | _MASKS | {"mask_prior_beta": 4.0},
    ConditionalVAEModule: _SHARED,
}


def make_module(
    module_cls: type[PerturbationModule] = SAMSVAEModule, *, seed: int | None = 0, **changes: Any
) -> Any:
    """Build a module whose every parameter and statistic is a random number.

    Parameters
    ----------
    module_cls
        Which model.
    seed
        Of the values; ``None`` leaves parameters and statistics as the module starts them.
    **changes
        Arguments of the module that differ from those of the tiny screen.
    """
    settings = _SETTINGS[module_cls] | changes
    torch.manual_seed(0)
    module = module_cls(**settings)
    if seed is None:
        return module
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for _, parameter in sorted(module.named_parameters()):
            parameter.copy_(torch.as_tensor(rng.normal(scale=0.5, size=parameter.shape)))
        module.input_mean.copy_(torch.as_tensor(rng.normal(size=settings["n_genes"])))
        module.input_sd.copy_(torch.as_tensor(rng.uniform(0.5, 2, size=settings["n_genes"])))
        if settings["n_perturbations"] == len(CELLS_PER_PERTURBATION):
            module.cells_per_perturbation.copy_(torch.tensor(CELLS_PER_PERTURBATION))
    return module


def make_tensors(
    *,
    codes: Any = CODES,
    doses: Any = DOSES,
    n_genes: int = N_GENES,
    counts: bool = True,
    size_factor: bool = False,
    covariates: bool = False,
    contexts: Any = None,
    seed: int = 1,
) -> dict[str, torch.Tensor]:
    """Build a mini-batch as a data loader yields it; a cell's values depend on its row alone."""
    rng = np.random.default_rng(seed)
    n_cells = len(codes)
    shape = (n_cells, n_genes)
    x = rng.negative_binomial(1, 0.1, size=shape) if counts else rng.normal(1, 2, size=shape)
    if counts:
        x[:, 0] += 1  # no cell without counts
    packed = np.concatenate([np.asarray(codes), np.asarray(doses)], axis=1)
    tensors = {
        REGISTRY_KEYS.X: x,
        REGISTRY_KEYS.PERTURBATIONS: packed,
        REGISTRY_KEYS.BATCH: np.zeros((n_cells, 1)),
    }
    if size_factor:
        tensors[REGISTRY_KEYS.SIZE_FACTOR] = rng.uniform(0.3, 3, size=(n_cells, 1))
    if covariates:
        tensors[REGISTRY_KEYS.BATCH] = rng.integers(0, 2, size=(n_cells, 1))
        tensors[REGISTRY_KEYS.CATEGORICAL_COVARIATES] = rng.integers(0, 3, size=(n_cells, 1))
        tensors[REGISTRY_KEYS.CONTINUOUS_COVARIATES] = rng.normal(size=(n_cells, 1))
    if contexts is not None:
        tensors[REGISTRY_KEYS.CONTEXTS] = np.asarray(contexts)[:, None]
    return {key: torch.as_tensor(value, dtype=torch.float32) for key, value in tensors.items()}


COVARIATE_SIZES: dict[str, Any] = {"n_batch": 2, "n_categories": [3], "n_continuous": 1}
"""Arguments of a module for batches made with ``covariates=True``."""


def take_cells(tensors: dict[str, torch.Tensor], cells: Any) -> dict[str, torch.Tensor]:
    """Select cells of a mini-batch."""
    return {key: value[cells] for key, value in tensors.items()}


def score(module: PerturbationModule, tensors: dict[str, torch.Tensor], **loss_kwargs: Any) -> Any:
    """Inference, generation and loss of a mini-batch."""
    return module(tensors, loss_kwargs=loss_kwargs)[2]


def all_of(fill):
    """Random numbers that are all the same: ``torch.zeros`` or ``torch.ones``, as a generator."""

    def drawn(*size, generator=None, **kwargs):
        return fill(*size, **kwargs)

    return drawn
