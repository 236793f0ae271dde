"""Effects on every gene as the cells show them, beside what the decoder makes of the shifts.

On the logarithm of the rate (for a normal likelihood, on the mean); of a combination together with
its perturbations. With X the sum of the counts of the cells of t, and M what the decoder expects of
these cells without t::

    by sums:   log(X_t + 1/2) - log(M_t + 1/2), less the same of the control cells
    by logs:   the change of log rate that explains the mean of log2(1 + 1e4 x / size) over the
               cells of t, less that over the control cells

The first is efficient where counts are few, the second where cells differ a lot. They are combined
by their errors, which the control cells tell, and taken to the scale on which effects are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from scvi_sams._torch import fixed_seed
from scvi_sams.module._likelihoods import Likelihood, NegativeBinomialLikelihood
from scvi_sams.module._perturbation_module import PerturbationModule
from scvi_sams.train._compared_scale import ComparedScale, SameScale
from scvi_sams.train._gene_sums import Cells, GeneSums, sample_of_groups

Total = Callable[[torch.Tensor], torch.Tensor]
"""Adds up the numbers of all processes."""

ROWS_AT_ONCE = 64
_N_POSTERIOR, _N_STATES = 32, 8
"""Posterior samples of the shifts, and basal states of each, over which the decoder is averaged;
the states are the same for all perturbations."""
_SEED = 60013
_ENOUGH_COUNTS = 20.0
"""Counts of a gene in the cells of a perturbation, expected and observed, from which on means of
logarithms are used: of fewer, their inverse is too curved for a normal error."""
_FEW_PERTURBATIONS = 5
_SMALLEST_RATE = 1e-30
"""A share of the library may be too small for single precision, and its logarithm is taken."""
_SMALLEST_VARIANCE, _SMALLEST_DISPERSION = 1e-12, 1e-3


class Expected(NamedTuple):
    """What the decoder expects of the cells of each group, the controls in the last row."""

    without: np.ndarray
    """Rates of the cells without their perturbation or combination, ``(R + 1, G)``."""
    with_shift: np.ndarray
    """The same with its shift, averaged over the posterior."""
    at_mean: np.ndarray
    """The same with the posterior mean of the shift."""
    variance: np.ndarray
    """Posterior variance of the change of the log rate (of the mean, where it is no count)."""
    dose: np.ndarray
    """Mean dose of the perturbation in its cells, ``(R + 1,)``; 1 of a combination."""
    log_rates: np.ndarray
    """Of states of control cells, states x genes; without genes where expression is no count."""

    @property
    def unchanged(self) -> np.ndarray:
        """Mean rates of those states, ``(G,)``."""
        return np.exp(self.log_rates.astype(np.float64)).mean(axis=0)


@torch.no_grad()
def expected_rates(module: PerturbationModule, cells: Cells, n_groups: int) -> Expected:
    """Decode basal states from the prior with the covariates of the cells of each group."""
    generator = torch.Generator().manual_seed(_SEED)
    shape = (_N_POSTERIOR, _N_STATES, module.n_latent)
    z_basal = torch.randn(shape, generator=generator).to(module.device)
    n_perturbations = len(module.cells_per_perturbation)
    rows = torch.arange(n_perturbations, device=module.device)
    with fixed_seed(_SEED):
        drawn = [
            module.sampled_shifts(some, _N_POSTERIOR).expand(_N_POSTERIOR, -1, -1)
            for some in rows.split(ROWS_AT_ONCE)
        ]
    shifts = torch.cat(drawn, dim=1)
    # Groups without cells keep rates of 1, of which there are logarithms.
    shape_of_rates = (3, n_groups, module.likelihood.n_genes)
    without, with_shift, at_mean = np.ones(shape_of_rates, dtype=np.float32)
    variance = np.zeros_like(without)
    dose = np.ones(n_groups)
    is_count = module.likelihood.is_count_likelihood

    def mean_rates(shift: torch.Tensor, covariates: torch.Tensor | None) -> np.ndarray:
        """Rates averaged over the states of each posterior sample."""
        rate = module.likelihood.rate(module.decode(z_basal, shift, covariates)).mean(dim=1)
        if is_count:
            rate.clamp_(min=_SMALLEST_RATE)
        return rate.cpu().numpy()

    nothing = shifts.new_zeros(1, 1, shifts.shape[-1])
    plain = None if module.covariates.n_out else mean_rates(nothing, None)
    # Empty slots hold one more perturbation, which does nothing.
    shifts = torch.cat([shifts, shifts.new_zeros(_N_POSTERIOR, 1, shifts.shape[-1])], dim=1)
    samples = torch.arange(_N_POSTERIOR, device=module.device)[:, None, None]

    mean_shifts = shifts.mean(dim=0, keepdim=True).expand_as(shifts)

    def shift_of(table: torch.Tensor, codes: torch.Tensor, doses: torch.Tensor) -> torch.Tensor:
        """Sum over slots, ``(posterior samples, states, K)`` to ``(.., S)``."""
        of_slots = table[samples, codes.masked_fill(codes < 0, n_perturbations)]
        return (of_slots * doses[..., None]).sum(dim=2)

    for group, members in sample_of_groups(cells, n_groups, _N_POSTERIOR * _N_STATES, generator):
        codes, doses, covariates = (
            part[members].unflatten(0, shape[:2]).to(module.device)
            for part in (cells.codes, cells.doses, cells.covariates)
        )
        # The perturbation of the group stands first; in a group of a combination all are its own.
        n_own = 1 if group < n_perturbations else codes.shape[-1]
        own, rest = (
            (codes[..., :n_own], doses[..., :n_own]),
            (codes[..., n_own:], doses[..., n_own:]),
        )
        others, base = nothing, plain
        if base is None or (rest[0] >= 0).any():
            others = shift_of(shifts, *rest)
            base = mean_rates(others, covariates if module.covariates.n_out else None)
        changed = changed_by_mean = base
        if group < n_groups - 1:
            changed, changed_by_mean = (
                mean_rates(
                    others + shift_of(table, *own),
                    covariates if module.covariates.n_out else None,
                )
                for table in (shifts, mean_shifts)
            )
        if group < n_perturbations:
            dose[group] = float(doses[..., 0].mean())
        without[group], with_shift[group] = base.mean(axis=0), changed.mean(axis=0)
        at_mean[group] = changed_by_mean.mean(axis=0)
        change = np.log(changed) - np.log(base) if is_count else changed - base
        variance[group] = change.var(axis=0, ddof=1)
    log_rates = np.zeros((1, 0))
    if is_count:
        is_used = cells.group == n_groups - 1
        covariates = cells.covariates[is_used if is_used.any() else slice(None)]
        evenly = torch.linspace(0, len(covariates) - 1, _N_POSTERIOR * _N_STATES).long()
        chosen = covariates[evenly].unflatten(0, shape[:2]).to(module.device)
        logits = module.decode(z_basal, nothing, chosen if module.covariates.n_out else None)
        log_rates = module.likelihood.log_rate(logits).flatten(0, 1).cpu().numpy()
    return Expected(without, with_shift, at_mean, variance, dose, log_rates)


def over_processes(expected: Expected, cells: Cells, total: Total) -> Expected:
    """Average what processes expect of groups, each of its own cells; ``total`` adds up."""
    own = torch.bincount(cells.group, minlength=len(expected.dose)).float()
    everywhere = total(own).numpy()

    def average(values: np.ndarray) -> np.ndarray:
        own_weight = own.reshape(-1, *[1] * (values.ndim - 1))
        weight = everywhere.reshape(own_weight.shape)
        summed = total(own_weight * torch.as_tensor(values, dtype=torch.float32)).numpy()
        return np.where(weight > 0, summed / np.maximum(weight, 1), values)

    averaged = Expected._fields[:-1]
    return expected._replace(**{name: average(getattr(expected, name)) for name in averaged})


def _as_control_cells_vary(dispersion: np.ndarray) -> NegativeBinomialLikelihood:
    """Gamma-Poisson counts of these dispersions."""
    likelihood = NegativeBinomialLikelihood(len(dispersion), uses_size_factor=True)
    with torch.no_grad():
        likelihood.log_inverse_dispersion.copy_(-torch.as_tensor(dispersion).log())
    return likelihood


class Block(NamedTuple):
    """Effects of some perturbations or combinations at the doses of their cells, rows x genes."""

    rows: slice
    """Of the direct effects."""
    dose: np.ndarray
    """Mean dose of the perturbation, ``(rows, 1)``; 1 of a combination."""
    observed: np.ndarray
    """As effects are compared."""
    error: np.ndarray
    """Standard error of the observed effects; infinite where there are no cells."""
    of_model: np.ndarray
    """On the log rate, as are the next."""
    model_at_mean: np.ndarray
    """Effects of the posterior means of the shifts."""
    variance_of_model: np.ndarray
    """Posterior variance of the model's effects."""


