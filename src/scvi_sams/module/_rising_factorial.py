"""Tables of the rising factorial, the term of the negative binomial that only counts have.

It does not depend on the Monte Carlo particle, so it is looked up once per cell and gene.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from scvi_sams import _torch as _devices
from scvi_sams.kernels import _negative_binomial as loops

TABLE_SIZE = 256
"""Smaller counts are in a table per gene; for the few larger ones Stirling's series is added."""


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
    """As long for each gene as its largest count requires; for CPUs."""

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
    """As long for all genes as the largest count requires; for accelerators.

    For counts beyond it Stirling's series is added, in genes that may have some.
    """

    def __init__(self, theta: Tensor, largest: np.ndarray) -> None:
        self.theta = theta
        device = theta.device
        # NaN counts as beyond the table, so that its value is NaN.
        beyond = np.flatnonzero(~(largest < TABLE_SIZE))
        self.genes_beyond = torch.as_tensor(beyond, device=device) if len(beyond) else None
        self.length = int(np.nan_to_num(largest).max().clip(0, TABLE_SIZE - 1)) + 1
        # Entry x sums over k < x: column x adds k = x - 1, and column 0 adds zero, as does k = 0.
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
            # Zero for most: only the device knows which counts of these genes are beyond.
            some = counts[:, self.genes_beyond].clamp(min=TABLE_SIZE - 1)
            value, slope = _beyond_table(some, self.theta[self.genes_beyond])
            sums += value.sum(-1)
            slopes.index_add_(1, self.genes_beyond, slope)
        return sums, slopes


def _beyond_table(x: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Additions to the last table entry for counts x beyond it: value and slope in log(theta).

    Log-gammas at ``x + theta`` and at the end of the table by Stirling's series, which has nine
    correct digits from 256 on; their difference is written so that nothing cancels for large theta.
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
