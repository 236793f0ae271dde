"""Where the right answer stands among all answers, the core of every measure of specificity."""

from __future__ import annotations

import numpy as np

_ROUNDING = 1e-9
"""Distances that differ by less than this share are equal: predictions of single precision."""


def own_positions(distances: np.ndarray, failed: np.ndarray) -> np.ndarray:
    """Position of each diagonal entry in its column, sorted from near to far.

    Parameters
    ----------
    distances
        Candidates x targets, square; candidate ``i`` is the right one for target ``i``. NaN is
        farther than any number.
    failed
        Targets for which there is no answer (boolean): they take the last position.

    Returns
    -------
    Positions from 0 (nearest) to ``n - 1``. Ties take their mean position, so that answers which
    are all alike stand at chance, ``(n - 1) / 2``, whatever their order.
    """
    distances = np.where(np.isnan(distances), np.inf, distances)
    own = np.diagonal(distances)
    tied = np.isclose(distances, own, rtol=_ROUNDING, atol=0)
    nearer = (distances < own) & ~tied
    positions = nearer.sum(axis=0) + (tied.sum(axis=0) - 1) / 2
    return np.where(failed, len(distances) - 1, positions)


def not_finite(profiles: np.ndarray) -> np.ndarray:
    """Which rows hold NaN or infinite entries: these predictions failed."""
    return ~np.isfinite(profiles).all(axis=1)
