"""Metrics against values computed by hand, and what they must not depend on."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from scvi_sams.evaluation import align_ate, compare_ate, effect_metrics
from scvi_sams.exceptions import MissingKeyError, SAMSError
from scvi_sams.metrics._profiles import centred


def make_table(effect, perturbations, genes=None, *, n_cells=None, **description) -> ad.AnnData:
    effect = np.asarray(effect, dtype=float)
    genes = [f"g{i}" for i in range(effect.shape[1])] if genes is None else genes
    return ad.AnnData(
        effect,
        obs=pd.DataFrame({} if n_cells is None else {"n_cells": n_cells}, index=perturbations),
        var=pd.DataFrame(index=genes),
        uns={"ate": {"method": "lognorm", "target_sum": 1e4, "units": "log2"} | description},
    )


def test_effect_metrics_by_hand():
    # y has mean 2 and squares about it 2; x - y = (1, 2, 3).
    scores = effect_metrics(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]))
    assert scores == pytest.approx(
        {"pearson": 1, "r2": 1 - 14 / 2, "slope": 2, "cosine": 1, "rmse": np.sqrt(14 / 3)}
    )


def test_effect_metrics_of_a_shifted_prediction():
    # x = y + 1: perfectly correlated, slope 1, but neither exact nor parallel.
    scores = effect_metrics(np.array([1.0, 2.0]), np.array([0.0, 1.0]))
    assert scores == pytest.approx(
        {"pearson": 1, "r2": 1 - 2 / 0.5, "slope": 1, "cosine": 2 / np.sqrt(5), "rmse": 1}
    )


def test_effect_metrics_agree_with_scipy():
    rng = np.random.default_rng(0)
    y = rng.normal(size=50)
    x = 0.3 * y + rng.normal(size=50) + 2
    scores = effect_metrics(x, y)
    assert scores["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert scores["slope"] == pytest.approx(stats.linregress(y, x).slope)


@pytest.mark.parametrize("constant", [0.0, 0.1])
def test_relations_with_a_constant_are_zero_not_nan(constant):
    x = np.full(3, constant)  # the mean of three times 0.1 is not exactly 0.1
    scores = effect_metrics(x, np.array([1.0, 0.0, -1.0]))
    assert scores["pearson"] == scores["slope"] == scores["cosine"] == 0
    reverse = effect_metrics(np.array([1.0, 0.0, -1.0]), x)
    assert reverse["pearson"] == reverse["slope"] == reverse["cosine"] == reverse["r2"] == 0
    assert effect_metrics(x, x)["r2"] == 1


def test_a_constant_row_of_many_has_no_variation_at_all():
    rows = np.array([[0.1, 0.1, 0.1], [1.0, 2.0, 6.0]])  # the mean of thrice 0.1 is not exactly 0.1
    assert centred(rows).tolist() == [[0, 0, 0], [-2, -1, 3]]


def test_compare_scores_each_perturbation_and_all_flattened():
    predicted = make_table([[2, 4, 6], [0, 1, -1]], ["A", "B"])
    observed = make_table([[1, 2, 3], [0, 2, -2]], ["A", "B"], n_cells=[10, 30])
    scores = compare_ate(predicted, observed, n_top_genes=2)
    assert scores.index.tolist() == ["A", "B", "all"]
    assert scores.columns.tolist() == [
        "pearson", "r2", "slope", "cosine", "rmse", "pearson_top", "r2_top", "n_cells", "missing",
    ]  # fmt: skip
    assert scores.loc["A", "slope"] == pytest.approx(2)
    assert scores.loc["B", "slope"] == pytest.approx(0.5)
    assert scores.loc["B", "r2"] == pytest.approx(1 - 2 / 8)
    x, y = [2, 4, 6, 0, 1, -1], [1, 2, 3, 0, 2, -2]
    assert scores.loc["all", "pearson"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert scores.loc["all", "slope"] == pytest.approx(stats.linregress(y, x).slope)
    assert scores.loc["all", "r2"] == pytest.approx(1 - 16 / 16)
    assert scores.loc["all", "rmse"] == pytest.approx(np.sqrt(16 / 6))
    assert scores["n_cells"].tolist() == [10, 30, 40]
    assert scores["missing"].tolist() == [0, 0, 0]


def test_top_genes_are_those_of_each_perturbation():
    # Top two by |observed|: genes 0 and 1 for A, genes 2 and 3 for B.
    observed = make_table([[3, -4, 0.1, 0.2], [0, 1, 5, -6]], ["A", "B"])
    predicted = make_table([[3, -2, 9, -9], [9, 9, 4, 0]], ["A", "B"])
    scores = compare_ate(predicted, observed, n_top_genes=2)
    assert scores.loc["A", "r2_top"] == pytest.approx(1 - 4 / (2 * 3.5**2))
    assert scores.loc["B", "r2_top"] == pytest.approx(1 - (1 + 36) / (2 * 5.5**2))
    x, y = [3, -2, 4, 0], [3, -4, 5, -6]
    assert scores.loc["all", "pearson_top"] == pytest.approx(stats.pearsonr(x, y).statistic)
    mean = np.mean(y)
    spread = sum((value - mean) ** 2 for value in y)
    assert scores.loc["all", "r2_top"] == pytest.approx(1 - (4 + 1 + 36) / spread)


def test_fewer_genes_than_asked_for_use_all():
    predicted, observed = make_table([[1, 3, 2]], ["A"]), make_table([[1, 2, 3]], ["A"])
    scores = compare_ate(predicted, observed)
    assert scores.loc["A", "pearson_top"] == pytest.approx(scores.loc["A", "pearson"])
    assert scores.loc["A", "pearson"] == pytest.approx(0.5)
    assert scores["n_cells"].isna().all()


@pytest.mark.parametrize("failure", ["absent", "nan", "one entry infinite"])
def test_failed_predictions_are_scored_as_no_effect(failure):
    observed = make_table([[1, 2, 3], [0, 3, -3]], ["A", "B"])
    predicted = make_table([[2, 4, 6], [0, 3, -3]], ["A", "B"])
    if failure == "absent":
        predicted = predicted[["A"]].copy()
    elif failure == "nan":
        predicted.X[1] = np.nan
    else:
        predicted.X[1, 0] = np.inf
    scores = compare_ate(predicted, observed)
    failed = scores.loc["B"]
    assert failed[["pearson", "slope", "cosine", "r2", "pearson_top"]].tolist() == [0] * 5
    assert failed["rmse"] == pytest.approx(np.sqrt(18 / 3))
    assert scores["missing"].tolist() == [0, 1, 1]
    zeros = make_table([[2, 4, 6], [0, 0, 0]], ["A", "B"])
    pd.testing.assert_series_equal(
        scores.loc["all"].drop("missing"), compare_ate(zeros, observed).loc["all"].drop("missing")
    )


def test_rows_genes_and_spelling_are_aligned():
    rng = np.random.default_rng(0)
    effect, noise = rng.normal(size=(2, 3, 5))
    observed = make_table(effect, ["A", "B+A", "C"])
    predicted = make_table(effect + noise, ["A", "A+B", "C"])
    expected = compare_ate(predicted, observed)
    wider = ad.concat([predicted, make_table(effect, ["X", "Y", "Z"])], uns_merge="first")
    scores = compare_ate(wider[::-1, ::-1].copy(), observed)
    assert scores.index.tolist() == ["A", "B+A", "C", "all"]
    pd.testing.assert_frame_equal(scores, expected)
    assert scores["missing"].sum() == 0
    x, y, missing = align_ate(wider[::-1, ::-1].copy(), observed)
    np.testing.assert_array_equal(x, effect + noise)
    np.testing.assert_array_equal(y, effect)
    assert not missing.any()


def test_comparing_does_not_change_the_tables():
    predicted = make_table([[np.nan, 4, 6]], ["A"])
    observed = make_table([[1, 2, 3]], ["A"])
    compare_ate(predicted, observed)
    np.testing.assert_array_equal(predicted.X, [[np.nan, 4, 6]])
    np.testing.assert_array_equal(observed.X, [[1, 2, 3]])


def test_tables_that_cannot_be_compared_are_refused():
    observed = make_table([[1, 2, 3]], ["A"])
    with pytest.raises(SAMSError, match=r"method is 'mean' .* 'lognorm'"):
        compare_ate(make_table([[1, 2, 3]], ["A"], method="mean"), observed)
    with pytest.raises(SAMSError, match="target_sum"):
        compare_ate(make_table([[1, 2, 3]], ["A"], target_sum=1e6), observed)
    with pytest.raises(MissingKeyError, match="'g2'"):
        compare_ate(make_table([[1, 2]], ["A"]), observed)
    with pytest.raises(SAMSError, match="more than once"):
        compare_ate(make_table([[1, 2, 3]] * 2, ["A+B", "B+A"]), observed)
    with pytest.raises(SAMSError, match="not finite"):
        compare_ate(observed, make_table([[1, np.nan, 3]], ["A"]))
    with pytest.raises(SAMSError, match="empty"):
        compare_ate(observed, observed[[]].copy())
    with pytest.raises(SAMSError, match="At least two genes"):
        compare_ate(observed, observed, n_top_genes=1)
    undescribed = observed.copy()
    del undescribed.uns["ate"]
    with pytest.raises(MissingKeyError, match="predicted table"):
        compare_ate(undescribed, observed)


def test_the_twenty_strongest_genes_unless_said_otherwise():
    """Genes 0 to 19 are predicted, gene 20, the next strongest, has the wrong sign."""
    effect = np.linspace(3, 1, 30)[None]
    wrong = np.where(np.arange(30) == 20, -effect, effect)
    scores = compare_ate(make_table(wrong, ["A"]), make_table(effect, ["A"]))
    (name,) = (column for column in scores if "pearson" in column and "top" in column)
    assert scores.loc["A", name] == pytest.approx(1)


def test_combinations_are_matched_by_the_given_delimiter():
    effect = [[1.0, 2.0, 4.0]]
    scores = compare_ate(make_table(effect, ["B_A"]), make_table(effect, ["A_B"]), delimiter="_")
    assert scores["rmse"].tolist()[0] == 0
