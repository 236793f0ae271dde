"""Whether guides differ from their siblings: by hand, sizes without a difference, and powers."""

import numpy as np
import pytest
from scipy import stats

from scvi_sams.interpretation._guide_cells import Compared
from scvi_sams.interpretation._siblings import (
    Pair,
    between,
    collinearity,
    cosine,
    independent_features,
    sibling_tests,
    sibling_weights,
)

N_FEATURES = 12
OF_CELLS = np.ones((2, 2))
NO_CONTROLS = np.zeros((2, 2))


def compared(guide, n_guides, per_perturbation, stratum=None):
    """Cells by their guides; ``n_guides`` stands for control cells."""
    stratum = np.zeros(len(guide), dtype=int) if stratum is None else stratum
    is_control = guide == n_guides
    counts = np.zeros((n_guides, stratum.max() + 1))
    np.add.at(counts, (guide[~is_control], stratum[~is_control]), 1)
    n_cells = counts.sum(axis=1)
    return Compared(
        np.arange(n_guides) // per_perturbation,
        guide,
        stratum,
        n_cells.astype(int),
        counts / np.maximum(n_cells, 1)[:, None],
        np.bincount(stratum[is_control], minlength=stratum.max() + 1),
    )


def cells_of_guides(n_cells, n_controls):
    """Guides of cells, as many of each."""
    n_guides = len(n_cells)
    return np.concatenate([np.repeat(np.arange(n_guides), n_cells), np.full(n_controls, n_guides)])


def compare(features, cells, fdr=0.05):
    everything = np.ones(cells.perturbation.max() + 1, dtype=bool)
    return sibling_tests(features, cells, everything, fdr)


def test_the_statistic_is_the_smaller_eigenvalue():
    """Products of the effects are 9 and 3, 3 and 2: eigenvalues (11 +- sqrt(85)) / 2."""
    effects = np.array([[3.0, 0.0], [1.0, 1.0]])
    statistic, n_fitted = collinearity(Pair(effects, OF_CELLS, NO_CONTROLS), np.ones(2))
    assert statistic == pytest.approx((11 - np.sqrt(85)) / 2, rel=1e-6)
    assert n_fitted == 1


def test_errors_of_either_effect_count():
    """(x - a y)^2 / (.5 + .25 a^2) is smallest where both are scaled to errors of 1."""
    effects = np.array([[3.0, 0.0], [1.0, 1.0]])
    pair = Pair(effects, np.array([[0.5, 0.5], [0.25, 0.25]]), NO_CONTROLS)
    scaled = effects / np.sqrt(pair.of_cells)
    smallest = np.linalg.eigvalsh(scaled @ scaled.T)[0]
    assert collinearity(pair, np.ones(2))[0] == pytest.approx(smallest, rel=1e-4)


def test_control_cells_are_common_to_both():
    """Of equal multiples, the error of the controls cancels; features vary there as controls do."""
    effects = np.array([[1.0, 0.0], [1.0, 2.0]])
    of_controls, share = np.array([3.0, 0.5]), np.full((2, 2), 0.1)
    found, _ = collinearity(Pair(effects, OF_CELLS, share), of_controls)
    angles = np.linspace(0, np.pi / 2, 20_001)
    a, b = np.cos(angles), np.sin(angles)
    values = sum(
        (a * effects[0, j] - b * effects[1, j]) ** 2
        / (a**2 + b**2 + 0.1 * (a - b) ** 2 * of_controls[j])
        for j in range(2)
    )
    assert found == pytest.approx(values.min(), rel=1e-5)


def test_an_opposite_effect_is_no_multiple():
    effects = np.array([[3.0, 0.0], [-1.0, 1.0]])
    statistic, n_fitted = collinearity(Pair(effects, OF_CELLS, NO_CONTROLS), np.ones(2))
    assert statistic == pytest.approx(2)
    assert n_fitted == 0


def test_multiples_leave_nothing():
    for factor in (0.0, 0.3, 4.0):
        effects = np.array([[2.0, -1.0, 3.0], [2.0 * factor, -factor, 3 * factor]])
        pair = Pair(effects, np.ones((2, 3)), NO_CONTROLS)
        assert collinearity(pair, np.ones(3))[0] == pytest.approx(0, abs=1e-6)


def test_cosines_are_corrected_for_errors():
    """Squared lengths 4 and 9 have errors of 1 + .2 each; the product has one of .2."""
    pair = Pair(
        np.array([[2.0, 0.0], [1.8, 2.4]]), np.full((2, 2), 0.5), np.array([[0.1, 0.1]] * 2)
    )
    expected = (3.6 - 0.2) / np.sqrt((4 - 1.2) * (9 - 1.2))
    assert cosine(pair, np.ones(2)) == pytest.approx(expected)
    unsure = pair._replace(of_cells=np.array([[0.5, 0.5], [2.2, 2.2]]))  # 4.6 of 9 are errors
    assert np.isnan(cosine(unsure, np.ones(2)))


def test_features_that_others_explain_are_left_out():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(50, 3))
    doubled = np.column_stack([values[:, 0], values[:, 1], values[:, 0] + 2, values[:, 2]])
    np.testing.assert_array_equal(independent_features(doubled, np.arange(50)), values)


