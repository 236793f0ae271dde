"""Cells x genes, dense or sparse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from scipy import sparse

Matrix: TypeAlias = "np.ndarray | sparse.csr_array"


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
