"""Do cells with a perturbation differ from cells that lack nothing but it? One test for each.

Partial F-tests of the indicator of a perturbation on features of cells, within groups of cells that
are alike in everything else: covariates and further perturbations. For one group of treated and one
of control cells this is Hotelling's test of two means.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
from scipy.stats import beta, false_discovery_control, norm, rankdata

from scvi_sams.labels._labels import NO_PERTURBATION, Labels, distinct_rows

_CELLS_PER_FEATURE = 10
"""Cells for each feature that a test looks at; with fewer it looks at the first ones."""
_ENOUGH_CELLS = 100
"""With a perturbation, for the theory to hold without permutations."""
_N_PERMUTATIONS = 300
_WORTH_PERMUTING = 0.2
"""p-value by theory above which a perturbation is called by none."""
_SEED = 5077


class GroupTests(NamedTuple):
    """A test per perturbation of the vocabulary, all of shape ``(n_perturbations,)``."""

    n_cells: np.ndarray
    """Cells that carry it and have others to be compared with."""
    n_compared: np.ndarray
    """Cells that they are compared with, which lack it."""
    statistic: np.ndarray
    """F statistic; NaN where there is nothing to compare."""
    p_value: np.ndarray
    n_features: np.ndarray
    """Features that it looks at: fewer where cells are few."""
    size: np.ndarray
    """Sum of ``n m / (n + m)`` over groups of n cells with it and m that lack nothing but it."""

    @property
    def squared_distance(self) -> np.ndarray:
        """Of the means of cells with and without it, by the covariance within (Mahalanobis).

        Less what chance makes of no distance, so that it may be below zero. 0 where nothing is
        compared.
        """
        beyond_chance = np.nan_to_num(self.statistic - 1) * self.n_features
        return beyond_chance / np.maximum(self.size, 1e-12)


class _Group(NamedTuple):
    """Cells that are alike: which they are, and sums of features and of their products."""

    cells: np.ndarray
    total: np.ndarray
    products: np.ndarray


_Pair = tuple[_Group, _Group]
"""Cells with a perturbation, and cells that lack nothing but it."""


def group_tests(features: np.ndarray, labels: Labels, strata: np.ndarray) -> GroupTests:
    """Test for each perturbation whether features differ between cells with and without it.

    Parameters
    ----------
    features
        Cells x features, most important first, found without a look at the labels.
    labels
        What each cell carries. Doses play no part, but that a dose of 0 is none.
    strata
        Integers, one per cell: only cells of the same stratum are compared.

    Notes
    -----
    Under the null hypothesis labels are exchangeable between the two kinds of cell of a stratum.
    The share of the labels' variance that features explain then has a beta distribution, up to how
    far features are from normal (:func:`normal_scores`). Where fewer than 100 cells carry a
    perturbation that is too crude, and a beta distribution takes its place that has the mean and
    variance of the share over permutations of the labels.
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
    """What is left of features after a linear regression on covariates, cells x covariates."""
    if covariates is None or not covariates.shape[1]:
        return features
    design = np.column_stack([np.ones(len(features)), covariates])
    return features - design @ np.linalg.lstsq(design, features, rcond=None)[0]


def normal_scores(values: np.ndarray) -> np.ndarray:
    """Replace the values of each column by the normal quantiles of their ranks.

    The mean of ten cells is then nearly normal, whatever the tails of a feature.
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
    """Cells by the perturbations that act on them and their stratum."""
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
    """What features explain of labels that were permuted within pairs, ``(_N_PERMUTATIONS,)``."""
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
