"""Latent dimensions that are no mechanisms, but bends of the others.

A decoder that has not learned how expression bends along its latent dimensions lets the encoder
describe the bend with a further dimension: on simulated screens one that holds, in effect, the
length of the latent state. Every strong perturbation moves it, as a consequence of what it moves
besides. As basal states are independent a priori, such a dimension gives itself away: the squares
of the other dimensions predict it.
"""

from __future__ import annotations

import torch
from torch import Tensor

_RIDGE = 1e-3
"""Penalty relative to the number of cells: columns are standardised, and may be collinear."""


def curvature(basal: Tensor, shift: Tensor, groups: Tensor) -> Tensor:
    """Share of each basal dimension that the squares of the other dimensions predict.

    Ridge regressions on one half of the cells, scored on the other: first on the states of the
    other dimensions, then also on their squares. The answer is the share of what the first leaves
    unexplained that the second explains. Everything is centred within groups of cells with the same
    perturbations, so that what perturbations have in common does not count, and a bend is seen
    where the perturbation has put the cells.

    Parameters
    ----------
    basal
        Posterior means of basal states, ``(n_cells, n_latent)``.
    shift
        What the perturbations of the cells add, ``(n_cells, n_latent)``.
    groups
        Number of the group of every cell, ``(n_cells,)``, integers from 0.

    Returns
    -------
    Shape ``(n_latent,)``, at most 1; about 0, or below, where there is nothing to predict.
    """
    n_cells, n_latent = basal.shape
    state = (basal + shift).double()
    target = _centred(basal.double(), groups)
    predictors = _standardised(_centred(torch.cat([state, state.square()], dim=1), groups))
    first, second = _halves(n_cells)
    gram = predictors[first].T @ predictors[first]
    gram = gram + _RIDGE * len(first) * torch.eye(2 * n_latent, dtype=gram.dtype)
    moments = predictors[first].T @ target[first]

    def unexplained(latent: int, columns: Tensor) -> Tensor:
        weights = torch.linalg.solve(gram[columns][:, columns], moments[columns, latent])
        residual = target[second, latent] - predictors[second][:, columns] @ weights
        return residual.square().mean()

    shares = []
    for latent in range(n_latent):
        others = torch.arange(n_latent)[torch.arange(n_latent) != latent]
        linear = unexplained(latent, others)
        bent = unexplained(latent, torch.cat([others, others + n_latent]))
        shares.append((linear - bent) / linear.clamp(min=1e-12))
    return torch.stack(shares).to(basal.dtype)


def _centred(values: Tensor, groups: Tensor) -> Tensor:
    n_groups = int(groups.max()) + 1
    sums = values.new_zeros(n_groups, values.shape[1]).index_add_(0, groups, values)
    counts = torch.bincount(groups, minlength=n_groups).clamp(min=1)
    return values - (sums / counts[:, None])[groups]


def _standardised(values: Tensor) -> Tensor:
    return values / values.square().mean(dim=0).sqrt().clamp(min=1e-9)


def _halves(n_cells: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(n_cells, generator=torch.Generator().manual_seed(0))
    return order[: n_cells // 2], order[n_cells // 2 :]
