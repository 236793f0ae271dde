"""The negative binomial log-likelihood, exact in float32 and with its own gradient.

With ``ratio = mean / theta`` (``theta`` the inverse dispersion)::

    log p(x) = x log(mean) - (x + theta) log1p(ratio) + rising(x, theta) - log(x!)
    rising(x, theta) = sum_{k < x} log1p(k / theta)
                     = log Gamma(x + theta) - log Gamma(theta) - x log(theta)

Two reasons to write it out. Every term stays exact when ``theta`` is large (the textbook form
loses more than 100 nats per cell in float32 at ``theta = 1e5``), and goes over into the Poisson.
And ``rising`` does not depend on the Monte-Carlo particle, so it is read off tables once per cell
and gene, while the particles need few passes over few arrays.
"""

from __future__ import annotations

import math
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

MAX_LOG_MEAN = 60.0
"""Keeps the mean finite in float32 whatever the decoder says."""
_LOG_THETA = (-25.0, 60.0)
"""Within which the mean over theta, and theta, are finite in float32 as well."""

TABLE_SIZE = 256
"""Counts below this are looked up in a table per gene; to the few above, Stirling's series adds."""


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
        logits whose softmax over genes shares out the size.
    log_theta
        Log of the inverse dispersion, shape ``(n_genes,)``.
    softmax_size
        Shape ``(n_cells,)``: total that the softmax of ``log_mean`` is multiplied with.

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
    """Log-likelihood of counts, given what the decoder's last layer reads instead of its output.

    The output, of shape ``(n_particles, n_cells, n_genes)``, is by far the largest array of a
    training step, and needs two more of its size: the likelihood's, and its gradient. Here none of
    them exists. Gradients are taken while a chunk of cells is at hand, which the mean allows: every
    particle and cell weighs the same, whatever comes after.

    Parameters
    ----------
    x, log_theta
        As in :func:`negative_binomial_log_prob`.
    hidden
        Shape ``(n_particles, n_cells, n_hidden)``.
    weight, bias
        Of the last layer, ``(n_genes, n_hidden)`` and ``(n_genes,)``.
    size
        Of every cell, shape ``(n_cells,)``.
    direct
        Added to the output of the last layer, the same for all particles: ``(n_cells, n_genes)``,
        without a gradient.
    softmax
        Whether a softmax over genes shares out the size; otherwise rates are multiplied with it.
    largest
        The largest count of each gene that ``x`` may have, ``(n_genes,)``. Without it, an
        accelerator must be waited for.

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
            x.detach(),
            size.detach(),
            direct,
            softmax,
            torch.is_grad_enabled(),
            largest,
        )
    return result


def inverse_dispersion(log_theta: Tensor) -> Tensor:
    """Exponential of the parameter, bounded as means are."""
    return log_theta.clamp(*_LOG_THETA).exp()


class _LogProb(torch.autograd.Function):
    """All terms per particle and cell.

    The softmax is differentiated here too, and of the size of the logits nothing is kept but they
    themselves: the gradient begins with them again.
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
                # What is there before the first product counts as zero.
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
    """Some cells, and what of the likelihood all their particles share."""

    counts: Tensor
    theta: Tensor
    inverse_theta: Tensor
    softmax_size: Tensor | None

    def of(self, cells: Tensor) -> Chunk:
        """The same of some of the cells, by their positions."""
        size = None if self.softmax_size is None else self.softmax_size[cells]
        return replace(self, counts=self.counts[cells], softmax_size=size)

    @abstractmethod
    def terms(self, part: Tensor) -> Tensor:
        """Terms of particles and cells whose logits are ``part``, which is spent."""

    @abstractmethod
    def kept_terms(self, part: Tensor) -> Tensor:
        """Terms, and ``part`` stays as it is."""

    @abstractmethod
    def terms_and_slopes(self, part: Tensor, weights: Tensor, of_theta: Tensor) -> Tensor:
        """Terms too; ``part`` becomes the gradient of their weighted sum with respect to itself.

        The gradient with respect to log(theta) is added to ``of_theta``.
        """


class _ChunkOfLoops(Chunk):
    """In one pass; for processors."""

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
        # Added at once: of large counts it cancels against the slopes of the rising factorial.
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
    """In some twenty passes over arrays, in place; for accelerators."""

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
            # Of the shares first: as a difference of large sums their logarithm would not be exact.
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


def rising_factorial_table(
    theta: Tensor, x: Tensor, largest: np.ndarray | None = None
) -> _TableOfLoops | _TableOfTensors:
    """Table of ``rising - log(x!)`` and its slope in log(theta), for all counts ``x``.

    ``read`` returns the sum over genes per cell, and the slope of every entry. ``largest`` as in
    :func:`mean_decoded_log_prob`.
    """
    if _devices.is_accelerator(x.device):
        return _TableOfTensors(theta, x.amax(0).cpu().numpy() if largest is None else largest)
    return _TableOfLoops(theta, x)


