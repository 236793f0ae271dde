"""Loops over posterior draws, compiled for processors: four draws at a time, of many columns."""

from __future__ import annotations

from typing import Any

from numba import njit

from scvi_sams._compiled_math import EXACT

N_KEPT = 4
"""Draws at either end that :func:`outermost` keeps."""

COLUMNS_AT_ONCE = 256
"""Of these all that is kept stays in the cache nearest to the core."""


@njit(**EXACT)
def moments(draws: Any, mean: Any, squares: Any) -> None:
    """Write the mean of every column of ``draws``, and the sum of squared distances to it."""
    for start in range(0, draws.shape[1], COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, draws.shape[1])
        _moments(draws, start, stop, mean[start:stop], squares[start:stop])


@njit(**EXACT)
def outermost(draws: Any, kept: Any, low: Any, high: Any) -> None:
    """Write the four smallest and the four largest of every column, ascending, ``(4, n_columns)``.

    There are at least four draws, none of them NaN. ``kept`` is scratch for ``8 * COLUMNS_AT_ONCE``
    values: in one array with fixed places the compiler sees that none lies upon another.
    """
    for start in range(0, draws.shape[1], COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, draws.shape[1])
        _outermost(draws, start, stop, kept, low, high)


@njit(**EXACT)
def moments_and_outermost(
    draws: Any, mean: Any, squares: Any, kept: Any, low: Any, high: Any
) -> None:
    """Do both of some columns before going on to the next, which are fetched from afar once."""
    for start in range(0, draws.shape[1], COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, draws.shape[1])
        _moments(draws, start, stop, mean[start:stop], squares[start:stop])
        _outermost(draws, start, stop, kept, low, high)


@njit(**EXACT)
def _moments(draws: Any, start: Any, stop: Any, mean: Any, squares: Any) -> None:
    n_draws = len(draws)
    share = mean.dtype.type(1 / n_draws)
    mean[:] = mean.dtype.type(0)
    squares[:] = mean.dtype.type(0)
    for draw in range(n_draws):
        a = draws[draw][start:stop]
        for k in range(len(mean)):
            mean[k] += a[k]
    for k in range(len(mean)):
        mean[k] *= share
    for draw in range(n_draws):
        a = draws[draw][start:stop]
        for k in range(len(mean)):
            distance = a[k] - mean[k]
            squares[k] += distance * distance


@njit(**EXACT)
def _outermost(draws: Any, start: Any, stop: Any, kept: Any, low: Any, high: Any) -> None:
    n_draws, n = len(draws), stop - start
    whole = n_draws - n_draws % 4
    for draw in range(0, whole, 4):
        a, b = draws[draw][start:stop], draws[draw + 1][start:stop]
        c, d = draws[draw + 2][start:stop], draws[draw + 3][start:stop]
        if draw == 0:
            for k in range(n):
                w, x, y, z = _in_order(a[k], b[k], c[k], d[k])
                _keep(kept, k, w, x, y, z)
                _keep(kept, k + 4 * COLUMNS_AT_ONCE, w, x, y, z)
            continue
        for k in range(n):
            w, x, y, z = _in_order(a[k], b[k], c[k], d[k])
            # Of two ascending rows: the one against the other backwards.
            l0, l1, l2, l3 = _kept(kept, k)
            l0, l1, l2, l3 = _smaller(l0, z), _smaller(l1, y), _smaller(l2, x), _smaller(l3, w)
            h0, h1, h2, h3 = _kept(kept, k + 4 * COLUMNS_AT_ONCE)
            h0, h1, h2, h3 = _larger(h0, z), _larger(h1, y), _larger(h2, x), _larger(h3, w)
            l0, l1, l2, l3 = _merged(l0, l1, l2, l3)
            _keep(kept, k, l0, l1, l2, l3)
            h0, h1, h2, h3 = _merged(h0, h1, h2, h3)
            _keep(kept, k + 4 * COLUMNS_AT_ONCE, h0, h1, h2, h3)
    for draw in range(whole, n_draws):
        a = draws[draw][start:stop]
        for k in range(n):
            l0, l1, l2, l3 = _kept(kept, k)
            l0, l1, l2, l3 = _in_order(l0, l1, l2, _smaller(l3, a[k]))
            h0, h1, h2, h3 = _kept(kept, k + 4 * COLUMNS_AT_ONCE)
            h0, h1, h2, h3 = _in_order(_larger(h0, a[k]), h1, h2, h3)
            _keep(kept, k, l0, l1, l2, l3)
            _keep(kept, k + 4 * COLUMNS_AT_ONCE, h0, h1, h2, h3)
    for place in range(4):
        for k in range(n):
            low[place, start + k] = kept[place * COLUMNS_AT_ONCE + k]
            high[place, start + k] = kept[(4 + place) * COLUMNS_AT_ONCE + k]


@njit(**EXACT)
def _kept(kept: Any, k: Any) -> Any:
    return (
        kept[k],
        kept[k + COLUMNS_AT_ONCE],
        kept[k + 2 * COLUMNS_AT_ONCE],
        kept[k + 3 * COLUMNS_AT_ONCE],
    )


@njit(**EXACT)
def _keep(kept: Any, k: Any, a: Any, b: Any, c: Any, d: Any) -> None:
    kept[k] = a
    kept[k + COLUMNS_AT_ONCE] = b
    kept[k + 2 * COLUMNS_AT_ONCE] = c
    kept[k + 3 * COLUMNS_AT_ONCE] = d


@njit(**EXACT)
def _smaller(a: Any, b: Any) -> Any:
    return a if a < b else b


@njit(**EXACT)
def _larger(a: Any, b: Any) -> Any:
    return b if a < b else a


@njit(**EXACT)
def _in_order(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Sort four values."""
    a, b, c, d = _smaller(a, b), _larger(a, b), _smaller(c, d), _larger(c, d)
    a, c, b, d = _smaller(a, c), _larger(a, c), _smaller(b, d), _larger(b, d)
    return a, _smaller(b, c), _larger(b, c), d


@njit(**EXACT)
def _merged(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Sort four values that rise and then fall, or fall and then rise."""
    a, c, b, d = _smaller(a, c), _larger(a, c), _smaller(b, d), _larger(b, d)
    return _smaller(a, b), _larger(a, b), _smaller(c, d), _larger(c, d)
