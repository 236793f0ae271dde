"""Test whether cells with a perturbation differ from otherwise equal cells without it.

Partial F-tests of the indicator of a perturbation on features of cells, within groups of cells that
are equal in everything else: covariates and other perturbations. For one group of treated and one
of control cells this is Hotelling's test of two means.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
from scipy.stats import beta, false_discovery_control, norm, rankdata

from scvi_sams.labels._labels import NO_PERTURBATION, Labels, distinct_rows

_CELLS_PER_FEATURE = 10
"""Cells per feature in a test; with fewer cells only the first features are used."""
_ENOUGH_CELLS = 100
"""Cells with a perturbation above which the theory holds without permutations."""
_N_PERMUTATIONS = 300
_WORTH_PERMUTING = 0.2
"""Smallest p-value by theory above which permutations are not needed."""
_SEED = 5077


class GroupTests(NamedTuple):
    """A test per perturbation of the vocabulary, all of shape ``(n_perturbations,)``."""

    n_cells: np.ndarray
    """Cells with the perturbation that have cells to compare with."""
    n_compared: np.ndarray
    """Cells without the perturbation that they are compared with."""
    statistic: np.ndarray
    """F statistic; NaN if there are no cells to compare."""
    p_value: np.ndarray
    n_features: np.ndarray
    """Number of features used: fewer for few cells."""
    size: np.ndarray
    """Sum of ``n m / (n + m)`` over groups of n cells with the perturbation and m without."""

    @property
    def squared_distance(self) -> np.ndarray:
        """Squared distance of the means of both kinds of cells, by the covariance within groups.

        The expectation under no difference is subtracted, so that it may be negative. 0 if nothing
        is compared.
        """
        beyond_chance = np.nan_to_num(self.statistic - 1) * self.n_features
        return beyond_chance / np.maximum(self.size, 1e-12)


class _Group(NamedTuple):
    """Equal cells: their positions, and sums of features and of their products."""

    cells: np.ndarray
    total: np.ndarray
    products: np.ndarray


_Pair = tuple[_Group, _Group]
"""Cells with a perturbation, and otherwise equal cells without it."""


def group_tests(features: np.ndarray, labels: Labels, strata: np.ndarray) -> GroupTests:
    """Test for each perturbation whether features differ between cells with and without it.

    Parameters
    ----------
    features
        Cells x features, most important first, computed without using the labels.
    labels
        Perturbations of each cell. Doses are ignored, except that a dose of 0 is no perturbation.
    strata
        Integers, one per cell: only cells of the same stratum are compared.

    Notes
    -----
    Under the null hypothesis labels are exchangeable between the two kinds of cell of a stratum.
    The proportion of the labels' variance that features explain then has a beta distribution, up to
    deviations of features from normality (:func:`normal_scores`). With fewer than 100 cells with a
    perturbation this is too inaccurate, and a beta distribution with the mean and variance of the
    proportion over permutations of the labels is used.
    """
    groups = _groups(features, labels, strata)
    pairs: dict[int, list[_Pair]] = defaultdict(list)
    for (carried, stratum), group in groups.items():
        for code in carried:
            others = tuple(other for other in carried if other != code)
            if (others, stratum) in groups:
                pairs[code].append((group, groups[others, stratum]))
    rng = np.random.default_rng(_SEED)
    found = [_test(pairs[code], features, rng) for code in range(len(labels.vocabulary))]
    return GroupTests(*(np.array(column) for column in zip(*found, strict=True)))


def without_linear(features: np.ndarray, covariates: np.ndarray | None) -> np.ndarray:
    """Residuals of features after linear regression on covariates, cells x covariates."""
    if covariates is None or not covariates.shape[1]:
        return features
    design = np.column_stack([np.ones(len(features)), covariates])
    return features - design @ np.linalg.lstsq(design, features, rcond=None)[0]


def normal_scores(values: np.ndarray) -> np.ndarray:
    """Replace the values of each column by the normal quantiles of their ranks.

    The mean of ten cells is then nearly normal, whatever the distribution of a feature.
    """
    return norm.ppf((rankdata(values, axis=0) - 0.5) / len(values))


def q_values(p_values: np.ndarray) -> np.ndarray:
    """Smallest false discovery rates (Benjamini & Hochberg 1995); NaN stays NaN."""
    q = np.full(len(p_values), np.nan)
    known = np.isfinite(p_values)
    if known.any():
        q[known] = false_discovery_control(p_values[known])
    return q


def _groups(
    features: np.ndarray, labels: Labels, strata: np.ndarray
) -> dict[tuple[tuple[int, ...], int], _Group]:
    """Cells grouped by the perturbations that act on them and their stratum."""
    acting = np.where(labels.doses != 0, labels.codes, NO_PERTURBATION)
    rows, row_of_cell = distinct_rows(np.sort(acting, axis=1))
    _, stratum = np.unique(strata, return_inverse=True)
    n_strata = int(stratum.max(initial=0)) + 1
    number = row_of_cell * n_strata + stratum
    order = np.argsort(number, kind="stable")
    starts = np.flatnonzero(np.diff(number[order], prepend=-1))
    groups = {}
    for cells in np.split(order, starts[1:]):
        row, of_stratum = divmod(int(number[cells[0]]), n_strata)
        carried = tuple(int(code) for code in rows[row] if code != NO_PERTURBATION)
        values = features[cells]
        groups[carried, of_stratum] = _Group(cells, values.sum(axis=0), values.T @ values)
    return groups


def _test(
    pairs: list[_Pair], features: np.ndarray, rng: np.random.Generator
) -> tuple[int, int, float, float, int, float]:
    n_with, n_without = (sum(len(pair[place].cells) for pair in pairs) for place in range(2))
    freedom = n_with + n_without - len(pairs)
    n_used = min(features.shape[1], max(freedom // _CELLS_PER_FEATURE, 1))
    if freedom <= n_used + 1:
        return n_with, n_without, np.nan, np.nan, n_used, 0.0
    # Sums of products within pairs: of features, of features with the indicator, of the indicator.
    within = np.zeros((n_used, n_used))
    slope = np.zeros(n_used)
    size = 0.0
    for treated, other in pairs:
        n_treated, n_other = len(treated.cells), len(other.cells)
        n = n_treated + n_other
        both = (treated.total + other.total)[:n_used]
        within += (treated.products + other.products)[:n_used, :n_used] - np.outer(both, both) / n
        slope += ((n_other * treated.total - n_treated * other.total) / n)[:n_used]
        size += n_treated * n_other / n
    inverse = np.linalg.pinv(within, hermitian=True)
    share = float(np.clip(slope @ inverse @ slope / size, 0, 1))
    statistic = share / n_used / max((1 - share) / (freedom - n_used), np.finfo(float).tiny)
    p_value = float(beta.sf(share, n_used / 2, (freedom - n_used) / 2))
    if n_with < _ENOUGH_CELLS and p_value < _WORTH_PERMUTING:
        shares = _permuted_shares(pairs, features[:, :n_used], inverse, rng) / size
        p_value = float(beta.sf(share, *_beta_of(shares.mean(), shares.var(ddof=1))))
    return n_with, n_without, statistic, p_value, n_used, size


def _permuted_shares(
    pairs: list[_Pair], features: np.ndarray, inverse: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Proportions that features explain of permuted labels, ``(_N_PERMUTATIONS,)``."""
    slopes = np.zeros((_N_PERMUTATIONS, len(inverse)))
    for treated, other in pairs:
        values = features[np.concatenate([treated.cells, other.cells])]
        values = values - values.mean(axis=0)
        for slope in slopes:
            drawn = rng.choice(len(values), len(treated.cells), replace=False, shuffle=False)
            slope += values[drawn].sum(axis=0)
    return np.einsum("pi,ij,pj->p", slopes, inverse, slopes)


def _beta_of(mean: float, variance: float) -> tuple[float, float]:
    """Parameters of the beta distribution with a mean and a variance."""
    total = mean * (1 - mean) / variance - 1
    return mean * total, (1 - mean) * total
