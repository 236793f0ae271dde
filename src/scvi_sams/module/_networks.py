"""Encoder and decoder: one hidden layer as in the paper, residual blocks where deeper."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional

_VARIANCE_FLOOR = 1e-4
"""Added to every posterior variance (paper, appendix)."""


_MAX_LOG_VARIANCE = 20.0
"""Far beyond any posterior; keeps the first steps finite where doses are in the thousands."""

_INITIAL_SENSITIVITY = 0.4
"""Of the decoder to the latent state, relative to PyTorch's initial weights. Latent dimensions then
enter one by one as they are needed and the others stay off: on a simulated screen with 30 true ones
the dense phase ended at a validation -ELBO of 3138.4 instead of 3142.4, with 32 dimensions in use
instead of more than 35. A tenth was no better there, and too slow a start for a thousand cells."""


class HiddenLayers(nn.Module):
    """Activation of a first pre-activation, then residual blocks; no normalisation, no dropout.

    Parameters
    ----------
    n_layers
        Number of hidden layers, the first (whose linear part the caller owns) included.
    n_hidden
        Width.
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
    """Mean and standard deviation of a diagonal normal: variance = exp(.) + 1e-4.

    Parameters
    ----------
    n_hidden, n_out
        Width of the input and of the distribution.
    initial_scale
        Standard deviation that the distribution has, about, before training.
    """

    def __init__(self, n_hidden: int, n_out: int, *, initial_scale: float = 1.0) -> None:
        super().__init__()
        self.loc = nn.Linear(n_hidden, n_out)
        self.log_variance = nn.Linear(n_hidden, n_out)
        with torch.no_grad():
            self.log_variance.bias.add_(2 * math.log(initial_scale))

    @torch.no_grad()
    def rotate(self, rotation: Tensor) -> None:
        """Turn the coordinates: means exactly; variances as far as a diagonal allows.

        The turned variances ``var @ rotation**2`` are no linear map of hidden units in the log, so
        the logs are averaged with the same weights instead.
        """
        for layer, weights in ((self.loc, rotation), (self.log_variance, rotation.square())):
            layer.weight.copy_(weights.T @ layer.weight)
            layer.bias.copy_(layer.bias @ weights)

    def forward(self, hidden: Tensor) -> Normal:
        """Return the distribution for hidden units of shape ``(..., n_hidden)``."""
        # One product, which is faster than two of half the width.
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

    An encoder that sees the shift predicts the cell's whole state and takes the shift away from it
    (a skip connection within the same family of posteriors). A growing effect then need not first
    wait for the encoder to make room for it: its gradient is that of the prior of z_basal, a
    regression of states on perturbations. Without it effects stay shrunken for hundreds of epochs.

    Parameters
    ----------
    n_genes, n_latent, n_covariates
        Sizes of the inputs and of the latent space.
    n_layers, n_hidden
        Shape of the network.
    sees_shift
        Whether the posterior depends on the shift that the perturbations cause.
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
        """Turn the coordinates of shift and state."""
        self.head.rotate(rotation)
        if self.from_shift is not None:
            self.from_shift.weight.copy_(self.from_shift.weight @ rotation)

    def state(
        self, x: Tensor, covariates: Tensor | None, condition: Tensor | None = None
    ) -> Normal:
        """Distribution of the latent state.

        Parameters
        ----------
        x, covariates
            As in :meth:`forward`.
        condition
            What else the first layer is given, as its product with the weights: added to the
            pre-activations, ``(n_particles or 1, n_cells, n_hidden)``.
        """
        first = self.from_x(x)
        if self.from_covariates is not None:
            first = first + self.from_covariates(covariates)
        first = first[None]
        if condition is not None:
            first = first + condition
        return self.head(self.hidden_layers(first))

    def forward(self, x: Tensor, shift: Tensor, covariates: Tensor | None) -> Normal:
        """Return the posterior.

        Parameters
        ----------
        x
            Standardised expression, ``(n_cells, n_genes)``.
        shift
            ``(n_particles, n_cells, n_latent)``.
        covariates
            ``(n_cells, n_covariates)``.

        Returns
        -------
        Batch shape ``(n_particles, n_cells, n_latent)`` if the encoder sees the shift, else
        ``(1, n_cells, n_latent)``.
        """
        if self.from_shift is None:
            return self.state(x, covariates)
        state = self.state(x, covariates, self.from_shift(shift))
        return Normal(state.loc - shift, state.scale, validate_args=False)


class Decoder(nn.Module):
    """Latent states and covariates to hidden units, and (``to_genes``) those to logits of genes.

    The last step is the caller's, as a likelihood may have a faster way than through all logits.
    """

    def __init__(
        self, n_latent: int, n_genes: int, n_covariates: int, *, n_layers: int, n_hidden: int
    ) -> None:
        super().__init__()
        self.from_z = nn.Linear(n_latent, n_hidden)
        with torch.no_grad():
            self.from_z.weight.mul_(_INITIAL_SENSITIVITY)
            self.from_z.bias.mul_(_INITIAL_SENSITIVITY)
        self.from_covariates = _covariate_layer(n_covariates, n_hidden)
        self.hidden_layers = HiddenLayers(n_layers, n_hidden)
        self.to_genes = nn.Linear(n_hidden, n_genes)

    @torch.no_grad()
    def rotate(self, rotation: Tensor) -> None:
        """Turn the coordinates of z; what is decoded stays the same."""
        self.from_z.weight.copy_(self.from_z.weight @ rotation)

    def forward(
        self, z: Tensor, covariates: Tensor | None, condition: Tensor | None = None
    ) -> Tensor:
        """Map ``z`` of shape ``(n_particles, n_cells, n_latent)`` to what ``to_genes`` reads.

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


class CovariateEncoding(nn.Module):
    """Batch and further covariates as one numeric vector per cell.

    Parameters
    ----------
    n_batch
        Number of batches; a single batch adds nothing.
    n_categories
        Number of categories of every categorical covariate.
    n_continuous
        Number of continuous covariates.
    """

    def __init__(self, n_batch: int, n_categories: list[int], n_continuous: int) -> None:
        super().__init__()
        self.category_counts = ([n_batch] if n_batch > 1 else []) + list(n_categories)
        self.uses_batch = n_batch > 1
        self.n_out = sum(self.category_counts) + n_continuous

    def forward(
        self, batch: Tensor, categorical: Tensor | None, continuous: Tensor | None
    ) -> Tensor | None:
        """Return ``(n_cells, n_out)``, or ``None`` where there are no covariates."""
        if not self.n_out:
            return None
        columns = [batch] if self.uses_batch else []
        if categorical is not None:
            columns += list(torch.split(categorical, 1, dim=1))
        parts = [
            functional.one_hot(column.squeeze(1).long(), count).float()
            for column, count in zip(columns, self.category_counts, strict=True)
        ]
        if continuous is not None:
            parts.append(continuous.float())
        return torch.cat(parts, dim=1)

    def in_batch(self, covariates: Tensor | None, batch: int | None) -> Tensor | None:
        """Covariates of the same cells, all of one batch; ``None`` leaves each in its own."""
        if batch is None or covariates is None or not self.uses_batch:
            return covariates
        n_batch = self.category_counts[0]
        moved = covariates.clone()
        moved[:, :n_batch] = functional.one_hot(torch.tensor(batch), n_batch).to(moved)
        return moved
