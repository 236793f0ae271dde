"""CPA-VAE (Bereket & Karaletsos 2023): SAMS-VAE whose masks are all one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scvi_sams.module._networks import MeanFieldEffects, draw_particles
from scvi_sams.module._perturbation_module import GlobalDraw, LatentShiftModule
from scvi_sams.module._settings import PositiveNumber


class CPAVAEModule(LatentShiftModule):
    """Generative model and guide of CPA-VAE.

    Globals, for perturbation t::

        e_t ~ Normal(0, beta^2 I)       q(e_t) = Normal(loc_t, scale_t)
        shift_t = e_t

    Parameters
    ----------
    effect_prior_scale
        ``beta``, the standard deviation of effects a priori.
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
        """Draw e of the perturbations in ``rows``."""
        q_e = self.effects(rows)
        e = draw_particles(q_e, n_particles)
        kl_e = self.normal_kl(q_e, e, self.effect_prior_scale)
        return GlobalDraw(e, {"effects": kl_e})

    @torch.no_grad()
    def shift_moments(self, rows: Tensor, n_samples: int = 500) -> tuple[Tensor, Tensor]:
        """Posterior mean and sd of e."""
        q_e = self.effects(rows)
        return q_e.loc[0], q_e.scale[0]

    def permute_shifts(self, order: Tensor, signs: Tensor) -> None:
        """Reorder effects."""
        self.effects.permute(order, signs)

    def table_parameters(self) -> list[torch.nn.Parameter]:
        """Add the table of effects."""
        return super().table_parameters() + list(self.effects.parameters())
