"""Curved and redundant latent dimensions: those that are no mechanisms, but follow from the others.

A decoder that has not learned how expression curves along its latent dimensions lets the encoder
describe the curve with a further dimension: on simulated screens one that holds, in effect, the
length of the latent state. Every strong perturbation moves it, as a consequence of what it moves
besides. As basal states are independent a priori, such a dimension gives itself away: the squares
of the other dimensions predict it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_RIDGE = 1e-3
"""Penalty relative to the number of cells: columns are standardised, and may be collinear."""

_NATS_OF_A_CURVED = 0.5
"""The states of a dimension that tells less are noise, whatever predicts them."""

_FOLLOWING_OF_A_CURVED = 0.6
"""On simulated screens mechanisms had at most .45, curved ones of little curvature at least .75."""

_PERTURBATIONS_TO_FOLLOW = 20
"""With fewer, effects on a dimension are as large as those on the others by chance."""


class LatentSurvey(NamedTuple):
    """What each latent dimension is good for."""

    curvature: Tensor
    """Share that the squares of the other dimensions predict, ``(n_latent,)``."""
    variance: Tensor
    """Of the posterior of basal states, mean over cells, ``(n_latent,)``; a priori 1."""
    following: Tensor
    """Correlation, over perturbations, of the effect on a dimension with the length of the effect
    on all others, ``(n_latent,)``."""

    @property
    def information(self) -> Tensor:
        """Nats by which a dimension tells cells apart: ``-log(variance) / 2``, at least 0."""
        return -self.variance.clamp(max=1).log() / 2

    def curved(self, max_curvature: float) -> Tensor:
        """Dimensions of a larger curvature, as far as they tell cells apart at all.

        Half the curvature is enough where effects on a dimension follow those on the others:
        perturbations then move it as far as they move the rest.
        """
        follows = self.following.abs() > _FOLLOWING_OF_A_CURVED
        is_curved = self.curvature > torch.where(follows, max_curvature / 2, max_curvature)
        return is_curved & (self.information > _NATS_OF_A_CURVED)

    def redundant(self, curved: Tensor) -> Tensor:
        """Dimensions that could take the place of curved ones: they tell less than one of these.

        Where curved ones were switched off alone, one that told half as much had replaced them by
        the end of training. Without these as well the decoder learns the curve.
        """
        if not curved.any():
            return curved
        return ~curved & (self.information < self.information[curved].max())

    def can_spare(self, is_off: Tensor) -> bool:
        """Whether the other dimensions tell at least half of what all tell.

        Curved dimensions come after the mechanisms. Where they seem to come before most of these,
        as in screens of a thousand cells or of a handful of perturbations, they are mechanisms
        themselves.
        """
        return bool(self.information[is_off].sum() <= self.information.sum() / 2)


def curvature(basal: Tensor, shift: Tensor, groups: Tensor) -> Tensor:
    """Share of each basal dimension that the squares of the other dimensions predict.

    Ridge regressions on one half of the cells, scored on the other: first on the states of the
    other dimensions, then also on their squares. The answer is the share of what the first leaves
    unexplained that the second explains. Everything is centred within groups of cells with the same
    perturbations, so that what perturbations have in common does not count, and a curve is seen
    where the perturbation has put the cells.

    Given are posterior means of basal states and what perturbations add, ``(n_cells, n_latent)``,
    and the number of the group of every cell, ``(n_cells,)``. The shares, ``(n_latent,)``, are at
    most 1; about 0, or below, where there is nothing to predict.
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

    Its own are column ``l`` and, where there are squares, ``l + L``. One inverse serves all: with
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
    """Correlation of the effect on a dimension with the length of the effect on all others.

    Mean effects ``(n_perturbations, n_latent)`` give ``(n_latent,)``, between -1 and 1; 0 where
    something does not vary, or where there are fewer than 20 perturbations.
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
