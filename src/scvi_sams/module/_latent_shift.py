"""Modules in which perturbations add to the latent state."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.distributions import Normal

from scvi_sams.module._perturbation_module import PerturbationModule
from scvi_sams.module._rotation import canonical_order, signed_permutation


class LatentShiftModule(PerturbationModule):
    """Modules whose perturbations add to the latent state: ``z = z_basal + sum_t d_t s_t``."""

    @property
    def n_shift(self) -> int:
        """A shift is as wide as the latent state."""
        return self.n_latent

    def encode(self, x: Tensor, shift: Tensor, covariates: Tensor | None) -> Normal:
        """q(z_basal | x, shift, covariates)."""
        return self.encoder(self.standardised(x), shift, covariates)

    def decode_hidden(self, z_basal: Tensor, shift: Tensor, covariates: Tensor | None) -> Tensor:
        """Last hidden layer of the decoder at ``z = z_basal + shift``."""
        return self.decoder(z_basal + shift, covariates)

    @torch.no_grad()
    def order_latents(self) -> None:
        """Strongest shifts first, positive on average; the model itself does not change."""
        order, signs = canonical_order(self.shift_moments(self.effect_rows.measured)[0])
        rotation = signed_permutation(order, signs)
        self.encoder.rotate(rotation)
        self.decoder.rotate(rotation)
        self.permute_shifts(order, signs)

    @abstractmethod
    def permute_shifts(self, order: Tensor, signs: Tensor) -> None:
        """Reorder coordinates: the new ``l`` is the old ``order[l]``, times ``signs[l]``."""
