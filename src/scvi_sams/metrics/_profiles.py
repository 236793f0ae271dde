"""Arithmetic of profiles and cells that metrics share: means, similarity, ranks.

Arrays of profiles have genes on their last axis; all other axes (such as perturbations) are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsFloat, TypeAlias

import numpy as np
from scipy import sparse

Matrix: TypeAlias = np.ndarray | sparse.csr_array
"""Cells x genes, dense or sparse."""

_ROUNDING = 1e-9
"""Distances with a smaller relative difference are equal: predictions have single precision."""


def to_dense(cells: Matrix) -> np.ndarray:
    """Return a dense array."""
    return np.asarray(cells) if isinstance(cells, np.ndarray) else cells.toarray()


def stack(groups: Sequence[Matrix]) -> Matrix:
    """Put the cells of several groups below each other."""
    if sparse.issparse(groups[0]):
        return sparse.csr_array(sparse.vstack(groups))
    return np.concatenate(groups)


def squared(cells: Matrix) -> Matrix:
    """Square every entry, in double precision."""
    cells = cells.astype(np.float64)
    return np.square(cells) if isinstance(cells, np.ndarray) else cells.power(2)


def mean_over_cells(cells: Matrix) -> np.ndarray:
    """Mean of each gene, in double precision; NaN if there are no cells."""
    if cells.shape[0] == 0:
        return np.full(cells.shape[1], np.nan)
    with np.errstate(invalid="ignore"):  # infinity minus infinity is NaN
        return np.asarray(cells.sum(axis=0, dtype=np.float64)).ravel() / cells.shape[0]


def ratio(numerator: SupportsFloat, denominator: SupportsFloat) -> float:
    """Divide; 0 if the denominator is 0."""
    divisor = float(denominator)
    return float(numerator) / divisor if divisor > 0 else 0.0


def rmse(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Root mean squared error, ``sqrt(mean_g (x - y)^2)``, in the units of the input."""
    return np.sqrt(np.mean((predicted - observed) ** 2, axis=-1))


def mae(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Mean absolute error, ``mean_g |x - y|``, in the units of the input."""
    return np.mean(np.abs(predicted - observed), axis=-1)


def pearson(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Pearson correlation over genes; 0 (no relation) if one side is constant."""
    return cosine(centred(predicted), centred(observed))


def cosine(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Cosine similarity, ``x.y / (|x| |y|)``; 0 (no relation) if one side is zero."""
    product = np.sum(predicted * observed, axis=-1)
    norms = np.linalg.norm(predicted, axis=-1) * np.linalg.norm(observed, axis=-1)
    return np.divide(product, norms, out=np.zeros_like(norms), where=norms > 0)


def centred(values: np.ndarray) -> np.ndarray:
    """Subtract the mean over genes."""
    spread = np.ptp(values, axis=-1, keepdims=True)
    # The mean of equal numbers may differ from them by rounding; this is not variation.
    return np.where(spread == 0, 0, values - values.mean(axis=-1, keepdims=True))


def largest(effects: np.ndarray, n_genes: int) -> np.ndarray:
    """Positions of the genes with the largest absolute effect, largest first."""
    return np.argsort(-np.abs(effects), axis=-1, kind="stable")[..., :n_genes]


def r2(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """``1 - sum((y - x)^2) / sum((y - mean(y))^2)``; if y is constant, 1 if x equals y, else 0."""
    spread = np.sum(centred(observed) ** 2, axis=-1)
    residual = np.sum((observed - predicted) ** 2, axis=-1)
    exact = (predicted == observed).all(axis=-1)
    return np.where(spread > 0, 1 - residual / np.where(spread > 0, spread, 1), exact)


def own_positions(distances: np.ndarray, failed: np.ndarray) -> np.ndarray:
    """Position of each diagonal entry in its column, from 0 (nearest) to ``n - 1``.

    Entries are candidates x targets; candidate ``i`` is the correct one for target ``i``. NaN is
    farther than any number, and ``failed`` targets get the last position. Ties get their mean
    position, so that equal candidates score at chance level, ``(n - 1) / 2``.
    """
    distances = np.where(np.isnan(distances), np.inf, distances)
    own = np.diagonal(distances)
    tied = np.isclose(distances, own, rtol=_ROUNDING, atol=0)
    nearer = (distances < own) & ~tied
    positions = nearer.sum(axis=0) + (tied.sum(axis=0) - 1) / 2
    return np.where(failed, len(distances) - 1, positions)


def not_finite(profiles: np.ndarray) -> np.ndarray:
    """Which rows have NaN or infinite entries: failed predictions."""
    return ~np.isfinite(profiles).all(axis=1)
