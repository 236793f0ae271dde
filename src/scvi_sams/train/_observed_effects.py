"""Observed effects on every gene, and the corresponding effects of the decoder.

On the logarithm of the rate (for a normal likelihood, on the mean); for a combination together with
its perturbations. With X the sum of the counts of the cells of t, and M the decoder's expectation
for these cells without t::

    by sums:   log(X_t + 1/2) - log(M_t + 1/2), minus the same for the control cells
    by logs:   the change of log rate that explains the mean of log2(1 + 1e4 x / size) over the
               cells of t, minus that over the control cells

The first is efficient for low counts, the second if cells vary a lot. They are combined by their
errors, estimated from control cells, and converted to the scale on which effects are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from scvi_sams.module._likelihoods import Likelihood, NegativeBinomialLikelihood
from scvi_sams.train._compared_scale import ComparedScale, Decoded, SameScale
from scvi_sams.train._expected_rates import ROWS_AT_ONCE, Expected
from scvi_sams.train._gene_sums import GeneSums

_ENOUGH_COUNTS = 20.0
"""Smallest count of a gene in the cells of a perturbation, expected and observed, for means of
logarithms: with fewer, their inverse is too curved for a normal error."""
_CONFLICT = 3.0
"""Standard errors by which the two estimates of one effect may differ, as if they were independent.
Beyond, the excess is error of the one by sums: effects are compared by means of logarithms."""
_FEW_PERTURBATIONS = 5
_SMALLEST_VARIANCE, _SMALLEST_DISPERSION = 1e-12, 1e-3


def _as_control_cells_vary(dispersion: np.ndarray) -> NegativeBinomialLikelihood:
    """Gamma-Poisson counts with these dispersions."""
    likelihood = NegativeBinomialLikelihood(len(dispersion), uses_size_factor=True)
    with torch.no_grad():
        likelihood.log_inverse_dispersion.copy_(-torch.as_tensor(dispersion).log())
    return likelihood


class Moments(NamedTuple):
    """Second moments of cells around their rate and their mean of logs, per gene, ``(G,)``."""

    of_sums: np.ndarray
    of_logs: np.ndarray
    of_both: np.ndarray

    @classmethod
    def of(
        cls, products: np.ndarray, n: float, rate: np.ndarray, logged: np.ndarray | float
    ) -> Moments:
        """Compute them from sums of products over ``n`` cells, ``(3, 3, G)``."""
        means = products / n
        return cls(
            means[0, 0] - 2 * rate * means[0, 2] + rate**2 * means[2, 2],
            np.maximum(means[1, 1] - logged**2, 0),
            means[0, 1] - rate * means[1, 2],
        )


class Reference(NamedTuple):
    """Control cells in the contexts of the cells of each row."""

    sizes: np.ndarray
    """Proportion of the sizes of the cells of a row in each context, ``(R, C)``."""
    numbers: np.ndarray
    """The same for numbers of cells."""
    n: np.ndarray
    """Number of control cells of each context, ``(C,)``."""
    rate: np.ndarray
    """Their observed rates, ``(C, G)``."""
    expected: np.ndarray
    """Rates that the decoder expects for them, ``(C, G)``."""
    logged: np.ndarray
    """Mean of their logged expression, ``(C, G)``."""
    moments: Moments
    """Moments within contexts."""

    @classmethod
    def of(cls, sums: GeneSums, expected: Expected, is_count: bool) -> Reference | None:
        """From contexts with control cells; ``None`` without contexts."""
        of_controls = slice(sums.n_rows + 1, None)
        n = sums.n[of_controls].double().numpy()
        has_controls = n > 0
        if not has_controls.any():
            return None
        cells, n_contexts = sums.cells, len(n)
        keys = (cells.group * n_contexts + cells.contexts).numpy()
        shares = []
        for weights in (cells.size.double().numpy(), np.ones(len(keys))):
            total = np.bincount(keys, weights, minlength=len(sums.n) * n_contexts)
            of_rows = total.reshape(-1, n_contexts)[: sums.n_rows, has_controls]
            # A row in none of these contexts is compared with all control cells.
            of_rows = np.where(of_rows.any(axis=1, keepdims=True), of_rows, n[has_controls])
            shares.append(of_rows / of_rows.sum(axis=1, keepdims=True))
        x, logged, size = (
            values[of_controls][torch.as_tensor(has_controls)].double().numpy()
            for values in (sums.x, sums.logged, sums.size)
        )
        n = n[has_controls]
        rate = (x + 0.5 * is_count) / size[:, None]
        base = expected.without[of_controls][has_controls].astype(np.float64)
        mean_logged = logged / n[:, None]
        products = sums.products[2:][torch.as_tensor(has_controls)].numpy()
        # Values that are not counts have no logarithms.
        of_logs = mean_logged if is_count else np.zeros((len(n), 1))
        of_contexts = zip(products, n, rate, of_logs, strict=True)
        within = zip(*(Moments.of(*values) for values in of_contexts), strict=True)
        moments = Moments(*(np.average(values, axis=0, weights=n) for values in within))
        sizes, numbers = shares
        return cls(sizes, numbers, n, rate, base, mean_logged, moments)


class Block(NamedTuple):
    """Effects of some perturbations or combinations at the doses of their cells, rows x genes."""

    rows: slice
    """Rows of the direct effects."""
    dose: np.ndarray
    """Mean dose of the perturbation, ``(rows, 1)``; 1 for a combination."""
    observed: np.ndarray
    """On the compared scale."""
    error: np.ndarray
    """Standard error of the observed effects; infinite without cells."""
    of_controls: np.ndarray
    """Proportion of the squared error that is due to control cells, ``(rows, 1)``: this error is
    the same in all rows."""
    of_model: np.ndarray
    """On the log rate, as are the next."""
    model_at_mean: np.ndarray
    """Effects of the posterior means of the shifts."""
    variance_of_model: np.ndarray
    """Posterior variance of the model's effects."""


