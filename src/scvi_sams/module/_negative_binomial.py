"""The negative binomial log-likelihood, exact in float32 and with its own gradient.

With ``ratio = mean / theta`` (``theta`` the inverse dispersion)::

    log p(x) = x log(mean) - (x + theta) log1p(ratio) + rising(x, theta) - log(x!)

Two reasons to write it out. Every term stays exact when ``theta`` is large (the textbook form
loses more than 100 nats per cell in float32 at ``theta = 1e5``), and goes over into the Poisson.
And the terms of ``rising`` do not depend on the Monte-Carlo particle, so they are computed once per
cell and gene, while the particles need few passes over few arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scvi_sams.module._chunks import chunks_of_cells, chunks_of_particles
from scvi_sams.module._rising_factorial import RisingFactorialTable, rising_factorial

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
    return particles + rising_factorial(log_theta, x)


def mean_decoded_log_prob(
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    log_theta: Tensor,
    size: Tensor,
    *,
    softmax: bool,
) -> tuple[Tensor, Tensor]:
    """Log-likelihood of counts, given what the decoder's last layer reads instead of its output.

    The output, of shape ``(n_particles, n_cells, n_genes)``, is by far the largest array of a
    training step, and needs two more of its size: the likelihood's, and its gradient. Here none of
    them exists. Gradients are taken while a chunk of cells is at hand, which the mean allows: every
    particle and cell weighs the same, whatever comes after.

    Parameters
    ----------
    x
        Counts of shape ``(n_cells, n_genes)``.
    hidden
        Shape ``(n_particles, n_cells, n_hidden)``.
    weight, bias
        Of the last layer, ``(n_genes, n_hidden)`` and ``(n_genes,)``.
    log_theta
        Log of the inverse dispersion, shape ``(n_genes,)``.
    size
        Of every cell, shape ``(n_cells,)``.
    softmax
        Whether a softmax over genes shares out the size; otherwise rates are multiplied with it.

    Returns
    -------
    Mean over particles and cells, in nats, the constant ``-log(x!)`` included; and the value of
    each, shape ``(n_particles, n_cells)``, which has no gradient.
    """
    # In full precision under automatic mixed precision too: a rate is the exponential of a logit.
    with torch.autocast(x.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _MeanOfDecoded.apply(
            hidden.to(weight.dtype),
            weight,
            bias,
            log_theta,
            x,
            size,
            softmax,
            torch.is_grad_enabled(),
        )
    return result


class _ParticleTerms(torch.autograd.Function):
    """``sum_g x log(mean) - (x + theta) log1p(ratio)`` per particle and cell.

    The softmax is differentiated here too, which saves keeping another array.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, x: Tensor, log_theta: Tensor, softmax_size: Tensor | None
    ) -> Tensor:
        theta = log_theta.exp()
        ratio = torch.empty_like(logits)
        result = logits.new_empty(logits.shape[:-1])
        for cells, chunk in _chunks_of_cells(x, theta, softmax_size):
            for particles in chunks_of_particles(len(logits), x.device):
                part = ratio[particles, cells]
                part.copy_(logits[particles, cells])
                result[particles, cells] = _terms(part, torch.empty_like(part), chunk)
        ctx.save_for_backward(ratio, x, theta, softmax_size)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ratio, x, theta, softmax_size = ctx.saved_tensors
        grad_logits = torch.empty_like(ratio)
        grad_log_theta = torch.zeros_like(theta)
        for cells, chunk in _chunks_of_cells(x, theta, softmax_size):
            for particles in chunks_of_particles(len(ratio), x.device):
                part, slopes = ratio[particles, cells].clone(), grad_logits[particles, cells]
                weights = grad[particles, cells]
                torch.log1p(part, out=slopes)
                grad_log_theta += _slopes(part, slopes, chunk, weights)
                slopes *= weights[..., None]
        return grad_logits, None, grad_log_theta, None


