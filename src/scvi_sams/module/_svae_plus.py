"""SVAE+ (Lopez et al. 2022): sparse mechanism shifts that are parameters, one per label."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from scvi_sams.module._masks import MaskPosterior, PointEstimateMaskPrior
from scvi_sams.module._perturbation_module import GlobalDraw, LatentShiftModule
from scvi_sams.module._settings import PositiveNumber, Share, number

_INITIAL_MEAN_SCALE = 0.1
"""Standard deviation of the means before training (paper)."""


class SVAEPlusModule(LatentShiftModule):
    """Generative model and guide of SVAE+.

    For perturbation t (a combination is one of its own) and latent dimension l::

        pi_tl ~ Beta(1, K_2)                   a point estimate
        m_tl  ~ Bernoulli(pi_tl)               q(m_tl) = Bernoulli(sigmoid(logit_tl))
        z_i   ~ Normal(m_t * mu_t, I)          q(z_i | x_i): it does not see the perturbation

    ``mu_t`` is a parameter without a prior. In the coordinates of the other models,
    ``z_basal = z - m_t * mu_t``, the first factor is Normal(0, I) and the second is moved by minus
    the shift: the same densities, so the same bounds.

    Parameters
    ----------
    mask_prior_beta
        ``K_2``.
    mask_initial_probability
        Inclusion probability before training.
    mask_temperature
        Of the relaxed Bernoulli.
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
        """q(z | x, covariates), moved by minus the shift."""
        state = super().encode(x, shift, covariates)
        return Normal(state.loc - shift, state.scale, validate_args=False)

    def global_posterior(self, rows: Tensor, n_particles: int) -> GlobalDraw:
        """Draw m of the perturbations in ``rows``; shift = m * mu."""
        m = self.masks.sample(rows, n_particles)
        kl_m = self.mask_prior.kl_of_rows(self.kl_estimator, self.masks.log_odds(rows), m)
        return GlobalDraw(m * self.means[rows], {"masks": kl_m})

    @torch.no_grad()
    def shift_moments(self, rows: Tensor, n_samples: int = 500) -> tuple[Tensor, Tensor]:
        """Posterior mean and sd of m * mu, exact."""
        on = self.masks.inclusion_probability[rows]
        means = self.means[rows]
        return on * means, (on * (1 - on)).sqrt() * means.abs()

    def diagnostics(self) -> dict[str, float]:
        """Share of masks that are more likely on."""
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