class _OfControls(NamedTuple):
    """Values of control cells to compare rows with, ``(rows or 1, G)`` or ``(G,)``."""

    rate: np.ndarray
    expected: np.ndarray
    logged: np.ndarray


class ObservedEffects:
    """Observed effects and those of the model, a block of perturbations at a time.

    They are effects on responding cells. ``responding``, ``(R,)``, is the proportion of responding
    cells of each row; ``None``: all. The last group of ``sums`` is control cells; with a
    ``reference`` those of the contexts of the cells. ``scale`` is that of the same states, if it is
    known already; it is computed otherwise, which takes seconds with thousands of genes.

    Attributes
    ----------
    cell_sizes
        Sizes of cells and the proportion of cells of each, ``(2, n_sizes)``.
    scale
        Scale on which effects are compared; its ``slope``, ``(G,)``, is the weight of each gene.
    others
        Additions of other perturbations to the logits in the cells of some rows, by row.
    """

    def __init__(
        self,
        sums: GeneSums,
        expected: Expected,
        cell_sizes: np.ndarray,
        likelihood: Likelihood,
        responding: np.ndarray | None = None,
        reference: Reference | None = None,
        scale: ComparedScale | SameScale | None = None,
    ) -> None:
        n_rows = len(sums.n) - 1
        self._responding = np.ones((n_rows, 1)) if responding is None else responding[:, None]
        self._sums, self._expected, self._by_context = sums, expected, reference
        self.others: dict[int, np.ndarray] = {}
        is_count = likelihood.is_count_likelihood
        self._n = sums.n.double().numpy()[:, None]
        self._size = sums.size.double().numpy()[:, None]
        # Effects are relative to control cells, or to all cells if there are no controls. All cells
        # of a context may be held out: then no row has cells, and 1 is a placeholder.
        controls = slice(-1, None) if sums.has_controls else slice(None)
        self._n_reference = float(self._n[controls].sum()) or 1.0
        total = sums.x[controls].double().sum(dim=0).numpy()
        self._size_reference = float(self._size[controls].sum()) or 1.0
        self._rate = (total + 0.5 * is_count) / self._size_reference
        logged = sums.logged[controls].double().sum(dim=0).numpy() / self._n_reference
        products = sums.products[int(sums.has_controls)].numpy()
        moments = Moments.of(products, self._n_reference, self._rate, logged if is_count else 0.0)
        if reference is not None:
            moments = reference.moments
        self._of_sums = np.maximum(moments.of_sums, _SMALLEST_VARIANCE)
        self._logs: ComparedScale | None = None
        self._bias: np.ndarray | float = 0.0
        self.scale: ComparedScale | SameScale = SameScale(len(total))
        if is_count:
            mean_count = self._rate * self._size_reference / self._n_reference
            self._of_sums = self._of_sums / mean_count**2
            self._dispersion = np.maximum(self._of_sums - 1 / mean_count, _SMALLEST_DISPERSION)
            states = expected.log_rates[0].astype(np.float64)
            if not likelihood.has_laplace_transform:
                likelihood, states = (
                    _as_control_cells_vary(self._dispersion),
                    np.log(self._rate)[None],
                )
            if not isinstance(scale, ComparedScale):
                scale = ComparedScale(likelihood, states, cell_sizes)
            self.scale = self._logs = scale
            # Without controls, effects are relative to the decoder.
            self._mean_of_logs = logged if sums.has_controls else self._logs.unchanged
            self._of_logs = moments.of_logs / self.scale.slope**2
            self._of_both = moments.of_both / mean_count / self.scale.slope
            self._bias = self._beyond_errors(self._logs)

    def blocks(self, rows_of_all: range, step: int = 1) -> Iterator[Block]:
        """Yield the effects of some rows at a time; every ``step``-th block."""
        for start in rows_of_all[:: ROWS_AT_ONCE * step]:
            rows = slice(start, min(start + ROWS_AT_ONCE, rows_of_all.stop))
            observed, variance = self._combined(rows)
            for row in self.others.keys() & range(rows.start, rows.stop):
                change = self.scale.log_change(observed[row - start]) - self.others[row]
                observed[row - start] = self.scale.compared(change)
            has_cells = self._n[rows] > 0
            # Cells that do not respond have no effect, which dilutes the mean over all cells.
            respond = self._responding[rows]
            observed, variance = observed / respond, variance / respond**2
            yield Block(
                rows,
                self._expected.dose[rows, None],
                np.where(has_cells, observed, 0),
                np.where(has_cells, np.sqrt(variance), np.inf),
                1 - 1 / np.maximum(self._n[rows], 1) / self._per_cell(rows),
                np.where(has_cells, self._change_of_model(1, rows), 0),
                np.where(has_cells, self._change_of_model(2, rows), 0),
                self._expected.variance[rows],
            )

    def _change_of_model(self, place: int, rows: slice) -> np.ndarray:
        """Effect on the decoder's expectation, rows x genes: of shifts, or of their means."""
        expected = self._expected
        base, changed = (Decoded(expected[p][rows], expected.logged[p, rows]) for p in (0, place))
        return changed.change_from(base, self.scale)

    def _combined(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Best linear unbiased combinations of the two estimates, and their variances."""
        expected = self._expected
        per_cell = self._per_cell(rows)
        of_sums = self._of_sums * per_cell
        if self._logs is None:
            per_cell_mean = self._sums.x[rows].double().numpy() / np.maximum(self._n[rows], 1)
            of_controls = self._of_controls(rows)
            observed = per_cell_mean - expected.without[rows] - of_controls.rate
            return observed + of_controls.expected, of_sums
        by_sums, by_logs, change, counts = self._estimates(rows, self._logs)
        # At least the variance of Poisson counts, for genes without counts in controls: no
        # estimate of a rate has a smaller variance.
        error_of_controls = 1 / (self._rate * self._size_reference + 0.5)
        of_counts = 1 / (counts + 0.5) + error_of_controls
        of_sums = np.maximum(of_sums, of_counts) + self._bias
        of_logs, of_both = (
            np.maximum(values * per_cell, of_counts) for values in (self._of_logs, self._of_both)
        )
        level = self._at_level(rows, self._logs, change)
        weight = self._weight_of_sums(
            (of_sums, of_logs, of_both),
            np.square(by_sums - by_logs) / level,
            np.maximum(self._logs.relative_slope(change), 1),
            error_of_controls / of_counts,
        )
        rest = 1 - weight
        variance = weight**2 * of_sums + rest**2 * of_logs + 2 * weight * rest * of_both
        variance = np.maximum(variance, _SMALLEST_VARIANCE)
        observed = weight * by_sums + rest * by_logs
        return observed, variance * level

    @staticmethod
    def _weight_of_sums(
        variances: tuple[np.ndarray, np.ndarray, np.ndarray],
        squared_difference: np.ndarray,
        slope: np.ndarray,
        share_of_controls: np.ndarray,
    ) -> np.ndarray:
        """Weight of estimates by sums, given variances of both estimates and their covariance.

        The error of control cells in a ratio of sums grows with the slope at the level that the
        ratio leads to: with two counts where twenty were expected, all perturbations would seem to
        raise the gene. And a gene that few control cells express, but highly, may be expressed by
        all treated cells: means of logs then increase by more than any change of the rate explains.
        """
        of_sums, of_logs, of_both = variances
        beyond = squared_difference - _CONFLICT**2 * (of_sums + of_logs)
        steeper = 1 + share_of_controls * (slope - 1)
        of_sums, of_both = steeper**2 * of_sums + np.maximum(beyond, 0), steeper * of_both
        spread = of_sums + of_logs - 2 * of_both
        weight = np.clip((of_logs - of_both) / np.maximum(spread, _SMALLEST_VARIANCE), 0, 1)
        return np.where(spread > _SMALLEST_VARIANCE, weight, 1)

    def _at_level(self, rows: slice, logs: ComparedScale, change: np.ndarray) -> np.ndarray:
        """Variance of observed effects relative to that of an effect of 0.

        Half-way between 1 and the value at a ``change`` of the log rate: the first alone ignores
        the larger variance of an increased gene, and with the second alone a gene with few expected
        and no observed counts would be certain not to be expressed.
        """
        of_treated = 1 / np.maximum(self._n[rows], 1)
        of_treated = of_treated / (of_treated + 1 / self._n_reference)
        mean_count = self._rate * self._size_reference / self._n_reference
        of_change = self._dispersion + np.exp(-change) / mean_count
        level = logs.relative_slope(change) ** 2 * of_change
        level /= self._dispersion + 1 / mean_count
        return (1 + of_treated * level + 1 - of_treated) / 2

    def _estimates(
        self, rows: slice, logs: ComparedScale
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Estimates by sums and by logs, log ratios of sums, and expected counts."""
        without = np.log(self._expected.without[rows].astype(np.float64))
        of_controls = self._of_controls(rows)
        base = np.log(of_controls.expected)
        log_rate = without
        if self._sums.has_controls:  # errors of the decoder are the same in controls and others
            log_rate = without + np.log(of_controls.rate) - base
        counts, observed = self._size[rows] * np.exp(log_rate), self._sums.x[rows].double().numpy()
        change = np.log(observed + 0.5) - np.log(counts + 0.5)
        logged = self._sums.logged[rows].double().numpy() / np.maximum(self._n[rows], 1)
        by_logs = (logged - of_controls.logged) / logs.slope - logs.compared(without - base)
        return logs.compared(change), by_logs, change, counts

    def _per_cell(self, rows: slice) -> np.ndarray:
        """Variance of differences of means, relative to that of a cell, ``(rows, 1)``."""
        of_controls = 1 / self._n_reference
        if self._by_context is not None:
            shares = np.square(self._by_context.numbers[rows])
            of_controls = (shares / self._by_context.n).sum(axis=1, keepdims=True)
        return 1 / np.maximum(self._n[rows], 1) + of_controls

    def _of_controls(self, rows: slice) -> _OfControls:
        """Observed and expected rates, and mean logs of the control cells of rows."""
        by_context = self._by_context
        if by_context is not None:
            sizes, numbers = by_context.sizes[rows], by_context.numbers[rows]
            return _OfControls(
                sizes @ by_context.rate, sizes @ by_context.expected, numbers @ by_context.logged
            )
        if self._sums.has_controls:
            expected = self._expected.without[-1].astype(np.float64)
        else:
            expected = self._rate if self._logs is None else self._expected.unchanged
        logged = self._rate if self._logs is None else self._mean_of_logs
        return _OfControls(self._rate, expected, logged)

    def _beyond_errors(self, logs: ComparedScale) -> np.ndarray:
        """Squared difference of the two estimates per gene beyond their errors, ``(G,)``.

        It arises from variation between cells, to which means of logs and logs of means differ.
        """
        total, n_used = np.zeros((2, len(self._rate)))
        variance = self._of_sums + self._of_logs - 2 * self._of_both
        n_rows = len(self._n) - 1
        for start in range(0, n_rows, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, n_rows))
            by_sums, by_logs, _, counts = self._estimates(rows, logs)
            counts = np.minimum(counts, self._sums.x[rows].double().numpy())
            per_cell = self._per_cell(rows)
            used = counts >= _ENOUGH_COUNTS
            beyond = np.square(by_sums - by_logs) - variance * per_cell
            total += np.where(used, beyond, 0).sum(axis=0)
            n_used += used.sum(axis=0)
        return np.maximum(total / np.maximum(n_used, _FEW_PERTURBATIONS), 0)
