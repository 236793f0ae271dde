"""Tests of whether cells with a perturbation differ: closed forms, and their size."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from scvi_sams._group_tests import group_tests, normal_scores, q_values
from scvi_sams.labels._labels import Labels
from scvi_sams.labels._parsing import read_labels


def labels_of(texts: list[str]) -> Labels:
    return read_labels(np.array(texts, dtype=object), "control", "+")


def one_stratum(labels: Labels) -> np.ndarray:
    return np.zeros(len(labels), dtype=int)


def test_of_one_feature_it_is_the_t_test():
    rng = np.random.default_rng(0)
    labels = labels_of(["control"] * 150 + ["A"] * 120)
    feature = rng.normal(size=(270, 1)) + 0.3 * (np.arange(270) >= 150)[:, None]
    expected = stats.ttest_ind(feature[150:, 0], feature[:150, 0])
    found = group_tests(feature, labels, one_stratum(labels))
    assert found.statistic[0] == pytest.approx(expected.statistic**2)
    assert found.p_value[0] == pytest.approx(expected.pvalue)
    assert (found.n_cells[0], found.n_compared[0]) == (120, 150)


def test_of_two_groups_it_is_hotellings_test():
    rng = np.random.default_rng(1)
    labels = labels_of(["control"] * 200 + ["A"] * 110)
    x = rng.normal(size=(310, 4)) @ rng.normal(size=(4, 4))
    x[200:] += 0.2
    first, second = x[200:], x[:200]
    pooled = (109 * np.cov(first.T) + 199 * np.cov(second.T)) / 308
    difference = first.mean(axis=0) - second.mean(axis=0)
    t_squared = 110 * 200 / 310 * difference @ np.linalg.solve(pooled, difference)
    expected = t_squared * (310 - 5) / (308 * 4)
    found = group_tests(x, labels, one_stratum(labels))
    assert found.statistic[0] == pytest.approx(expected)
    assert found.p_value[0] == pytest.approx(stats.f.sf(expected, 4, 305))


def test_strata_are_compared_within():
    """Partial F-test of a regression with an intercept per stratum."""
    rng = np.random.default_rng(2)
    labels = labels_of(["control"] * 150 + ["A"] * 150)
    strata = rng.integers(0, 3, size=300)
    x = rng.normal(size=(300, 2)) + 5 * strata[:, None]
    y = (np.arange(300) >= 150).astype(float)
    intercepts = np.eye(3)[strata]
    without, with_features = (
        np.linalg.lstsq(design, y, rcond=None)[1][0]
        for design in (intercepts, np.column_stack([intercepts, x]))
    )
    expected = (without - with_features) / 2 / (with_features / (300 - 5))
    found = group_tests(x, labels, strata)
    assert found.statistic[0] == pytest.approx(expected)


def test_combinations_are_compared_with_cells_that_have_the_rest():
    rng = np.random.default_rng(3)
    texts = ["control"] * 100 + ["A"] * 120 + ["A+B"] * 130
    labels = labels_of(texts)
    effect_of_a = (np.arange(350) >= 100) * 3.0
    x = rng.normal(size=(350, 1)) + effect_of_a[:, None]
    found = group_tests(x, labels, one_stratum(labels))
    # B has cells in A+B only, which are compared with those of A: no difference.
    assert (found.n_cells[1], found.n_compared[1]) == (130, 120)
    expected = stats.ttest_ind(x[220:, 0], x[100:220, 0]).pvalue
    assert found.p_value[1] == pytest.approx(expected)
    # A is compared with controls, as nothing lacks A in A+B but a B that nobody measured.
    assert (found.n_cells[0], found.n_compared[0]) == (120, 100)
    assert found.p_value[0] < 1e-20


def test_a_dose_of_nothing_is_a_control():
    labels = labels_of(["control"] * 100 + ["A"] * 200)
    doses = labels.doses.copy()
    doses[100:200] = 0
    found = group_tests(
        np.random.default_rng(4).normal(size=(300, 1)),
        replace(labels, doses=doses),
        one_stratum(labels),
    )
    assert (found.n_cells[0], found.n_compared[0]) == (100, 200)


def test_nothing_to_compare_with_is_no_test():
    labels = labels_of(["control"] * 50 + ["A"] * 50 + ["B"] * 50)
    strata = np.repeat([0, 0, 1], 50)
    found = group_tests(np.random.default_rng(5).normal(size=(150, 2)), labels, strata)
    assert np.isnan(found.p_value).tolist() == [False, True]
    assert found.n_compared[1] == 0


@pytest.mark.parametrize("n_cells", [8, 30, 150])
def test_sizes_are_those_promised(n_cells):
    """Skewed features, as of counts: p-values of permuted labels are uniform."""
    rng = np.random.default_rng(n_cells)
    x = normal_scores(rng.negative_binomial(1, 0.6, size=(400 + n_cells, 6)) @ np.eye(6)[:, :5])
    labels = labels_of(["control"] * 400 + ["A"] * n_cells)
    p_values = []
    for _ in range(400):
        codes = labels.codes[rng.permutation(len(labels))]
        permuted = replace(labels, codes=codes, doses=(codes >= 0).astype(float))
        p_values.append(group_tests(x, permuted, one_stratum(labels)).p_value[0])
    p_values = np.array(p_values)
    # Binomial intervals of 99.9 %.
    for size in (0.05, 0.2):
        low, high = stats.binom.interval(0.999, 400, size)
        assert low <= (p_values < size).sum() <= high
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


def test_normal_scores_by_hand():
    scores = normal_scores(np.array([[10.0], [30.0], [20.0], [1e9]]))
    expected = stats.norm.ppf([0.125, 0.625, 0.375, 0.875])
    np.testing.assert_allclose(scores[:, 0], expected)


def test_q_values_by_hand():
    """The larger of p times m over the rank, from the largest down; unknown ones do not count."""
    found = q_values(np.array([0.01, np.nan, 0.04, 0.03]))
    np.testing.assert_allclose(found, [0.03, np.nan, 0.04, 0.04])
    assert np.isnan(q_values(np.array([np.nan]))).all()
