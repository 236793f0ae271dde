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

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TABLE_SIZE = 128
"""Counts below this are looked up in a table per gene; the few above go through log-gamma."""

_VALUES_PER_CHUNK = 2**17
"""Half a megabyte in float32; a quarter and a whole one were as fast."""

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
        ratio = torch.empty_like(logits)
        result = logits.new_empty(logits.shape[:-1])
        for particles, cells in _chunks(logits):
            counts, part = x[cells], ratio[particles, cells]
            if softmax_size is None:
                torch.clamp(logits[particles, cells], max=_MAX_LOG_MEAN, out=part)
                terms = _sum_over_genes(part, counts)
                part.exp_()
            else:
                chunk, size = logits[particles, cells], softmax_size[cells]
                torch.sub(chunk, chunk.amax(-1, keepdim=True), out=part)
                exponential = part.exp()
                total = exponential.sum(-1, keepdim=True)
                # The logarithm of a share, as a difference of large sums would not be exact.
                part -= total.log()
                terms = _sum_over_genes(part, counts) + counts.sum(-1) * size.log()
                torch.mul(exponential, size[:, None] / total, out=part)
            part /= theta
            result[particles, cells] = terms - _sum_over_genes(part.log1p(), counts + theta)
        ctx.save_for_backward(ratio, x, theta, softmax_size)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ratio, x, theta, softmax_size = ctx.saved_tensors
        grad_logits = torch.empty_like(ratio)
        grad_log_theta = torch.zeros_like(theta) if ctx.needs_input_grad[2] else None
        for particles, cells in _chunks(ratio):
            counts, part, weights = x[cells], ratio[particles, cells], grad[particles, cells]
            # d/d log(mean) = x - (x + theta) ratio / (1 + ratio), in place
            slope = torch.div(part, part + 1, out=grad_logits[particles, cells])
            slope *= counts + theta
            if grad_log_theta is not None:
                grad_log_theta += _sum_over_cells(slope, weights)
                grad_log_theta -= theta * _sum_over_cells(part.log1p(), weights)
            torch.sub(counts, slope, out=slope)
            slope *= weights[..., None]
            if softmax_size is not None:
                share = part * (theta / softmax_size[cells, None])
                slope -= share.mul_(slope.sum(dim=-1, keepdim=True))
        return grad_logits, None, grad_log_theta, None


def _chunks(values: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of particles and cells whose values fit into a processor's cache.

    Passes over such a chunk cost half of what passes over everything do, where most of the time
    goes to memory. On an accelerator everything is one chunk.
    """
    n_particles, n_cells, n_genes = values.shape
    if values.device.type != "cpu":
        yield slice(0, n_particles), slice(0, n_cells)
        return
    n_rows = max(1, _VALUES_PER_CHUNK // n_genes)
    for start in range(0, n_cells, n_rows):
        for particle in range(n_particles):
            yield slice(particle, particle + 1), slice(start, start + n_rows)


class _RisingFactorial(torch.autograd.Function):
    """``sum_g rising(x, theta) - log(x!)`` per cell, by tables of cumulative sums.

    Counts beyond the tables are looked up as the last one, and corrected.
    """

    @staticmethod
    def forward(ctx: Any, log_theta: Tensor, x: Tensor) -> Tensor:
        theta = log_theta.exp()
        last = min(TABLE_SIZE, int(x.max()) + 1) - 1
        steps = torch.arange(last, device=x.device, dtype=theta.dtype)[:, None]
        table = _cumulative(torch.log1p(steps / theta) - torch.log1p(steps))
        result = torch.cat([_look_up(table, x[cells]).sum(-1) for cells in _chunks_of_cells(x)])
        cells, genes = (x > last).nonzero(as_tuple=True)
        if len(cells):
            exact = _rising_by_gamma(x[cells, genes], theta[genes])
            result.index_add_(0, cells, exact - table[last, genes])
        ctx.save_for_backward(theta, x, steps, cells, genes)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        theta, x, steps, cells, genes = ctx.saved_tensors
        # d/d log(theta) log1p(k / theta) = -k / (k + theta)
        table = _cumulative(-steps / (steps + theta))
        grad_log_theta = torch.zeros_like(theta)
        for part in _chunks_of_cells(x):
            grad_log_theta += grad[part] @ _look_up(table, x[part])
        if len(cells):
            exact = _rising_slope_by_gamma(x[cells, genes], theta[genes])
            grad_log_theta.index_add_(0, genes, (exact - table[-1, genes]) * grad[cells])
        return grad_log_theta, None


def _chunks_of_cells(x: Tensor) -> Iterator[slice]:
    return (cells for _, cells in _chunks(x[None]))


def _cumulative(terms: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... rows."""
    return torch.nn.functional.pad(terms.cumsum(0), (0, 0, 1, 0))


def _look_up(table: Tensor, x: Tensor) -> Tensor:
    """Entry of every cell and gene in its gene's column, at row x or the last."""
    return table.gather(0, x.long().clamp_(max=len(table) - 1))


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
    # Not as a product of matrices: torch adds up the terms of small ones one by one.
    return (values * weights).sum(dim=-1)


def _sum_over_cells(values: Tensor, weights: Tensor) -> Tensor:
    """Sum over particles and cells of values (.. x genes) times weights (particles x cells)."""
    return weights.reshape(-1) @ values.reshape(-1, values.shape[-1])
