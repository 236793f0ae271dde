"""Tests of effects that are the same in all levels: by hand, in size, and in what they find."""

import numpy as np
import pytest
from scipy import stats

from scvi_sams._level_tests import level_tests

CONTROL = -1


def cells(rng, *, n_treatments=1, n_levels=3, n_treated=30, n_controls=60, n_features=5, spread=1):
    """Standard normal features; ``spread`` is that of each level."""
    treatment = np.concatenate(
        [np.full(n_controls * n_levels, CONTROL)]
        + [np.full(n_treated * n_levels, one) for one in range(n_treatments)]
    )
    level = np.concatenate(
        [np.repeat(np.arange(n_levels), n_controls)]
        + [np.repeat(np.arange(n_levels), n_treated)] * n_treatments
    )
    scale = np.broadcast_to(spread, n_levels)[level]
    return rng.normal(size=(len(level), n_features)) * scale[:, None], treatment, level


def test_one_feature_in_two_levels_by_hand():
    """The statistic over its mean is the square of Welch's t for a difference of differences."""
    rng = np.random.default_rng(0)
    x, treatment, level = cells(rng, n_levels=2, n_features=1, spread=[1.0, 3.0])
    x[(treatment == 0) & (level == 1)] += 2
    tests = level_tests(x, treatment, level, level)
    groups = [x[(treatment == t) & (level == c), 0] for c in (0, 1) for t in (0, CONTROL)]
    of_means = np.array([group.var(ddof=1) / len(group) for group in groups])
    means = [group.mean() for group in groups]
    difference = (means[0] - means[1]) - (means[2] - means[3])
    freedom = np.array([len(group) - 1 for group in groups])
    welch = of_means.sum() ** 2 / (of_means**2 / freedom).sum()
    t = difference / np.sqrt(of_means.sum())
    np.testing.assert_allclose(tests.p_value[0], 2 * stats.t.sf(abs(t), welch), rtol=1e-8)
    pooled = sum(group.var(ddof=1) * (len(group) - 1) for group in groups) / freedom.sum()
    w = 1 / (1 / 30 + 1 / 60)
    expected = w / 2 * (difference**2 - of_means.sum()) / pooled
    np.testing.assert_allclose(tests.squared_difference[0], expected, rtol=1e-10)
    effects = np.array([means[0] - means[1], means[2] - means[3]])
    squared = w * ((effects**2).sum() - of_means.sum()) / pooled
    np.testing.assert_allclose(tests.squared_effect[0], squared, rtol=1e-10)


@pytest.mark.parametrize("n_treated", [15, 80])
def test_p_values_of_equal_effects_are_uniform(n_treated):
    """Whatever levels differ by: means, spread, and how many cells they have."""
    rng = np.random.default_rng(1)
    p_values = []
    for _ in range(60):
        x, treatment, level = cells(
            rng, n_treatments=10, n_treated=n_treated, n_controls=150, spread=[1.0, 2.0, 0.5]
        )
        x += 3 * level[:, None] + 2 * (treatment[:, None] >= 0)
        kept = (level < 2) | (rng.random(len(level)) < 0.8)
        keep = kept | (n_treated == 15)
        p_values.append(level_tests(x[keep], treatment[keep], level[keep], level[keep]).p_value)
    p_values = np.concatenate(p_values)
    assert np.isfinite(p_values).all()
    for size, most in ((0.05, 0.075), (0.01, 0.022)):
        assert 0.5 * size < (p_values < size).mean() < most
    assert 0.45 < p_values.mean() < 0.55


def test_an_effect_in_one_of_three_levels_has_a_share_of_two_thirds():
    rng = np.random.default_rng(2)
    x, treatment, level = cells(rng, n_treatments=2, n_treated=400, n_controls=800)
    x[(treatment == 0) & (level == 2)] += 1
    x[treatment == 1] += 1
    tests = level_tests(x, treatment, level, level)
    share = tests.squared_difference / tests.squared_effect
    np.testing.assert_allclose(share, [2 / 3, 0], atol=0.03)
    w = 1 / (1 / 400 + 1 / 800)
    variance = x[:, 0].var()  # features are those in which cells have variance 1
    assert tests.squared_effect[1] == pytest.approx(3 * 5 * w / variance, rel=0.25)
    assert tests.p_value[0] < 1e-50
    assert tests.p_value[1] > 0.01


def test_cells_are_compared_within_strata():
    """A stratum that shifts cells, in which treated cells are in one level only, is no effect."""
    rng = np.random.default_rng(3)
    x, treatment, level = cells(rng, n_treated=60, n_controls=200)
    lane = rng.random(len(level)) < np.where((treatment >= 0) & (level == 0), 0.9, 0.3)
    x[lane] += 2
    ignored = level_tests(x, treatment, level, level)
    known = level_tests(x, treatment, level, 2 * level + lane)
    assert ignored.p_value[0] < 1e-6
    assert known.p_value[0] > 0.01
    assert abs(known.squared_effect[0]) < 60


def test_strata_without_controls_and_levels_with_few_cells_are_left_out():
    rng = np.random.default_rng(4)
    x, treatment, level = cells(rng)
    lane = np.where((treatment >= 0) & (rng.random(len(level)) < 0.3), 1, 0)
    kept = lane == 0
    expected = level_tests(x[kept], treatment[kept], level[kept], level[kept])
    found = level_tests(x, treatment, level, 2 * level + lane)
    np.testing.assert_allclose(found.p_value, expected.p_value, rtol=1e-10)
    few = np.ones(len(level), dtype=bool)
    few[np.flatnonzero((treatment == 0) & (level == 2))[14:]] = False
    tests = level_tests(x[few], treatment[few], level[few], level[few])
    assert tests.n_levels[0] == 2
    assert np.isfinite(tests.p_value[0])
    one = few & (level != 1)
    assert np.isnan(level_tests(x[one], treatment[one], level[one], level[one]).p_value[0])


def test_scale_and_rotation_of_features_play_no_part():
    rng = np.random.default_rng(5)
    x, treatment, level = cells(rng, spread=[1.0, 2.0, 1.0])
    mixed = x @ rng.normal(size=(5, 5)) * 10 + 3
    doubled = np.column_stack([mixed, mixed[:, 0] + mixed[:, 1]])  # says nothing more
    expected = level_tests(x, treatment, level, level)
    for features in (mixed, doubled):
        tests = level_tests(features, treatment, level, level)
        np.testing.assert_allclose(tests.p_value, expected.p_value, rtol=1e-6)
        np.testing.assert_allclose(tests.squared_effect, expected.squared_effect, rtol=1e-6)
