"""Small screens, and a record of an AnnData to compare it with later."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

from bad_input.situation import screen


@pytest.fixture
def cells() -> Callable[..., pd.Series]:
    """One value per cell; the cells are called c0, c1, ..."""

    def build(values: Sequence, dtype: Any = None) -> pd.Series:
        return pd.Series(values, index=[f"c{i}" for i in range(len(values))], dtype=dtype)

    return build


@pytest.fixture(scope="session")
def make_screen() -> Callable[..., AnnData]:
    """Screen with a label per cell, further columns of obs, and counts from 1 up in csr."""

    return screen


@pytest.fixture(scope="session")
def assert_unchanged() -> Callable[[AnnData, AnnData], None]:
    """Compare an AnnData with a copy of it that was made earlier, to the last stored entry."""

    def check(adata: AnnData, before: AnnData) -> None:
        pd.testing.assert_frame_equal(adata.obs, before.obs)
        pd.testing.assert_frame_equal(adata.var, before.var)
        _assert_same(adata.X, before.X)
        for slot in ("layers", "obsm", "varm", "uns"):
            now, then = getattr(adata, slot), getattr(before, slot)
            assert list(now.keys()) == list(then.keys()), slot
            for key in then:
                _assert_same(now[key], then[key])

    return check


def _assert_same(now: Any, then: Any) -> None:
    assert isinstance(now, type(then))
    if isinstance(then, pd.DataFrame):
        pd.testing.assert_frame_equal(now, then)
    elif sparse.issparse(then):
        for part in ("data", "indices", "indptr"):
            np.testing.assert_array_equal(getattr(now, part), getattr(then, part))
    else:
        np.testing.assert_array_equal(now, then)
