"""Context-specific effects of perturbations: in a cell type, a donor or a cell line.

In context c the effect of perturbation t on latent dimension l is::

    s_tcl = m_tl * e_tl + n_tcl * f_tcl

with a shared mask and effect, and a context-specific mask ``n`` and effect
``f_tcl ~ Normal(0, beta^2)``. A perturbation has specific effects in a proportion ``rho`` of the
contexts, on a proportion ``pi`` of the latent dimensions (:class:`RowwiseMaskPrior`). Both are
estimated from the screen: where contexts agree, hardly any specific mask is on.

If a perturbation was measured in n contexts, but not in this one, its effect here is the shared
effect plus a specific effect that equals that of one of the n contexts, or is a new sample of the
prior, with probability 1 / (n + 1) each (a Polya urn; Blackwell & MacQueen 1973).
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
"""Prefix of the names of divergences of these parts."""


_INITIAL_SHARE_OF_ROWS = 0.5


class OwnDraw(NamedTuple):
    """Samples of the context-specific parts of rows."""

    masks: Tensor
    """Zeros and ones, ``(P, R, L)``."""
    logits: Tensor
    """Posterior log-odds of the masks, ``(R, L)``."""
    effects: Tensor
    """``(P, R, L)``."""
    posterior: Normal
    """Posterior of the effects, batch shape ``(1, R, L)``."""


class ContextEffects(nn.Module):
    """Posterior of context-specific effects, for measured pairs.

    Tables have a row for every pair of :attr:`EffectRows.measured`.

    Parameters
    ----------
    rows
        Rows of effects.
    n_latent
        L.
    probability
        ``pi`` until it is estimated, with a ``rho`` of 0.5.
    effect_scale
        ``beta``.
    temperature
        Temperature of the relaxed masks through which gradients pass.

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
        """Sample the specific effects of ``rows``, ``(R,)``."""
        is_measured, logits, posterior = self.posterior(rows)
        if self.masks.all_on:
            masks = is_measured.to(logits).expand(n_particles, *logits.shape)
        else:
            masks = self.masks.sample_by(logits, n_particles)
        effects = draw_particles(posterior, n_particles)
        if self.training:
            # Cells of pairs without a table row have shared effects only.
            masks = masks * is_measured.to(masks)
        elif not (self.masks.all_on or bool(is_measured.all())):
            masks, effects = self._as_elsewhere(rows, masks, effects)
        return OwnDraw(masks, logits, effects, posterior)

    def _as_elsewhere(self, rows: Tensor, masks: Tensor, effects: Tensor) -> tuple[Tensor, Tensor]:
        """Replace prior samples of unmeasured rows by samples of other contexts.

        Measured rows are unchanged.
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
        """First position of a perturbation in the tables, and number of contexts measured."""
        start = self.rows.perturbation_of(rows) * self.rows.per_perturbation
        ends = (start, start + self.rows.per_perturbation)
        first, end = (torch.searchsorted(self.rows.measured, place) for place in ends)
        return first, end - first

    def mixed(self, rows: Tensor, of_places: Tensor, of_prior: Tensor) -> Tensor:
        """Expectations ``(R, L)``: of measured rows their own, of others those of the Polya urn.

        ``of_places`` are those of all table rows; ``of_prior``, ``(L,)`` or ``(R, L)``, of the
        prior.
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

        Unmeasured rows have those of the prior.
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
        """Exact posterior mean and variance of specific effects, each ``(R, L)``."""
        q = self.effects(torch.arange(len(self.n_cells), device=rows.device))
        on = self._on_in_places()
        mean = self.mixed(rows, on * q.loc[0], torch.zeros_like(on[0]))
        squares = on * (q.loc[0].square() + q.variance[0])
        second = self.mixed(rows, squares, self._on_by_prior() * self.effect_scale**2)
        return mean, (second - mean.square()).clamp(min=0)

    def _on_in_places(self) -> Tensor:
        """Posterior probability of every mask in the table."""
        if self.masks.all_on:
            return torch.ones_like(self.masks.logits)
        return self.masks.inclusion_probability

    def _on_by_prior(self) -> Tensor:
        """Prior probability of masks, ``(L,)``."""
        chance = torch.sigmoid(self.prior.marginal_log_odds())
        return torch.where(self.masks.is_excluded, 0.0, chance)

    def inclusion_probability(self, rows: Tensor) -> Tensor:
        """Posterior probability that a context has a specific effect, ``(R, L)``."""
        return self.mixed(rows, self._on_in_places(), self._on_by_prior())

    def cells_of(self, rows: Tensor) -> Tensor:
        """Number of training cells of rows, ``(R,)``."""
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

    The specific part may cancel the shared part. If both are on, the sum is zero with a probability
    that follows from its posterior and prior density at zero (Savage-Dickey; Dickey 1971), with
    equal prior probabilities of both hypotheses.
    """
    at_zero = Normal(mean_if_both, variance_if_both.sqrt()).log_prob(torch.zeros(()))
    prior = Normal(torch.zeros_like(mean_if_both), 2**0.5 * effect_scale)
    remains = torch.sigmoid(prior.log_prob(torch.zeros(())) - at_zero)
    both = shared_on * own_on
    return shared_on + own_on - 2 * both + both * remains
