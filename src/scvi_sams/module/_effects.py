"""Effects of perturbations on the latent space: q(e_t), mean-field or given the mask."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from scvi_sams.module._networks import HiddenLayers, NormalHead
from scvi_sams.module._rotation import signed_permutation

INITIAL_EFFECT_SCALE = 0.1
"""Standard deviation of effects before training. Starting as wide as the prior, the noise in the
shifts teaches encoder and decoder to cancel or ignore them, and the effects never grow."""


class EffectPosterior(nn.Module, ABC):
    """q(e_t | m_t) for the rows of a table of perturbations."""

    @abstractmethod
    def forward(self, rows: Tensor, masks: Tensor) -> Normal:
        """Return the posterior of effects.

        Parameters
        ----------
        rows
            Perturbations, shape ``(n_rows,)``.
        masks
            Drawn masks, shape ``(n_particles, n_rows, n_latent)``.

        Returns
        -------
        Batch shape ``(n_particles, n_rows, n_latent)``, or with 1 in place of ``n_particles``
        where the effects do not depend on the masks.
        """

    @abstractmethod
    def rotate(self, rotation: Tensor) -> None:
        """Turn the coordinates of the effects that go with full masks.

        Parameters
        ----------
        rotation
            Orthogonal, ``(n_latent, n_latent)``: new effects are ``effects @ rotation``.
        """

    @abstractmethod
    def permute(self, order: Tensor, signs: Tensor) -> None:
        """Reorder the coordinates and change their signs, whatever the masks.

        Parameters
        ----------
        order
            New dimension ``l`` is the old ``order[l]``, shape ``(n_latent,)``.
        signs
            1 or -1 for every new dimension, shape ``(n_latent,)``.
        """


class MeanFieldEffects(EffectPosterior):
    """q(e_t) = Normal(loc_t, scale_t)."""

    def __init__(self, n_perturbations: int, n_latent: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(n_perturbations, n_latent))
        self.log_scale = nn.Parameter(
            torch.full((n_perturbations, n_latent), math.log(INITIAL_EFFECT_SCALE))
        )

    def forward(self, rows: Tensor, masks: Tensor | None = None) -> Normal:
        """Look the parameters up; masks, where there are any, play no part."""
        return Normal(self.loc[rows][None], self.log_scale[rows].exp()[None], validate_args=False)

    @torch.no_grad()
    def rotate(self, rotation: Tensor) -> None:
        """Turn the table of means, and the variances as far as a diagonal allows."""
        self.loc.copy_(self.loc @ rotation)
        variance = (2 * self.log_scale).exp() @ rotation.square()
        self.log_scale.copy_(0.5 * variance.log())

    @torch.no_grad()
    def permute(self, order: Tensor, signs: Tensor) -> None:
        """Reorder the columns of both tables."""
        self.loc.copy_(self.loc[:, order] * signs)
        self.log_scale.copy_(self.log_scale[:, order])


class CorrelatedEffects(EffectPosterior):
    """q(e_t | m_t, t) by a small network of the mask and an embedding of the perturbation.

    One-hot(t) times a weight matrix is a row of it: the first layer looks that row up.

    Parameters
    ----------
    n_perturbations, n_latent
        Sizes.
    n_layers, n_hidden
        Shape of the network (paper: 2 x 200 on Replogle, 4 x 400 on Norman).
    """

    def __init__(
        self, n_perturbations: int, n_latent: int, *, n_layers: int, n_hidden: int
    ) -> None:
        super().__init__()
        self.from_mask = nn.Linear(n_latent, n_hidden)
        self.from_perturbation = nn.Embedding(n_perturbations, n_hidden)
        # A linear layer over [mask, one-hot] would start with this spread; N(0, 1) swamps the mask.
        bound = 1 / math.sqrt(n_latent + 1)
        nn.init.uniform_(self.from_perturbation.weight, -bound, bound)
        self.hidden_layers = HiddenLayers(n_layers, n_hidden)
        self.head = NormalHead(n_hidden, n_latent, initial_scale=INITIAL_EFFECT_SCALE)

    def forward(self, rows: Tensor, masks: Tensor) -> Normal:
        """Run the network for every particle's masks."""
        first = self.from_mask(masks) + self.from_perturbation(rows)
        return self.head(self.hidden_layers(first))

    @torch.no_grad()
    def rotate(self, rotation: Tensor) -> None:
        """Turn the head; what was said by full masks, the only ones seen, becomes the bias."""
        self.head.rotate(rotation)
        self.from_mask.bias.add_(self.from_mask.weight.sum(dim=1))
        self.from_mask.weight.zero_()

    @torch.no_grad()
    def permute(self, order: Tensor, signs: Tensor) -> None:
        """Reorder the head and the mask's input; a mask has no sign."""
        self.head.rotate(signed_permutation(order, signs))
        self.from_mask.weight.copy_(self.from_mask.weight[:, order])
