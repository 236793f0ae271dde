"""Loops of the negative binomial over cells and genes, compiled for CPUs.

Each computes in one pass over a chunk of cells what torch computes in about twenty, in a quarter of
the time. The formulas are those of ``module/_negative_binomial.py``, in the precision of the
arrays. Numeric literals would turn the whole loop into double precision, so constants such as
``one`` are variables.

The compiler vectorises a loop only if it sees all operations in it, but not the C library: numba's
own ``exp`` and ``log1p`` are called value by value, at ten to twenty times the cost. Single
precision therefore uses the polynomials of Cephes (errors below 1.3e-7, smaller than those of
torch), without branches. Double precision, which only tests of gradients need, calls the C
library.

``VECTORS`` is for functions with sums: it lets the compiler change the order of additions.
``EXACT`` is for expressions that must be computed as written. All are in one file, because numba
compiles a cached loop again only if its own file has changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
EXACT: dict[str, Any] = {**_OPTIONS, "fastmath": {"contract"}}
VECTORS: dict[str, Any] = {**_OPTIONS, "fastmath": {"contract", "reassoc", "nsz"}}

_SINGLE, _BITS = np.float32, np.int32
_ONE, _HALF = _SINGLE(1), _SINGLE(0.5)
_LOG2_E = _SINGLE(math.log2(math.e))
# log(2) as a number with few digits, whose multiples are exact, and a remainder.
_LOG_2_HIGH, _LOG_2_LOW = _SINGLE(0.693359375), _SINGLE(-2.12194440e-4)
_TO_WHOLE = _SINGLE(1.5 * 2**23)
"""Adding and subtracting it rounds to the nearest whole number."""
_SMALLEST_EXPONENT = _SINGLE(-87.0)
"""``exp`` of smaller numbers would be below the range of normal single-precision numbers."""
_EXP = tuple(
    _SINGLE(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1)
)
_LOG = tuple(
    _SINGLE(c)
    for c in (
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    )
)

# The lowest 23 of the 32 bits of a number are its mantissa; above them is its exponent plus 127.
_N_MANTISSA_BITS, _MANTISSA_BITS = _BITS(23), _BITS(0x7FFFFF)
_BITS_OF_ONE, _BITS_OF_SQRT_HALF = _BITS(127 << 23), _BITS(0x3F3504F3)


@njit(**EXACT)
def _polynomial(x: Any, coefficients: Any) -> Any:
    value = coefficients[0]
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


@njit(**EXACT)
def _exp_single(x: Any) -> Any:
    x = _SMALLEST_EXPONENT if x < _SMALLEST_EXPONENT else x  # NaN stays NaN
    shifted = x * _LOG2_E + _TO_WHOLE
    n = shifted - _TO_WHOLE
    rest = x - n * _LOG_2_HIGH
    rest = rest - n * _LOG_2_LOW
    value = (_polynomial(rest, _EXP) * rest + _HALF) * (rest * rest) + rest + _ONE
    # The low bits of `shifted` are those of n. Numba widens integers, hence int32 each time; and
    # it accepts `view` only on what is visibly a numpy number.
    exponent = np.int32(np.float32(shifted).view(np.int32) << _N_MANTISSA_BITS)
    return value * np.int32(exponent + _BITS_OF_ONE).view(np.float32)


@njit(**EXACT)
def _log1p_single(x: Any) -> Any:
    above = _ONE + x
    # As m * 2**n, with m between the square roots of a half and of two.
    bits = np.int32(np.float32(above).view(np.int32) - _BITS_OF_SQRT_HALF)
    n = _SINGLE(bits >> _N_MANTISSA_BITS)
    m = np.int32((bits & _MANTISSA_BITS) + _BITS_OF_SQRT_HALF).view(np.float32)
    rest = m - _ONE
    square = rest * rest
    value = _polynomial(rest, _LOG) * rest * square
    value = value + n * _LOG_2_LOW - _HALF * square
    # First-order correction for the rounding error of adding one.
    return rest + value + n * _LOG_2_HIGH + (x - (above - _ONE)) / above


def exp(x: Any) -> Any:
    """``e**x`` for x up to 88; below -87 the single-precision result is ``e**-87``."""
    raise NotImplementedError("Only for loops compiled by numba.")


def log1p(x: Any) -> Any:
    """``log(1 + x)`` for x at or above 0."""
    raise NotImplementedError("Only for loops compiled by numba.")


@overload(exp, strict=False)  # signatures differ by their annotations
def _exp_of_type(x: Any) -> Any:
    return (lambda x: _exp_single(x)) if x is types.float32 else (lambda x: math.exp(x))


@overload(log1p, strict=False)
def _log1p_of_type(x: Any) -> Any:
    return (lambda x: _log1p_single(x)) if x is types.float32 else (lambda x: math.log1p(x))


def compiled(**options: Any) -> Callable:
    """Compile a loop when it is first called, or load what an earlier process compiled.

    Compiled code is stored next to this file, or in the user's cache if that is not writable
    (``NUMBA_CACHE_DIR`` sets another place). If neither is writable, each process compiles.
    """

    def compile_or_load(function: Callable) -> Callable:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:
            return njit(**options)(function)

    return compile_or_load


@compiled(**VECTORS)
def terms_and_slopes(
    softmax: bool,
    logits: Any,
    counts: Any,
    theta: Any,
    inverse_theta: Any,
    sizes: Any,
    weights: Any,
    bounds: Any,
    of_theta: Any,
    values: Any,
    means: Any,
) -> None:
    """Replace logits by their gradients, ``(n_cells, n_genes)``.

    Parameters
    ----------
    softmax
        Whether a softmax over genes divides the sizes.
    logits
        Log means, or the input of the softmax; overwritten by ``weights`` times the gradient.
    counts, theta, inverse_theta, sizes
        Counts and parameters of the model.
    weights
        Factor of the value of every cell before gradients are taken.
    bounds
        With softmax the largest logit of every cell, otherwise the upper limit of log means.
    of_theta
        The gradient with respect to log(theta) is added here.
    values
        Terms of every cell, written here.
    means
        Scratch memory, as long as ``theta``.
    """
    n_cells, n_genes = logits.shape
    of_type = theta.dtype.type
    zero, one, largest = of_type(0), of_type(1), of_type(2**60)
    for cell in range(n_cells):
        logit, x, weight = logits[cell], counts[cell], weights[cell]
        shift = bounds[cell] if softmax else zero
        bound = zero if softmax else bounds[cell]
        total, of_counts, n_counts = zero, zero, zero
        for g in range(n_genes):
            log_mean = logit[g] - shift
            log_mean = bound if log_mean > bound else log_mean  # NaN stays NaN
            of_counts += log_mean * x[g]
            n_counts += x[g]
            mean = exp(log_mean)
            total += mean
            means[g] = mean
        per_share = sizes[cell] / total if softmax else one
        of_both, slope_of_cell = zero, zero
        for g in range(n_genes):
            ratio = means[g] * per_share * inverse_theta[g]
            log1p_ratio = log1p(ratio)
            x_and_theta = x[g] + theta[g]
            of_both += x_and_theta * log1p_ratio
            # d/d log(mean) = x - (x + theta) ratio / (1 + ratio); the compiler may multiply before
            # it divides, so the ratio is limited: above the limit the quotient is 1.
            bounded = largest if ratio > largest else ratio  # NaN stays NaN
            expected = x_and_theta * (bounded / (one + bounded))
            of_theta[g] += weight * (expected - theta[g] * log1p_ratio)
            slope = weight * (x[g] - expected)
            slope_of_cell += slope
            logit[g] = slope
        values[cell] = of_counts - of_both
        if softmax:
            values[cell] += n_counts * math.log(per_share)
            per_mean = slope_of_cell / total
            for g in range(n_genes):
                logit[g] -= means[g] * per_mean


@compiled(**VECTORS)
def terms(
    softmax: bool,
    logits: Any,
    counts: Any,
    theta: Any,
    inverse_theta: Any,
    sizes: Any,
    bounds: Any,
    values: Any,
    means: Any,
) -> None:
    """Write the terms of every cell without gradients; arguments as in :func:`terms_and_slopes`.

    Logits are not changed.
    """
    n_cells, n_genes = logits.shape
    of_type = theta.dtype.type
    zero, one = of_type(0), of_type(1)
    for cell in range(n_cells):
        logit, x = logits[cell], counts[cell]
        shift = bounds[cell] if softmax else zero
        bound = zero if softmax else bounds[cell]
        total, of_counts, n_counts = zero, zero, zero
        for g in range(n_genes):
            log_mean = logit[g] - shift
            log_mean = bound if log_mean > bound else log_mean  # NaN stays NaN
            of_counts += log_mean * x[g]
            n_counts += x[g]
            mean = exp(log_mean)
            total += mean
            means[g] = mean
        per_share = sizes[cell] / total if softmax else one
        of_both = zero
        for g in range(n_genes):
            of_both += (x[g] + theta[g]) * log1p(means[g] * per_share * inverse_theta[g])
        values[cell] = of_counts - of_both
        if softmax:
            values[cell] += n_counts * math.log(per_share)


@compiled(**VECTORS)
def fill_table(
    theta: Any, starts: Any, steps: Any, log_steps: Any, scratch: Any, table: Any
) -> None:
    """Fill the rows of every gene, from one of ``starts`` to the next, with values and slopes.

    ``steps`` are the numbers k from 0 on, ``log_steps`` their log1p, as many as the longest part
    has rows; ``scratch`` has two rows of this length.
    """
    one = theta.dtype.type(1)
    values, slopes = scratch[0], scratch[1]
    for g in range(len(theta)):
        n_rows = starts[g + 1] - starts[g]
        inverse = one / theta[g]
        for k in range(n_rows):
            values[k] = log1p(steps[k] * inverse) - log_steps[k]
            slopes[k] = -steps[k] / (steps[k] + theta[g])
        value, slope = 0.0, 0.0  # in double precision, because they are long sums
        for k in range(n_rows):
            table[starts[g] + k, 0] = value
            table[starts[g] + k, 1] = slope
            value += values[k]
            slope += slopes[k]


@compiled(**EXACT)
def read_table(counts: Any, starts: Any, table: Any, sums: Any, slopes: Any) -> None:
    """Write the sum of values of every cell, and the slope of every entry.

    Counts beyond the rows of a gene use its last row.
    """
    n_cells, n_genes = counts.shape
    for cell in range(n_cells):
        total = 0.0
        for g in range(n_genes):
            last = starts[g + 1] - starts[g] - 1
            count = counts[cell, g]
            # Compared before conversion to an integer: NaN and too large numbers use row 0.
            row = starts[g] + (last if count >= last else max(int(count), 0))
            total += table[row, 0]
            slopes[cell, g] = table[row, 1]
        sums[cell] = total
