"""Derivatives of expected expression with respect to the latent state, summed over cells."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from scvi_sams.model._cells import CellReader, EncodedCells
from scvi_sams.model._contrast import EffectScale, expected_expression
from scvi_sams.module._likelihoods import Likelihood
from scvi_sams.module._perturbation_module import PerturbationModule

_DIRECTIONS_AT_ONCE = 4
"""Latent dimensions at a time in forward mode, each with an array of cells x genes."""


def summed_slopes(cells: CellReader, method: EffectScale, target_sum: float) -> Tensor:
    """Sum over cells of the derivatives, ``(n_latent, n_genes)``.

    Derivatives of the last hidden layer are computed in forward mode, because there are fewer
    latent dimensions than hidden units. From there on each gene has a weight in every cell, and
    cells are summed before genes are reached: no array of cells x genes is made for each latent
    dimension. A likelihood without these weights is differentiated as a whole, which takes four to
    ten times as long.
    """
    module = cells.module
    shifts = module.shift_moments(cells.effects)[0][None]
    slopes_of = _contracted if module.likelihood.has_rate_slope else _in_forward_mode
    # In double precision, so that the order of cells does not matter.
    total = torch.zeros(
        module.n_latent, cells.adata.n_vars, dtype=torch.float64, device=module.device
    )
    for read in cells.encoded(shifts):
        total += slopes_of(module, read, method, target_sum)
    return total


def _contracted(
    module: PerturbationModule, read: EncodedCells, method: EffectScale, target_sum: float
) -> Tensor:
    covariates, to_genes = read.cells.covariates, module.decoder.to_genes
    logits = module.decode(read.qz.loc, read.shift, covariates, read.direct).flatten(0, 1)
    slope, share = module.likelihood.rate_slope(logits)
    weights = slope * _slope_of_scale(module.likelihood, logits, method, target_sum)

    def hidden(z: Tensor) -> Tensor:
        return module.decode_hidden(z, read.shift, covariates)

    def along(direction: Tensor) -> Tensor:
        z = read.qz.loc
        return torch.func.jvp(hidden, (z,), (direction.expand_as(z),))[1].flatten(0, 1)

    axes = torch.eye(module.n_latent, device=module.device)
    changes = torch.vmap(along)(axes)
    of_genes = torch.stack([(to_genes.weight * (weights.T @ some)).sum(dim=1) for some in changes])
    if share is None:
        return of_genes
    # Derivative of the sum by which rates are divided.
    return of_genes - (changes * (share @ to_genes.weight)).sum(dim=-1) @ weights


def _slope_of_scale(
    likelihood: Likelihood, logits: Tensor, method: EffectScale, target_sum: float
) -> Tensor:
    """Derivative of ``expected_expression`` with respect to the rate."""
    if not likelihood.is_count_likelihood:
        return torch.ones_like(logits)
    if method == "mean":
        return torch.full_like(logits, target_sum)
    return target_sum / (math.log(2) * (1 + target_sum * likelihood.rate(logits)))


def _in_forward_mode(
    module: PerturbationModule, read: EncodedCells, method: EffectScale, target_sum: float
) -> Tensor:
    covariates = read.cells.covariates

    def expression(z: Tensor) -> Tensor:
        logits = module.decode(z, read.shift, covariates, read.direct)
        return expected_expression(module.likelihood, logits, method, target_sum)

    def along(z: Tensor, direction: Tensor) -> Tensor:
        slope = torch.func.jvp(expression, (z,), (direction.expand_as(z),))[1]
        return slope.sum(dim=(0, 1))

    axes = torch.eye(module.n_latent, device=module.device)
    found = torch.vmap(partial(along, read.qz.loc), chunk_size=_DIRECTIONS_AT_ONCE)(axes)
    return found
