"""Conditional VAE, CPA-VAE (Bereket & Karaletsos 2023) and SVAE+ (Lopez et al. 2022)."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from scvi_sams.module._latent_shift import LatentShiftModule
from scvi_sams.module._masks import MaskPosterior, PointEstimateMaskPrior
from scvi_sams.module._networks import MeanFieldEffects, draw_particles
from scvi_sams.module._perturbation_module import (
    GlobalDraw,
    PerturbationModule,
)
from scvi_sams.module._settings import PositiveNumber, Share, number

_INITIAL_MEAN_SCALE = 0.1
"""SD of the means of SVAE+ before training (paper)."""


class ConditionalVAEModule(PerturbationModule):
    """decoder(z, d) and encoder(x, d) with dosages d: nothing is shared or sparse.

    d times the weights of the first layer is the sum of the rows of its perturbations times their
    doses, so this module stores these rows, and a shift is a row of both: S = 2 n_hidden. They are
    weights of the networks and have their learning rate. There are no global variables. Rows start
    at zero, so that a perturbation without training cells changes nothing.

    Parameters
    ----------
    **kwargs
        See :class:`~scvi_sams.module.PerturbationModule`.
    """

    def __init__(self, *, n_perturbations: int, n_hidden: int, **kwargs: Any) -> None:
        super().__init__(
            n_perturbations=n_perturbations,
            n_hidden=n_hidden,
            correlated_basal=False,
            global_kl_weight=1.0,
            evidence_cells=None,
            **kwargs,
        )
        self.encoder_rows = nn.Parameter(torch.zeros(n_perturbations, n_hidden))
        self.decoder_rows = nn.Parameter(torch.zeros(n_perturbations, n_hidden))

    @property
    def n_shift(self) -> int:
        """A shift consists of the inputs of the encoder's and the decoder's first layer."""
        return self.encoder_rows.shape[1] + self.decoder_rows.shape[1]

    def global_posterior(self, rows: Tensor, n_particles: int) -> GlobalDraw:
        """Look the rows up; they are parameters, equal for all particles."""
        return GlobalDraw(self._shifts(rows)[None], {})

    @torch.no_grad()
    def shift_moments(self, rows: Tensor, n_samples: int = 500) -> tuple[Tensor, Tensor]:
        """Return the rows, and zeros."""
        shifts = self._shifts(rows)
        return shifts, torch.zeros_like(shifts)

    def encode(self, x: Tensor, shift: Tensor, covariates: Tensor | None) -> Normal:
        """q(z | x, d, covariates)."""
        for_encoder, _ = shift.chunk(2, dim=-1)
        return self.encoder.state(self.standardised(x), covariates, for_encoder)

    def decode_hidden(self, z_basal: Tensor, shift: Tensor, covariates: Tensor | None) -> Tensor:
        """Last hidden layer of the decoder at z and d."""
        _, for_decoder = shift.chunk(2, dim=-1)
        return self.decoder(z_basal, covariates, for_decoder)

    def _shifts(self, rows: Tensor) -> Tensor:
        return torch.cat([self.encoder_rows[rows], self.decoder_rows[rows]], dim=-1)


class CPAVAEModule(LatentShiftModule):
    """Generative model and guide of CPA-VAE: SAMS-VAE whose masks are all one.

    Globals, for perturbation t::

        e_t ~ Normal(0, beta^2 I)       q(e_t) = Normal(loc_t, scale_t)
        shift_t = e_t

    Parameters
    ----------
    effect_prior_scale
        ``beta``, the prior SD of effects.
    **kwargs
        See :class:`~scvi_sams.module.PerturbationModule`.
    """

    def __init__(
        self,
        *,
        n_perturbations: int,
        n_latent: int,
        effect_prior_scale: PositiveNumber,
        **kwargs: Any,
    ) -> None:
        super().__init__(n_perturbations=n_perturbations, n_latent=n_latent, **kwargs)
        self.effect_prior_scale = effect_prior_scale
        self.effects = MeanFieldEffects(n_perturbations, n_latent)

    def global_posterior(self, rows: Tensor, n_particles: int) -> GlobalDraw:
        """Sample e of the perturbations in ``rows``."""
        q_e = self.effects(rows)
        e = draw_particles(q_e, n_particles)
        kl_e = self.normal_kl(q_e, e, self.effect_prior_scale)
        return GlobalDraw(e, {"effects": kl_e})

    @torch.no_grad()
    def shift_moments(self, rows: Tensor, n_samples: int = 500) -> tuple[Tensor, Tensor]:
        """Posterior mean and SD of e."""
        q_e = self.effects(rows)
        return q_e.loc[0], q_e.scale[0]

    def permute_shifts(self, order: Tensor, signs: Tensor) -> None:
        """Reorder effects."""
        self.effects.permute(order, signs)

    def table_parameters(self) -> list[nn.Parameter]:
        """Add the table of effects."""
        return super().table_parameters() + list(self.effects.parameters())


class SVAEPlusModule(LatentShiftModule):
    """Generative model and guide of SVAE+: mechanism shifts are parameters, one per label.

    For perturbation t (combinations are separate perturbations) and latent dimension l::

        pi_tl ~ Beta(1, K_2)                   a point estimate
        m_tl  ~ Bernoulli(pi_tl)               q(m_tl) = Bernoulli(sigmoid(logit_tl))
        z_i   ~ Normal(m_t * mu_t, I)          q(z_i | x_i): independent of the perturbation

    ``mu_t`` is a parameter without a prior. In the coordinates of the other models,
    ``z_basal = z - m_t * mu_t``, the first distribution is Normal(0, I) and the second is shifted
    by minus the shift: densities are the same, so bounds are the same.

    Parameters
    ----------
    mask_prior_beta
        ``K_2``.
    mask_initial_probability, mask_temperature
        As in :class:`~scvi_sams.SAMSVAE`.
    **kwargs
        See :class:`~scvi_sams.module.PerturbationModule`.
    """

    def __init__(
        self,
        *,
        n_perturbations: int,
        n_latent: int,
        mask_prior_beta: Annotated[float, number(above=1)],
        mask_initial_probability: Share,
        mask_temperature: PositiveNumber,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            n_perturbations=n_perturbations, n_latent=n_latent, correlated_basal=False, **kwargs
        )
        self.masks = MaskPosterior(
            n_perturbations,
            n_latent,
            initial_probability=mask_initial_probability,
            temperature=mask_temperature,
        )
        self.mask_prior = PointEstimateMaskPrior(mask_prior_beta)
        self.means = nn.Parameter(_INITIAL_MEAN_SCALE * torch.randn(n_perturbations, n_latent))

    def encode(self, x: Tensor, shift: Tensor, covariates: Tensor | None) -> Normal:
        """q(z | x, covariates), shifted by minus the shift."""
        state = super().encode(x, shift, covariates)
        return Normal(state.loc - shift, state.scale, validate_args=False)

    def global_posterior(self, rows: Tensor, n_particles: int) -> GlobalDraw:
        """Sample m of the perturbations in ``rows``; shift = m * mu."""
        m = self.masks.sample(rows, n_particles)
        kl_m = self.mask_prior.kl_of_rows(self.kl_estimator, self.masks.log_odds(rows), m)
        return GlobalDraw(m * self.means[rows], {"masks": kl_m})

    @torch.no_grad()
    def shift_moments(self, rows: Tensor, n_samples: int = 500) -> tuple[Tensor, Tensor]:
        """Posterior mean and SD of m * mu, exact."""
        on = self.masks.inclusion_probability[rows]
        means = self.means[rows]
        return on * means, (on * (1 - on)).sqrt() * means.abs()

    def diagnostics(self) -> dict[str, float]:
        """Proportion of masks that are more likely on than off."""
        active = (self.masks.inclusion_probability > 0.5).float().mean()
        return {"active_masks": float(active)}

    @torch.no_grad()
    def permute_shifts(self, order: Tensor, signs: Tensor) -> None:
        """Reorder means and masks."""
        self.means.copy_(self.means[:, order] * signs)
        self.masks.permute(order)

    def table_parameters(self) -> list[nn.Parameter]:
        """Add means and mask logits."""
        return [*super().table_parameters(), self.means, *self.masks.parameters()]
