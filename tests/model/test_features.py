"""Features as a model takes them: which rows, standardised, and few columns."""

import logging

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.features import FeatureTable, as_feature_table
from scvi_sams.labels._spelling import DEFAULT_SPELLING
from scvi_sams.model._features import features_of_model
from scvi_sams.module._feature_prior import MOST_FEATURES

MEASURED = ["A", "B", "C"]
GENES = np.array(["B", "other", "U"])


def of_model(table, measured=MEASURED):
    return features_of_model(as_feature_table(table), measured, DEFAULT_SPELLING, GENES)


def test_columns_are_standardised_by_measured_perturbations():
    table = pd.DataFrame({"x": [1.0, 2, 6, 10], "y": [0.0, 0, 3, -3]}, index=["U", "C", "A", "B"])
    found = of_model(table)
    assert found.unmeasured == ["U"]
    assert found.columns == ["x", "y"]
    # Mean 6 and 0; mean squares around them 32 / 3 and 18 / 3.
    rows = np.array([[0, 3], [4, -3], [-4, 0], [-5, 0]]) / np.sqrt([32 / 3, 6])
    np.testing.assert_allclose(found.values, rows)


def test_a_perturbation_targets_the_gene_of_its_name():
    found = of_model({"U": [1.0], "A": [2.0], "B": [4.0], "V": [5.0]})
    assert found.unmeasured == ["U", "V"]
    assert found.target_genes.tolist() == [-1, 0, -1, 2, -1]


def test_a_measured_perturbation_without_features_has_average_ones(caplog):
    with caplog.at_level(logging.WARNING, "scvi.sams"):
        found = of_model({"A": [1.0], "C": [3.0], "U": [7.0]})
    np.testing.assert_allclose(found.values.ravel(), [-1, 0, 1, 5])
    assert "no row for 1 of 3 measured perturbations: 'B'" in caplog.text


@pytest.mark.parametrize(
    ("of_others", "named"),
    [
        # Measured ones lie 1, 1 and 2 from their nearest.
        ({"near": 5.0, "far": 5.1, "further": -20.0}, "2 of 3 unmeasured perturbations"),
        ({"near": 5.0, "same": 1.0}, None),
    ],
    ids=["some far", "none far"],
)
def test_features_unlike_those_of_any_measured_perturbation_are_named(caplog, of_others, named):
    measured = {"A": 0.0, "B": 1.0, "C": 3.0}
    with caplog.at_level(logging.WARNING, "scvi.sams"):
        of_model({name: [value] for name, value in (measured | of_others).items()})
    if named is None:
        assert "unlike" not in caplog.text
    else:
        assert named in caplog.text
        assert "'far', 'further'" in caplog.text
        assert "near'" not in caplog.text


def test_controls_and_combinations_are_no_perturbations(caplog):
    table = {name: [float(n)] for n, name in enumerate(["control", "A", "B", "C", "A+B", "U+A"])}
    with caplog.at_level(logging.WARNING, "scvi.sams"):
        found = of_model(table)
    assert found.unmeasured == []
    assert "'A+B', 'U+A' are combinations" in caplog.text
    assert "control" not in caplog.text


@pytest.mark.parametrize("convert", [np.asarray, sparse.csr_matrix], ids=["dense", "sparse"])
def test_columns_that_are_the_same_for_all_are_left_out(convert):
    rng = np.random.default_rng(0)
    names = [f"P{number}" for number in range(101)]
    values = rng.uniform(size=(101, 5))
    # A mean of such numbers is off by an error of rounding; scales differ by orders of magnitude.
    values[:100, 1] = 0.1
    values[:100, 3] = 1e9 / 3
    values[:, 2] *= 1e-9
    values[:, 4] += 1e9
    table = FeatureTable(tuple(names), tuple("abcde"), convert(values))
    found = of_model(table, names[:100])
    assert found.columns == ["a", "c", "e"]
    np.testing.assert_allclose(found.values[:100].std(axis=0), 1, rtol=1e-6)
    assert np.abs(found.values).max() < 3


def test_many_columns_are_reduced_alike_dense_and_sparse():
    rng = np.random.default_rng(0)
    n_columns = MOST_FEATURES + 40
    names = [f"P{number}" for number in range(150)]
    terms = (rng.uniform(size=(150, n_columns)) < 0.2).astype(float)
    terms[:, :30] = terms[:, [0]]  # what many columns say leads
    measured = names[:130]
    dense, as_sparse = (
        of_model(FeatureTable(tuple(names), tuple(map(str, range(n_columns))), values), measured)
        for values in (terms, sparse.csr_matrix(terms))
    )
    np.testing.assert_allclose(dense.values, as_sparse.values, atol=1e-6)
    assert dense.values.shape == (150, MOST_FEATURES)
    of_measured = dense.values[:130]
    np.testing.assert_allclose(of_measured.mean(axis=0), 0, atol=1e-9)
    variances = of_measured.var(axis=0)
    assert variances.mean() == pytest.approx(1)
    assert variances[0] > 5 * variances[1]
    # Components are uncorrelated, and distances nearly those of all columns.
    correlations = np.corrcoef(of_measured.T) - np.eye(MOST_FEATURES)
    assert np.abs(correlations).max() < 1e-6
    standardised = (terms - terms[:130].mean(axis=0)) / terms[:130].std(axis=0)
    np.testing.assert_allclose(dense.values, standardised @ dense.projection, atol=1e-9)


def test_more_columns_than_perturbations_have_a_component_less_than_these():
    rng = np.random.default_rng(0)
    names = [f"P{number}" for number in range(6)]
    table = FeatureTable(
        tuple(names), tuple(map(str, range(MOST_FEATURES + 1))), rng.normal(size=(6, 101))
    )
    found = of_model(table, names[:4])
    assert found.values.shape == (6, 3)
    # All that tells the four from one another is kept.
    inner = found.values[:4] @ found.values[:4].T
    rows = table.rows(names[:4])
    rows = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    np.testing.assert_allclose(inner / np.trace(inner), rows @ rows.T / np.square(rows).sum())


def test_a_single_column_is_enough():
    found = of_model({"A": [0.0], "B": [1.0], "C": [1.0], "U": [0.0], "V": [1.0]})
    assert found.values.shape == (5, 1)
    np.testing.assert_allclose(found.values[3:, 0], found.values[:2, 0])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pd.DataFrame(np.eye(3), index=list("xyz"), columns=MEASURED), r"table\.T"),
        ({"Q": [1.0], "R": [2.0]}, "none of them was measured"),
        ({"A": [1.0, 2], "B": [1, 2], "C": [1, 2], "U": [3, 4]}, "the same for all"),
        ({"A": [1.0], "U": [2.0]}, "the same for all"),
    ],
    ids=["transposed", "other names", "constant", "one measured"],
)
def test_tables_that_tell_nothing_raise(table, message):
    with pytest.raises(InvalidArgumentError, match=message):
        of_model(table)
