"""Baselines that predict a level of a covariate from the others, against values by hand."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from evaluation.benchmark_builders import run, small_screen
from scvi_sams.evaluation import OtherLevelsMean, VectorArithmetic, covariate_transfer
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidCountsError,
    InvalidCovariateError,
    MissingControlError,
    MissingKeyError,
    SAMSError,
    UnknownPerturbationError,
)

# Means by type:  T: control (1, 2), A (4, 2) of 1 cell, A+B (0, 9);
#                 B: control (3, 0), A (4, 4) of 3 cells;
#                 M: control (10, 10), B (12, 10).
CELLS = [
    ("control", "T", [0, 2]),
    ("control", "T", [2, 2]),
    ("A", "T", [4, 2]),
    ("B+A", "T", [0, 9]),
    ("control", "B", [3, 0]),
    ("A", "B", [4, 3]),
    ("A", "B", [4, 3]),
    ("A", "B", [4, 6]),
    ("control", "M", [10, 10]),
    ("B", "M", [12, 10]),
]
each_method = pytest.mark.parametrize("method", [VectorArithmetic, OtherLevelsMean])


@pytest.fixture
def train() -> ad.AnnData:
    labels, types, rows = zip(*CELLS, strict=True)
    return ad.AnnData(
        np.array(rows, dtype=np.float32),
        obs=pd.DataFrame(
            {"perturbation": labels, "type": types}, index=[f"c{i}" for i in range(len(rows))]
        ),
        var=pd.DataFrame(index=["g1", "g2"]),
    )


def test_vector_arithmetic_adds_the_mean_effect_of_the_others_to_the_controls(train):
    method = VectorArithmetic(covariate_key="type").fit(train)
    # A changes T by (3, 0) and B by (1, 4); the types weigh the same, not the cells.
    np.testing.assert_allclose(method.predict(["A"], ["M"]).X, [[12, 12]])
    # The cells of the level itself are not used.
    predicted = method.predict(["A"], ["T", "B"])
    np.testing.assert_allclose(predicted.X, [[1 + 1, 2 + 4], [3 + 3, 0 + 0]])
    np.testing.assert_allclose(method.predict(["A+B"], ["M"]).X, [[9, 17]])


def test_mean_of_other_levels_weighs_cells(train):
    method = OtherLevelsMean(covariate_key="type").fit(train)
    np.testing.assert_allclose(method.predict(["A"], ["M"]).X, [[4, (2 + 3 * 4) / 4]])
    np.testing.assert_allclose(method.predict(["A"], ["T", "B"]).X, [[4, 4], [4, 2]])


def test_a_level_without_controls_tells_no_effect_but_a_mean(train):
    lost = train[[4, *range(4), *range(5, 8), 9]].copy()  # without the control of M
    shift = VectorArithmetic(covariate_key="type").fit(lost)
    with pytest.raises(UnknownPerturbationError, match=r"No level other than 'T' .* 'B' and 'cont"):
        shift.predict(["B"], ["T"])
    with pytest.raises(MissingControlError, match="of level 'M'"):
        shift.predict(["A"], ["M"])
    means = OtherLevelsMean(covariate_key="type").fit(lost)
    np.testing.assert_allclose(means.predict(["B"], ["T"]).X, [[12, 10]])


@each_method
def test_rows_name_label_and_level(method, train):
    fitted = method(covariate_key="type").fit(train)
    predicted = fitted.predict(["B+A", "B"], ["B"])
    assert predicted.obs_names.tolist() == ["B+A in B", "B in B"]
    assert predicted.obs["perturbation"].tolist() == ["A+B", "B"]
    assert predicted.obs["type"].tolist() == ["B", "B"]
    every = fitted.predict(["A"])
    assert every.obs["type"].tolist() == ["B", "M", "T"]
    np.testing.assert_array_equal(every[1].X, fitted.predict(["A"], ["M"]).X)
    assert fitted.predict([]).shape == (0, 2)
    assert fitted.predict(["A"], []).shape == (0, 2)


@each_method
def test_predictions_depend_neither_on_order_nor_on_sparsity(method, train):
    expected = method(covariate_key="type").fit(train).predict(["A"]).X
    csr = train[::-1].copy()
    csr.X = sparse.csr_matrix(csr.X)
    before = csr.X.copy()
    np.testing.assert_allclose(method(covariate_key="type").fit(csr).predict(["A"]).X, expected)
    np.testing.assert_array_equal(csr.X.toarray(), before.toarray())


@each_method
def test_what_cannot_be_learned_or_predicted_is_refused_by_name(method, train):
    with pytest.raises(InvalidArgumentError, match="`covariate_key` is None"):
        method().fit(train)
    with pytest.raises(MissingKeyError, match="'line'"):
        method(covariate_key="line").fit(train)
    with pytest.raises(SAMSError, match="call fit first"):
        method(covariate_key="type").predict(["A"])
    fitted = method(covariate_key="type").fit(train)
    with pytest.raises(UnknownPerturbationError, match=r"No level other than 'M' .* of 'Z'"):
        fitted.predict(["Z"], ["M"])
    with pytest.raises(UnknownPerturbationError, match=r"No level other than 'M' .* of 'B'"):
        fitted.predict(["B"])  # the only cells are those of M
    with pytest.raises(
        InvalidCovariateError, match="level 'NK' of 'type'; levels in training are 'B', 'M', 'T'"
    ):
        fitted.predict(["A"], ["T", "NK"])
    with pytest.raises(UnknownPerturbationError, match="is the control"):
        fitted.predict(["control"])
    with pytest.raises(SAMSError, match="no effect to learn"):
        method(covariate_key="type").fit(train[train.obs["perturbation"] == "control"])
    no_level = train.copy()
    no_level.obs.loc["c3", "type"] = np.nan
    with pytest.raises(InvalidCovariateError, match="1 cell has no 'type'"):
        method(covariate_key="type").fit(no_level)
    train.X[0, 0] = np.inf
    with pytest.raises(InvalidCountsError, match="not finite"):
        method(covariate_key="type").fit(train)


@pytest.fixture(scope="module")
def screen():
    adata = small_screen()
    adata.obs["line"] = pd.Categorical(np.tile(["a", "b"], adata.n_obs // 2))
    return adata


def test_a_benchmark_names_covariate_and_labels(screen):
    """Its rows are those of predictions by hand from the training cells of the split."""
    screen = screen.copy()
    screen.obs["guide"] = screen.obs["perturbation"].astype(str).replace("control", "NT")
    split = covariate_transfer(screen.obs["guide"], screen.obs["line"], control="NT")
    asked = {}

    def by_hand(cls):
        def predict(train, perturbations):
            keys = {"perturbation_key": "guide", "covariate_key": "line", "control": "NT"}
            fitted = cls(**keys).fit(train)
            pairs = zip(split.held_out, split.held_out_levels, strict=True)
            rows = [
                fitted.predict([label], [level]) for label, level in pairs if label in perturbations
            ]
            asked[cls] = len(rows)
            return ad.concat(rows)

        return predict

    result = run(
        screen,
        {
            "vector arithmetic": "vector arithmetic",
            "mean of other levels": "mean of other levels",
            "shift by hand": by_hand(VectorArithmetic),
            "means by hand": by_hand(OtherLevelsMean),
        },
        split=split,
        perturbation_key="guide",
        control="NT",
        covariate_key="line",
    )
    assert result.failures.empty
    assert min(asked.values()) > 1
    values = {name: table["value"].to_numpy() for name, table in result.scores.groupby("method")}
    np.testing.assert_allclose(values["vector arithmetic"], values["shift by hand"])
    np.testing.assert_allclose(values["mean of other levels"], values["means by hand"])
    assert (values["vector arithmetic"] != values["mean of other levels"]).any()


def test_a_benchmark_without_a_covariate_says_what_to_pass(screen):
    failures = run(screen, ["vector arithmetic"]).failures
    assert set(failures["method"]) == {"vector arithmetic"}
    assert failures["message"].str.contains("`covariate_key` is None").any()
