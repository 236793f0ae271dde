"""Curved and redundant latent dimensions: not mechanisms, but functions of other dimensions.

A decoder that has not learned the curvature of expression along its latent dimensions lets the
encoder describe it with a further dimension: on simulated screens one that encodes the norm of the
latent state. Every strong perturbation shifts it, as a consequence of its other shifts. Because
basal states are independent a priori, such a dimension can be detected: the squares of the other
dimensions predict it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_RIDGE = 1e-3
"""Ridge penalty per cell: columns are standardised, and may be collinear."""

_NATS_OF_A_CURVED = 0.5
"""Information below which the states of a dimension are noise, whatever predicts them."""

_FOLLOWING_OF_A_CURVED = 0.6
"""On simulated screens mechanisms had at most 0.45, slightly curved dimensions at least 0.75."""

_PERTURBATIONS_TO_FOLLOW = 20
"""With fewer perturbations, effects on a dimension follow those on the others by chance."""


class LatentSurvey(NamedTuple):
    """Curvature and information of each latent dimension."""

    curvature: Tensor
    """Proportion that the squares of the other dimensions predict, ``(n_latent,)``."""
    variance: Tensor
    """Variance of the posterior of basal states, mean over cells, ``(n_latent,)``; prior: 1."""
    following: Tensor
    """Correlation, over perturbations, of the effect on a dimension with the norm of the effect on
    all others, ``(n_latent,)``."""

    @property
    def information(self) -> Tensor:
        """Information of a cell on each dimension in nats: ``-log(variance) / 2``, at least 0."""
        return -self.variance.clamp(max=1).log() / 2

    def curved(self, max_curvature: float) -> Tensor:
        """Dimensions above this curvature, if cells contain information on them.

        Half the curvature is sufficient if effects on a dimension follow the norm of effects on the
        others.
        """
        follows = self.following.abs() > _FOLLOWING_OF_A_CURVED
        is_curved = self.curvature > torch.where(follows, max_curvature / 2, max_curvature)
        return is_curved & (self.information > _NATS_OF_A_CURVED)

    def redundant(self, curved: Tensor) -> Tensor:
        """Dimensions that could replace curved ones, with less information than one of these.

        If only curved dimensions were switched off, one with half as much information replaced them
        by the end of training. Without these as well the decoder learns the curvature.
        """
        if not curved.any():
            return curved
        return ~curved & (self.information < self.information[curved].max())

    def can_spare(self, is_off: Tensor) -> bool:
        """Whether the other dimensions have at least half of the total information.

        Curved dimensions normally have less information than mechanisms. If they seem to have more
        than most, as in screens of a thousand cells or a few perturbations, they are mechanisms
        themselves.
        """
        return bool(self.information[is_off].sum() <= self.information.sum() / 2)


def curvature(basal: Tensor, shift: Tensor, groups: Tensor) -> Tensor:
    """Proportion of each basal dimension that the squares of the other dimensions predict.

    Ridge regressions are fitted to one half of the cells and scored on the other: first on the
    states of the other dimensions, then also on their squares. The result is the proportion of the
    residual variance of the first that the second explains. Everything is centred within groups of
    cells with the same perturbations, so that shared effects do not count, and curvature is
    measured at the states of perturbed cells.

    Arguments are posterior means of basal states and shifts, ``(n_cells, n_latent)``, and the
    group of every cell, ``(n_cells,)``. Proportions, ``(n_latent,)``, are at most 1; about 0, or
    negative, if there is nothing to predict.
    """
    n_cells, n_latent = basal.shape
    state = (basal + shift).double()
    target = _centred(basal.double(), groups)
    predictors = _centred(torch.cat([state, state.square()], dim=1), groups)
    predictors = predictors / predictors.square().mean(dim=0).sqrt().clamp(min=1e-9)
    order = torch.randperm(n_cells, generator=torch.Generator().manual_seed(0))
    first, second = order[: n_cells // 2], order[n_cells // 2 :]
    gram = predictors[first].T @ predictors[first]
    gram = gram + _RIDGE * len(first) * torch.eye(2 * n_latent, dtype=gram.dtype)
    moments = predictors[first].T @ target[first]

    n_second = len(second)
    held_out, observed = predictors[second], target[second]

    def unexplained(n_columns: int) -> Tensor:
        weights = _without_own(gram[:n_columns, :n_columns], moments[:n_columns])
        return (observed - held_out[:, :n_columns] @ weights).square().sum(dim=0) / n_second

    linear, curved = unexplained(n_latent), unexplained(2 * n_latent)
    return ((linear - curved) / linear.clamp(min=1e-12)).to(basal.dtype)


def _without_own(gram: Tensor, moments: Tensor) -> Tensor:
    """Ridge weights of every dimension on the columns that are not its own, ``(n_columns, L)``.

    Its own are column ``l`` and, with squares, ``l + L``. One inverse is sufficient for all: with
    ``P`` that of ``gram`` and ``u = P m``, ``m`` being 0 in own columns ``K``, the weights without
    these are ``u - P[:, K] P[K, K]^-1 u[K]``.
    """
    n_columns, n_latent = moments.shape
    own = torch.arange(n_columns, device=gram.device).view(-1, n_latent)
    each = torch.arange(n_latent, device=gram.device).expand_as(own)
    others = moments.clone()
    others[own, each] = 0
    inverse = torch.linalg.inv(gram)
    weights = inverse @ others
    of_own = inverse[own.T[:, :, None], own.T[:, None, :]]
    excess = torch.linalg.solve(of_own, weights[own, each].T)
    return weights - torch.einsum("ckl,lk->cl", inverse[:, own], excess)


def following(effects: Tensor) -> Tensor:
    """Correlation of the effect on a dimension with the norm of the effect on all others.

    Mean effects ``(n_perturbations, n_latent)`` give ``(n_latent,)``, between -1 and 1; 0 without
    variation, or with fewer than 20 perturbations.
    """
    if len(effects) < _PERTURBATIONS_TO_FOLLOW:
        return torch.zeros_like(effects[0])
    squares = effects.square()
    lengths = (squares.sum(dim=1, keepdim=True) - squares).clamp(min=0).sqrt()
    effects, lengths = effects - effects.mean(dim=0), lengths - lengths.mean(dim=0)
    covariance = (effects * lengths).sum(dim=0)
    scale = (effects.square().sum(dim=0) * lengths.square().sum(dim=0)).sqrt()
    return torch.where(scale > 0, covariance / scale, 0.0)


def _centred(values: Tensor, groups: Tensor) -> Tensor:
    n_groups = int(groups.max()) + 1
    sums = values.new_zeros(n_groups, values.shape[1]).index_add_(0, groups, values)
    counts = torch.bincount(groups, minlength=n_groups).clamp(min=1)
    return values - (sums / counts[:, None])[groups]
