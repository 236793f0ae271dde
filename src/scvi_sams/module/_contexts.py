"""Effects of their own that perturbations have in a context: a cell type, a donor, a line.

In context c the effect of perturbation t on latent dimension l is::

    s_tcl = m_tl * e_tl + n_tcl * f_tcl

with a mask and an effect that all contexts share, and a mask ``n`` and an effect
``f_tcl ~ Normal(0, beta^2)`` of the context's own. A perturbation has effects of its own in a share
``rho`` of the contexts, and on a share ``pi`` of the latent dimensions there
(:class:`RowwiseMaskPrior`). Both are estimated from the screen: where the contexts agree hardly
any mask is on.

A perturbation in a context that no cell was measured in does there what contexts share, and is
there as in one of the n contexts it was measured in, each as likely as that it is as in none of
them (a Polya urn; Blackwell & MacQueen 1973): the second part is that of one of these, or has its
prior, with probability 1 / (n + 1) each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from scvi_sams._torch import generator
from scvi_sams.module._effect_rows import EffectRows
from scvi_sams.module._masks import MaskPosterior, RowwiseMaskPrior
from scvi_sams.module._networks import MeanFieldEffects, draw_particles

OWN = "context_"
"""What names of divergences of these parts begin with."""


_INITIAL_SHARE_OF_ROWS = 0.5


class OwnDraw(NamedTuple):
    """Samples of the parts of rows that are a context's own."""

    masks: Tensor
    """Zeros and ones, ``(P, R, L)``."""
    logits: Tensor
    """Posterior log-odds of the masks, ``(R, L)``."""
    effects: Tensor
    """``(P, R, L)``."""
    posterior: Normal
    """Of the effects, batch shape ``(1, R, L)``."""