class ObservedEffects:
    """Observed effects and those of the model, a block of perturbations at a time.

    They are effects on cells that respond to what they carry. ``responding``, ``(R,)``, is the
    proportion of the cells of each row that do; ``None``: all.

    Attributes
    ----------
    cell_sizes
        Sizes of cells and the share of cells of each, ``(2, n_sizes)``.
    scale
        On which effects are compared; its ``slope``, ``(G,)``, is what one of a gene weighs.
    others
        What other perturbations add to the logits in the cells of some rows, by row.
    """

    def __init__(
        self,
        sums: GeneSums,
        expected: Expected,
        cell_sizes: np.ndarray,
        likelihood: Likelihood,
        responding: np.ndarray | None = None,
    ) -> None:
        n_rows = len(sums.n) - 1
        self._responding = np.ones((n_rows, 1)) if responding is None else responding[:, None]
        self._sums, self._expected = sums, expected
        self.others: dict[int, np.ndarray] = {}
        is_count = likelihood.is_count_likelihood
        self._n = sums.n.double().numpy()[:, None]
        self._size = sums.size.double().numpy()[:, None]
        # Control cells are what effects are relative to; all cells where there are none.
        reference = slice(-1, None) if sums.has_controls else slice(None)
        self._n_reference = float(self._n[reference].sum())
        total = sums.x[reference].double().sum(dim=0).numpy()
        self._size_reference = float(self._size[reference].sum())
        self._rate = (total + 0.5 * is_count) / self._size_reference
        moments = sums.products[int(sums.has_controls)].numpy() / self._n_reference
        residual = moments[0, 0] - 2 * self._rate * moments[0, 2] + self._rate**2 * moments[2, 2]
        self._of_sums = np.maximum(residual, _SMALLEST_VARIANCE)
        self._logs: ComparedScale | None = None
        self._bias: np.ndarray | float = 0.0
        self.scale: ComparedScale | SameScale = SameScale(len(total))
        if is_count:
            mean_count = self._rate * self._size_reference / self._n_reference
            self._of_sums = self._of_sums / mean_count**2
            self._dispersion = np.maximum(self._of_sums - 1 / mean_count, _SMALLEST_DISPERSION)
            logged = sums.logged[reference].double().sum(dim=0).numpy() / self._n_reference
            states = expected.log_rates.astype(np.float64)
            if not likelihood.has_laplace_transform:
                likelihood, states = (
                    _as_control_cells_vary(self._dispersion),
                    np.log(self._rate)[None],
                )
            self.scale = self._logs = ComparedScale(likelihood, states, cell_sizes)
            # Without controls the decoder is what effects are relative to.
            self._mean_of_logs = logged if sums.has_controls else self._logs.unchanged
            variance = np.maximum(moments[1, 1] - logged**2, 0)
            self._of_logs = variance / self.scale.slope**2
            covariance = moments[0, 1] - self._rate * moments[1, 2]
            self._of_both = covariance / mean_count / self.scale.slope
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
            # Cells that do not respond have none of the effect: all have that much less of it.
            respond = self._responding[rows]
            observed, variance = observed / respond, variance / respond**2
            yield Block(
                rows,
                self._expected.dose[rows, None],
                np.where(has_cells, observed, 0),
                np.where(has_cells, np.sqrt(variance), np.inf),
                np.where(has_cells, self._change_to(self._expected.with_shift, rows), 0),
                np.where(has_cells, self._change_to(self._expected.at_mean, rows), 0),
                self._expected.variance[rows],
            )

    def _change_to(self, rates: np.ndarray, rows: slice) -> np.ndarray:
        """Effect of a shift on the decoder's expectation, rows x genes."""
        changed, base = (
            values[rows].astype(np.float64) for values in (rates, self._expected.without)
        )
        return changed - base if self._logs is None else np.log(changed) - np.log(base)

    def _combined(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Best linear unbiased combinations of the two estimates, and their variances."""
        expected = self._expected
        per_cell = 1 / np.maximum(self._n[rows], 1) + 1 / self._n_reference
        of_sums = self._of_sums * per_cell
        if self._logs is None:
            per_cell_mean = self._sums.x[rows].double().numpy() / np.maximum(self._n[rows], 1)
            observed = per_cell_mean - expected.without[rows] - self._rate
            observed = observed + (expected.without[-1] if self._sums.has_controls else self._rate)
            return observed, of_sums
        by_sums, by_logs, change, counts = self._estimates(rows, self._logs)
        # At least that of counts that vary no more than a Poisson, as where controls had none: no
        # estimate of a rate has a smaller one.
        of_counts = 1 / (counts + 0.5) + 1 / (self._rate * self._size_reference + 0.5)
        of_sums = np.maximum(of_sums, of_counts) + self._bias
        of_logs, of_both = (
            np.maximum(values * per_cell, of_counts) for values in (self._of_logs, self._of_both)
        )
        spread = of_sums + of_logs - 2 * of_both
        weight = np.clip((of_logs - of_both) / np.maximum(spread, _SMALLEST_VARIANCE), 0, 1)
        weight = np.where(spread > _SMALLEST_VARIANCE, weight, 1)
        rest = 1 - weight
        variance = weight**2 * of_sums + rest**2 * of_logs + 2 * weight * rest * of_both
        variance = np.maximum(variance, _SMALLEST_VARIANCE)
        observed = weight * by_sums + rest * by_logs
        return observed, variance * self._at_level(rows, self._logs, change)

    def _at_level(self, rows: slice, logs: ComparedScale, change: np.ndarray) -> np.ndarray:
        """Variance of observed effects per that of an effect of 0.

        Half-way between 1, and what it is if ``change`` of the log rate is right: the first alone
        misses how much a gene varies that has risen, and by the second alone a gene without counts,
        where few were expected, would be known not to be expressed.
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
        base = np.log(self._expected.unchanged)
        log_rate = without
        if self._sums.has_controls:  # what the decoder gets wrong of them, it gets wrong of all
            base = np.log(self._expected.without[-1].astype(np.float64))
            log_rate = without + np.log(self._rate) - base
        counts, observed = self._size[rows] * np.exp(log_rate), self._sums.x[rows].double().numpy()
        change = np.log(observed + 0.5) - np.log(counts + 0.5)
        logged = self._sums.logged[rows].double().numpy() / np.maximum(self._n[rows], 1)
        by_logs = (logged - self._mean_of_logs) / logs.slope - logs.compared(without - base)
        return logs.compared(change), by_logs, change, counts

    def _beyond_errors(self, logs: ComparedScale) -> np.ndarray:
        """Squared difference of the two estimates per gene beyond their errors, ``(G,)``.

        What the logarithm of a mean misses of the mean of logarithms, where cells differ.
        """
        total, n_used = np.zeros((2, len(self._rate)))
        variance = self._of_sums + self._of_logs - 2 * self._of_both
        n_rows = len(self._n) - 1
        for start in range(0, n_rows, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, n_rows))
            by_sums, by_logs, _, counts = self._estimates(rows, logs)
            counts = np.minimum(counts, self._sums.x[rows].double().numpy())
            per_cell = 1 / np.maximum(self._n[rows], 1) + 1 / self._n_reference
            used = counts >= _ENOUGH_COUNTS
            beyond = np.square(by_sums - by_logs) - variance * per_cell
            total += np.where(used, beyond, 0).sum(axis=0)
            n_used += used.sum(axis=0)
        return np.maximum(total / np.maximum(n_used, _FEW_PERTURBATIONS), 0)
