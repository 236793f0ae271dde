"""The largest norms of sums of two rows of a table, without computing all sums one by one.

``|a + b|^2 = |a|^2 + |b|^2 + 2 a.b``: a matrix product, a block of rows at a time; the largest so
far are kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_NORMS_AT_ONCE = 2**22
"""Numbers in an array (rows x all rows): 16 megabytes in single precision."""


class StrongestSums(NamedTuple):
    """Pairs of rows, the largest sum first."""

    first: np.ndarray
    second: np.ndarray
    norms: np.ndarray
    largest_left_out: float
    """Norm of the largest sum that is not among them; 0 if all are."""


def strongest_sums(values: np.ndarray, n_pairs: int, left_out: np.ndarray) -> StrongestSums:
    """Find the pairs ``i < j`` of rows ``(N, G)`` with the largest ``|values[i] + values[j]|``.

    ``left_out``, ``(M, 2)``, are pairs to ignore. Among equal norms earlier rows come first, so
    that results do not depend on blocks. Memory grows with N, not with its square.
    """
    n_rows = len(values)
    n_kept = n_pairs + 1
    squares = np.square(values, dtype=np.float32).sum(axis=1)
    kept = np.empty(0, dtype=np.int64)  # i * N + j
    kept_squares = np.empty(0, dtype=np.float32)
    n_block = max(1, _NORMS_AT_ONCE // max(1, n_rows))
    columns = np.arange(n_rows)
    for start in range(0, n_rows, n_block):
        rows = np.arange(start, min(start + n_block, n_rows))
        found = 2 * (values[rows] @ values[start:].T)
        found += squares[rows, None]
        found += squares[start:]
        found[columns[start:] <= rows[:, None]] = -np.inf
        here = left_out[(left_out[:, 0] >= start) & (left_out[:, 0] <= rows[-1])]
        found[here[:, 0] - start, here[:, 1] - start] = -np.inf
        least = kept_squares.min() if len(kept) == n_kept else -np.inf
        if found.size > n_kept:
            least = max(least, np.partition(found, -n_kept, axis=None)[-n_kept])
        row, column = np.nonzero((found >= least) & np.isfinite(found))
        kept_squares = np.concatenate([kept_squares, found[row, column]])
        kept = np.concatenate([kept, (row + start) * n_rows + column + start])
        best = np.lexsort((kept, -kept_squares))[:n_kept]
        kept, kept_squares = kept[best], kept_squares[best]
    norms = np.sqrt(np.maximum(kept_squares, 0).astype(np.float64))
    first, second = np.divmod(kept[:n_pairs], n_rows)
    return StrongestSums(first, second, norms[:n_pairs], float(norms[n_pairs:].sum()))
