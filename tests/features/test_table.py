"""Whatever users have becomes one table by name, or an error says what is wrong with it."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scvi_sams.exceptions import InvalidArgumentError, MissingKeyError, UnknownPerturbationError
from scvi_sams.features._table import FeatureTable, as_feature_table

VALUES = np.array([[1.0, 0.0, -2.0], [0.0, 0.0, 3.5]])
FRAME = pd.DataFrame(VALUES, index=["A", "B"], columns=["x", "y", "z"])


def dense(table):
    return table.values.toarray() if sparse.issparse(table.values) else table.values


def of_values(values):
    return ad.AnnData(values, obs=FRAME[[]], var=FRAME.T[[]])


@pytest.mark.parametrize(
    ("features", "is_sparse"),
    [
        (FRAME, False),
        (FRAME.astype("Float32"), False),
        (FRAME.astype(pd.SparseDtype("float32", 0.0)), True),
        (FRAME.astype({"x": pd.SparseDtype(float, 0.0)}), False),
        (FRAME.astype(pd.SparseDtype(float, 3.5)), False),
        (of_values(VALUES), False),
        (of_values(sparse.csc_matrix(VALUES)), True),
        (of_values(sparse.csr_array(VALUES.astype(np.float32))), True),
        ({"A": pd.Series(VALUES[0], list("xyz")), "B": pd.Series(VALUES[1], list("xyz"))}, False),
        (FeatureTable(("A", "B"), ("x", "y", "z"), VALUES), False),
    ],
)
def test_the_same_features_in_any_form_are_the_same_table(features, is_sparse):
    table = as_feature_table(features)
    assert (table.names, table.columns, table.n_features) == (("A", "B"), ("x", "y", "z"), 3)
    assert sparse.issparse(table.values) == is_sparse
    assert table.values.dtype == np.float64
    np.testing.assert_array_equal(dense(table), VALUES)
    assert table.digest == FeatureTable(("A", "B"), ("x", "y", "z"), VALUES).digest


def test_vectors_without_names_of_columns_are_numbered():
    table = as_feature_table({"A": [1, 0, -2], "B": (0, 0, np.float32(3.5))})
    assert table.columns == ("feature_0", "feature_1", "feature_2")
    np.testing.assert_array_equal(table.values, VALUES)


@pytest.mark.parametrize("kind", [set, list, tuple, np.array, lambda terms: np.array(terms, "O")])
def test_terms_become_columns_of_zeros_and_ones(kind):
    table = as_feature_table({"A": kind(["q", "p"]), "B": kind(["r", "p"]), "C": set()})
    assert table.columns == ("p", "q", "r")
    assert sparse.issparse(table.values)
    assert table.values.toarray().tolist() == [[1, 1, 0], [1, 0, 1], [0, 0, 0]]


def test_a_term_that_is_listed_twice_counts_once():
    assert as_feature_table({"A": ["p", "p"]}).values.toarray().tolist() == [[1]]


def test_a_key_is_looked_up_in_uns():
    uns = {"pathways": FRAME, "other": 1}
    assert as_feature_table("pathways", uns=uns).digest == as_feature_table(FRAME).digest
    with pytest.raises(MissingKeyError, match=r"`f` is 'pathway', .* There are 'pathways'\. Store"):
        as_feature_table("pathway", uns=uns, argument="f")
    with pytest.raises(MissingKeyError, match=r"adata.uns. There are none"):
        as_feature_table("pathways")
    with pytest.raises(InvalidArgumentError, match=r"`adata.uns\['other'\]` must be a DataFrame"):
        as_feature_table("other", uns=uns)


def test_names_are_read_as_labels_are():
    assert as_feature_table({1.0: [0], " B ": [1], np.str_("C"): [2]}).names == ("1", "B", "C")


@pytest.mark.parametrize("matrix", [VALUES, sparse.csr_matrix(VALUES)])
def test_rows_by_name_are_of_the_same_kind(matrix):
    table = FeatureTable(("A", "B"), ("x", "y", "z"), matrix)
    rows = table.rows(["B", "A", "B"])
    assert type(rows) is type(matrix)
    np.testing.assert_array_equal(sparse.csr_matrix(rows).toarray(), VALUES[[1, 0, 1]])
    assert table.missing(["C", "A", "D", "C"]) == ["C", "D"]
    assert "A" in table
    assert "C" not in table
    assert len(table) == 2
    pd.testing.assert_frame_equal(pd.DataFrame(table.to_frame(), dtype=float), FRAME)


def test_an_unknown_name_is_named_with_similar_ones():
    table = as_feature_table(FRAME.rename({"A": "STAT1", "B": "IRF1"}))
    with pytest.raises(UnknownPerturbationError, match=r"'STAT'\. .*did you mean 'STAT1'\?"):
        table.rows(["IRF1", "STAT"])
    with pytest.raises(UnknownPerturbationError, match=r"of 2 perturbations: 'STAT1', 'IRF1'"):
        table.rows(["foo"])


def test_perturbations_that_are_columns_are_told():
    table = as_feature_table(FRAME)
    assert "2 of 3 perturbations are columns of the features" in table.transposed_hint(
        ["x", "y", "w"]
    )
    assert "'x': transpose" in table.transposed_hint(["y", "x"])
    assert table.transposed_hint(["A", "x"]) == ""
    assert table.transposed_hint(["w"]) == ""
    with pytest.raises(UnknownPerturbationError, match=r"transpose the table \(table\.T\)"):
        table.rows(["x"])


def test_shuffling_permutes_rows_among_names():
    table = as_feature_table(pd.DataFrame(np.arange(40.0).reshape(20, 2), index=range(20)))
    shuffled = table.shuffled(0)
    assert (shuffled.names, shuffled.columns) == (table.names, table.columns)
    assert sorted(shuffled.values.tolist()) == table.values.tolist() != shuffled.values.tolist()
    assert shuffled.digest == table.shuffled(0).digest != table.shuffled(1).digest
    with pytest.raises(InvalidArgumentError, match="`seed`"):
        table.shuffled(-1)


def test_the_digest_is_of_names_columns_and_values():
    changed = FRAME.copy()
    changed.iloc[1, 0] = 1e-300
    others = [changed, FRAME[::-1], FRAME.rename({"A": "C"}), FRAME.rename(columns={"x": "w"})]
    digests = {as_feature_table(frame).digest for frame in [FRAME, *others]}
    assert len(digests) == 5
    # Kept in saved models: it may not change.
    assert as_feature_table(FRAME).digest[:16] == "4dcef99406f31436"


@pytest.mark.parametrize("matrix", [VALUES.copy(), sparse.csr_matrix(VALUES)])
def test_later_changes_are_not_seen_and_the_values_cannot_be_changed(matrix):
    table = FeatureTable(("A", "B"), ("x", "y", "z"), matrix)
    matrix[0, 0] = 7
    np.testing.assert_array_equal(dense(table), VALUES)
    with pytest.raises(ValueError, match="read-only"):
        (table.values.data if sparse.issparse(table.values) else table.values)[:] = 0
    with pytest.raises(AttributeError):
        table.names = ("C", "D")


NAN = FRAME.replace(3.5, np.nan)
INFINITE = FRAME.replace(3.5, np.inf).astype(pd.SparseDtype(float, 0.0))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"A": [1], "B": [object()]}, "must have a vector of numbers .*'A' or another one"),
        (FRAME.set_axis(["A", "A"]), r"several rows of 'A'\. .*index\.duplicated\(\)"),
        ({1: [0], "1": [1]}, "several rows of '1'"),
        (FRAME.set_axis(["A", np.nan]), "no name in row 1"),
        (FRAME[[]], "has no columns"),
        ({"A": set()}, "has no columns"),
        ({"A": []}, "has no columns"),
        (FRAME[:0], "has no rows"),
        ({}, "is an empty dict"),
        (
            FRAME.assign(group=["a", "b"], family=pd.Categorical(["a", "b"])),
            r"are not: 'group', 'family'\. .*pd\.get_dummies\(table, columns=\['group', 'family'\]",
        ),
        (FRAME.assign(x=["1", "2"]), r"these columns are not: 'x'.*\.astype\(float\)"),
        (FRAME.astype(complex), "these columns are not: 'x', 'y', 'z'"),
        (NAN, "is nan for 'B' in column 'z'"),
        (INFINITE, "is inf for 'B' in column 'z'"),
        (FRAME.assign(x=pd.array([1, None], "Int64")), "is nan for 'B' in column 'x'"),
        (FRAME.replace(0, np.nan).astype(pd.SparseDtype(float)), "is nan for 'A' in column 'y'"),
        ({"A": [np.nan, np.nan]}, r"'feature_0' \(and 1 more values are not finite\)"),
        ({"A": [1], "B": [1, 2], "C": [3]}, r"different lengths: 1 \('A'\) and 2 \('B'\)"),
        ({"A": [[1]], "B": [[2]]}, "must have a vector of numbers for each perturbation"),
        ({"A": [None, 2]}, "is nan for 'A'"),
        ({"A": np.ones((1, 2))}, "has ndarray for 'A'"),
        ({"A": "pathway"}, "has str for 'A'.*pass one term as a list of one"),
        ({"A": 1.0}, "has float for 'A'"),
        ({"A": {"x": 1}}, "has dict for 'A'"),
        ({"A": {"p"}, "B": [1.0]}, r"mixes terms \(of 'A'\) and vectors of numbers \(of 'B'\)"),
        ({"A": ["p", np.nan]}, "missing values among the terms of 'A'"),
        (
            {"A": pd.Series([1, 2], ["x", "y"]), "B": pd.Series([1, 2], ["y", "x"])},
            r"Series with different indices.*DataFrame\(features\)\.T",
        ),
        (VALUES, r"must be a DataFrame .*not ndarray\. .*DataFrame\(values, index=names\)"),
        (sparse.csr_matrix(VALUES), r"not csr_matrix\. Its rows need names"),
        (None, "must be a DataFrame .*not NoneType"),
        (ad.AnnData(obs=FRAME[[]], var=FRAME.T[[]]), "X of the AnnData is empty"),
    ],
)
def test_what_is_wrong_with_features_is_told(features, message):
    with pytest.raises(InvalidArgumentError, match="`perturbation_features`.*" + message):
        as_feature_table(features)


def test_names_and_values_must_agree_in_number():
    with pytest.raises(InvalidArgumentError, match=r"shape \(2, 3\) for 2 names .* 2 of columns"):
        FeatureTable(("A", "B"), ("x", "y"), VALUES)


def test_an_anndata_on_disk_is_read(tmp_path):
    of_values(VALUES).write_h5ad(tmp_path / "features.h5ad")
    table = as_feature_table(ad.read_h5ad(tmp_path / "features.h5ad", backed="r"))
    np.testing.assert_array_equal(table.values, VALUES)
