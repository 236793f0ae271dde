"""Responses of cells to their perturbations, marginalised in the likelihood of every cell.

::

    b_i ~ Bernoulli(pi_i)                  1 where cell i responded
    z_i = z_basal_i + b_i * sum_t d_it s_t

The log-odds of ``pi_i`` are those of the cell's perturbations, or of its guides if they are
registered, averaged if a cell has several: it responds to all of them or to none. With ``B`` a
bound on the likelihood of a cell in each of the two branches, the bound for the cell is::

    log sum_b p(b) exp(B_b) = sum_b r_b (B_b + log p(b) - log r_b),    r_b = p(b) exp(B_b) / sum

so that ``r``, the posterior probability of a response, is exact given the two bounds.

Shapes: P particles, B cells, T perturbations, U units: perturbations, then guides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from scvi_sams.module._minibatch import CellBatch

N_BRANCHES = 2
"""With a response, and without."""

_NEVER = -1e30
"""Log-probability of a branch that a cell does not have: finite, so that 0 times it is 0."""

_CERTAIN = 1e-4
"""Limits of proportions, so that log-odds are finite."""

_INITIAL_LOG_ODDS, _SD_OF_MEAN = 1.4, 1.0
"""Prior for a whole screen: four of five cells respond; 0.37 to 0.96 in two of three screens."""
_SD_OF_PERTURBATIONS, _SD_OF_GUIDES = 1.0, 1.0
"""SD of log-odds of perturbations around those of the screen, and of guides around theirs."""


class Responses(nn.Module):
    """Probabilities that cells respond to perturbations, by perturbation and guide.

    ``acts`` are the perturbations with an effect to which cells can respond. Cells of the others
    have one branch, as control cells do: with two, any non-normality of basal states would be taken
    for an effect, the same for all of these perturbations.

    ``rates`` are the proportions of training cells of each perturbation that respond,
    ``information`` is the information of cells on the log-odds of each unit, and ``evidence`` the
    root mean square change of the log-odds of a cell by its expression, per perturbation. All are
    computed when training ends.

    Parameters
    ----------
    n_perturbations
        T.
    perturbation_of_guides
        Code of the perturbation of every guide; empty if no guides are registered.
    """

    def __init__(self, n_perturbations: int, perturbation_of_guides: Sequence[int] = ()) -> None:
        super().__init__()
        self.n_perturbations = n_perturbations
        self.mean = nn.Parameter(torch.tensor([_INITIAL_LOG_ODDS]))
        self.of_perturbations = nn.Parameter(torch.zeros(n_perturbations))
        self.of_guides = nn.Parameter(torch.zeros(len(perturbation_of_guides)))
        self.perturbation_of_guides: Tensor
        self.register_buffer(
            "perturbation_of_guides", torch.tensor(perturbation_of_guides, dtype=torch.int64)
        )
        self.n_cells: Tensor
        self.register_buffer("n_cells", torch.tensor(1.0))
        self.information: Tensor
        n_units = n_perturbations + len(perturbation_of_guides)
        self.register_buffer("information", torch.zeros(n_units))
        self.evidence: Tensor
        self.register_buffer("evidence", torch.zeros(n_perturbations))
        self.acts: Tensor
        self.register_buffer("acts", torch.ones(n_perturbations, dtype=torch.bool))
        self.rates: Tensor
        self.register_buffer("rates", torch.ones(n_perturbations))
        self.is_on: Tensor
        self.register_buffer("is_on", torch.tensor(False))
        self._is_on = False

    @property
    def has_begun(self) -> bool:
        """Whether cells may escape: ``is_on``, without reading it from the device."""
        return self._is_on

    def switch_on(self, on: bool) -> None:
        """Set whether cells may escape from now on."""
        self.is_on.fill_(on)
        self._is_on = on

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_on = bool(self.is_on)

    def log_odds(self) -> Tensor:
        """Log-odds of every unit, ``(U,)``."""
        perturbations = self.mean + self.of_perturbations
        guides = perturbations[self.perturbation_of_guides] + self.of_guides
        return torch.cat([perturbations, guides])

    def rates_of(self, codes: Tensor) -> Tensor:
        """Proportion of cells that respond to the perturbations ``codes``, ``(N, K)``; ``(N,)``.

        The log-odds of a combination are the mean over its perturbations that act; the proportion
        is 1 if none does. The proportion for an unmeasured perturbation is the mean of all
        others.
        """
        of_measured = torch.logit(self.rates, eps=_CERTAIN)
        log_odds = torch.cat([of_measured, self.mean.detach()])
        acts = torch.cat([self.acts, torch.ones_like(self.acts[:1])])
        places = codes.clamp(0, self.n_perturbations)
        counts, log_odds = (codes >= 0) & acts[places], log_odds[places]
        total = torch.where(counts, log_odds, 0.0).sum(dim=1)
        mean = torch.sigmoid(total / counts.sum(dim=1).clamp(min=1))
        return torch.where(counts.any(dim=1), mean, 1.0)

    def shares_of(self, rows: Tensor) -> Tensor:
        """Prior proportion of responding cells of perturbations ``rows``; no gradient."""
        share = torch.sigmoid(self.log_odds()[rows]).detach()
        return torch.where(self.acts[rows], share, 1.0)

    def _act(self, codes: Tensor) -> Tensor:
        """Whether a slot has a perturbation, and one that acts; the shape of ``codes``."""
        return (codes >= 0) & self.acts[codes.clamp(min=0)]

    def knows(self, cells: CellBatch) -> Tensor:
        """Whether the response of cells is identifiable, ``(B,)``: not if effects are too small.

        The evidence of cells is then smaller than the prior SD of log-odds.
        """
        tells = self.acts & (self.evidence >= _SD_OF_PERTURBATIONS)
        return ((cells.codes >= 0) & tells[cells.codes.clamp(min=0)]).any(dim=1)

    def sd(self) -> Tensor:
        """SD of the log-odds of every unit, ``(U,)``, once they are fitted."""
        n_guides = len(self.of_guides)
        sds = [_SD_OF_PERTURBATIONS] * self.n_perturbations + [_SD_OF_GUIDES] * n_guides
        precision = self.information.new_tensor(sds).square().reciprocal()
        return (self.information.clamp(min=0) + precision).rsqrt()

    def penalty(self) -> Tensor:
        """Minus the log prior density, up to a constant, in nats per training cell."""
        return (0.5 / self.n_cells) * (
            ((self.mean - _INITIAL_LOG_ODDS) / _SD_OF_MEAN).square().sum()
            + (self.of_perturbations / _SD_OF_PERTURBATIONS).square().sum()
            + (self.of_guides / _SD_OF_GUIDES).square().sum()
        )

    @torch.no_grad()
    def improve(self, cells: CellsOfUnits, total: Callable[[Tensor], Tensor]) -> None:
        """Take a step of expectation-maximisation towards the posterior mode of the log-odds.

        The maximum is exact, by messages from guides to perturbations to the screen and back:
        separate steps for the three levels would undo one another, because all depend on the same
        cells. ``total`` sums over processes, each of which has its own cells.
        """
        slope, weight = total(self.sums_of(cells)).to(self.mean)[:2]
        # Information of cells on each log-odds: its precision, and precision times value.
        known, told = weight, weight * self.log_odds() + slope
        of_units = [self.n_perturbations, len(self.of_guides)]
        (known, known_of_guides), (told, told_of_guides) = (
            values.split(of_units) for values in (known, told)
        )
        owners = self.perturbation_of_guides
        upwards = 1 + known_of_guides * _SD_OF_GUIDES**2
        known = known.index_add(0, owners, known_of_guides / upwards)
        told = told.index_add(0, owners, told_of_guides / upwards)
        upwards = 1 + known * _SD_OF_PERTURBATIONS**2
        precision = 1 / _SD_OF_MEAN**2
        mean = (_INITIAL_LOG_ODDS * precision + (told / upwards).sum()) / (
            precision + (known / upwards).sum()
        )
        perturbations = (mean + told * _SD_OF_PERTURBATIONS**2) / upwards
        above = perturbations[owners]
        guides = (above + told_of_guides * _SD_OF_GUIDES**2) / (
            1 + known_of_guides * _SD_OF_GUIDES**2
        )
        self.mean.copy_(mean)
        self.of_perturbations.copy_(perturbations - mean)
        self.of_guides.copy_(guides - above)

    @torch.no_grad()
    def finish(self, cells: CellsOfUnits, total: Callable[[Tensor], Tensor]) -> None:
        """Compute everything that is fitted besides the log-odds."""
        self.information.copy_(total(self.sums_of(cells))[2])
        carried = cells.codes >= 0
        _, prior = self._share_and_prior(cells)
        each = (
            torch.stack([torch.sigmoid(prior), cells.evidence.square(), torch.ones_like(prior)])[
                ..., None
            ]
            .expand(-1, *carried.shape)[:, carried]
            .double()
        )
        sums = each.new_zeros(3, self.n_perturbations)
        sums.index_add_(1, cells.codes[carried], each)
        responding, squares, n_cells = total(sums).to(self.rates)
        self.evidence.copy_((squares / n_cells.clamp(min=1)).sqrt())
        untrained = torch.sigmoid(self.mean + self.of_perturbations)
        rates = torch.where(n_cells > 0, responding / n_cells.clamp(min=1), untrained)
        self.rates.copy_(torch.where(self.acts, rates, 1.0))

    def _share_and_prior(self, cells: CellsOfUnits) -> tuple[Tensor, Tensor]:
        """Weights of the slots of each cell, ``(N, K)``, and prior log-odds, ``(N,)``."""
        carried = cells.units >= 0
        share = carried / carried.sum(dim=1, keepdim=True).clamp(min=1)
        return share, (self.log_odds()[cells.units.clamp(min=0)] * share).sum(dim=1)

    def sums_of(self, cells: CellsOfUnits) -> Tensor:
        """Per unit: slope and curvature of the log-likelihood in the log-odds, and information.

        ``(3, U)``. The curvature is that for known responses; the third is that from the cells.
        """
        carried = cells.units >= 0
        places = cells.units.clamp(min=0)
        share, prior = self._share_and_prior(cells)
        expected, posterior = torch.sigmoid(prior), torch.sigmoid(prior + cells.evidence)
        known = expected * (1 - expected)
        each = torch.stack([posterior - expected, known, known - posterior * (1 - posterior)])
        # If a cell has several units, each is updated as if it changed alone.
        powers = torch.stack([share, share, share.square()])
        values = (each[..., None] * powers).double()
        found = values.new_zeros(3, len(self.log_odds()))
        return found.index_add_(1, places[carried], values[:, carried])

    def may_escape(self, cells: CellBatch) -> Tensor:
        """Whether cells have a perturbation that acts, ``(B,)``."""
        return self._act(cells.codes).any(dim=1)

    def units_of(self, cells: CellBatch) -> Tensor:
        """Units whose log-odds apply to each cell, ``(B, K)``, -1 where a slot is empty.

        These are its guides, or its perturbations if it has no guides, that act. A cell without
        any such perturbation has none.
        """
        codes = torch.where(self._act(cells.codes), cells.codes, -1)
        if cells.guides is None or not len(self.of_guides):
            return codes
        owners = self.perturbation_of_guides[cells.guides.clamp(min=0)]
        act = self._act(torch.where(cells.guides < 0, -1, owners))
        guides = torch.where(act, cells.guides + self.n_perturbations, -1)
        n_slots = max(guides.shape[1], codes.shape[1])
        guides, codes = (
            functional.pad(units, (0, n_slots - units.shape[1]), value=-1)
            for units in (guides, codes)
        )
        return torch.where(act.any(dim=1, keepdim=True), guides, codes)

    def log_odds_of(self, cells: CellBatch) -> Tensor:
        """Prior log-odds that each cell responds, ``(B,)``; 0 for cells with nothing that acts."""
        units = self.units_of(cells)
        carried = units >= 0
        total = torch.where(carried, self.log_odds()[units.clamp(min=0)], 0.0).sum(dim=1)
        return total / carried.sum(dim=1).clamp(min=1)

    def log_prior(self, cells: CellBatch) -> Tensor:
        """Log-probabilities of the branches, ``(2, B)``.

        Cells without a perturbation that acts have only the first.
        """
        log_odds = self.log_odds_of(cells)
        both = torch.stack([functional.logsigmoid(log_odds), functional.logsigmoid(-log_odds)])
        alone = torch.stack([torch.zeros_like(log_odds), torch.full_like(log_odds, _NEVER)])
        return torch.where(self.may_escape(cells), both, alone)


def posterior_of_branches(log_weights: Tensor) -> Tensor:
    """Posterior of the branches from log-weights ``(2 P, B)``, in the same shape."""
    return torch.softmax(log_weights.unflatten(0, (N_BRANCHES, -1)), dim=0).flatten(0, 1)


class CellsOfUnits(NamedTuple):
    """Perturbations, units and evidence of cells for the fit of responses."""

    codes: Tensor
    """Perturbations of each cell, ``(N, K)``, -1 where a slot is empty."""

    evidence: Tensor
    """Log likelihood ratio of response and no response, ``(N,)``."""
    units: Tensor
    """Units of each cell, ``(N, K)``, -1 where a slot is empty."""


class Branches(NamedTuple):
    """Posterior of the branches of cells, and means over it."""

    log_prior: Tensor
    """``(2, 1, B)``."""
    posterior: Tensor
    """``(2, P, B)``, without a gradient."""

    @classmethod
    def of(cls, log_prior: Tensor, bounds: Tensor) -> Branches:
        """Compute them from ``log_prior``, ``(2, B)``, and bounds of both, ``(2 P, B)``."""
        given = log_prior[:, None]
        each = bounds.detach().unflatten(0, (N_BRANCHES, -1)) + given.detach()
        return cls(given, torch.softmax(each, dim=0))

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the branches of values ``(2 P, B)``, ``(P, B)``."""
        return (self.posterior * values.unflatten(0, (N_BRANCHES, -1))).sum(dim=0)

    def divergence(self) -> Tensor:
        """Divergence from their prior, in nats, ``(P, B)``."""
        entropy = torch.special.entr(self.posterior)
        return -(self.posterior * self.log_prior + entropy).sum(dim=0)


def with_branches(effects: Tensor, n_particles: int) -> Tensor:
    """Effects ``(P or 1, B, S)`` of cells with and without a response, ``(2 P, B, S)``."""
    effects = effects.expand(n_particles, *effects.shape[1:])
    return torch.cat([effects, torch.zeros_like(effects)])


def add_to_branches(log_prior: Tensor, values: Tensor) -> Tensor:
    """Add log-probabilities of the branches ``(2, B)`` to values ``(2 P, B)``."""
    return (values.unflatten(0, (N_BRANCHES, -1)) + log_prior[:, None]).flatten(0, 1)


def log_mixture(log_prior: Tensor, weights: Tensor) -> Tensor:
    """Log of a mixture of branches with log-weights ``(2 P, B)``; returns ``(P, B)``."""
    both = add_to_branches(log_prior, weights).unflatten(0, (N_BRANCHES, -1))
    return torch.logsumexp(both, dim=0)
