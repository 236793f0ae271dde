"""The negative binomial log-likelihood, exact in float32 and with its own gradient.

With ``ratio = mean / theta`` (``theta`` the inverse dispersion)::

    log p(x) = x log(mean) - (x + theta) log1p(ratio) + rising(x, theta) - log(x!)
    rising(x, theta) = sum_{k < x} log1p(k / theta)
                     = log Gamma(x + theta) - log Gamma(theta) - x log(theta)

There are two reasons to write it out. Every term stays exact when ``theta`` is large (the textbook
form loses more than 100 nats per cell in float32 at ``theta = 1e5``), with the Poisson as the
limit. And ``rising`` does not depend on the Monte Carlo particle, so it is looked up once per cell
and gene, and the particles need few passes over few arrays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scvi_sams import _torch as _devices
from scvi_sams.kernels import _negative_binomial as loops
from scvi_sams.module._minibatch import chunks_of_cells, chunks_of_particles
from scvi_sams.module._rising_factorial import rising_factorial_table

MAX_LOG_MEAN = 60.0
"""Keeps the mean finite in float32 for any output of the decoder."""
_LOG_THETA = (-25.0, 60.0)
"""Limits within which the mean over theta, and theta, are also finite in float32."""


def negative_binomial_log_prob(
    x: Tensor, log_mean: Tensor, log_theta: Tensor, softmax_size: Tensor | None = None
) -> Tensor:
    """Log-likelihood of counts, summed over genes.

    Parameters
    ----------
    x
        Counts of shape ``(n_cells, n_genes)``. They and sizes are data: without a gradient.
    log_mean
        Shape ``(n_particles, n_cells, n_genes)``: log of the mean; or, with ``softmax_size``,
        logits whose softmax over genes divides the size.
    log_theta
        Log of the inverse dispersion, shape ``(n_genes,)``.
    softmax_size
        Shape ``(n_cells,)``: total by which the softmax of ``log_mean`` is multiplied.

    Returns
    -------
    Shape ``(n_particles, n_cells)``, in nats, the constant ``-log(x!)`` included.
    """
    x = x.detach()
    size = None if softmax_size is None else softmax_size.detach()
    result: Tensor = _LogProb.apply(log_mean, x, log_theta, size)
    return result


def mean_decoded_log_prob(
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    log_theta: Tensor,
    size: Tensor,
    direct: Tensor | None = None,
    *,
    softmax: bool,
    largest: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-likelihood of counts from the input, not the output, of the decoder's last layer.

    The output, of shape ``(n_particles, n_cells, n_genes)``, is by far the largest array of a
    training step, and requires two more of its size: the likelihood and its gradient. None of them
    is stored here. Gradients are computed while a chunk of cells is in memory, which is possible
    because the result is a mean: every particle and cell has the same weight.

    Parameters
    ----------
    x, log_theta
        As in :func:`negative_binomial_log_prob`.
    hidden
        Shape ``(n_particles, n_cells, n_hidden)``.
    weight, bias
        Parameters of the last layer, ``(n_genes, n_hidden)`` and ``(n_genes,)``.
    size
        Size of every cell, shape ``(n_cells,)``.
    direct
        Added to the output of the last layer, the same for all particles: ``(n_cells, n_genes)``,
        without a gradient.
    softmax
        Whether a softmax over genes divides the size; otherwise rates are multiplied by it.
    largest
        The largest possible count of each gene in ``x``, ``(n_genes,)``. Without it, an accelerator
        must be synchronised.

    Returns
    -------
    Mean over particles and cells, in nats, the constant ``-log(x!)`` included; and the values,
    shape ``(n_particles, n_cells)``, without a gradient.
    """
    # Full precision even with automatic mixed precision: a rate is the exponential of a logit.
    with torch.autocast(x.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _MeanOfDecoded.apply(
            hidden.to(weight.dtype),
            weight,
            bias,
            log_theta,
            x.detach(),
            size.detach(),
            direct,
            softmax,
            torch.is_grad_enabled(),
            largest,
        )
    return result


def inverse_dispersion(log_theta: Tensor) -> Tensor:
    """Exponential of the parameter, bounded in the same way as means."""
    return log_theta.clamp(*_LOG_THETA).exp()


class _LogProb(torch.autograd.Function):
    """All terms per particle and cell.

    The softmax is differentiated here too, so that only the logits are stored; the backward pass
    starts from them.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, x: Tensor, log_theta: Tensor, softmax_size: Tensor | None
    ) -> Tensor:
        theta = inverse_dispersion(log_theta)
        result = torch.empty_like(logits[..., 0])
        slopes = torch.empty_like(x, dtype=theta.dtype)
        table = rising_factorial_table(theta, x)
        for cells, chunk in chunks_with_counts(x, theta, softmax_size):
            rising, slopes[cells] = table.read(chunk.counts)
            for particles in chunks_of_particles(len(logits), x.device):
                terms = chunk.terms(logits[particles, cells].clone())
                result[particles, cells] = terms + rising
        ctx.save_for_backward(logits, x, theta, softmax_size, slopes)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, x, theta, softmax_size, slopes = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        grad_log_theta = torch.zeros_like(theta)
        for cells, chunk in chunks_with_counts(x, theta, softmax_size):
            for particles in chunks_of_particles(len(logits), x.device):
                part = logits[particles, cells].clone()
                chunk.terms_and_slopes(part, grad[particles, cells], grad_log_theta)
                grad_logits[particles, cells] = part
        return grad_logits, None, grad_log_theta + grad.sum(0) @ slopes, None


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
        direct: Tensor | None,
        softmax: bool,
        with_gradient: bool,
        largest: np.ndarray | None,
    ) -> tuple[Tensor, Tensor]:
        theta = inverse_dispersion(log_theta)
        each = theta.new_empty(hidden.shape[:-1])
        share = torch.full_like(each, 1 / each.numel())
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
        grad_bias, grad_log_theta = torch.zeros_like(bias), torch.zeros_like(theta)
        table = rising_factorial_table(theta, x, largest)
        beta = 0.0
        for cells, chunk in chunks_with_counts(x, theta, size if softmax else None):
            rising, slopes_of_theta = table.read(chunk.counts)
            if with_gradient:
                grad_log_theta += slopes_of_theta.sum(0) / len(x)
            for particles in chunks_of_particles(len(hidden), x.device):
                inner = hidden[particles, cells]
                part = torch.nn.functional.linear(inner, weight, bias)
                inner = inner.flatten(0, 1)
                if direct is not None:
                    part += direct[cells]
                if not softmax:
                    part += size[cells, None].log()
                if not with_gradient:
                    each[particles, cells] = chunk.terms(part) + rising
                    continue
                terms = chunk.terms_and_slopes(part, share[particles, cells], grad_log_theta)
                each[particles, cells] = terms + rising
                slopes = part.flatten(0, 1)
                grad_bias += slopes.sum(0)
                # The initial contents count as zero in the first product.
                grad_weight.addmm_(slopes.T, inner, beta=beta)
                beta = 1.0
                torch.mm(slopes, weight, out=grad_hidden[particles, cells].view_as(inner))
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, grad_log_theta)
        ctx.mark_non_differentiable(each)
        return each.mean(), each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * saved for saved in ctx.saved_tensors), *[None] * 6


@dataclass(frozen=True)
class Chunk(ABC):
    """Some cells, and the part of their likelihood that is the same for all particles."""

    counts: Tensor
    theta: Tensor
    inverse_theta: Tensor
    softmax_size: Tensor | None

    def of(self, cells: Tensor) -> Chunk:
        """The chunk restricted to some of its cells, by position."""
        size = None if self.softmax_size is None else self.softmax_size[cells]
        return replace(self, counts=self.counts[cells], softmax_size=size)

    @abstractmethod
    def terms(self, part: Tensor) -> Tensor:
        """Terms of particles and cells with logits ``part``, which is overwritten."""

    @abstractmethod
    def kept_terms(self, part: Tensor) -> Tensor:
        """Terms; ``part`` is unchanged."""

    @abstractmethod
    def terms_and_slopes(self, part: Tensor, weights: Tensor, of_theta: Tensor) -> Tensor:
        """Terms; ``part`` is overwritten by the gradient of their weighted sum.

        The gradient with respect to log(theta) is added to ``of_theta``.
        """


class _ChunkOfLoops(Chunk):
    """In one pass; for CPUs."""

    def terms(self, part: Tensor) -> Tensor:
        terms = torch.empty_like(part[..., 0])
        scratch = torch.empty_like(self.theta)
        for logits, written in zip(part, terms, strict=True):
            self._run(loops.terms, logits, [], [written, scratch])
        return terms

    kept_terms = terms

    def terms_and_slopes(self, part: Tensor, weights: Tensor, of_theta: Tensor) -> Tensor:
        terms = torch.empty_like(part[..., 0])
        scratch = torch.empty_like(self.theta)
        # Added at once: for large counts it cancels against the slopes of the rising factorial.
        total = torch.zeros_like(self.theta)
        for logits, of_cells, written in zip(part, weights, terms, strict=True):
            self._run(loops.terms_and_slopes, logits, [of_cells], [total, written, scratch])
        of_theta += total
        return terms

    def _run(self, loop: Any, logits: Tensor, weights: list[Tensor], written: list[Tensor]) -> None:
        """Call a loop over the cells of a particle."""
        if self.softmax_size is None:
            size = torch.ones_like(logits[:, 0])
            bounds = torch.full_like(size, MAX_LOG_MEAN)
        else:
            size, bounds = self.softmax_size, logits.amax(-1)
        given = [logits, self.counts, self.theta, self.inverse_theta, size, *weights, bounds]
        arrays = (array.numpy() for array in (*given, *written))
        loop(self.softmax_size is not None, *arrays)


class _ChunkOfTensors(Chunk):
    """In about twenty in-place passes over arrays; for accelerators."""

    def terms(self, part: Tensor) -> Tensor:
        return self._terms(part, torch.empty_like(part))

    def kept_terms(self, part: Tensor) -> Tensor:
        return self.terms(part.clone())

    def terms_and_slopes(self, part: Tensor, weights: Tensor, of_theta: Tensor) -> Tensor:
        slopes = torch.empty_like(part)
        terms = self._terms(part, slopes)
        ratio, counts_and_theta = part, self.counts + self.theta
        of_theta -= self.theta * _sum_over_cells(slopes, weights)
        # d/d log(mean) = x - (x + theta) ratio / (1 + ratio)
        torch.add(ratio, 1, out=slopes)
        torch.div(ratio, slopes, out=slopes)
        slopes *= counts_and_theta
        of_theta += _sum_over_cells(slopes, weights)
        torch.sub(self.counts, slopes, out=slopes)
        if self.softmax_size is not None:
            ratio *= slopes.sum(dim=-1, keepdim=True) / self.softmax_size[:, None]
            slopes.addcmul_(ratio, self.theta, value=-1)
        torch.mul(slopes, weights[..., None], out=part)
        return terms

    def _terms(self, part: Tensor, log1p: Tensor) -> Tensor:
        """``part`` becomes ``ratio``, and ``log1p`` is filled with ``log1p(ratio)``."""
        if self.softmax_size is None:
            part.clamp_(max=MAX_LOG_MEAN)
        else:
            part -= part.amax(-1, keepdim=True)
        terms = part * self.counts
        part.exp_()
        per_cell: Tensor | float = 0.0
        if self.softmax_size is not None:
            # Proportions first: the logarithm as a difference of large sums would not be exact.
            per_share = self.softmax_size / part.sum(-1)
            per_cell = self.counts.sum(-1) * per_share.log()
            part *= per_share[..., None]
        part *= self.inverse_theta
        torch.log1p(part, out=log1p)
        return terms.addcmul_(log1p, self.counts + self.theta, value=-1).sum(-1) + per_cell


def chunks_with_counts(
    x: Tensor, theta: Tensor, softmax_size: Tensor | None
) -> Iterator[tuple[slice, Chunk]]:
    kind = _ChunkOfTensors if _devices.is_accelerator(x.device) else _ChunkOfLoops
    inverse_theta = theta.reciprocal()  # half of the time of dividing by theta
    for cells in chunks_of_cells(x):
        size = None if softmax_size is None else softmax_size[cells]
        yield cells, kind(x[cells], theta, inverse_theta, size)


def _sum_over_cells(values: Tensor, weights: Tensor) -> Tensor:
    """Sum over particles and cells of values (.. x genes) times weights (particles x cells)."""
    return weights.reshape(-1) @ values.reshape(-1, values.shape[-1])
