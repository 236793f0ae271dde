"""Test whether the effect of a guide is a multiple of that of the other guides of its gene.

With ``d`` the effect of a guide on features of cells and ``s`` that of its siblings together, the
statistic is the smallest over angles of::

    (cos a * d - sin a * s)' V(a)^-1 (cos a * d - sin a * s),    0 <= a <= pi / 2

where ``V(a)`` is the covariance of that difference, from the cells of the guide, of its siblings,
and of the control cells with which both are compared. It is zero if one effect is a non-negative
multiple of the other. If all cells had the same covariance, it would be that of Bartlett's test of
the second canonical variate. Responding cells have another covariance than control cells; that of
the cells of a guide is between the two.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.linalg import eigh
from scipy.optimize import minimize_scalar
from scipy.stats import f as f_distribution

from scvi_sams._fdr import within
from scvi_sams._group_tests import q_values
from scvi_sams.interpretation._guide_cells import Compared

_CELLS_PER_FEATURE = 10
"""Cells of a perturbation per feature in its tests."""
_FEWEST_CELLS = 5
"""Smallest number of cells of a tested guide: means of fewer are far from normal."""
_FEWEST_LEFT = 2
"""Smallest number of guides to compare after others are excluded."""
_UNEXPLAINED = 1e-3
"""Smallest proportion of the variance of a feature that earlier features do not explain."""
_AGREES = 0.9
"""Cosine above which two effects are the same: the residual is half as long as the shared part."""
_MOST_ERROR = 0.5
"""Proportion of the squared length of an effect that must not be error to know its direction."""
_BEYOND, _SMALLEST_VARIANCE = 0.5, 0.1
"""Limit of extrapolation of variances beyond those of all siblings, and their smallest value."""
_N_ANGLES = 65
_END = 1e-4
"""Tolerance of angles: the minimum is found less accurately than this from the ends."""


class SiblingTests(NamedTuple):
    """For each guide, ``(K,)``."""

    p_value: np.ndarray
    """NaN without siblings, or with too few cells."""
    q_value: np.ndarray
    """Over the tested guides."""
    agreement: np.ndarray
    """Cosine of the effect with that of its siblings; NaN if either is mostly error."""
    differs: np.ndarray
    """Whether it differs, at the false discovery rate and by enough."""
    put_aside: np.ndarray
    """Whether it is excluded from the siblings of others."""


class _Guides(NamedTuple):
    """Guides of a perturbation in features in which both covariances are diagonal."""

    which: np.ndarray
    """Numbers of the guides, ``(J,)``."""
    mean: np.ndarray
    """``(J, p)``; cells with the perturbation have variance 1 in each feature."""
    variance: np.ndarray
    """Variance of a cell of each guide, ``(J, p)``."""
    of_controls: np.ndarray
    """Variance of a control cell in each feature, ``(p,)``."""
    freedom: int


class Pair(NamedTuple):
    """A guide and its siblings together."""

    effects: np.ndarray
    """``(2, p)``."""
    of_cells: np.ndarray
    """Variances of the means of their own cells, ``(2, p)``."""
    of_controls: np.ndarray
    """Covariance of the means of control cells, relative to that of a cell, ``(2, 2)``."""


def independent_features(features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Remove features that earlier ones explain, based on the cells ``rows``."""
    values = features[rows] - features[rows].mean(axis=0)
    length = np.linalg.norm(values, axis=0)
    left = np.abs(np.diagonal(np.linalg.qr(values, mode="r")))
    n_left = len(left)
    is_own = np.zeros(features.shape[1], dtype=bool)
    is_own[:n_left] = left**2 > _UNEXPLAINED * np.square(length[:n_left])
    return features[:, is_own]


