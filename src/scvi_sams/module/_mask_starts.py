"""Initial masks at the end of the dense phase, from estimates of effects on sparse axes.

The log-odds of an entry compare, for an estimate ``e`` of its effect, the densities of
Normal(mu, v + beta^2) (on) and Normal(0, v) (off). Its variance ``v`` is that of its posterior,
plus 1 / ``evidence_cells``, plus that due to errors of the axes (:func:`variance_of_axes`). Without
features of perturbations ``mu`` is 0, and::

    logit = log(alpha / (1 - alpha)) + (e^2 / v) / (2 + 2 v / beta^2) - log(1 + beta^2 / v) / 2
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Normal

from scvi_sams.module._axis_errors import variance_of_axes
from scvi_sams.module._context_masks import Estimates, by_perturbation, fit_masks, of_rows
from scvi_sams.module._rotation import resampled_rotations

MAX_INITIAL_LOGIT = 4.6
"""Initial mask probabilities are limited to 0.01 to 0.99; training hardly changes those at the
limits. With 0.05 to 0.95 (3.0) clear entries ended near 0.96: nothing was called at a false
discovery rate below 0.04, intervals of the strongest effects included zero, and the calibration
error was 0.02."""

_LEAST_FROM_CELLS = 0.02
_UNKNOWN = 1e6
"""Variance of unknown effects where it must be finite."""


def starting_log_odds(
    effects: Tensor,
    variance: Tensor,
    prior_log_odds: Tensor | float,
    prior_mean: Tensor | float,
    prior_variance: Tensor | float,
) -> Tensor:
    """Initial log-odds of masks from estimates and their variances, ``(T, L)``."""
    on = variance + prior_variance
    fit = effects.square() / variance - (effects - prior_mean).square() / on
    logits = prior_log_odds + 0.5 * (fit - torch.log(on / variance))
    return logits.clamp(-MAX_INITIAL_LOGIT, MAX_INITIAL_LOGIT)


def shrunken_totals(shared: Tensor, own: Normal, place: Tensor, prior_scale: float) -> Tensor:
    """Effects in contexts, ``(R, L)``, with context-specific parts shrunken by their noise.

    They are multiplied by the proportion of their sum of squares that is not error (James & Stein
    1961): with few cells per pair, noise would otherwise blur the axes.
    cells of each pair would otherwise blur the axes that all of them show.
    """
    from_cells = _share_from_cells(own, prior_scale)
    noise = (own.variance / from_cells).sum(dim=1, keepdim=True)
    squares = (own.loc / from_cells).square().sum(dim=1, keepdim=True)
    return shared[place] + (1 - noise / squares).clamp(min=0) * own.loc


def _share_from_cells(own: Normal, prior_scale: float) -> Tensor:
    """Proportion of the information on specific effects that comes from cells, not the prior."""
    return (1 - own.variance / prior_scale**2).clamp(min=_LEAST_FROM_CELLS)


class ContextStart(NamedTuple):
    """Initial masks in contexts; T' perturbations have cells, in R pairs with a context."""

    shared: Tensor
    """Log-odds of shared masks, ``(T', L)``."""
    own: Tensor
    """Log-odds of context-specific masks, ``(R, L)``."""
    own_effects: Tensor
    """Means of context-specific effects, ``(R, L)``: the sum of both parts is unchanged."""
    probabilities: tuple[float, float]
    """``rho`` and ``pi`` of context-specific masks."""
    effects: Tensor
    """Estimates of shared effects, ``(T', L)``; the next field is their variance."""
    variance: Tensor


def starts_in_contexts(
    shared: Tensor,
    own: Normal,
    place: Tensor,
    has_cells: Tensor,
    coarsened: Tensor | float,
    probability: float,
    prior_scale: float,
) -> ContextStart:
    """Masks and effects of both parts, from estimates of their sums in each context.

    ``shared``, ``(T', L)``, and ``own``, of batch shape ``(R, L)``, are posteriors with all masks
    on, ``place`` the perturbation of each pair, ascending. See
    :mod:`~scvi_sams.module._context_masks`.
    """
    from_cells = _share_from_cells(own, prior_scale)
    sums = shared[place] + own.loc / from_cells
    variance = torch.where(has_cells[:, None], own.variance / from_cells, torch.inf)
    weights = by_perturbation(1 / variance, place, 0.0)
    precision = weights.sum(dim=1).clamp(min=prior_scale**-2)
    mean = (weights * by_perturbation(sums, place, 0.0)).sum(dim=1) / precision
    resampled = list(resampled_rotations(shared[place] + own.loc, place))
    common = variance_of_axes(mean, 1 / precision + coarsened, prior_scale, resampled=resampled)
    known = variance.clamp(max=_UNKNOWN)
    variance = variance + variance_of_axes(own.loc, known, prior_scale, resampled=resampled)
    estimates = Estimates(
        by_perturbation(sums, place, 0.0),
        by_perturbation(variance, place, torch.inf),
        common + coarsened,
    )
    found, probabilities = fit_masks(estimates, probability, prior_scale)
    bounds = (-MAX_INITIAL_LOGIT, MAX_INITIAL_LOGIT)
    shared_on = found.shared.to(shared)
    return ContextStart(
        torch.logit(found.shared).clamp(*bounds).to(shared),
        torch.logit(of_rows(found.own, place)).clamp(*bounds).to(shared),
        shared[place] * (1 - shared_on[place]) + own.loc,
        probabilities,
        mean,
        1 / precision + common + coarsened,
    )