class _MeanOfDecoded(torch.autograd.Function):
    """Mean of all terms over particles and cells, from the input of the decoder's last layer."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        log_theta: Tensor,
        x: Tensor,
        size: Tensor,
        softmax: bool,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        theta = log_theta.exp()
        each = theta.new_empty(hidden.shape[:-1])
        # Of the sum; the mean is a matter of what they are multiplied with in the end.
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
        grad_bias, grad_log_theta = torch.zeros_like(bias), torch.zeros_like(theta)
        table = RisingFactorialTable(theta, x)
        beta = 0.0
        for cells, chunk in _chunks_of_cells(x, theta, size if softmax else None):
            rising, slopes_of_theta = table.read(chunk.counts)
            if with_gradient:
                grad_log_theta += len(hidden) * slopes_of_theta.sum(0)
            for particles in chunks_of_particles(len(hidden), x.device):
                inner = hidden[particles, cells]
                part = torch.nn.functional.linear(inner, weight, bias)
                if not softmax:
                    part += size[cells, None].log()
                slopes = torch.empty_like(part)
                each[particles, cells] = _terms(part, slopes, chunk) + rising
                if with_gradient:
                    ones = torch.ones_like(part[..., 0])
                    grad_log_theta += _slopes(part, slopes, chunk, ones)
                    grad_bias += _sum_over_cells(slopes, ones)
                    # What is there before the first product counts as zero.
                    grad_weight.addmm_(slopes.flatten(0, 1).T, inner.flatten(0, 1), beta=beta)
                    beta = 1.0
                    grad_hidden[particles, cells] = slopes @ weight
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, grad_log_theta)
        ctx.mark_non_differentiable(each)
        return each.mean(), each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        n_values = ctx.saved_tensors[0].shape[:-1].numel()
        grads = (grad / n_values * saved for saved in ctx.saved_tensors)
        return *grads, None, None, None, None


class _Chunk(NamedTuple):
    """What the particles of some cells share."""

    counts: Tensor
    counts_and_theta: Tensor
    total: Tensor
    """Counts of each cell."""
    theta: Tensor
    inverse_theta: Tensor
    softmax_size: Tensor | None


def _chunks_of_cells(
    x: Tensor, theta: Tensor, softmax_size: Tensor | None
) -> Iterator[tuple[slice, _Chunk]]:
    inverse_theta = theta.reciprocal()  # half of the time of dividing by theta
    for cells in chunks_of_cells(x):
        counts = x[cells]
        size = None if softmax_size is None else softmax_size[cells]
        yield cells, _Chunk(counts, counts + theta, counts.sum(-1), theta, inverse_theta, size)


def _terms(part: Tensor, log1p: Tensor, chunk: _Chunk) -> Tensor:
    """Terms of particles and cells whose logits are ``part``.

    ``part`` becomes ``ratio``, and ``log1p`` is filled with ``log1p(ratio)``.
    """
    if chunk.softmax_size is None:
        part.clamp_(max=_MAX_LOG_MEAN)
    else:
        part -= part.amax(-1, keepdim=True)
    terms = part * chunk.counts
    part.exp_()
    per_cell: Tensor | float = 0.0
    if chunk.softmax_size is not None:
        # Of the shares first: as a difference of large sums their logarithm would not be exact.
        per_share = chunk.softmax_size / part.sum(-1)
        per_cell = chunk.total * per_share.log()
        part *= per_share[..., None]
    part *= chunk.inverse_theta
    torch.log1p(part, out=log1p)
    return terms.addcmul_(log1p, chunk.counts_and_theta, value=-1).sum(-1) + per_cell


def _slopes(ratio: Tensor, slopes: Tensor, chunk: _Chunk, weights: Tensor) -> Tensor:
    """Turn ``slopes`` from ``log1p(ratio)`` into the gradient with respect to the logits.

    ``ratio`` is spent. Returns the gradient of the weighted sum with respect to log(theta).
    """
    of_theta = -chunk.theta * _sum_over_cells(slopes, weights)
    # d/d log(mean) = x - (x + theta) ratio / (1 + ratio)
    torch.add(ratio, 1, out=slopes)
    torch.div(ratio, slopes, out=slopes)
    slopes *= chunk.counts_and_theta
    of_theta += _sum_over_cells(slopes, weights)
    torch.sub(chunk.counts, slopes, out=slopes)
    if chunk.softmax_size is not None:
        ratio *= slopes.sum(dim=-1, keepdim=True) / chunk.softmax_size[:, None]
        slopes.addcmul_(ratio, chunk.theta, value=-1)
    return of_theta


def _sum_over_cells(values: Tensor, weights: Tensor) -> Tensor:
    """Sum over particles and cells of values (.. x genes) times weights (particles x cells)."""
    return weights.reshape(-1) @ values.reshape(-1, values.shape[-1])
