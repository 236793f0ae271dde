"""SAMS-VAE (Bereket & Karaletsos 2023): shifts are sparse masks times effects."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

from scvi_sams.module._axis_errors import variance_of_axes
from scvi_sams.module._context_masks import (
    Estimates,
    by_perturbation,
    fit_masks,
    of_rows,
)
from scvi_sams.module._contexts import OWN, ContextEffects, chance_of_effect
from scvi_sams.module._curvature import LatentSurvey, curvature, following
from scvi_sams.module._latent_shift import LatentShiftModule
from scvi_sams.module._masks import MASK_PRIORS, MaskPosterior, MaskPriorName
from scvi_sams.module._minibatch import CellBatch, positions_in, sum_over_slots
from scvi_sams.module._networks import (
    CorrelatedEffects,
    EffectPosterior,
    MeanFieldEffects,
    draw_particles,
)
from scvi_sams.module._perturbation_module import GlobalDraw
from scvi_sams.module._rotation import resampled_rotations, sparsest_rotation
from scvi_sams.module._settings import PositiveNumber, Share, WholeNumber
from scvi_sams.module._training_statistics import TrainingStatistics

MAX_INITIAL_LOGIT = 4.6
"""Masks start at probabilities of .01 to .99; training hardly moves those at the ends. At .05 to
.95 (3.0) clear entries ended near .96: nothing was called at a false discovery rate below .04,
intervals of the strongest effects reached to zero, and the calibration error was .02."""

_LEAST_KNOWN = 0.01
"""Share of the variance of a dimension that a cell's expression explains, at least."""

_SHARE_OF_OWN = 0.5
"""Of the probability of masks, that of masks that are a context's own, until it is estimated."""
_LEAST_FROM_CELLS = 0.02
_UNKNOWN = 1e6
"""Variance of effects of which nothing is known, where it has to be finite."""
_SMALLEST_PROBABILITY = 1e-6

_MOMENTS_SEED = 11027

_ROWS_PER_CHUNK = 32
"""Perturbations whose draws are in memory at once: 13 MB for 500 draws and 200 hidden units."""


