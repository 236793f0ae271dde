"""The part of the negative binomial that does not depend on the mean, by tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scvi_sams.module._chunks import chunks_of_cells

TABLE_SIZE = 128
"""Counts below this are looked up in a table per gene; the few above go through log-gamma."""


def rising_factorial(log_theta: Tensor, x: Tensor) -> Tensor:
    """Return ``sum_g rising(x, theta) - log(x!)`` per cell.

    Where ::

        rising(x, theta) = sum_{k < x} log1p(k / theta)
                         = log Gamma(x + theta) - log Gamma(theta) - x log(theta)

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
    """Look up tables of cumulative sums; counts beyond are looked up as the last and corrected."""

    @staticmethod
    def forward(ctx: Any, log_theta: Tensor, x: Tensor) -> Tensor:
        theta = log_theta.exp()
        largest = int(x.max())
        last = min(TABLE_SIZE - 1, largest)
        steps = torch.arange(last, device=x.device, dtype=theta.dtype)[:, None]
        table = _cumulative(torch.log1p(steps / theta) - torch.log1p(steps))
        # d/d log(theta) log1p(k / theta) = -k / (k + theta)
        slope_table = _cumulative(-steps / (steps + theta))
        result = theta.new_empty(len(x))
        slopes = torch.empty_like(x, dtype=theta.dtype)
        for cells in chunks_of_cells(x):
            rows = x[cells].long().clamp_(max=last)
            result[cells] = table.gather(0, rows).sum(-1)
            torch.gather(slope_table, 0, rows, out=slopes[cells])
        if largest > last:
            beyond = (x > last).nonzero(as_tuple=True)
            exact = _rising_by_gamma(x[beyond], theta[beyond[1]])
            result.index_add_(0, beyond[0], exact - table[last, beyond[1]])
            slopes[beyond] = _rising_slope_by_gamma(x[beyond], theta[beyond[1]])
        ctx.save_for_backward(slopes)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return grad @ slopes, None


def _cumulative(terms: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... rows."""
    return torch.nn.functional.pad(terms.cumsum(0), (0, 0, 1, 0))


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