def sibling_weights(compared: Compared, put_aside: np.ndarray) -> sparse.csr_array:
    """Proportions of each sibling in the cells of all siblings of a guide, ``(K, K)``.

    Rows of guides without siblings are empty. Guides that are ``put_aside``, ``(K,)``, are not
    siblings.
    """
    rows, columns, weights = [], [], []
    for guides in _by_perturbation(compared):
        for guide in guides:
            siblings = guides[(guides != guide) & ~put_aside[guides]]
            n = compared.n_cells[siblings]
            if n.sum():
                rows.append(np.full(len(siblings), guide))
                columns.append(siblings)
                weights.append(n / n.sum())
    shape = (compared.n_guides, compared.n_guides)
    if not rows:
        return sparse.csr_array(shape)
    places = (np.concatenate(rows), np.concatenate(columns))
    return sparse.csr_array((np.concatenate(weights), places), shape)


def _by_perturbation(compared: Compared) -> list[np.ndarray]:
    order = np.argsort(compared.perturbation, kind="stable")
    ends = np.flatnonzero(np.diff(compared.perturbation[order])) + 1
    return np.split(order, ends)


def sibling_tests(
    features: np.ndarray, compared: Compared, is_tested: np.ndarray, fdr: float
) -> SiblingTests:
    """Test each guide against its siblings.

    A guide that differs would also make the others differ from their siblings. For each
    perturbation, the guide with the smallest p-value is excluded as long as two or more are left,
    and the others are tested again without it.

    Parameters
    ----------
    features
        Cells x features, the most important first, none of which is explained by others.
    is_tested
        Perturbations to test, ``(T,)``.
    fdr
        False discovery rate at which guides are excluded.
    """
    values, base = compared.less_controls(features)
    order = np.argsort(compared.guide, kind="stable")
    ends = np.searchsorted(compared.guide[order], np.arange(compared.n_guides + 1))
    cells_of = [order[start:end] for start, end in pairwise(ends)]
    prepared = [
        _prepared(values, base, [cells_of[guide] for guide in guides], guides)
        for guides in _by_perturbation(compared)
        if is_tested[compared.perturbation[guides[0]]]
    ]
    p_value, agreement = np.full((2, compared.n_guides), np.nan)
    put_aside = np.zeros(compared.n_guides, dtype=bool)
    todo = [guides for guides in prepared if guides is not None]
    while todo:
        for guides in todo:
            for guide in guides.which[~put_aside[guides.which]]:
                pair = _pair(guides, guide, put_aside, compared)
                if pair is not None:
                    p_value[guide] = _p_value(pair, guides)
                    agreement[guide] = cosine(pair, guides.of_controls)
        differs = within(q_values(p_value), fdr) & (agreement < _AGREES)
        again = []
        for guides in todo:
            left = guides.which[~put_aside[guides.which]]
            differing = left[differs[left]]
            if len(differing) and np.isfinite(p_value[left]).sum() > _FEWEST_LEFT:
                put_aside[differing[p_value[differing].argmin()]] = True
                again.append(guides)
        todo = again
    q_value = q_values(p_value)
    differs = within(q_value, fdr) & (agreement < _AGREES)
    return SiblingTests(p_value, q_value, agreement, differs, put_aside)


