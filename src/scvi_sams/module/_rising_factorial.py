"""The part of the negative binomial that does not depend on the mean, by tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scvi_sams.module._chunks import chunks_of_cells

TABLE_SIZE = 256
"""Counts below this are looked up in a table per gene; the few above go through log-gamma."""


class RisingFactorialTable:
    """Reads ``rising(x, theta) - log(x!)`` and its slope off tables.

    Where ::

        rising(x, theta) = sum_{k < x} log1p(k / theta)
                         = log Gamma(x + theta) - log Gamma(theta) - x log(theta)

    Parameters
    ----------
    theta
        Inverse dispersion, shape ``(n_genes,)``.
    x
        All counts that will be asked for, shape ``(n_cells, n_genes)``.
    """

    def __init__(self, theta: Tensor, x: Tensor) -> None:
        self.theta = theta
        largest = int(x.amax())  # `max` takes ten times as long
        self.last = min(TABLE_SIZE - 1, largest)
        self.is_complete = largest <= self.last
        # Entry x sums over k < x: column x adds k = x - 1, and column 0 zero, as k = 0 does.
        steps = torch.arange(-1, self.last, device=x.device, dtype=theta.dtype).clamp_(min=0)
        of_gene = theta[:, None]
        self.values = (steps / of_gene).log1p_().sub_(steps.log1p()).cumsum_(1).flatten()
        # d/d log(theta) log1p(k / theta) = -k / (k + theta)
        self.slopes = (steps + of_gene).reciprocal_().mul_(-steps).cumsum_(1).flatten()
        # Flat tables are read in half of the time that `gather` takes of those with two dimensions.
        n_genes = len(theta)
        self.first = torch.arange(n_genes, device=x.device, dtype=torch.int32) * (self.last + 1)

    def read(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum over genes per cell, and the slope in log(theta) of every entry."""
        if self.is_complete or counts.amax() <= self.last:
            return self._read_small(counts)
        sums, slopes = self._read_small(counts.clamp(max=self.last))
        cells, genes = (counts > self.last).nonzero(as_tuple=True)
        beyond, theta = counts[cells, genes], self.theta[genes]
        read = self.values[self.first[genes] + self.last]
        sums.index_add_(0, cells, _rising_by_gamma(beyond, theta) - read)
        slopes[cells, genes] = _rising_slope_by_gamma(beyond, theta)
        return sums, slopes

    def _read_small(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        entries = counts.int().add_(self.first).flatten()
        sums = self.values.index_select(0, entries).view(counts.shape).sum(-1)
        return sums, self.slopes.index_select(0, entries).view(counts.shape)


def rising_factorial(log_theta: Tensor, x: Tensor) -> Tensor:
    """Return ``sum_g rising(x, theta) - log(x!)`` per cell, with its gradient.

    Parameters
    ----------
    log_theta
        Shape ``(n_genes,)``.
    x
        Counts of shape ``(n_cells, n_genes)``.
    """
    result: Tensor = _RisingFactorial.apply(log_theta, x)
    return result


class _RisingFactorial(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_theta: Tensor, x: Tensor) -> Tensor:
        theta = log_theta.exp()
        table = RisingFactorialTable(theta, x)
        result = theta.new_empty(len(x))
        slopes = torch.empty_like(x, dtype=theta.dtype)
        for cells in chunks_of_cells(x):
            result[cells], slopes[cells] = table.read(x[cells])
        ctx.save_for_backward(slopes)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return grad @ slopes, None


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
