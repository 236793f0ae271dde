"""Networks and the normal posteriors that they parametrise: encoder, decoder, and q(e_t | m_t).

One hidden layer as in the paper; further layers are residual blocks.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional

from scvi_sams._torch import generator
from scvi_sams.module._rotation import signed_permutation

_VARIANCE_FLOOR = 1e-4
"""Added to every posterior variance (paper, appendix)."""

_MAX_LOG_VARIANCE = 20.0
"""Far beyond any posterior; keeps the first steps finite if doses are in the thousands."""

_INITIAL_SENSITIVITY = 0.4
"""Scale of the decoder's latent input weights, relative to PyTorch's initial weights. Latent
dimensions are then used one by one as needed, and the others stay off: on a simulated screen with
30 true ones the dense phase ended at a validation -ELBO of 3138.4 instead of 3142.4, with 32
dimensions in use instead of more than 35. A tenth was no better there, and too slow at the
beginning for a thousand cells."""

INITIAL_EFFECT_SCALE = 0.1
"""SD of effects before training. If it were that of the prior, noise in the shifts would teach
encoder and decoder to cancel or ignore them, and the effects would never grow."""


class HiddenLayers(nn.Module):
    """Activation of a first pre-activation, then residual blocks; no normalisation, no dropout.

    ``n_layers`` includes the first layer, whose linear part belongs to the caller.
    """

    def __init__(self, n_layers: int, n_hidden: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(n_hidden, n_hidden) for _ in range(n_layers - 1))

    def forward(self, first: Tensor) -> Tensor:
        """Map pre-activations of the first layer, shape ``(..., n_hidden)``, to the last layer."""
        hidden = functional.leaky_relu(first)
        for block in self.blocks:
            hidden = hidden + functional.leaky_relu(block(hidden), inplace=True)
        return hidden


class NormalHead(nn.Module):
    """Mean and SD of a diagonal normal: variance = exp(.) + 1e-4.

    ``initial_scale`` is its approximate SD before training.
    """

    def __init__(self, n_hidden: int, n_out: int, *, initial_scale: float = 1.0) -> None:
        super().__init__()
        self.loc = nn.Linear(n_hidden, n_out)
        self.log_variance = nn.Linear(n_hidden, n_out)
        with torch.no_grad():
            self.log_variance.bias.add_(2 * math.log(initial_scale))

    @torch.no_grad()
    def rotate(self, rotation: Tensor) -> None:
        """Rotate the coordinates: means exactly; variances as far as a diagonal allows.

        The rotated variances ``var @ rotation**2`` are not linear in the hidden units on the log
        scale, so the logs are averaged with the same weights instead.
        """
        for layer, weights in ((self.loc, rotation), (self.log_variance, rotation.square())):
            layer.weight.copy_(weights.T @ layer.weight)
            layer.bias.copy_(layer.bias @ weights)

    def forward(self, hidden: Tensor) -> Normal:
        """Return the distribution for hidden units of shape ``(..., n_hidden)``."""
        # One product is faster than two of half the width.
        layers = (self.loc, self.log_variance)
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        loc, log_variance = functional.linear(hidden, weight, bias).chunk(2, dim=-1)
        variance = log_variance.clamp(max=_MAX_LOG_VARIANCE).exp() + _VARIANCE_FLOOR
        return Normal(loc, variance.sqrt(), validate_args=False)


class BasalEncoder(nn.Module):
    """q(z_basal | x, covariates), or q(z_basal | x, shift, covariates).

    The first layer is a sum of products with x, shift and covariates: x is the same for every
    particle, so its product, by far the largest, is computed once.

    An encoder with the shift as input predicts the cell's full state and subtracts the shift (a
    skip connection within the same family of posteriors). A growing effect then does not have to
    wait for the encoder to adapt: its gradient is that of the prior of z_basal, a regression of
    states on perturbations. Without this, effects stay shrunken for hundreds of epochs.
    """

    def __init__(
        self,
        n_genes: int,
        n_latent: int,
        n_covariates: int,
        *,
        n_layers: int,
        n_hidden: int,
        sees_shift: bool,
    ) -> None:
        super().__init__()
        self.from_x = nn.Linear(n_genes, n_hidden)
        self.from_shift = nn.Linear(n_latent, n_hidden, bias=False) if sees_shift else None
        self.from_covariates = _covariate_layer(n_covariates, n_hidden)
        self.hidden_layers = HiddenLayers(n_layers, n_hidden)
        self.head = NormalHead(n_hidden, n_latent)

    @torch.no_grad()
    def rotate(self, rotation: Tensor) -> None:
        """Rotate the coordinates of shift and state."""
        self.head.rotate(rotation)
        if self.from_shift is not None:
            self.from_shift.weight.copy_(self.from_shift.weight @ rotation)

    @torch.no_grad()
    def translate(self, origin: Tensor) -> None:
        """Move the origin of states to a point, which is subtracted from shifts.

        Basal states of cells with one perturbation stay the same.
        """
        if self.from_shift is not None:
            self.head.loc.bias.sub_(origin)
            self.from_x.bias.add_(self.from_shift.weight @ origin)

    def state(
        self, x: Tensor, covariates: Tensor | None, condition: Tensor | None = None
    ) -> Normal:
        """Distribution of the latent state; ``x`` and ``covariates`` as in :meth:`forward`.

        ``condition``, ``(n_particles or 1, n_cells, n_hidden)``, is a further input of the first
        layer, multiplied by its weights: it is added to the pre-activations.
        """
        first = self.from_x(x)
        if self.from_covariates is not None:
            first = first + self.from_covariates(covariates)
        first = first[None]
        if condition is not None:
            first = first + condition
        return self.head(self.hidden_layers(first))

    def forward(self, x: Tensor, shift: Tensor, covariates: Tensor | None) -> Normal:
        """Return the posterior, of batch shape ``(n_particles, n_cells, n_latent)``.

        ``x`` is standardised expression, ``(n_cells, n_genes)``, ``shift``
        ``(n_particles, n_cells, n_latent)``, ``covariates`` ``(n_cells, n_covariates)``. An encoder
        without the shift as input has one posterior for all particles.
        """
        if self.from_shift is None:
            return self.state(x, covariates)
        state = self.state(x, covariates, self.from_shift(shift))
        return Normal(state.loc - shift, state.scale, validate_args=False)


class Decoder(nn.Module):
    """Latent states and covariates to hidden units, and (``to_genes``) hidden units to logits.

    The last step is left to the caller, because a likelihood may have a faster way than logits.
    """

    def __init__(
        self, n_latent: int, n_outputs: int, n_covariates: int, *, n_layers: int, n_hidden: int
    ) -> None:
        super().__init__()
        self.from_z = nn.Linear(n_latent, n_hidden)
        with torch.no_grad():
            self.from_z.weight.mul_(_INITIAL_SENSITIVITY)
            self.from_z.bias.mul_(_INITIAL_SENSITIVITY)
        self.from_covariates = _covariate_layer(n_covariates, n_hidden)
        self.hidden_layers = HiddenLayers(n_layers, n_hidden)
        self.to_genes = nn.Linear(n_hidden, n_outputs)

    @torch.no_grad()
    def rotate(self, rotation: Tensor) -> None:
        """Rotate the coordinates of z; decoded values do not change."""
        self.from_z.weight.copy_(self.from_z.weight @ rotation)

    @torch.no_grad()
    def translate(self, origin: Tensor) -> None:
        """Move the origin of z; decoded values do not change."""
        self.from_z.bias.add_(self.from_z.weight @ origin)

    def forward(
        self, z: Tensor, covariates: Tensor | None, condition: Tensor | None = None
    ) -> Tensor:
        """Map ``z`` of shape ``(n_particles, n_cells, n_latent)`` to the input of ``to_genes``.

        ``condition`` is added to the first layer's pre-activations, as in
        :meth:`BasalEncoder.state`.
        """
        first = self.from_z(z)
        if self.from_covariates is not None:
            first = first + self.from_covariates(covariates)
        if condition is not None:
            first = first + condition
        return self.hidden_layers(first)


def _covariate_layer(n_covariates: int, n_hidden: int) -> nn.Linear | None:
    return nn.Linear(n_covariates, n_hidden, bias=False) if n_covariates else None


class EffectPosterior(nn.Module, ABC):
    """q(e_t | m_t) for the rows of a table of perturbations."""

    @abstractmethod
    def forward(self, rows: Tensor, masks: Tensor) -> Normal:
        """Return the posterior of the effects of perturbations ``rows``, ``(n_rows,)``.

        Its batch shape is that of the sampled ``masks``, ``(n_particles, n_rows, n_latent)``, or
        with 1 instead of ``n_particles`` if the effects do not depend on them.
        """

    @abstractmethod
    def rotate(self, rotation: Tensor) -> None:
        """Rotate effects with all masks on: they become ``effects @ rotation``."""

    @abstractmethod
    def translate(self, origin: Tensor) -> None:
        """Subtract a vector of shape ``(n_latent,)`` from every effect."""

    @abstractmethod
    def permute(self, order: Tensor, signs: Tensor) -> None:
        """Reorder coordinates: the new ``l`` is the old ``order[l]``, times ``signs[l]``."""


class MeanFieldEffects(EffectPosterior):
    """q(e_t) = Normal(loc_t, scale_t)."""

    def __init__(self, n_perturbations: int, n_latent: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(n_perturbations, n_latent))
        self.log_scale = nn.Parameter(
            torch.full((n_perturbations, n_latent), math.log(INITIAL_EFFECT_SCALE))
        )

    def forward(self, rows: Tensor, masks: Tensor | None = None) -> Normal:
        """Look the parameters up; masks are ignored."""
        return Normal(self.loc[rows][None], self.log_scale[rows].exp()[None], validate_args=False)

    @torch.no_grad()
    def rotate(self, rotation: Tensor) -> None:
        """Rotate the table of means, and the variances as far as a diagonal allows."""
        self.loc.copy_(self.loc @ rotation)
        variance = (2 * self.log_scale).exp() @ rotation.square()
        self.log_scale.copy_(0.5 * variance.log())

    @torch.no_grad()
    def translate(self, origin: Tensor) -> None:
        """Subtract it from the table of means."""
        self.loc.sub_(origin)

    @torch.no_grad()
    def permute(self, order: Tensor, signs: Tensor) -> None:
        """Reorder the columns of both tables."""
        self.loc.copy_(self.loc[:, order] * signs)
        self.log_scale.copy_(self.log_scale[:, order])


class CorrelatedEffects(EffectPosterior):
    """q(e_t | m_t, t) by a small network of the mask and an embedding of the perturbation.

    One-hot(t) times a weight matrix is a row of it, so the first layer looks that row up. The
    paper's network has 2 layers of 200 units on Replogle, 4 of 400 on Norman.
    """

    def __init__(
        self, n_perturbations: int, n_latent: int, *, n_layers: int, n_hidden: int
    ) -> None:
        super().__init__()
        self.from_mask = nn.Linear(n_latent, n_hidden)
        self.from_perturbation = nn.Embedding(n_perturbations, n_hidden)
        # The initial SD of a linear layer over [mask, one-hot]; N(0, 1) would dominate the mask.
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
        """Rotate the head; the contribution of full masks, the only ones seen, becomes a bias."""
        self.head.rotate(rotation)
        self.from_mask.bias.add_(self.from_mask.weight.sum(dim=1))
        self.from_mask.weight.zero_()

    @torch.no_grad()
    def translate(self, origin: Tensor) -> None:
        """Subtract it from the head's bias."""
        self.head.loc.bias.sub_(origin)

    @torch.no_grad()
    def permute(self, order: Tensor, signs: Tensor) -> None:
        """Reorder the head and the mask's input; a mask has no sign."""
        self.head.rotate(signed_permutation(order, signs))
        self.from_mask.weight.copy_(self.from_mask.weight[:, order])


