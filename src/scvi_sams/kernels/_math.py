"""``exp`` and ``log1p`` for loops compiled by numba, exact and several values at a time.

The compiler turns a loop into vector instructions only if it sees all that happens in it, and it
does not see into the C library: numba's own ``exp`` and ``log1p`` are called value by value, at ten
to twenty times the cost. So single precision has the polynomials of Cephes here (errors below
1.3e-7, less than those of torch), written without branches. Double precision, which only tests of
gradients need, calls the C library.

``VECTORS`` is for functions with sums: it lets the compiler add in another order. ``EXACT`` is for
what must be computed as it is written.
"""

from __future__ import annotations

import math
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
# log(2) as a number with few digits, whose multiples are exact, and the rest.
_LOG_2_HIGH, _LOG_2_LOW = _SINGLE(0.693359375), _SINGLE(-2.12194440e-4)
_TO_WHOLE = _SINGLE(1.5 * 2**23)
"""Added to a number and taken away again, it leaves the nearest whole number."""
_SMALLEST_EXPONENT = _SINGLE(-87.0)
"""``exp`` of less would be below what single precision holds with all its digits."""
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

# Of the 32 bits of a number, the lowest 23 are its mantissa; above them is its exponent plus 127.
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
    # The low bits of `shifted` are those of n. Numba widens whole numbers, hence int32 each time;
    # and it takes `view` of what visibly is a number of numpy.
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
    # What was lost when one was added, to first order.
    return rest + value + n * _LOG_2_HIGH + (x - (above - _ONE)) / above


def exp(x: Any) -> Any:
    """``e**x`` for x up to 88; below -87 single precision gives ``e**-87``."""
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
