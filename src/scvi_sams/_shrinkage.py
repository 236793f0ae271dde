"""Shrink effects by their standard errors: as a whole, or entry by entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal, NamedTuple, Self, get_args

import numpy as np
from scipy.linalg import solve_triangular
from scipy.optimize import brentq, nnls
from scipy.special import digamma, ndtr, polygamma

from scvi_sams._checks import as_numbers, check_choice
from scvi_sams.exceptions import InvalidArgumentError

Sharing = Literal["row", "pooled"]
"""Effects that share mixture weights: those of one perturbation, or all."""

_GRID_RATIO = np.sqrt(2)
_SMALLEST_SCALE = 2.0**-10
"""Relative to the largest scale: no screen can distinguish smaller effects from 0."""
_BIN_RATIO = 1.05
"""Relative width of bins of errors and effects in which the mixture is fitted."""
_NULL_COUNTS = 9.0
"""Pseudo-observations of effects that are 0, as in Stephens (2017): if 0 and small scales explain
estimates equally well, 0 is preferred. Without them, in rows of 70 genes with 5 % true effects,
0.13 of calls at a sign error rate of 0.05 were false; with them 0.04."""
_MOST_STEPS = 100
_MOST_HALVINGS = 30
_RIDGE = 1e-10
_MOST_NATS = 0.01
"""Largest difference of the fitted log-likelihood from its maximum."""
_ENTRIES_AT_ONCE = 8192


class Shrunken(NamedTuple):
    """Posterior of effects; four arrays of one shape, perturbations x genes.

    Attributes
    ----------
    mean
        Posterior mean, in the units of the effects.
    sd
        Posterior SD.
    lfsr
        Local false sign rate: the posterior probability that an effect is 0 or has the opposite
        sign of its mean.
    null
        Posterior probability that an effect is exactly 0.
    """

    mean: np.ndarray
    sd: np.ndarray
    lfsr: np.ndarray
    null: np.ndarray


@dataclass(frozen=True, eq=False)
class NormalMixture:
    """Prior of effects: normal distributions of mean 0 and several scales; scale 0 is a point mass.

    Attributes
    ----------
    scales
        SDs, ascending, in the units of the effects; shape ``(n_scales,)``.
    weights
        Proportion of effects with each scale; they sum to 1.
    """

    scales: np.ndarray
    weights: np.ndarray

    @classmethod
    def fit(
        cls, effect: np.ndarray, error: np.ndarray, scales: Sequence[float] | None = None
    ) -> Self:
        """Find the weights that best explain estimates with normal errors.

        They maximise the likelihood with nine additional effects that are exactly 0 if there is a
        point mass (Stephens' "null-biased" prior). Errors and effects are counted in bins, so that
        a million take no longer than a few thousand.

        Parameters
        ----------
        effect, error
            Estimates and their standard errors, of one shape. Entries that are not finite, or have
            no error, are ignored.
        scales
            SDs of the mixture, 0 for a point mass. ``None``: 0 and a grid in steps of the square
            root of 2, from a tenth of the smallest error to twice the largest effect.
        """
        known = np.isfinite(effect) & np.isfinite(error) & (error > 0)
        binned_effect, binned_error, counts = _bins(np.abs(effect[known]), error[known])
        given = _scales(binned_effect, binned_error) if scales is None else np.asarray(scales)
        grid = np.sort(given.astype(np.float64))
        if not len(counts):
            return cls(grid, np.full(len(grid), 1 / len(grid)))
        log_likelihood, _ = _log_likelihood(binned_effect, binned_error, grid)
        likelihood = np.exp(log_likelihood - log_likelihood.max(axis=0))
        if (grid == 0).any():
            likelihood = np.column_stack([likelihood, grid == 0])
            counts = np.append(counts, _NULL_COUNTS)
        weights = _highest_likelihood(likelihood, counts)
        # To save time, scales that account for less than a hundredth of an effect are dropped.
        is_used = (weights > 0.01 / counts.sum()) | (grid == 0)
        return cls(grid[is_used], weights[is_used] / weights[is_used].sum())

    def posterior(self, effect: np.ndarray, error: np.ndarray) -> Shrunken:
        """Posterior of effects of any shape, given estimates and their standard errors.

        If an error is not finite, the posterior is the prior. If an error is 0, the posterior is
        the effect itself.
        """
        shape = effect.shape
        effect, error = effect.ravel(), error.ravel()
        tables = Shrunken(*np.empty((4, effect.size)))
        for start in range(0, effect.size, _ENTRIES_AT_ONCE):
            block = slice(start, start + _ENTRIES_AT_ONCE)
            of_block = self._of_block(effect[block], error[block])
            for table, values in zip(tables, of_block, strict=True):
                table[block] = values
        return Shrunken(*(table.reshape(shape) for table in tables))

    def _of_block(self, effect: np.ndarray, error: np.ndarray) -> Shrunken:
        is_exact = np.isfinite(effect) & (error == 0)
        known = np.isfinite(effect) & np.isfinite(error) & (error > 0)
        value = np.where(known, effect, 0)
        noise = np.where(known, error, 1)
        log_likelihood, kept = _log_likelihood(value, noise, self.scales)
        # An effect without information has no likelihood, and keeps its prior.
        log_likelihood[:, ~known] = kept[:, ~known] = 0
        with np.errstate(divide="ignore"):
            joint = log_likelihood + np.log(self.weights)[:, None]
        responsibility = np.exp(joint - joint.max(axis=0))
        responsibility /= responsibility.sum(axis=0)
        means = kept * value
        variances = np.where(known, kept * np.square(noise), np.square(self.scales)[:, None])
        mean = (responsibility * means).sum(axis=0)
        second = (responsibility * (np.square(means) + variances)).sum(axis=0)
        is_spread = self.scales > 0
        distance = np.abs(means[is_spread]) / np.sqrt(variances[is_spread])
        null = responsibility[~is_spread].sum(axis=0)
        lfsr = null + (responsibility[is_spread] * ndtr(-distance)).sum(axis=0)
        is_zero = is_exact & (effect == 0)
        return Shrunken(
            np.where(is_exact, effect, mean),
            np.where(is_exact, 0, np.sqrt(np.maximum(second - np.square(mean), 0))),
            np.where(is_exact, is_zero, lfsr),
            np.where(is_exact, is_zero, null),
        )


def shrink_rows(effect: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Multiply the effects of each perturbation by the part of their size that is not error.

    ``effect * max(0, 1 - sum(error^2) / sum(effect^2))``, over genes: the empirical Bayes mean.

    Parameters
    ----------
    effect, error
        Estimates and their standard errors, perturbations x genes. Genes that are not finite in
        either are excluded from the sums, and their effect is 0.

    Returns
    -------
    Shrunken effects, perturbations x genes.

    Raises
    ------
    InvalidArgumentError
        If they are not two numeric matrices of the same shape, or an error is negative.

    Notes
    -----
    James and Stein (1961); with unequal errors and the positive part, Efron and Morris (1975),
    Journal of the American Statistical Association 70, 311-319.

    Examples
    --------
    Errors make up 2 of 25 in the first row, and all of the second:

    >>> from scvi_sams._shrinkage import shrink_rows
    >>> shrink_rows(np.array([[3.0, 4.0], [0.5, 1.0]]), np.ones((2, 2))).round(2).tolist()
    [[2.76, 3.68], [0.0, 0.0]]
    """
    effect, error = _as_pair(effect, error)
    known = np.isfinite(effect) & np.isfinite(error)
    value, noise = np.where(known, effect, 0), np.where(known, error, 0)
    return value * share_kept(value, noise)


def share_kept(effect: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Factor by which :func:`shrink_rows` multiplies each row, ``(n_rows, 1)``; input is finite."""
    size, noise = (np.square(values).sum(axis=1, keepdims=True) for values in (effect, error))
    share = np.divide(noise, size, out=np.ones_like(size), where=size > 0)
    return np.maximum(1 - share, 0)


def shrink_entries(
    effect: np.ndarray,
    error: np.ndarray,
    *,
    weights: Sharing = "row",
    scales: Sequence[float] | None = None,
) -> Shrunken:
    """Shrink every effect under a scale mixture of normals (adaptive shrinkage, "ash").

    Effects follow ``sum_k w_k Normal(0, s_k^2)`` with ``s_0 = 0``, a point mass, and each is
    observed with a normal error. :meth:`NormalMixture.fit` finds the weights.

    Parameters
    ----------
    effect, error
        Estimates and their standard errors, perturbations x genes. An estimate that is not finite
        or has no finite error is returned as 0; one with an error of 0 is unchanged.
    weights
        ``"row"``: the effects of each perturbation have their own weights. ``"pooled"``: all have
        the same.
    scales
        As for :meth:`NormalMixture.fit`.

    Returns
    -------
    Posterior mean, SD, local false sign rate and probability of 0.

    Raises
    ------
    InvalidArgumentError
        If they are not two numeric matrices of the same shape, an error is negative, or
        ``weights`` is neither word.

    Notes
    -----
    Stephens (2017), Biostatistics 18, 275-294. Data larger than memory are read in blocks of
    rows: :meth:`NormalMixture.fit` on some, then :meth:`NormalMixture.posterior` on each.

    Examples
    --------
    With a single scale of 2 and errors of 1, every effect is multiplied by ``4 / (4 + 1)``:

    >>> from scvi_sams._shrinkage import shrink_entries
    >>> shrink_entries(np.array([[1.0, -2.0]]), np.ones((1, 2)), scales=[2]).mean.tolist()
    [[0.8, -1.6]]
    """
    check_choice("weights", weights, get_args(Sharing))
    effect, error = _as_pair(effect, error)
    if weights == "pooled":
        return NormalMixture.fit(effect, error, scales).posterior(effect, error)
    tables = Shrunken(*np.empty((4, *effect.shape)))
    for row, (values, noise) in enumerate(zip(effect, error, strict=True)):
        of_row = NormalMixture.fit(values, noise, scales).posterior(values, noise)
        for table, shrunken in zip(tables, of_row, strict=True):
            table[row] = shrunken
    return tables


def moderated_variance(
    variance: np.ndarray,
    n_cells: np.ndarray,
    control_variance: np.ndarray,
    n_controls: int,
    control_kurtosis: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Shrink the variances of genes over few cells towards those over the control cells.

    The ratio ``s^2 / s_control^2`` of a gene follows ``c F(d, d_0)``, up to the error of the
    control variances, and the posterior variance is ``(d_0 c s_control^2 + d s^2) / (d_0 + d)``.
    The variance of normal cells has ``d = n_cells - 1`` degrees of freedom; with excess kurtosis k
    it varies as if it had ``2 / (2 / (n_cells - 1) + k / n_cells)``. For each perturbation, ``c``
    and ``d_0`` are estimated from the mean and variance over genes of the logarithms of the ratios,
    corrected for their errors; genes are weighted by the precision of their logarithm.

    Parameters
    ----------
    variance
        Sample variances (``ddof=1``), perturbations x genes; rows of a single cell are ignored.
    n_cells
        Cells of each perturbation, shape ``(n_perturbations,)``.
    control_variance
        Sample variances over the control cells, shape ``(n_genes,)``.
    n_controls
        Number of control cells, at least 2.
    control_kurtosis
        Excess kurtosis over the control cells, shape ``(n_genes,)``; negative values count as 0.
        Without it, noisy variances of rare genes would be taken for differences between genes.

    Returns
    -------
    Posterior variances, perturbations x genes, in the units of ``variance``. A gene that does
    not vary over the controls keeps its own. A perturbation with a single cell has the variances of
    the controls, NaN where these are 0.

    Notes
    -----
    Smyth (2004), Statistical Applications in Genetics and Molecular Biology 3, article 3: section
    6.2, where the prior variance is common to genes; here it is that of the controls, gene by gene.

    Examples
    --------
    Ratios vary less than their errors, so all are estimated to be the same:

    >>> from scvi_sams._shrinkage import moderated_variance
    >>> control = np.array([1.0, 2.0, 4.0])
    >>> moderated_variance(control[None], np.array([10]), control, 1000).round(2).tolist()
    [[1.12, 2.24, 4.48]]
    """
    variance = np.asarray(variance, dtype=np.float64)
    prior = np.asarray(control_variance, dtype=np.float64)
    kurtosis = np.broadcast_to(np.maximum(control_kurtosis, 0), prior.shape)
    # Numbers of cells recur, and digamma and trigamma of every gene take most of the time.
    certainty_of = cache(partial(_certainty, kurtosis=kurtosis))
    _, control_bias, control_error = certainty_of(n_controls)
    moderated = np.empty_like(variance)
    for row, (observed, n) in enumerate(zip(variance, np.asarray(n_cells).tolist(), strict=True)):
        if n < 2:
            moderated[row] = np.where(prior > 0, prior, np.nan)
            continue
        freedom, bias, error = certainty_of(n)
        known = (observed > 0) & (prior > 0)
        ratio = np.log(observed[known] / prior[known]) - (bias - control_bias)[known]
        scale, prior_freedom = _prior_of_variances(ratio, (error + control_error)[known])
        # Infinite prior degrees of freedom: the gene's own variance has no weight.
        own = 1 / (1 + prior_freedom / freedom)
        mixed = own * observed + (1 - own) * scale * prior
        moderated[row] = np.where(prior > 0, mixed, observed)
    return moderated


def _certainty(n_cells: int, kurtosis: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Degrees of freedom of sample variances; bias and squared error of their logarithms."""
    freedom = 2 / (2 / (n_cells - 1) + kurtosis / n_cells)
    return freedom, _log_bias(freedom), polygamma(1, freedom / 2)


def _prior_of_variances(ratio: np.ndarray, squared_error: np.ndarray) -> tuple[float, float]:
    """Scale and degrees of freedom of the prior, from unbiased log ratios and their errors."""
    if len(ratio) < 2:
        return 1.0, 0.0
    weights = 1 / squared_error
    weights /= weights.sum()
    mean = weights @ ratio
    excess = weights @ (np.square(ratio - mean) - (1 - weights) * squared_error)
    if excess <= 0:
        return float(np.exp(mean)), np.inf
    prior_freedom = 2 * _inverse_trigamma(excess / (1 - np.square(weights).sum()))
    return float(np.exp(mean + _log_bias(prior_freedom))), prior_freedom


def _log_bias(freedom: np.ndarray | float) -> np.ndarray:
    """Difference of the mean logarithm of a sample variance from the log of the variance."""
    return digamma(freedom / 2) - np.log(freedom / 2)


def _inverse_trigamma(value: float) -> float:
    """Solve ``trigamma(x) = value``; trigamma lies between 1 / x and 1 / (x - 1/2)."""
    return brentq(lambda x: float(polygamma(1, x)) - value, 1 / value, 1 / value + 1, xtol=1e-12)


def _as_pair(effect: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    effect, error = as_numbers("effect", effect), as_numbers("error", error)
    if effect.ndim != 2 or effect.shape != error.shape:
        raise InvalidArgumentError(
            f"`effect` has the shape {effect.shape} and `error` {error.shape}; both must be "
            "perturbations x genes."
        )
    if (error < 0).any():
        raise InvalidArgumentError("`error` has negative numbers; it must be standard errors.")
    return effect, error


def _bins(effect: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count entries of nearly equal size and error; return the means of each bin."""
    if not effect.size:
        return effect, error, effect
    step = np.log(_BIN_RATIO)
    of_error = np.floor(np.log(error) / step).astype(np.int64)
    # By arcsinh, bins are a fraction of the error wide if the effect is no larger than it.
    of_effect = np.floor(np.arcsinh(effect / error) / step).astype(np.int64)
    width = of_effect.max() + 1
    _, bin_of_entry, counts = np.unique(
        of_error * width + of_effect, return_inverse=True, return_counts=True
    )
    square = np.bincount(bin_of_entry, np.square(effect / error)) / counts
    log_error = np.bincount(bin_of_entry, np.log(error)) / counts
    binned_error = np.exp(log_error)
    return np.sqrt(square) * binned_error, binned_error, counts.astype(np.float64)


def _scales(effect: np.ndarray, error: np.ndarray) -> np.ndarray:
    """0, then steps from a tenth of the smallest error to twice the largest effect."""
    if not effect.size:
        return np.zeros(1)
    smallest = error.min() / 10
    excess = np.max(np.square(effect) - np.square(error))
    largest = 2 * np.sqrt(excess) if excess > 0 else 8 * smallest
    smallest = max(smallest, largest * _SMALLEST_SCALE)
    n_steps = int(np.ceil(np.log(largest / smallest) / np.log(_GRID_RATIO)))
    return np.append(0, largest * _GRID_RATIO ** -np.arange(n_steps + 1.0)[::-1])


def _log_likelihood(
    effect: np.ndarray, error: np.ndarray, scales: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood of effects under each scale, up to a constant, and the shrinkage factor."""
    variance = np.square(scales)[:, None]
    total = variance + np.square(error)
    return -0.5 * (np.log(total) + np.square(effect) / total), variance / total


def _highest_likelihood(likelihood: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Maximum likelihood weights; ``likelihood`` is scales x bins.

    By Newton's method: EM would take thousands of steps, because neighbouring scales are similar. A
    penalty, the number of effects times the sum of the weights, replaces the constraint that they
    sum to 1 (Kim et al., 2020, Journal of Computational and Graphical Statistics 29, 261-273), so
    that each step is a least squares problem with non-negative weights.
    """
    total = counts.sum()
    weights = np.full(len(likelihood), 1 / len(likelihood))
    mixed = weights @ likelihood
    for _ in range(_MOST_STEPS):
        relative = likelihood / mixed
        gradient = relative @ counts
        # The log-likelihood is concave: this bounds the difference from its maximum.
        if gradient.max() - total < _MOST_NATS:
            break
        curvature = (relative * counts) @ relative.T
        curvature[np.diag_indices_from(curvature)] += _RIDGE * np.trace(curvature)
        factor = np.linalg.cholesky(curvature)
        wanted = solve_triangular(factor, curvature @ weights + gradient - total, lower=True)
        step = nnls(factor.T, wanted)[0] - weights
        weights, mixed = _climb(weights, step, likelihood, counts)
    return weights


def _climb(
    weights: np.ndarray, step: np.ndarray, likelihood: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Take the largest of 0.99, 0.99 / 2 ... of a step that raises the likelihood."""
    # After a full step an outlier could have no scale that explains it.
    before = counts @ np.log(weights @ likelihood)
    for halving in range(_MOST_HALVINGS):
        tried = weights + 0.99 / 2**halving * step
        tried /= tried.sum()
        mixed = tried @ likelihood
        if counts @ np.log(mixed) > before:
            return tried, mixed
    return weights, weights @ likelihood
