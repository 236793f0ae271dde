"""Generative model and guide of SAMS-VAE: shifts are sparse masks times effects."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal

from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.module._contexts import OWN, ContextEffects, chance_of_effect
from scvi_sams.module._effect_moments import MomentsOfWeights, moments_over_masks
from scvi_sams.module._feature_prior import FeaturePrior, PriorOfEffects
from scvi_sams.module._latent_shift import LatentShiftModule
from scvi_sams.module._masks import (
    MASK_PRIORS,
    BernoulliMaskPrior,
    MaskPosterior,
    MaskPriorName,
    kl_to_log_odds,
)
from scvi_sams.module._networks import (
    CorrelatedEffects,
    EffectPosterior,
    MeanFieldEffects,
    draw_particles,
)
from scvi_sams.module._perturbation_module import GlobalDraw
from scvi_sams.module._settings import PositiveNumber, Share, WholeNumber
from scvi_sams.module._training_statistics import TrainingStatistics

_SHARE_OF_OWN = 0.5
"""Initial prior probability of context-specific masks, relative to that of masks."""
_SMALLEST_PROBABILITY = 1e-6

_MOMENTS_SEED = 11027


class MaskedEffectsModule(LatentShiftModule):
    """Generative model and guide of SAMS-VAE.

    Globals, for perturbation t and latent dimension l::

        m_tl ~ Bernoulli(alpha)         q(m_tl) = Bernoulli(sigmoid(logit_tl))
        e_t  ~ Normal(0, beta^2 I)      q(e_t | m_t) = Normal(loc_t, scale_t) or a network of m_t
        shift_t = m_t * e_t

    Parameters
    ----------
    correlated_effects
        Whether q(e_t) depends on the mask.
    mask_prior_probability, mask_prior_concentration
        ``alpha``, or the mean of a Beta prior over it, whose ``a + b`` is the concentration.
    effect_prior_scale
        ``beta``.
    mask_prior, mask_initial_probability, mask_temperature, effect_n_hidden, effect_n_layers
        As in :class:`~scvi_sams.SAMSVAE`.
    features
        Features of measured and other perturbations, ``(T + U, D)``: see :class:`FeaturePrior`.
    target_genes
        Position of the gene that each of them targets, ``(T + U,)``; -1 if it is unknown.
    **kwargs
        See :class:`~scvi_sams.module.PerturbationModule`.
    """

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
        features: np.ndarray | None = None,
        target_genes: np.ndarray | None = None,
        **kwargs: Any,
    ) -> None:
        n_unmeasured = 0 if features is None else len(features) - n_perturbations
        super().__init__(
            n_perturbations=n_perturbations, n_latent=n_latent, n_unmeasured=n_unmeasured, **kwargs
        )
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
        self._moments = MomentsOfWeights()
        self.features = None if features is None else self._prior_given(features)
        if self.unmeasured is not None and target_genes is not None:
            self.unmeasured.fill(target_genes=torch.as_tensor(target_genes))
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

    def _prior_given(self, features: np.ndarray) -> FeaturePrior:
        if not isinstance(self.mask_prior, BernoulliMaskPrior):
            raise InvalidArgumentError(
                "`perturbation_features` set the prior probability of each mask: omit "
                "`mask_prior` and `mask_prior_concentration`."
            )
        return FeaturePrior(
            features,
            n_perturbations=self.effect_rows.n_perturbations,
            n_latent=self.n_latent,
            log_odds=self.mask_prior.log_odds,
            scale=self.effect_prior_scale,
        )

    def global_posterior(self, rows: Tensor, n_particles: int) -> GlobalDraw:
        """Sample m and e of the effects ``rows``; shift = m * e, plus the context-specific part."""
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
        """Shared effects of the perturbations ``rows``."""
        if self.features is not None and not self.training:
            is_measured = rows < self.effect_rows.n_perturbations
            if not bool(is_measured.all()):
                return self._with_unmeasured(self.features, rows, is_measured, n_particles)
        m = self.masks.sample(rows, n_particles)
        q_e = self.effects(rows, m)
        e = draw_particles(q_e, n_particles)
        logits = self.masks.log_odds(rows)
        if self.masks.all_on:
            kl_m = torch.zeros_like(logits[..., 0])[None] + 0 * logits.sum()
        elif self.features is not None:
            log_odds = self.features.measured(rows).log_odds
            kl_m = kl_to_log_odds(self.kl_estimator, logits, m, log_odds)
        else:
            kl_m = self.mask_prior.kl_of_rows(self.kl_estimator, logits, m)
        return GlobalDraw(m * e, {"masks": kl_m, "effects": self._kl_of_effects(rows, q_e, e)})

    def _kl_of_effects(self, rows: Tensor, q_e: Normal, e: Tensor) -> Tensor:
        """Divergence of the effects of every perturbation from their prior."""
        if self.features is None:
            return self.normal_kl(q_e, e, self.effect_prior_scale)
        prior = self.features.measured(rows)
        centred = Normal(q_e.loc - prior.mean, q_e.scale, validate_args=False)
        return self.normal_kl(centred, e - prior.mean, prior.variance.sqrt())

    def prior_of(self, codes: Tensor) -> PriorOfEffects:
        """Prior of masks and effects of measured perturbations, ``(R, L)`` each."""
        if self.features is not None:
            return self.features.measured(codes)
        values = self.mask_prior.log_odds, 0.0, self.effect_prior_scale**2
        like = self.masks.logits[codes]
        return PriorOfEffects(*(torch.full_like(like, value) for value in values))

    def _with_unmeasured(
        self, features: FeaturePrior, rows: Tensor, is_measured: Tensor, n_particles: int
    ) -> GlobalDraw:
        """Samples in which those of unmeasured perturbations are replaced by prior samples."""
        shifts = torch.zeros(n_particles, len(rows), self.n_latent, device=rows.device)
        found = self._shared_posterior(rows[is_measured], n_particles)
        shifts[:, is_measured] = found.shifts
        prior = features.of(rows[~is_measured])
        log_odds = torch.where(self.masks.is_excluded, -torch.inf, prior.log_odds)
        m = self.masks.sample_by(log_odds, n_particles)
        e = Normal(prior.mean[None], prior.variance.sqrt()[None], validate_args=False)
        shifts[:, ~is_measured] = m * draw_particles(e, n_particles)
        kl = {}
        for name, values in found.kl.items():
            kl[name] = values.new_zeros(len(values), len(rows))
            kl[name][:, is_measured] = values
        return GlobalDraw(shifts, kl)

    def cells_behind(self, rows: Tensor, name: str) -> Tensor:
        """Number of training cells with the global variable ``name`` of each row, ``(R,)``."""
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
        """Posterior mean and SD of shifts: exact for mean-field effects, else from samples of m.

        Samples are the same in each call and in each process, because all processes must find the
        same order of the latents.
        """
        if self.contexts is None:
            return self.shared_moments(rows, n_samples)
        distinct, place = self.effect_rows.perturbation_of(rows).unique(return_inverse=True)
        mean, sd = (values[place] for values in self.shared_moments(distinct, n_samples))
        own, variance = self.contexts.moments(rows)
        return mean + own, (sd.square() + variance).sqrt()

    @torch.no_grad()
    def shared_moments(self, rows: Tensor, n_samples: int = 500) -> tuple[Tensor, Tensor]:
        """Posterior mean and SD of m * e of perturbations ``rows``: the shared effects."""
        is_measured = rows < self.effect_rows.n_perturbations
        if self.features is not None and not bool(is_measured.all()):
            mean, sd = torch.zeros(2, len(rows), self.n_latent, device=rows.device)
            mean[is_measured], sd[is_measured] = self.shared_moments(rows[is_measured], n_samples)
            prior, is_on = self.features.of(rows[~is_measured]), ~self.masks.is_excluded
            first, second = prior.moments()
            mean[~is_measured] = first * is_on
            sd[~is_measured] = (second - first.square()).clamp(min=0).sqrt() * is_on
            return mean, sd
        on = self.masks.inclusion_probability
        if isinstance(self.effects, MeanFieldEffects):
            q_e = self.effects(rows, on[rows][None])
            mean = on[rows] * q_e.loc[0]
            second = on[rows] * (q_e.loc[0].square() + q_e.scale[0].square())
        else:
            mean, second = self._moments_over_masks(rows, on, n_samples)
        sd = (second - mean.square()).clamp(min=0).sqrt()
        return mean.to(on.dtype), sd.to(on.dtype)

    def _moments_over_masks(
        self, rows: Tensor, on: Tensor, n_samples: int
    ) -> tuple[Tensor, Tensor]:
        """First and second moment of m * e, from samples of masks with probability ``on``."""

        def compute(some: Tensor) -> tuple[Tensor, Tensor]:
            # The same numbers for every row, so that rows do not depend on others.
            same = torch.Generator(on.device).manual_seed(_MOMENTS_SEED)
            shape = (n_samples, 1, self.n_latent)
            uniform = torch.rand(shape, generator=same, device=on.device)
            return moments_over_masks(self.effects, some, on[some], uniform)

        weights = [torch.tensor(n_samples), on, *self.effects.parameters()]
        return self._moments.of(rows, weights, on, compute)

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

    def _chance_of_shared(self, codes: Tensor) -> Tensor:
        """Posterior probability of shared masks, ``(R, L)``."""
        n_measured = self.effect_rows.n_perturbations
        found = self.masks.inclusion_probability[codes.clamp(max=n_measured - 1)]
        is_unmeasured = codes >= n_measured
        if self.features is not None and bool(is_unmeasured.any()):
            of_prior = torch.sigmoid(self.features.of(codes[is_unmeasured]).log_odds)
            found[is_unmeasured] = torch.where(self.masks.is_excluded, 0.0, of_prior)
        return found

    def has_effects(self) -> Tensor:
        """Whether each perturbation probably shifts some latent dimension, ``(T,)``."""
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
        shared_on = self._chance_of_shared(perturbations)
        if self.contexts is None:
            return shared_on
        distinct, place = perturbations.unique(return_inverse=True)
        mean, sd = (values[place] for values in self.shared_moments(distinct))
        # Probability that the effect is not zero given that its mask is on.
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

    def permute_shifts(self, order: Tensor, signs: Tensor) -> None:
        """Reorder effects and masks."""
        self.effects.permute(order, signs)
        self.masks.permute(order)
        if self.features is not None:
            self.features.permute(order, signs)
        if self.contexts is not None:
            self.contexts.effects.permute(order, signs)
            self.contexts.masks.permute(order)

    def table_parameters(self) -> list[torch.nn.Parameter]:
        """Add mask logits, and the table of effects, or of embeddings of the perturbations."""
        tables = super().table_parameters() + list(self.masks.parameters())
        if isinstance(self.effects, MeanFieldEffects):
            tables += list(self.effects.parameters())
        elif isinstance(self.effects, CorrelatedEffects):
            tables += list(self.effects.from_perturbation.parameters())
        return tables + ([] if self.contexts is None else list(self.contexts.parameters()))
