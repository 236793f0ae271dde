"""Initial masks of shared and context-specific effects, from estimates of their sums.

Training with all masks on gives, for each pair of a perturbation and a context, the sum of both
parts. For each perturbation and latent dimension, with x the shared effect, estimates ``y_c`` with
variances ``v_c`` and ``a`` the variance of errors that all contexts have in common::

    x   ~ (1 - alpha) Normal(0, a)   + alpha Normal(0, a + beta^2)
    y_c ~ (1 - pi_c)  Normal(x, v_c) + pi_c  Normal(x, v_c + beta^2)

Given x the contexts are independent, so sums over a grid of x give posterior probabilities of all
masks for any number of contexts: an effect in one of many contexts is context-specific; an effect
in all but one is shared, and cancelled in that one. ``pi_c`` is ``pi`` for a pair of a perturbation
and a context with specific effects, a proportion ``rho`` of all pairs, and otherwise nearly 0. The
probability of each pair follows from its other latent dimensions (belief propagation). ``rho`` and
``pi`` are estimated by expectation-maximisation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from scvi_sams.module._masks import NEVER

_N_GRID = 161
_MARGIN = 4.0
"""The grid extends this number of SD beyond the outermost estimates."""
_VALUES_AT_ONCE = 2**23
_MOST_FOR_PRIOR = 300
"""Perturbations from which ``rho`` and ``pi`` are estimated: tens of thousands of entries."""
_N_STEPS, _N_LAST_STEPS = 20, 4
_WEIGHT_OF_PRIOR = 20.0
"""Weight, in entries, of the prior mean of ``pi``, which is that of masks in general."""
_LEAST, _MOST = 1e-6, 0.5


class Estimates(NamedTuple):
    """Effects of T perturbations in up to C contexts each, on L latent dimensions."""

    mean: Tensor
    """``(T, C, L)``."""
    variance: Tensor
    """``(T, C, L)``; infinite where there is no such context."""
    common: Tensor
    """Variance of errors that all contexts of a perturbation have in common, ``(T, L)``."""

    def some(self, rows: slice) -> Estimates:
        """Estimates of some perturbations."""
        return Estimates(*(values[rows] for values in self))


class MaskProbabilities(NamedTuple):
    """Posterior probabilities."""

    shared: Tensor
    """``(T, L)``."""
    own: Tensor
    """``(T, C, L)``."""


class OwnPrior(NamedTuple):
    """Frequency of context-specific effects."""

    rows: float
    """``rho``."""
    entries: float
    """``pi``."""


def fit_masks(
    estimates: Estimates, probability: float, scale: float
) -> tuple[MaskProbabilities, OwnPrior]:
    """Posterior probabilities of masks; ``probability`` is ``alpha``, ``scale`` is ``beta``.

    ``rho`` and ``pi`` are estimated together with the probabilities of each row, from a subset of
    the perturbations if there are many.
    """
    step = -(-len(estimates.mean) // _MOST_FOR_PRIOR)
    prior = OwnPrior(0.5, probability)
    for some, n_steps in ((slice(None, None, step), _N_STEPS), (slice(None), _N_LAST_STEPS)):
        part = estimates.some(some)
        exists = part.variance.isfinite()
        evidence = torch.zeros_like(part.mean, dtype=torch.float64)
        for _ in range(n_steps):
            chance = _chance_of_rows(evidence, exists, prior)
            share = chance * prior.entries + (1 - chance) * NEVER
            found = mask_probabilities(part, probability, share, scale)
            evidence = torch.logit(found.own, eps=_LEAST) - torch.logit(share)
            if some.step is not None:
                prior = _improved(prior, evidence, exists, probability)
    return found, prior


def _chance_of_rows(evidence: Tensor, exists: Tensor, prior: OwnPrior) -> Tensor:
    """Probability that a row has masks given the evidence for its other masks, ``(T, C, L)``."""
    told = torch.where(exists, _for_row(evidence, prior), 0.0)
    others = told.sum(dim=-1, keepdim=True) - told
    return torch.sigmoid(math.log(prior.rows) - math.log1p(-prior.rows) + others)


def _for_row(evidence: Tensor, prior: OwnPrior) -> Tensor:
    """Evidence of a mask with this log Bayes factor for its row having any masks."""
    with_masks, without = (
        torch.logaddexp(math.log(weight) + evidence, torch.full_like(evidence, math.log1p(-weight)))
        for weight in (prior.entries, NEVER)
    )
    return with_masks - without


def _improved(prior: OwnPrior, evidence: Tensor, exists: Tensor, probability: float) -> OwnPrior:
    """One step of expectation-maximisation for ``rho`` and ``pi``."""
    is_row = exists.any(dim=-1)
    told = torch.where(exists, _for_row(evidence, prior), 0.0).sum(dim=-1)
    chance = torch.sigmoid(math.log(prior.rows) - math.log1p(-prior.rows) + told)[is_row]
    on = torch.sigmoid(math.log(prior.entries) - math.log1p(-prior.entries) + evidence)[is_row]
    rows = (float(chance.sum()) + 1) / (len(chance) + 2)
    entries = (float((chance[:, None] * on).sum()) + _WEIGHT_OF_PRIOR * probability) / (
        float(chance.sum()) * on.shape[-1] + _WEIGHT_OF_PRIOR
    )
    return OwnPrior(rows, min(max(entries, _LEAST), _MOST))


def mask_probabilities(
    estimates: Estimates, probability: float, share: Tensor, scale: float
) -> MaskProbabilities:
    """Posterior probabilities of masks; ``share``, ``(T, C, L)``: prior of specific ones."""
    per_row = max(1, estimates.mean[0].numel() * _N_GRID)
    n_rows = max(1, _VALUES_AT_ONCE // per_row)
    parts = []
    for start in range(0, len(estimates.mean), n_rows):
        some = slice(start, start + n_rows)
        parts.append(_on_grid(estimates.some(some), probability, share[some], scale))
    return MaskProbabilities(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _on_grid(
    estimates: Estimates, probability: float, share: Tensor, scale: float
) -> MaskProbabilities:
    """Sums over a grid of shared effects, on the last axis."""
    mean, variance, common = (values.double()[..., None] for values in estimates)
    exists = variance.isfinite()
    variance = torch.where(exists, variance, 1.0)
    mean = torch.where(exists, mean, 0.0)
    margin = _MARGIN * (torch.where(exists, variance, 0.0).amax(dim=1) + common).sqrt()
    low, high = mean.amin(dim=1).clamp(max=0) - margin, mean.amax(dim=1).clamp(min=0) + margin
    places = torch.linspace(0, 1, _N_GRID, dtype=mean.dtype, device=mean.device)
    x = low + (high - low) * places
    # Peaks narrower than the grid spacing could fall between grid points.
    resolved = ((high - low) / (_N_GRID - 1)).square()
    common = common.maximum(resolved)
    variance = variance.maximum(resolved[:, None])
    on = math.log(probability) + _log_normal(x, common + scale**2)
    off = math.log1p(-probability) + _log_normal(x, common)
    apart = mean - x[:, None]
    own = share.log()[..., None] + _log_normal(apart, variance + scale**2)
    same = torch.log1p(-share)[..., None] + _log_normal(apart, variance)
    of_contexts = torch.where(exists, torch.logaddexp(own, same), 0.0)
    weights = torch.softmax(torch.logaddexp(on, off) + of_contexts.sum(dim=1), dim=-1)
    of_own = torch.sigmoid(own - same)
    return MaskProbabilities(
        (weights * torch.sigmoid(on - off)).sum(dim=-1),
        torch.where(exists[..., 0], (weights[:, None] * of_own).sum(dim=-1), 0.0),
    )


def _log_normal(x: Tensor, variance: Tensor) -> Tensor:
    return -0.5 * (variance.log() + x.square() / variance)


def by_perturbation(values: Tensor, perturbations: Tensor, missing: float) -> Tensor:
    """Reshape rows ``(R, L)``, grouped by perturbation, to ``(T, C, L)``, padded by ``missing``.

    ``perturbations``, ``(R,)``, ascending, are the codes 0 to T - 1.
    """
    counts, place = _places(perturbations)
    table = values.new_full((len(counts), int(counts.max()), values.shape[1]), missing)
    table[perturbations, place] = values
    return table


def of_rows(table: Tensor, perturbations: Tensor) -> Tensor:
    """Inverse of :func:`by_perturbation`."""
    return table[perturbations, _places(perturbations)[1]]


def _places(perturbations: Tensor) -> tuple[Tensor, Tensor]:
    counts = torch.bincount(perturbations)
    first = counts.cumsum(0) - counts
    return counts, torch.arange(len(perturbations), device=counts.device) - first[perturbations]