def test_siblings_are_weighed_by_their_cells():
    cells = compared(cells_of_guides([10, 30, 20, 5, 7], 9), 5, 3)
    left_out = np.array([False, False, True, False, False])
    weights = sibling_weights(cells, left_out).toarray()
    expected = [
        [0, 1, 0, 0, 0],
        [1, 0, 0, 0, 0],
        [0.25, 0.75, 0, 0, 0],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 1, 0],
    ]
    np.testing.assert_allclose(weights, expected)


def test_variances_of_guides_lie_between_those_of_responding_and_of_control_cells():
    of_controls = np.array([3.0, 1.0, 0.5])
    own = np.stack([of_controls, np.ones(3), (of_controls + 1) / 2, 10 * of_controls])
    expected = [of_controls, np.ones(3), (of_controls + 1) / 2, of_controls]
    np.testing.assert_allclose(between(own, of_controls), expected)
    np.testing.assert_allclose(between(np.zeros((1, 3)), of_controls)[0, 1], 1)
    np.testing.assert_array_equal(between(own, np.ones(3)), np.ones((4, 3)))


def screen_without_differences(rates, n_cells, seed, n_perturbations=120):
    """Features with heavy tails; the guides of each perturbation share an effect at these rates.

    Cells that respond vary half as much in some features and twice as much in others.
    """
    rng = np.random.default_rng(seed)
    n_guides = n_perturbations * len(rates)
    guide = cells_of_guides([n_cells] * n_guides, 1500)
    features = rng.standard_t(5, size=(len(guide), N_FEATURES)) @ rng.normal(
        size=(N_FEATURES, N_FEATURES)
    )
    effects = rng.normal(size=(n_perturbations, N_FEATURES)) * 4
    own = guide < n_guides
    responds = rng.random(own.sum()) < np.tile(rates, n_perturbations)[guide[own]]
    scale = np.where(np.arange(N_FEATURES) % 3 == 0, 0.5, 1) * (
        1 + (np.arange(N_FEATURES) % 5 == 0)
    )
    features[own] *= np.where(responds[:, None], scale, 1)
    features[own] += responds[:, None] * effects[guide[own] // len(rates)]
    stratum = rng.integers(0, 3, len(guide))
    features += 5 * stratum[:, None]
    return features, compared(guide, n_guides, len(rates), stratum)


@pytest.mark.parametrize(
    ("rates", "n_cells"),
    [((0.8,) * 4, 60), ((0.8,) * 4, 15), ((0.2, 0.5, 0.9), 60), ((0.0, 0.8, 0.8), 40)],
)
def test_guides_that_do_the_same_are_flagged_at_the_stated_rate(rates, n_cells):
    """Batches and the proportion of cells that respond play no part."""
    found = compare(*screen_without_differences(rates, n_cells, seed=1))
    p_value = found.p_value
    assert np.isfinite(p_value).all()
    # P-values of one perturbation are not independent: half as many are.
    error = np.sqrt(0.05 * 0.95 / (len(p_value) / 2))
    assert (p_value <= 0.05).mean() < 0.05 + 3 * error
    assert not (found.q_value <= 0.05).any()


def test_p_values_of_equal_guides_are_uniform():
    p_values = np.concatenate(
        [
            compare(*screen_without_differences((0.8,) * 3, 50, seed)).p_value[::3]
            for seed in range(4)
        ]
    )
    assert stats.kstest(p_values, "uniform").pvalue > 0.01


def test_the_odd_one_is_found_and_its_siblings_are_not_blamed():
    features, cells = screen_without_differences((0.8,) * 4, 60, seed=2)
    odd = np.arange(4, 80, 8)  # one guide of ten perturbations
    rng = np.random.default_rng(3)
    for guide in odd:
        features[cells.guide == guide] += 3 * rng.normal(size=N_FEATURES)
    found = compare(features, cells)
    flagged = np.flatnonzero(found.differs)
    assert set(odd) <= set(flagged)
    assert len(flagged) <= len(odd) + 2
    assert found.put_aside[odd].all()


def test_of_two_guides_both_are_flagged():
    features, cells = screen_without_differences((0.8,) * 2, 60, seed=4)
    features[cells.guide == 6] += np.arange(N_FEATURES)
    found = compare(features, cells)
    assert found.q_value[6] == found.q_value[7] < 0.01
    assert found.differs[[6, 7]].all()
    assert not found.put_aside.any()


def test_too_few_cells_are_not_tested():
    """Four cells, or 20 of a perturbation less one per guide, or no sibling."""
    guide = cells_of_guides([4, 40, 40, 9, 9, 3, 60, 0, 0], 100)
    features = np.random.default_rng(0).normal(size=(len(guide), N_FEATURES))
    found = compare(features, compared(guide, 9, 3))
    np.testing.assert_array_equal(np.isfinite(found.p_value), [False, True, True] + [False] * 6)
    assert np.isnan(found.agreement[[0, 3, 4, 5, 6, 7, 8]]).all()
