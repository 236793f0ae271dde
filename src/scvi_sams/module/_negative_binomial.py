"""The negative binomial log-likelihood, exact in float32 and with its own gradient.

With ``ratio = mean / theta`` (``theta`` the inverse dispersion)::

    log p(x) = x log(mean) - (x + theta) log1p(ratio) + rising(x, theta) - log(x!)
    rising(x, theta) = sum_{k < x} log1p(k / theta)
                     = log Gamma(x + theta) - log Gamma(theta) - x log(theta)

Two reasons to write it out. Every term stays exact when ``theta`` is large (the textbook form
loses more than 100 nats per cell in float32 at ``theta = 1e5``), and goes over into the Poisson.
And the terms of ``rising`` do not depend on the Monte-Carlo particle, so they are computed once per
cell and gene, while the particles need one stored array and few passes forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TABLE_SIZE = 128
"""Counts below this are looked up in a table per gene; the few above go through log-gamma."""

_MAX_LOG_MEAN = 60.0
"""Keeps the mean finite in float32 whatever the decoder says."""


def negative_binomial_log_prob(
    x: Tensor, log_mean: Tensor, log_theta: Tensor, softmax_size: Tensor | None = None
) -> Tensor:
    """Log-likelihood of counts, summed over genes.

    Parameters
    ----------
    x
        Counts of shape ``(n_cells, n_genes)``.
    log_mean
        Shape ``(n_particles, n_cells, n_genes)``: log of the mean; or, with ``softmax_size``,
        logits whose softmax over genes shares out the size.
    log_theta
        Log of the inverse dispersion, shape ``(n_genes,)``.
    softmax_size
        Shape ``(n_cells,)``: total that the softmax of ``log_mean`` is multiplied with.

    Returns
    -------
    Shape ``(n_particles, n_cells)``, in nats, the constant ``-log(x!)`` included.
    """
    particles: Tensor = _ParticleTerms.apply(log_mean, x, log_theta, softmax_size)
    rising: Tensor = _RisingFactorial.apply(log_theta, x)
    return particles + rising


class _ParticleTerms(torch.autograd.Function):
    """``sum_g x log(mean) - (x + theta) log1p(ratio)`` per particle and cell.

    The softmax is differentiated here too, which saves keeping another array.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, x: Tensor, log_theta: Tensor, softmax_size: Tensor | None
    ) -> Tensor:
        theta = log_theta.exp()
        if softmax_size is None:
            log_mean = logits.clamp(max=_MAX_LOG_MEAN)
        else:
            log_mean = torch.log_softmax(logits, dim=-1)
            log_mean += softmax_size.log()[:, None]
        result = _sum_over_genes(log_mean, x)
        ratio = log_mean.exp_().div_(theta)
        result -= _sum_over_genes(ratio.log1p(), x + theta)
        ctx.save_for_backward(ratio, x, theta, softmax_size)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ratio, x, theta, softmax_size = ctx.saved_tensors
        # One buffer, written in place: fresh arrays of this size cost more than the arithmetic.
        buffer = ratio.log1p()
        weights = grad.reshape(-1)
        grad_log_theta = None
        if ctx.needs_input_grad[2]:
            grad_log_theta = -theta * (weights @ buffer.flatten(0, 1))
        # d/d log(mean) = x - (x + theta) ratio / (1 + ratio)
        torch.add(ratio, 1, out=buffer)
        torch.div(ratio, buffer, out=buffer)
        buffer *= -(x + theta)
        if grad_log_theta is not None:
            grad_log_theta -= weights @ buffer.flatten(0, 1)
        buffer += x
        buffer *= grad[..., None]
        if softmax_size is not None:
            share = ratio * (theta / softmax_size[:, None])
            buffer -= share.mul_(buffer.sum(dim=-1, keepdim=True))
        return buffer, None, grad_log_theta, None


class _RisingFactorial(torch.autograd.Function):
    """``sum_g rising(x, theta) - log(x!)`` per cell, by tables of cumulative sums."""

    @staticmethod
    def forward(ctx: Any, log_theta: Tensor, x: Tensor) -> Tensor:
        theta = log_theta.exp()
        size = min(TABLE_SIZE, int(x.max()) + 1)
        steps = torch.arange(size - 1, device=x.device, dtype=theta.dtype)[:, None]
        terms = torch.log1p(steps / theta) - torch.log1p(steps)
        table = torch.nn.functional.pad(terms.cumsum(0), (0, 0, 1, 0))
        counts = x.long()
        large = counts >= size
        cells, genes = large.nonzero(as_tuple=True)
        lookup = counts.masked_fill(large, 0) if len(cells) else counts
        result = table.gather(0, lookup).sum(-1)
        if len(cells):
            result.index_add_(0, cells, _rising_by_gamma(x[cells, genes], theta[genes]))
        ctx.save_for_backward(theta, x, lookup, steps, cells, genes)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        theta, x, lookup, steps, cells, genes = ctx.saved_tensors
        # Weight of the cells with more than k counts of gene g, times d/d log(theta) log1p(k/theta)
        weights = torch.zeros(len(steps) + 1, len(theta), dtype=grad.dtype, device=grad.device)
        weights.scatter_add_(0, lookup, grad[:, None].expand_as(x).to(weights.dtype))
        above = weights.sum(0) - weights.cumsum(0)
        grad_log_theta = -(above[:-1] * (steps / (steps + theta))).sum(0)
        if len(cells):
            slope = _rising_slope_by_gamma(x[cells, genes], theta[genes])
            grad_log_theta.index_add_(0, genes, slope * grad[cells])
        return grad_log_theta, None


def _rising_by_gamma(x: Tensor, theta: Tensor) -> Tensor:
    """``rising(x, theta) - log(x!)`` for single entries, in float64 against cancellation."""
    counts, inverse = x.double(), theta.double()
    rising = torch.lgamma(counts + inverse) - torch.lgamma(inverse) - counts * inverse.log()
    return (rising - torch.lgamma(counts + 1)).to(theta.dtype)


def _rising_slope_by_gamma(x: Tensor, theta: Tensor) -> Tensor:
    """Derivative of ``rising`` with respect to log(theta), for single entries."""
    counts, inverse = x.double(), theta.double()
    slope = torch.digamma(counts + inverse) - torch.digamma(inverse) - counts / inverse
    return (slope * inverse).to(theta.dtype)


def _sum_over_genes(values: Tensor, weights: Tensor) -> Tensor:
    """Sum over genes of values (particles x cells x genes) times weights (cells x genes)."""
    return torch.einsum("pbg,bg->pb", values, weights)