class SAMSVAEModule(LatentShiftModule):
    """Generative model and guide of SAMS-VAE.

    Globals, for perturbation t and latent dimension l::

        m_tl ~ Bernoulli(alpha)         q(m_tl) = Bernoulli(sigmoid(logit_tl))
        e_t  ~ Normal(0, beta^2 I)      q(e_t | m_t) = Normal(loc_t, scale_t) or a network of m_t
        shift_t = m_t * e_t

    Parameters
    ----------
    correlated_effects
        Whether q(e_t) sees the mask.
    mask_prior_probability, mask_prior_concentration
        ``alpha``, or the mean of a Beta prior over it, whose ``a + b`` is the concentration.
    effect_prior_scale
        ``beta``.
    mask_prior, mask_initial_probability, mask_temperature, effect_n_hidden, effect_n_layers
        As in :class:`~scvi_sams.SAMSVAE`.
    **kwargs
        See :class:`~scvi_sams.module.PerturbationModule`.
    """

    has_dense_phase = True

    def __init__(
        self,
        *,
        n_perturbations: int,
        n_latent: int,
        correlated_effects: bool,
        mask_prior_probability: Share,
        mask_prior_concentration: PositiveNumber | None,
        effect_prior_scale: PositiveNumber,
        mask_initial_probability: Share,
        mask_temperature: PositiveNumber,
        effect_n_hidden: WholeNumber,
        effect_n_layers: WholeNumber,
        mask_prior: MaskPriorName | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(n_perturbations=n_perturbations, n_latent=n_latent, **kwargs)
        self.mask_prior_probability = mask_prior_probability
        self.effect_prior_scale = effect_prior_scale
        self.masks = MaskPosterior(
            n_perturbations,
            n_latent,
            initial_probability=mask_initial_probability,
            temperature=mask_temperature,
        )
        if mask_prior is None:
            mask_prior = "bernoulli" if mask_prior_concentration is None else "beta_bernoulli"
        self.mask_prior = MASK_PRIORS[mask_prior](mask_prior_probability, mask_prior_concentration)
        self.effects: EffectPosterior = (
            CorrelatedEffects(
                n_perturbations, n_latent, n_layers=effect_n_layers, n_hidden=effect_n_hidden
            )
            if correlated_effects
            else MeanFieldEffects(n_perturbations, n_latent)
        )
        self.contexts = (
            ContextEffects(
                self.effect_rows,
                n_latent,
                probability=_SHARE_OF_OWN * mask_prior_probability,
                effect_scale=effect_prior_scale,
                temperature=mask_temperature,
            )
            if self.effect_rows.n_contexts
            else None
        )

    def global_posterior(self, rows: Tensor, n_particles: int) -> GlobalDraw:
        """Draw m and e of the effects ``rows``; shift = m * e, plus what is a context's own."""
        if self.contexts is None:
            return self._shared_posterior(rows, n_particles)
        perturbations = self.effect_rows.perturbation_of(rows)
        distinct, place = perturbations.unique(return_inverse=True)
        shared = self._shared_posterior(distinct, n_particles)
        own = self.contexts.draw(rows, n_particles)
        kl = {name: values[:, place] for name, values in shared.kl.items()}
        kl[OWN + "masks"] = (
            torch.zeros_like(own.logits[..., 0])[None] + 0 * own.logits.sum()
            if self.contexts.masks.all_on
            else self.contexts.prior.kl_of_rows(self.kl_estimator, own.logits, own.masks)
        )
        kl[OWN + "effects"] = self.normal_kl(own.posterior, own.effects, self.effect_prior_scale)
        return GlobalDraw(shared.shifts[:, place] + own.masks * own.effects, kl)

    def _shared_posterior(self, rows: Tensor, n_particles: int) -> GlobalDraw:
        """What all contexts share of the perturbations ``rows``."""
        m = self.masks.sample(rows, n_particles)
        q_e = self.effects(rows, m)
        e = draw_particles(q_e, n_particles)
        kl_e = self.normal_kl(q_e, e, self.effect_prior_scale)
        logits = self.masks.log_odds(rows)
        if self.masks.all_on:
            kl_m = torch.zeros_like(logits[..., 0])[None] + 0 * logits.sum()
        else:
            kl_m = self.mask_prior.kl_of_rows(self.kl_estimator, logits, m)
        return GlobalDraw(m * e, {"masks": kl_m, "effects": kl_e})

    def cells_behind(self, rows: Tensor, name: str) -> Tensor:
        """Training cells that share the global variable ``name`` of each row, ``(R,)``."""
        if self.contexts is not None and name.startswith(OWN):
            return self.contexts.cells_of(rows)
        return super().cells_behind(rows, name)

    def set_training_statistics(self, statistics: TrainingStatistics) -> None:
        """Also store the cells of each pair of a perturbation and a context."""
        super().set_training_statistics(statistics)
        if self.contexts is not None and statistics.cells_per_pair is not None:
            self.contexts.n_cells.copy_(statistics.cells_per_pair)

    @torch.no_grad()
    def shift_moments(self, rows: Tensor, n_samples: int = 500) -> tuple[Tensor, Tensor]:
        """Posterior mean and sd of shifts: exact for mean-field effects, else from draws of m.

        The draws are the same in each call and in each process, all of which must come to the same
        order of the latents.
        """
        if self.contexts is None:
            return self.shared_moments(rows, n_samples)
        distinct, place = self.effect_rows.perturbation_of(rows).unique(return_inverse=True)
        mean, sd = (values[place] for values in self.shared_moments(distinct, n_samples))
        own, variance = self.contexts.moments(rows)
        return mean + own, (sd.square() + variance).sqrt()

    @torch.no_grad()
    def shared_moments(self, rows: Tensor, n_samples: int = 500) -> tuple[Tensor, Tensor]:
        """Posterior mean and sd of m * e of perturbations ``rows``: what all contexts share."""
        on = self.masks.inclusion_probability[rows]
        if isinstance(self.effects, MeanFieldEffects):
            q_e = self.effects(rows, on[None])
            mean = on * q_e.loc[0]
            second = on * (q_e.loc[0].square() + q_e.scale[0].square())
        else:
            # The same numbers for every row, so that no row depends on which others are asked for.
            same = torch.Generator(on.device).manual_seed(_MOMENTS_SEED)
            shape = (n_samples, 1, self.n_latent)
            uniform = torch.rand(shape, generator=same, device=on.device)
            chunks = zip(rows.split(_ROWS_PER_CHUNK), on.split(_ROWS_PER_CHUNK), strict=True)
            moments = [self._moments_over_masks(some, of_some, uniform) for some, of_some in chunks]
            mean, second = (torch.cat(parts) for parts in zip(*moments, strict=True))
        return mean, (second - mean.square()).clamp(min=0).sqrt()

    def _moments_over_masks(
        self, rows: Tensor, on: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor]:
        """First and second moment of m * e; masks are on where ``uniform`` is below ``on``."""
        m = (uniform < on).to(on.dtype)
        q_e = self.effects(rows, m)
        mean = (m * q_e.loc).mean(0)
        return mean, (m * (q_e.loc.square() + q_e.scale.square())).mean(0)

    @torch.no_grad()
    def begin_dense_phase(self) -> None:
        """Switch all masks on until :meth:`start_masks`."""
        self._switch_all_on(True)

    def _switch_all_on(self, on: bool) -> None:
        self.masks.switch_all_on(on)
        if self.contexts is not None:
            self.contexts.masks.switch_all_on(on)

    @torch.no_grad()
    def find_sparse_axes(self) -> None:
        """Rotate the latent space so that effects are sparsest; all masks are still on."""
        self.rotate(sparsest_rotation(self.full_effects().loc[0]))

    def full_effects(self) -> Normal:
        """Posterior of the effects of all measured rows, all masks on; ``(1, R, L)``."""
        rows = torch.arange(len(self.masks.logits), device=self.device)
        shared = self.effects(rows, torch.ones_like(self.masks.logits)[None])
        if self.contexts is None:
            return shared
        measured = self.effect_rows.measured
        place, own = (
            self.effect_rows.perturbation_of(measured),
            self.contexts.posterior(measured)[2],
        )
        variance = shared.variance[:, place] + own.variance
        return Normal(shared.loc[:, place] + own.loc, variance.sqrt(), validate_args=False)

    def has_effects(self) -> Tensor:
        """Whether each perturbation more likely than not moves some latent dimension, ``(T,)``."""
        rows = torch.arange(len(self.masks.logits), device=self.device)
        found = (self.masks.log_odds(rows) > 0).any(dim=1)
        if self.contexts is not None:
            measured = self.effect_rows.measured
            is_own = (self.contexts.inclusion_probability(measured) > 0.5).any(dim=1)
            found[self.effect_rows.perturbation_of(measured[is_own])] = True
        return found

    def chance_of_effect(self, rows: Tensor) -> Tensor:
        """Posterior probability that the effects ``rows`` are not zero, ``(R, L)``."""
        perturbations = self.effect_rows.perturbation_of(rows)
        shared_on = self.masks.inclusion_probability[perturbations]
        if self.contexts is None:
            return shared_on
        distinct, place = perturbations.unique(return_inverse=True)
        mean, sd = (values[place] for values in self.shared_moments(distinct))
        # Of the effect where its mask is on.
        on = shared_on.clamp(min=_SMALLEST_PROBABILITY)
        mean, second = mean / on, (sd.square() + mean.square()) / on
        is_measured, logits, own = self.contexts.posterior(rows)
        found = chance_of_effect(
            shared_on,
            torch.sigmoid(logits),
            mean + own.loc[0],
            (second - mean.square()).clamp(min=0) + own.variance[0],
            self.effect_prior_scale,
        )
        if bool(is_measured.all()):
            return found
        return self.contexts.mixed(rows, self.chance_of_effect(self.effect_rows.measured), found)

    @torch.no_grad()
    def start_masks(self, state_variance: Tensor | None = None) -> None:
        """End the dense phase: masks start from what the effects on sparse axes say.

        The log-odds of an entry are those of an estimate ``e`` of its effect, whose variance ``v``
        is that of its posterior, 1 / ``evidence_cells`` and what the axes are off by
        (:func:`variance_of_axes`), by the densities of Normal(0, v + beta^2) (on) and Normal(0, v)
        (off). Where contexts are registered see :mod:`~scvi_sams.module._context_masks`::

            logit = log(alpha / (1 - alpha)) + (e^2 / v) / (2 + 2 v / beta^2)
                    - log(1 + beta^2 / v) / 2

        ``state_variance``, ``(n_latent,)``, is the mean posterior variance of basal states. Where a
        cell leaves s^2 of the prior variance of a dimension, it is worth ``1 - s^2`` of a cell
        whose state is known, and 1 / ``evidence_cells`` is divided by that.
        """
        known = 1.0 if state_variance is None else (1 - state_variance).clamp(min=_LEAST_KNOWN)
        coarsened = 0.0 if self.evidence_cells is None else 1 / (self.evidence_cells * known)
        if self.contexts is not None:
            self._start_masks_of_contexts(self.contexts, coarsened)
            return
        q_e = self.full_effects()
        effects, variance = q_e.loc[0], q_e.variance[0] + coarsened
        variance = variance + variance_of_axes(effects, variance, self.effect_prior_scale)
        prior = self.effect_prior_scale**2
        fit = effects.square() / variance / (2 + 2 * variance / prior)
        logits = self.mask_prior.log_odds + fit - 0.5 * torch.log1p(prior / variance)
        self.masks.logits.copy_(logits.clamp(-MAX_INITIAL_LOGIT, MAX_INITIAL_LOGIT))
        self._switch_all_on(False)

    def _start_masks_of_contexts(self, contexts: ContextEffects, coarsened: Tensor | float) -> None:
        """Masks and effects of both parts, from estimates of their sums in each context."""
        rows, prior = self.effect_rows.measured, self.effect_prior_scale
        owners, place = self.effect_rows.perturbation_of(rows).unique(return_inverse=True)
        shared = self.effects(owners, torch.ones_like(self.masks.logits)[owners][None]).loc[0]
        own = contexts.posterior(rows)[2]
        # Given what is shared, the cells of a pair say this much less than the posterior: the rest
        # is the prior's.
        from_cells = (1 - own.variance[0] / prior**2).clamp(min=_LEAST_FROM_CELLS)
        sums = shared[place] + own.loc[0] / from_cells
        has_cells = (contexts.n_cells > 0)[:, None]
        variance = torch.where(has_cells, own.variance[0] / from_cells, torch.inf)
        weights = by_perturbation(1 / variance, place, 0.0)
        precision = weights.sum(dim=1).clamp(min=prior**-2)
        mean = (weights * by_perturbation(sums, place, 0.0)).sum(dim=1) / precision
        totals = self.full_effects().loc[0]
        resampled = list(resampled_rotations(totals, place))
        common = variance_of_axes(mean, 1 / precision + coarsened, prior, resampled=resampled)
        known = variance.clamp(max=_UNKNOWN)
        variance = variance + variance_of_axes(own.loc[0], known, prior, resampled=resampled)
        estimates = Estimates(
            by_perturbation(sums, place, 0.0),
            by_perturbation(variance, place, torch.inf),
            common + coarsened,
        )
        found, of_own_masks = fit_masks(estimates, self.mask_prior_probability, prior)
        contexts.prior.set_to(*of_own_masks)
        bounds = (-MAX_INITIAL_LOGIT, MAX_INITIAL_LOGIT)
        self.masks.logits.fill_(self.mask_prior.log_odds)
        self.masks.logits[owners] = torch.logit(found.shared).clamp(*bounds).to(shared)
        on = of_rows(found.own, place)
        contexts.masks.logits.copy_(torch.logit(on).clamp(*bounds))
        # Together the two parts are what they were, where the own one is on.
        shared_on = found.shared.to(shared)[place]
        contexts.effects.loc.copy_(shared[place] * (1 - shared_on) + own.loc[0])
        self._switch_all_on(False)

    @torch.no_grad()
    def survey_latents(self, cells: Iterable[CellBatch]) -> LatentSurvey:
        """Which dimensions follow from the others, and how much each tells of a cell."""
        rows = self.effect_rows.measured
        means = self.shift_moments(rows)[0][None]
        basal, variances, shifts, codes = [], [], [], []
        for batch in cells:
            shift = sum_over_slots(means, positions_in(rows, batch.effects), batch.doses)
            batch, shift = self.likelier_branch(batch, shift)
            posterior = self.encode(batch.x, shift, batch.covariates)
            basal.append(posterior.loc[0].cpu())
            variances.append(posterior.variance[0].cpu())
            shifts.append(shift[0].cpu())
            codes.append(batch.effects.sort(dim=1).values.cpu())
        groups = torch.unique(torch.cat(codes), dim=0, return_inverse=True)[1]
        return LatentSurvey(
            curvature(torch.cat(basal), torch.cat(shifts), groups).to(self.device),
            torch.cat(variances).mean(dim=0).to(self.device),
            following(means[0]),
        )

    @torch.no_grad()
    def switch_off_latents(self, is_off: Tensor) -> None:
        """Do without some latent dimensions, ``(n_latent,)``, from now on.

        No perturbation moves them, no cell differs in them (posterior and prior agree), and nothing
        is decoded from them.
        """
        self.masks.is_excluded.copy_(is_off)
        if self.contexts is not None:
            self.contexts.masks.is_excluded.copy_(is_off)

    def encode(self, x: Tensor, shift: Tensor, covariates: Tensor | None) -> Normal:
        """q(z_basal | x, shift, covariates); the prior in dimensions that are switched off."""
        posterior = super().encode(x, shift, covariates)
        # Products, as `masked_fill` with a mask of the last dimension is three times as slow.
        is_off = self.masks.is_excluded.to(posterior.scale.dtype)
        is_on = 1 - is_off
        scale = torch.addcmul(is_off, posterior.scale, is_on)
        return Normal(posterior.loc * is_on, scale, validate_args=False)

    def decode_hidden(self, z_basal: Tensor, shift: Tensor, covariates: Tensor | None) -> Tensor:
        """Last hidden layer of the decoder at ``z = z_basal + shift``, less what is off."""
        is_on = (~self.masks.is_excluded).to(z_basal.dtype)
        return super().decode_hidden(z_basal * is_on, shift, covariates)

    def diagnostics(self) -> dict[str, float]:
        """Whether this is the dense phase, and the share of masks that are more likely on."""
        on = self.masks.inclusion_probability > 0.5
        if self.contexts is not None:
            rows = self.effect_rows.measured
            is_own = self.contexts.inclusion_probability(rows) > 0.5
            on = on[self.effect_rows.perturbation_of(rows)] | is_own
        return {"dense_phase": float(self.masks.all_on), "active_masks": float(on.float().mean())}

    def permute_shifts(self, order: Tensor, signs: Tensor) -> None:
        """Reorder effects and masks."""
        self.effects.permute(order, signs)
        self.masks.permute(order)
        if self.contexts is not None:
            self.contexts.effects.permute(order, signs)
            self.contexts.masks.permute(order)

    def rotate(self, rotation: Tensor) -> None:
        """Fold a rotation of the latent space into encoder, decoder and effects.

        Exact for everything that is decoded from posterior means, as long as all masks are on; the
        diagonal posterior variances turn approximately (see ``NormalHead.rotate``).
        """
        self.encoder.rotate(rotation)
        self.decoder.rotate(rotation)
        self.effects.rotate(rotation)
        if self.contexts is not None:
            self.contexts.effects.rotate(rotation)

    @torch.no_grad()
    def translate(self, origin: Tensor) -> None:
        """Move the origin of the latent space to a point of it, ``(n_latent,)``.

        The effect of each perturbation becomes that much less: basal states of cells with a unit
        dose of one perturbation stay where they are, as long as all masks are on, and what is
        decoded from their posterior means stays the same. Control cells move by as much the other
        way. Their encoder is not exact: an encoder cannot tell them from perturbed cells but by
        the shift, which enters in more than one place.
        """
        self.encoder.translate(origin)
        self.decoder.translate(origin)
        self.effects.translate(origin)

    def table_parameters(self) -> list[torch.nn.Parameter]:
        """Add mask logits, and the table of effects, or of embeddings of the perturbations."""
        tables = super().table_parameters() + list(self.masks.parameters())
        if isinstance(self.effects, MeanFieldEffects):
            tables += list(self.effects.parameters())
        elif isinstance(self.effects, CorrelatedEffects):
            tables += list(self.effects.from_perturbation.parameters())
        return tables + ([] if self.contexts is None else list(self.contexts.parameters()))
