"""Baselines against values computed by hand."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from scvi_sams.evaluation import additive_ate, mean_ate
from scvi_sams.exceptions import SAMSError, UnknownPerturbationError

DESCRIPTION = {"method": "lognorm", "target_sum": 1e4, "units": "log2"}


@pytest.fixture
def singles() -> ad.AnnData:
    return ad.AnnData(
        np.array([[1.0, 2.0], [-3.0, 0.5], [10.0, 0.0]]),
        obs=pd.DataFrame({"n_cells": [5, 6, 7]}, index=["A", "B", "C"]),
        var=pd.DataFrame(index=["g1", "g2"]),
        layers={"standard_error": np.array([[3.0, 1.0], [4.0, 0.0], [12.0, np.nan]])},
        uns={"ate": DESCRIPTION},
    )


def test_additive_is_the_sum_of_singles(singles):
    table = additive_ate(singles, ["B+A", "A+B+C", "C"])
    assert table.obs_names.tolist() == ["A+B", "A+B+C", "C"]
    assert table.var_names.tolist() == ["g1", "g2"]
    np.testing.assert_allclose(table.X, [[-2, 2.5], [8, 2.5], [10, 0]])
    np.testing.assert_allclose(
        table.layers["standard_error"], [[5, 1], [13, np.nan], [12, np.nan]], equal_nan=True
    )
    assert table.uns["ate"] == DESCRIPTION


def test_additive_does_not_depend_on_the_order_of_singles(singles):
    np.testing.assert_array_equal(
        additive_ate(singles[["C", "A", "B"]].copy(), ["A+C"]).X, additive_ate(singles, ["C+A"]).X
    )


def test_additive_without_standard_errors_and_with_another_delimiter(singles):
    del singles.layers["standard_error"]
    table = additive_ate(singles, ["A_B"], delimiter="_")
    np.testing.assert_allclose(table.X, [[-2, 2.5]])
    assert "standard_error" not in table.layers


def test_additive_of_no_combinations_is_an_empty_table(singles):
    assert additive_ate(singles, []).shape == (0, 2)


def test_additive_names_the_missing_single(singles):
    with pytest.raises(UnknownPerturbationError, match="'X', 'Y'"):
        additive_ate(singles, ["A+X", "Y+B"])


def test_additive_refuses_ambiguous_singles(singles):
    singles.obs_names = ["A", "B", "A+control"]
    with pytest.raises(SAMSError, match="'A' occurs more than once"):
        additive_ate(singles, ["A+B"])


def test_mean_predicts_the_same_for_all(singles):
    singles.layers["standard_error"][2, 1] = 2
    table = mean_ate(singles, ["X", "A+B"])
    assert table.obs_names.tolist() == ["X", "A+B"]
    np.testing.assert_allclose(table.X, [[8 / 3, 2.5 / 3]] * 2)
    np.testing.assert_allclose(table.layers["standard_error"], [[19 / 3, 1]] * 2)
    assert table.uns["ate"] == DESCRIPTION


def test_mean_of_nothing_is_refused(singles):
    with pytest.raises(SAMSError, match="no perturbations"):
        mean_ate(singles[[]].copy(), ["A"])


def test_tables_are_not_changed(singles):
    before = singles.copy()
    additive = additive_ate(singles, ["A+B"])
    mean = mean_ate(singles, ["A"])
    additive.X[:], mean.X[:] = 0, 0
    additive.uns["ate"]["method"] = mean.uns["ate"]["method"] = "changed"
    np.testing.assert_array_equal(singles.X, before.X)
    assert singles.uns["ate"] == before.uns["ate"]
