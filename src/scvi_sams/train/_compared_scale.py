"""The scale on which effects are compared, and changes of log rates on this scale."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from scvi_sams.module._expected_lognorm import ExpectedLognorm
from scvi_sams.module._likelihoods import Likelihood
from scvi_sams.train._gene_sums import TARGET_SUM

_MOST_LOG_CHANGE, _STEP = 8.0, 0.125
"""Range of rates: down to a three-thousandth, at which no counts are left."""
_NEARLY = 0.999
_NORMAL_QUANTILE = 1.96
_LARGEST_LOG_SD = 1.96
"""Beyond this SD, the mean rate would depend on a few samples."""
_NORMAL_NODES = [
    (node, weight / np.sqrt(2 * np.pi))
    for node, weight in zip(*np.polynomial.hermite_e.hermegauss(7), strict=True)
]
"""Nodes and weights of Gauss-Hermite quadrature."""
_N_STEPS = 4
_SLOPE_STEP = 0.1
_SMALLEST_SLOPE = 1e-5
"""Pseudo-slope of each gene, so that a gene without counts also has a change of the rate."""
_SMALLEST_RELATIVE_SLOPE = 0.02


class ComparedScale:
    """Effects on the mean of log2(1 + 1e4 x / size), divided by its slope in control cells.

    Small effects are the same as on the log rate. For large effects the error is known only here: a
    gene that 50 control cells hardly express may increase a hundredfold or three hundredfold, but
    the level that it reaches, which the difference in means of logs shows, is known.

    Parameters
    ----------
    likelihood
        Distribution of counts in a cell with a known state.
    log_rates
        Log rates of states of control cells, states x genes; averaged over states.
    cell_sizes
        Sizes of cells and the proportion of cells of each, ``(2, n_sizes)``.

    Attributes
    ----------
    slope
        Change of the mean of logs per change of the log rate in control cells, ``(G,)``.
    """

    def __init__(
        self, likelihood: Likelihood, log_rates: np.ndarray, cell_sizes: np.ndarray
    ) -> None:
        with torch.no_grad():
            table = ExpectedLognorm(likelihood, cell_sizes, TARGET_SUM, torch.device("cpu"))
        nodes, means = table.by_log_rate()
        at_states = _Interpolation(nodes, means)
        n_steps = round(_MOST_LOG_CHANGE / _STEP)
        self._changes = np.arange(-n_steps, n_steps + 1) * _STEP
        changed = [at_states(log_rates + change).mean(axis=0) for change in self._changes]
        means = np.maximum.accumulate(np.stack(changed, axis=1), axis=1)
        self._means = means + _SMALLEST_SLOPE * self._changes
        self._mean = _Interpolation(self._changes, self._means)
        self._unchanged = self._mean(np.zeros((1, len(self._means))))[0]
        self.slope = np.ones(len(self._means))
        self.slope = self._slope_at(np.zeros_like(self.slope))

    @property
    def unchanged(self) -> np.ndarray:
        """Mean of logs in control cells, ``(G,)``."""
        return self._unchanged

    def compared(self, log_change: np.ndarray) -> np.ndarray:
        """Effects on the compared scale from changes of the log rate; rows x genes both."""
        return (self._mean(log_change) - self._unchanged) / self.slope

    def log_change(self, compared: np.ndarray) -> np.ndarray:
        """Changes of the log rate from effects on the compared scale; rows x genes both."""
        # Within the limits of a rate: 0, or a library of one gene.
        ends = self._means[:, [0, -1]].T - self._unchanged
        means = self._unchanged + (self.slope * compared).clip(*(_NEARLY * ends))
        found = np.empty_like(means)
        for gene, of_gene in enumerate(self._means):
            found[..., gene] = np.interp(means[..., gene], of_gene, self._changes)
        return found

    def relative_slope(self, log_change: np.ndarray) -> np.ndarray:
        """Slope at changed log rates, relative to control cells; rows x genes both."""
        return np.maximum(self._slope_at(log_change) / self.slope, _SMALLEST_RELATIVE_SLOPE)

    def log_sd(self, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
        """SD of the log rate, from effects with ``mean`` and ``sd`` on the compared scale.

        Rates are sampled as lognormal with this mean, whose 97.5 % quantile then equals that of the
        effect. With almost no counts left, a slope would turn all of the effect's error into one
        of the logarithm.
        """
        above = self.log_change(mean + _NORMAL_QUANTILE * sd) - self.log_change(mean)
        return _NORMAL_QUANTILE - np.sqrt(np.maximum(_NORMAL_QUANTILE**2 - 2 * above, 0))

    def log_normal(self, mean: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and SD of a normal change of the log rate, from effects with ``mean`` and ``sd``.

        The mean of the effect is that of such changes on the compared scale, not that of their
        rates: if the error is as large as the effect, these differ by as much as either.
        """
        wanted = self.log_change(mean)
        above = self.log_change(mean + _NORMAL_QUANTILE * sd) - wanted
        log_sd = np.minimum(above / _NORMAL_QUANTILE, _LARGEST_LOG_SD)
        found = wanted
        for _ in range(_N_STEPS):
            found = found + wanted - self.log_change(self.moments(found, log_sd)[0])
        return found, log_sd

    def moments(self, log_change: np.ndarray, log_sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of effects, of normal changes of the log rate; rows x genes all."""
        mean, square = np.zeros((2, *log_change.shape))
        for node, weight in _NORMAL_NODES:
            effect = self.compared(log_change + log_sd * node)
            mean += weight * effect
            square += weight * np.square(effect)
        return mean, np.maximum(square - np.square(mean), 0)

    def _slope_at(self, log_change: np.ndarray) -> np.ndarray:
        higher, lower = (self._mean(log_change + step) for step in (_SLOPE_STEP, -_SLOPE_STEP))
        return (higher - lower) / (2 * _SLOPE_STEP)


class _Interpolation:
    """Linear between evenly spaced nodes, and constant beyond them; one function per gene."""

    def __init__(self, nodes: np.ndarray, values: np.ndarray) -> None:
        self._first, self._step = nodes[0], nodes[1] - nodes[0]
        self._last = len(nodes) - 1
        self._values = values
        self._genes = np.arange(len(values))

    def __call__(self, at: np.ndarray) -> np.ndarray:
        place = ((at - self._first) / self._step).clip(0, self._last)
        node = np.minimum(place.astype(np.int64), self._last - 1)
        below, above = (self._values[self._genes, node + more] for more in (0, 1))
        return below + (place - node) * (above - below)


class SameScale:
    """For expression that is not counts: effects are compared unchanged."""

    def __init__(self, n_genes: int) -> None:
        self.slope = np.ones(n_genes)

    def compared(self, change: np.ndarray) -> np.ndarray:
        """Return the change itself."""
        return change

    def log_change(self, compared: np.ndarray) -> np.ndarray:
        """Return the effect itself."""
        return compared

    def relative_slope(self, change: np.ndarray) -> np.ndarray:
        """Return ones."""
        return np.ones_like(change)

    def log_sd(self, mean: np.ndarray, sd: np.ndarray) -> np.ndarray:
        """Return the SD itself."""
        return sd

    def log_normal(self, mean: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return both unchanged."""
        return mean, sd


Scale = ComparedScale | SameScale


class Decoded(NamedTuple):
    """Expectations of a decoder for cells, averaged over their states; genes last."""

    rate: np.ndarray
    logged: np.ndarray
    """Mean of ``log2(1 + 1e4 x / size)``; without genes if it has no closed form."""

    def change_from(self, base: Decoded, scale: Scale) -> np.ndarray:
        """Change of the log rate, or for expression that is not counts, of the mean.

        It is the change that, if equal in all cells, would change the mean of logs by the same
        amount. If few cells express a gene, a shift changes the log of the mean rate, which these
        cells dominate, by far more.
        """
        if self.logged.shape[-1]:
            moved = self.logged.astype(np.float64) - base.logged.astype(np.float64)
            return scale.log_change(moved / scale.slope)
        before, after = base.rate.astype(np.float64), self.rate.astype(np.float64)
        return after - before if isinstance(scale, SameScale) else np.log(after) - np.log(before)


def share_of_variance(slope: np.ndarray, whole: np.ndarray, of_model: np.ndarray) -> np.ndarray:
    """Ratio of the variance of total effects to that of the model, as compared; at most 1."""
    total, part = ((np.square(slope) * v).sum(axis=1, keepdims=True) for v in (whole, of_model))
    return np.minimum(np.divide(total, part, out=np.ones_like(part), where=part > 0), 1)
