"""Expected log-normalised counts of a cell, from a table instead of sampled counts."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from torch import Tensor

from scvi_sams.module._likelihoods import Likelihood

_LOW, _HIGH = -16.0, 20.0
"""Smallest range of log means: from almost no counts to half a billion counts."""

_SPLINE_STEP = 1 / 4
_STEP = 1 / 32
"""With this spacing of log means, linear interpolation has an error of at most 5e-5."""

_QUADRATURE_STEP = 1 / 2
_NEGLIGIBLE = 1e-7
_SMALLEST_REST = 1e-3
"""Smallest proportion of the library left for other genes if one gene has nearly all."""

_GENES_AT_ONCE = 128


class ExpectedLognorm:
    r"""E[log2(1 + target_sum * x / size)] over counts x, by gene and logit.

    A table for every gene, in steps of the log mean, is computed once; a value is then a look-up,
    which takes a twentieth of the time of sampling a count, and has no noise. With
    :math:`M(u) = E[e^{-ux}]`, known in closed form,

    .. math::
        E[\log(1 + cx)] = \int_{-\infty}^{\infty} \left(1 - M(e^v)\right) e^{-e^v / c} \, dv,

    an integral of a smooth function that vanishes on both sides: the trapezoid rule is accurate to
    float32 precision here.

    If a registered size factor is the size of a cell, c is ``target_sum / size``. Otherwise the
    size is the sum of the counts, including x: it is approximated by x plus the expected counts of
    the other genes, r, so that log(1 + target_sum * x / (x + r)) is the difference of two such
    logarithms. This neglects the variance of the sum of the other genes, of second order.

    ``sizes`` contains sizes of cells and the proportion of cells of each, ``(2, n_sizes)``, over
    which the expectation is averaged.
    """

    def __init__(
        self, likelihood: Likelihood, sizes: np.ndarray, target_sum: float, device: torch.device
    ) -> None:
        self.likelihood = likelihood
        has_shares = not likelihood.uses_size_factor
        # A proportion of the library is at most one.
        high = 0.0 if has_shares else _HIGH - math.log(sizes[0].min())
        low = min(_LOW - math.log(sizes[0].max()), high - 1)
        fine = np.arange(high, low, -_STEP)[::-1]
        coarse = np.arange(high, low - _SPLINE_STEP, -_SPLINE_STEP)[::-1]
        if has_shares:
            # The remainder for other genes changes fast if one gene has most of the counts.
            coarse = np.union1d(coarse[coarse < high - 1.5], fine[fine >= high - 1.5])
        at_sizes = [
            share * _table_at_size(likelihood, coarse, size, target_sum, device)
            for size, share in sizes.T
            if share > 0
        ]
        spline = CubicSpline(coarse, sum(at_sizes).cpu(), axis=1)
        self.table = torch.as_tensor(spline(fine), dtype=torch.float32, device=device).flatten()
        self._offset = -float(fine[0]) / _STEP
        self._last = len(fine) - 1 - 1e-3  # between the last two nodes
        self._starts = torch.arange(likelihood.n_genes, device=device).mul_(len(fine)).int()

    def by_log_rate(self) -> tuple[np.ndarray, np.ndarray]:
        """Log rates of the table's nodes, and expectations there, ``(n_genes, n_nodes)``."""
        values = self.table.view(self.likelihood.n_genes, -1).cpu().double().numpy()
        return (np.arange(values.shape[1]) - self._offset) * _STEP, values

    def __call__(self, logits: Tensor) -> Tensor:
        """Map logits ``(..., n_genes)`` to expectations of the same shape, in log2 units."""
        log_rate = (
            logits.clone()
            if self.likelihood.uses_size_factor
            else torch.log_softmax(logits, dim=-1)
        )
        # In place wherever possible: allocating new arrays would take as long as the arithmetic.
        position = log_rate.mul_(1 / _STEP).add_(self._offset).clamp_(0, self._last)
        place = position.int()
        fraction = position.frac_()
        place = place.add_(self._starts).flatten()
        below = self.table.index_select(0, place).view_as(fraction)
        above = self.table.index_select(0, place.add_(1)).view_as(fraction)
        return below.lerp_(above, fraction)


def _table_at_size(
    likelihood: Likelihood,
    log_rate: np.ndarray,
    size: float,
    target_sum: float,
    device: torch.device,
) -> Tensor:
    """Expectations by gene and log rate in cells of one size, ``(n_genes, n_rates)``."""
    mean = size * np.exp(log_rate)
    if likelihood.uses_size_factor:
        factors = [np.array([target_sum / size])]
        first_node = _NEGLIGIBLE / mean.max()
    else:
        rest = np.maximum(size - mean, size * _SMALLEST_REST)
        factors = [(1 + target_sum) / rest, 1 / rest]
        # Below the first node the integrand is at most mean * u^2 / smaller factor.
        first_node = _NEGLIGIBLE * factors[1].min()
    quadrature = _quadrature(first_node, *factors)
    return torch.cat(list(_expectations(likelihood, mean, *quadrature, device)))


def _expectations(
    likelihood: Likelihood,
    mean: np.ndarray,
    u: np.ndarray,
    weights: np.ndarray,
    device: torch.device,
) -> Iterator[Tensor]:
    """Yield expectations ``(n_genes, n_means)`` of some genes at a time."""
    means, nodes, weighted = (
        torch.as_tensor(values, dtype=torch.float32, device=device) for values in (mean, u, weights)
    )
    for genes in torch.arange(likelihood.n_genes, device=device).split(_GENES_AT_ONCE):
        log_transform = likelihood.log_laplace_transform(means[:, None], nodes, genes)
        yield torch.einsum("gmu,mu->gm", torch.expm1(log_transform), weighted).neg_()


def _quadrature(
    first_node: float, factor: np.ndarray, smaller: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes u and weights ``(n_means, n_nodes)`` of E[log2(1 + factor * x)], factors by mean.

    With ``smaller``, for that logarithm minus the one with smaller factors.
    """
    low, high = math.log(first_node), math.log(factor.max() * -math.log(_NEGLIGIBLE))
    u = np.exp(np.arange(low, high + _QUADRATURE_STEP, _QUADRATURE_STEP))
    weights = _weights(u, factor)
    return u, weights if smaller is None else weights - _weights(u, smaller)


def _weights(u: np.ndarray, factor: np.ndarray) -> np.ndarray:
    return np.exp(-u / factor[:, None]) * (_QUADRATURE_STEP / math.log(2))