def standard_normals(n_particles: int, like: Tensor) -> Tensor:
    """Standard normals of shape ``(n_particles, *like.shape[1:])``."""
    return torch.randn(
        (n_particles, *like.shape[1:]),
        generator=generator(like.device),
        dtype=like.dtype,
        device=like.device,
    )


def draw_particles(posterior: Normal, n_particles: int) -> Tensor:
    """Sample ``(n_particles, ...)`` from a posterior of batch shape ``(n_particles or 1, ...)``."""
    return posterior.loc + posterior.scale * standard_normals(n_particles, posterior.loc)


def divergence_from_prior(posterior: Normal, prior_scale: float | Tensor) -> Tensor:
    """KL(posterior || Normal(0, prior_scale)), summed over the last dimension, in nats.

    ``sum_l ((loc^2 + sd^2) / prior_scale^2 - 1) / 2 - log(sd / prior_scale)``
    """
    # `torch.distributions.kl_divergence` would need arrays filled with the prior's zeros and ones.
    squares = (posterior.loc.square() + posterior.variance) / prior_scale**2 - 1
    log_scale = prior_scale.log() if isinstance(prior_scale, Tensor) else math.log(prior_scale)
    return 0.5 * squares.sum(-1) - (posterior.scale.log() - log_scale).sum(-1)


def log_ratio_to_prior(
    posterior: Normal, draws: Tensor, prior_scale: float | Tensor = 1.0
) -> Tensor:
    """``log q(draws) - log p(draws)``, summed over the last dimension: its mean is the KL."""
    prior = Normal(
        torch.zeros_like(posterior.loc),
        torch.zeros_like(posterior.scale) + prior_scale,
        validate_args=False,
    )
    return (posterior.log_prob(draws) - prior.log_prob(draws)).sum(-1)
