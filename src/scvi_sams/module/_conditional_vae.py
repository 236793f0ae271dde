"""Conditional VAE: encoder and decoder are given the perturbations, nothing is shared or sparse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from scvi_sams.module._perturbation_module import GlobalDraw, PerturbationModule


class ConditionalVAEModule(PerturbationModule):
    """decoder(z, d) and encoder(x, d), d being the dosages of the cell.

    d times the first layer's weights is the dosed sum of the rows of its perturbations, so those
    rows are what this module keeps, and a shift is a row of both: S = 2 n_hidden. They are weights
    of the networks and take their learning rate. There are no global variables. Rows start at zero,
    so that a perturbation that no training cell carries changes nothing.

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
        """A shift is what goes to the encoder's first layer, then to the decoder's."""
        return self.encoder_rows.shape[1] + self.decoder_rows.shape[1]

    def global_posterior(self, rows: Tensor, n_particles: int) -> GlobalDraw:
        """Look the rows up; they are parameters, the same for every particle."""
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