class ContextEffects(nn.Module):
    """Posterior of what is a context's own, for pairs that were measured.

    Tables have a row for every pair of :attr:`EffectRows.measured`.

    Parameters
    ----------
    rows
        Which rows there are.
    n_latent
        L.
    probability
        ``pi`` until it is estimated, with a ``rho`` of one half.
    effect_scale
        ``beta``.
    temperature
        Of the relaxed masks that gradients pass through.

    Attributes
    ----------
    n_cells
        Training cells of each pair.
    """

    n_cells: Tensor

    def __init__(
        self,
        rows: EffectRows,
        n_latent: int,
        *,
        probability: float,
        effect_scale: float,
        temperature: float,
    ) -> None:
        super().__init__()
        n_pairs = len(rows.measured)
        self.rows = rows
        self.effect_scale = effect_scale
        self.masks = MaskPosterior(n_pairs, n_latent, temperature=temperature)
        self.effects = MeanFieldEffects(n_pairs, n_latent)
        self.prior = RowwiseMaskPrior(_INITIAL_SHARE_OF_ROWS, probability)
        self.register_buffer("n_cells", torch.zeros(n_pairs))

    def draw(self, rows: Tensor, n_particles: int) -> OwnDraw:
        """Sample what is their own of ``rows``, ``(R,)``."""
        is_measured, logits, posterior = self.posterior(rows)
        if self.masks.all_on:
            masks = is_measured.to(logits).expand(n_particles, *logits.shape)
        else:
            masks = self.masks.sample_by(logits, n_particles)
        effects = draw_particles(posterior, n_particles)
        if self.training:
            # Cells of pairs beyond those that have tables show what contexts share.
            masks = masks * is_measured.to(masks)
        elif not (self.masks.all_on or bool(is_measured.all())):
            masks, effects = self._as_elsewhere(rows, masks, effects)
        return OwnDraw(masks, logits, effects, posterior)

    def _as_elsewhere(self, rows: Tensor, masks: Tensor, effects: Tensor) -> tuple[Tensor, Tensor]:
        """Replace samples of the prior by some of other contexts, in rows that were not measured.

        The others are as they are.
        """
        n_particles, n_rows, _ = masks.shape
        first, n = self._measured_elsewhere(rows)
        shape, source = (n_particles, n_rows), generator(rows.device)
        uniform = torch.rand(shape, generator=source, device=rows.device)
        chosen = (uniform * (n + 1)).long()
        replaced = ((self.rows.places(rows) < 0) & (chosen < n))[..., None]
        place = (first + chosen).clamp(max=len(self.n_cells) - 1)
        there = self.masks.sample_by(self.masks.log_odds(place), 1)[0]
        q = self.effects(place)
        found = draw_particles(Normal(q.loc[0], q.scale[0], validate_args=False), n_particles)
        return torch.where(replaced, there, masks), torch.where(replaced, found, effects)

    def _measured_elsewhere(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """First place of a perturbation in the tables, and in how many contexts it was measured."""
        start = self.rows.perturbation_of(rows) * self.rows.per_perturbation
        ends = (start, start + self.rows.per_perturbation)
        first, end = (torch.searchsorted(self.rows.measured, place) for place in ends)
        return first, end - first

    def mixed(self, rows: Tensor, of_places: Tensor, of_prior: Tensor) -> Tensor:
        """Expectations ``(R, L)``: of measured rows their own, of others those of the urn.

        ``of_places`` are those of all places, ``of_prior``, ``(L,)`` or ``(R, L)``, of the prior.
        """
        first, n = self._measured_elsewhere(rows)
        place = self.rows.places(rows)
        sums = torch.cat([torch.zeros_like(of_places[:1]), of_places.cumsum(dim=0)])
        elsewhere = (sums[first + n] - sums[first] + of_prior) / (n + 1)[:, None]
        if self.masks.all_on:
            elsewhere = torch.zeros_like(elsewhere)
        return torch.where((place >= 0)[:, None], of_places[place.clamp(min=0)], elsewhere)

    def posterior(self, rows: Tensor) -> tuple[Tensor, Tensor, Normal]:
        """Whether rows were measured, ``(R, 1)``, log-odds of masks and posterior of effects.

        Where they were not, those of the prior.
        """
        place = self.rows.places(rows)
        is_measured = (place >= 0)[:, None]
        place = place.clamp(min=0)
        excluded = self.masks.is_excluded
        unknown = self.prior.marginal_log_odds()
        logits = torch.where(is_measured | excluded, self.masks.log_odds(place), unknown)
        q = self.effects(place)
        loc = torch.where(is_measured, q.loc, 0.0)
        scale = torch.where(is_measured, q.scale, self.effect_scale)
        return is_measured, logits, Normal(loc, scale, validate_args=False)

    def moments(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and variance of what is the context's own, each ``(R, L)``, exact."""
        q = self.effects(torch.arange(len(self.n_cells), device=rows.device))
        on = self._on_in_places()
        mean = self.mixed(rows, on * q.loc[0], torch.zeros_like(on[0]))
        squares = on * (q.loc[0].square() + q.variance[0])
        second = self.mixed(rows, squares, self._on_by_prior() * self.effect_scale**2)
        return mean, (second - mean.square()).clamp(min=0)

    def _on_in_places(self) -> Tensor:
        """Posterior probability of every mask of the table."""
        if self.masks.all_on:
            return torch.ones_like(self.masks.logits)
        return self.masks.inclusion_probability

    def _on_by_prior(self) -> Tensor:
        """Probability of masks of which nothing is known, ``(L,)``."""
        chance = torch.sigmoid(self.prior.marginal_log_odds())
        return torch.where(self.masks.is_excluded, 0.0, chance)

    def inclusion_probability(self, rows: Tensor) -> Tensor:
        """Posterior probability that a context has an effect of its own, ``(R, L)``."""
        return self.mixed(rows, self._on_in_places(), self._on_by_prior())

    def cells_of(self, rows: Tensor) -> Tensor:
        """Training cells of rows, ``(R,)``."""
        place = self.rows.places(rows)
        return torch.where(place >= 0, self.n_cells[place.clamp(min=0)], 0.0)


def chance_of_effect(
    shared_on: Tensor,
    own_on: Tensor,
    mean_if_both: Tensor,
    variance_if_both: Tensor,
    effect_scale: float,
) -> Tensor:
    """Probability that an effect in a context is not zero.

    A context's own part may take away what is shared. Given both, the sum is nothing with the
    probability that follows from its posterior and prior density at zero (Savage-Dickey; Dickey
    1971), both hypotheses being equally likely.
    """
    at_zero = Normal(mean_if_both, variance_if_both.sqrt()).log_prob(torch.zeros(()))
    prior = Normal(torch.zeros_like(mean_if_both), 2**0.5 * effect_scale)
    remains = torch.sigmoid(prior.log_prob(torch.zeros(())) - at_zero)
    both = shared_on * own_on
    return shared_on + own_on - 2 * both + both * remains