class _TableOfLoops:
    """As long for each gene as its largest count needs; for processors."""

    def __init__(self, theta: Tensor, x: Tensor) -> None:
        self.theta = theta
        largest = x.amax(0).nan_to_num_(0)
        self.has_all = bool(largest.amax() < TABLE_SIZE)
        lengths = largest.clamp(0, TABLE_SIZE - 1).long() + 1
        self.starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).numpy()
        self.table = theta.new_empty(self.starts[-1], 2).numpy()
        steps = torch.arange(int(lengths.amax()), dtype=theta.dtype)
        arrays = (steps, steps.log1p(), steps.new_empty(2, len(steps)))
        loops.fill_table(
            theta.numpy(), self.starts, *(array.numpy() for array in arrays), self.table
        )

    def read(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        sums = self.theta.new_empty(len(counts))
        slopes = torch.empty_like(counts, dtype=self.theta.dtype)
        loops.read_table(counts.numpy(), self.starts, self.table, sums.numpy(), slopes.numpy())
        if not self.has_all:
            cells, genes = (counts >= TABLE_SIZE).nonzero(as_tuple=True)
            # In double precision: they are few, and slopes cancel against those of the mean.
            value, slope = _beyond_table(counts[cells, genes].double(), self.theta[genes].double())
            sums.index_add_(0, cells, value.to(sums.dtype))
            slopes[cells, genes] = (slopes[cells, genes] + slope).to(slopes.dtype)
        return sums, slopes


class _TableOfTensors:
    """As long for all genes as the largest count needs; for accelerators.

    To counts beyond it Stirling's series adds, in the genes that may have some.
    """

    def __init__(self, theta: Tensor, largest: np.ndarray) -> None:
        self.theta = theta
        device = theta.device
        # Not a number is beyond too, so that its value is not a number.
        beyond = np.flatnonzero(~(largest < TABLE_SIZE))
        self.genes_beyond = torch.as_tensor(beyond, device=device) if len(beyond) else None
        self.length = int(np.nan_to_num(largest).max().clip(0, TABLE_SIZE - 1)) + 1
        # Entry x sums over k < x: column x adds k = x - 1, and column 0 zero, as k = 0 does.
        steps = torch.arange(-1, self.length - 1, device=device, dtype=theta.dtype).clamp_(min=0)
        of_gene = theta[:, None]
        self.values = (steps / of_gene).log1p_().sub_(steps.log1p()).cumsum_(1).flatten()
        # d/d log(theta) log1p(k / theta) = -k / (k + theta)
        self.slopes = (steps + of_gene).reciprocal_().mul_(-steps).cumsum_(1).flatten()
        self.first = torch.arange(len(theta), device=device, dtype=torch.int32) * self.length

    def read(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        within = counts.clamp(0, self.length - 1).nan_to_num_(0)
        entries = within.int().add_(self.first).flatten()
        sums = self.values.index_select(0, entries).view(counts.shape).sum(-1)
        slopes = self.slopes.index_select(0, entries).view(counts.shape)
        if self.genes_beyond is not None:
            # Zero for most: which counts of these genes are beyond, only the device knows.
            some = counts[:, self.genes_beyond].clamp(min=TABLE_SIZE - 1)
            value, slope = _beyond_table(some, self.theta[self.genes_beyond])
            sums += value.sum(-1)
            slopes.index_add_(1, self.genes_beyond, slope)
        return sums, slopes


def _beyond_table(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """What counts x beyond the table add to its last entry: value and slope in log(theta).

    Log-gammas at ``x + theta`` and at the end of the table by Stirling's series, which has nine
    digits from 256 on, and their difference written so that nothing cancels where theta is large.
    """
    last = TABLE_SIZE - 1
    n = x - last
    start, end = last + theta, x + theta
    log_growth = torch.log1p(n / start)
    value = (end - 0.5) * log_growth + _stirling(end) - _stirling(start)
    value += n * torch.log1p(last / theta)
    log_factorial = (x + 0.5) * torch.log1p(n / TABLE_SIZE) + n * math.log(TABLE_SIZE)
    log_factorial += _stirling(x + 1) - _stirling(torch.full_like(theta, TABLE_SIZE))
    slope = theta * (log_growth + _stirling_slope(end) - _stirling_slope(start)) - n
    return value - log_factorial, slope


def _stirling(z: Tensor) -> Tensor:
    """Log Gamma(z) - (z - 1/2) log(z) + z - log(2 pi) / 2."""
    inverse = z.reciprocal()
    return inverse * (1 / 12 - inverse.square() / 360)


def _stirling_slope(z: Tensor) -> Tensor:
    """Digamma(z) - log(z)."""
    inverse = z.reciprocal()
    square = inverse.square()
    return -0.5 * inverse - square * (1 / 12 - square / 120)
