"""The part of the negative binomial that does not depend on the mean, by tables.

::

    rising(x, theta) = sum_{k < x} log1p(k / theta)
                     = log Gamma(x + theta) - log Gamma(theta) - x log(theta)
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scvi_sams import _torch as _devices
from scvi_sams.kernels import _negative_binomial as loops
from scvi_sams.module._minibatch import chunks_of_cells

TABLE_SIZE = 256
"""Counts below this are looked up in a table per gene; to the few above, Stirling's series adds."""


class RisingFactorialTable(Protocol):
    """Reads ``rising(x, theta) - log(x!)`` and its slope off tables."""

    def read(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum over genes per cell, and the slope in log(theta) of every entry."""


def rising_factorial_table(theta: Tensor, x: Tensor) -> RisingFactorialTable:
    """Make the table that suits the device.

    Parameters
    ----------
    theta
        Inverse dispersion, shape ``(n_genes,)``.
    x
        All counts that will be asked for, shape ``(n_cells, n_genes)``.
    """
    return (_TableOfTensors if _devices.is_accelerator(x.device) else _TableOfLoops)(theta, x)


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
    """Of one size for all, so that nothing need be asked of the data; for accelerators."""

    def __init__(self, theta: Tensor, x: Tensor) -> None:
        self.theta = theta
        # Entry x sums over k < x: column x adds k = x - 1, and column 0 zero, as k = 0 does.
        steps = torch.arange(-1, TABLE_SIZE - 1, device=x.device, dtype=theta.dtype).clamp_(min=0)
        of_gene = theta[:, None]
        self.values = (steps / of_gene).log1p_().sub_(steps.log1p()).cumsum_(1).flatten()
        # d/d log(theta) log1p(k / theta) = -k / (k + theta)
        self.slopes = (steps + of_gene).reciprocal_().mul_(-steps).cumsum_(1).flatten()
        self.first = torch.arange(len(theta), device=x.device, dtype=torch.int32) * TABLE_SIZE

    def read(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        within = counts.clamp(0, TABLE_SIZE - 1).nan_to_num_(0)
        entries = within.int().add_(self.first).flatten()
        values = self.values.index_select(0, entries).view(counts.shape)
        slopes = self.slopes.index_select(0, entries).view(counts.shape)
        # Computed for all, and zero for nearly all: which are beyond, only the device knows.
        value, slope = _beyond_table(counts.clamp(min=TABLE_SIZE - 1), self.theta)
        return (values + value).sum(-1), slopes + slope


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
        table = rising_factorial_table(theta, x)
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
