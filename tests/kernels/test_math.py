"""Exponential and logarithm for compiled loops, beside numpy's in double precision."""

import numpy as np
import pytest
from numba import njit

from scvi_sams.kernels import _negative_binomial as loops
from scvi_sams.kernels._negative_binomial import VECTORS


def over_array(function):
    """A loop that the compiler may turn into vector instructions and reorder the sums of."""

    @njit(**VECTORS)
    def loop(x, out):
        for i in range(len(x)):
            out[i] = function(x[i])

    def mapped(x):
        out = np.empty_like(x)
        loop(x, out)
        return out

    return mapped


exp, log1p = over_array(loops.exp), over_array(loops.log1p)
EPSILON = {np.float32: 1.3e-7, np.float64: 2.3e-16}
BOTH_PRECISIONS = pytest.mark.parametrize("precision", list(EPSILON))


@BOTH_PRECISIONS
def test_exp(precision):
    x = np.linspace(-87, 88, 500_001).astype(precision)
    expected = np.exp(x.astype(np.longdouble))
    assert np.max(np.abs(exp(x) / expected - 1)) < EPSILON[precision]


@BOTH_PRECISIONS
def test_log1p(precision):
    x = np.concatenate([[0], 10.0 ** np.linspace(-37, 38, 500_001)]).astype(precision)
    expected = np.log1p(x.astype(np.longdouble))
    error = np.abs(log1p(x) - expected)
    assert np.max(error / np.maximum(expected, np.finfo(precision).tiny)) < EPSILON[precision]


def test_ends_of_single_precision():
    x = np.array([-87.5, -1000, -np.inf, 0, np.nan], np.float32)
    np.testing.assert_allclose(exp(x), np.exp([-87, -87, -87, 0, np.nan]), rtol=1e-6)
    assert np.isnan(log1p(np.array([np.nan], np.float32))).all()


def test_only_in_compiled_loops():
    for function in (loops.exp, loops.log1p):
        with pytest.raises(NotImplementedError, match="compiled"):
            function(1.0)