def _prepared(
    values: np.ndarray, base: np.ndarray, cells: list[np.ndarray], guides: np.ndarray
) -> _Guides | None:
    """Means of guides in features that are uncorrelated; ``None`` with too few cells.

    ``cells`` are those of each guide.
    """
    n_cells = np.array([len(own) for own in cells])
    which = guides[n_cells > 0]
    cells, n_cells = [own for own in cells if len(own)], n_cells[n_cells > 0]
    freedom = int(n_cells.sum()) - len(which)
    p = min(values.shape[1], freedom // _CELLS_PER_FEATURE)
    if len(which) < _FEWEST_LEFT or p < _FEWEST_LEFT:
        return None
    means, within_guide = np.empty((len(which), p)), np.empty((len(which), p, p))
    for place, rows in enumerate(cells):
        own = values[rows, :p]
        means[place] = own.mean(axis=0)
        left = own - means[place]
        within_guide[place] = left.T @ left
    of_controls, axes = eigh(base[:p, :p], within_guide.sum(axis=0) / freedom)
    squares = np.einsum("jpq,pf,qf->jf", within_guide, axes, axes, optimize=True)
    own = squares / np.maximum(n_cells - 1, 1)[:, None]
    variance = between(own, of_controls)
    return _Guides(which, means @ axes, variance, of_controls, freedom)


def between(own: np.ndarray, of_controls: np.ndarray) -> np.ndarray:
    """Variances of cells of guides, interpolated from the variance of control cells.

    A guide has too few cells for a separate variance per feature; one number is estimated for all.

    Parameters
    ----------
    own
        Variances within guides, ``(J, p)``; 1 over all guides together.
    of_controls
        Variances of control cells, ``(p,)``.
    """
    typical = np.maximum(of_controls, 1)
    towards = (of_controls - 1) / typical
    size = (towards**2).sum()
    share = ((own - 1) / typical) @ towards / max(size, np.finfo(float).tiny)
    share = np.clip(share, -_BEYOND, 1)[:, None]
    return np.maximum(1 + share * (of_controls - 1), _SMALLEST_VARIANCE)


def _pair(guides: _Guides, guide: int, put_aside: np.ndarray, compared: Compared) -> Pair | None:
    """Return a guide and its siblings; ``None`` if either has too few cells."""
    n = compared.n_cells[guides.which]
    is_self = guides.which == guide
    n_siblings = np.where(is_self | put_aside[guides.which], 0, n)
    totals = np.array([n[is_self].sum(), n_siblings.sum()])
    if totals.min() < _FEWEST_CELLS:
        return None
    weights = np.stack([is_self.astype(float), n_siblings / totals[1]])
    share = weights @ compared.share[guides.which]
    of_controls = (share / np.maximum(compared.n_controls, 1)) @ share.T
    of_cells = weights**2 @ (guides.variance / np.maximum(n, 1)[:, None])
    return Pair(weights @ guides.mean, of_cells, of_controls)


def _p_value(pair: Pair, guides: _Guides) -> float:
    statistic, n_fitted = collinearity(pair, guides.of_controls)
    n_left = len(guides.of_controls) - n_fitted
    # Hotelling's distribution, because the covariance is estimated.
    freedom = guides.freedom - n_left + 1
    scale = freedom / (guides.freedom * n_left)
    return float(f_distribution.sf(statistic * scale, n_left, freedom))


def cosine(pair: Pair, of_controls: np.ndarray) -> float:
    """Cosine of two effects, corrected for errors; NaN if either is mostly error.

    The expected contributions of errors to squared lengths, and through shared control cells to the
    product, are subtracted.
    """
    products = pair.effects @ pair.effects.T
    errors = np.diag(pair.of_cells.sum(axis=1)) + pair.of_controls * of_controls.sum()
    left = products - errors
    lengths = np.diagonal(left)
    if (lengths <= (1 - _MOST_ERROR) * np.diagonal(products)).any():
        return np.nan
    return float(np.clip(left[0, 1] / np.sqrt(lengths.prod()), -1, 1))


def collinearity(pair: Pair, of_controls: np.ndarray) -> tuple[float, int]:
    """Statistic, and its number of features minus directions."""

    def at(angle: np.ndarray | float) -> np.ndarray:
        weights = np.stack([np.cos(angle), -np.sin(angle)])
        left = np.tensordot(weights, pair.effects, axes=(0, 0))
        of_cells = np.tensordot(weights**2, pair.of_cells, axes=(0, 0))
        of_base = np.einsum("i...,ij,j...->...", weights, pair.of_controls, weights)
        variance = of_cells + np.expand_dims(of_base, -1) * of_controls
        return (left**2 / variance).sum(axis=-1)

    angles = np.linspace(0, np.pi / 2, _N_ANGLES)
    values = at(angles)
    best = int(values.argmin())
    ends = angles[[max(best - 1, 0), min(best + 1, _N_ANGLES - 1)]]
    found = minimize_scalar(lambda a: float(at(a)), bounds=tuple(ends), method="bounded")
    statistic, angle = min((values[best], angles[best]), (float(found.fun), float(found.x)))
    # At the ends no multiple is fitted: one of the two effects is zero.
    inside = _END < angle < np.pi / 2 - _END
    return float(statistic), int(inside)
