"""Shrunken effects and variances against closed forms and simulated truth."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import digamma, polygamma

from scvi_sams._shrinkage import (
    NormalMixture,
    _certainty,
    _inverse_trigamma,
    _prior_of_variances,
    moderated_variance,
    shrink_entries,
    shrink_rows,
)
from scvi_sams.exceptions import InvalidArgumentError


def sparse_effects(n_rows=20, n_genes=400, share=0.1, scale=2.0, seed=0):
    """True effects, mostly 0, estimates and errors that differ between genes."""
    rng = np.random.default_rng(seed)
    error = np.exp(rng.normal(0, 0.5, (n_rows, n_genes)))
    is_effect = rng.random((n_rows, n_genes)) < share
    truth = np.where(is_effect, scale * rng.normal(size=(n_rows, n_genes)), 0)
    return truth, truth + error * rng.normal(size=truth.shape), error


def rmse(estimate, truth):
    return np.sqrt(np.mean((estimate - truth) ** 2))


def test_a_row_is_scaled_by_what_errors_leave_of_its_size():
    effect = np.array([[3.0, 4, 0], [1, 1, 1], [0, 0, 0]])
    error = np.array([[1.0, 2, 0], [1, 1, 2], [1, 1, 1]])
    # 1 - (1 + 4) / 25 = .8; errors larger than effects; no effect at all.
    expected = [[2.4, 3.2, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_allclose(shrink_rows(effect, error), expected)


def test_genes_of_unknown_error_do_not_scale_a_row():
    effect, error = np.array([[3.0, 4, 9, np.nan]]), np.array([[1.0, 2, np.nan, 1]])
    np.testing.assert_allclose(shrink_rows(effect, error), [[2.4, 3.2, 0, 0]])


@pytest.mark.parametrize("weights", ["row", "pooled"])
def test_one_scale_is_the_normal_posterior(weights):
    effect, error = np.array([[1.0, -3, 0], [4, 0.5, 2]]), np.array([[1.0, 2, 1], [0.5, 1, 3]])
    kept = 4 / (4 + error**2)
    shrunken = shrink_entries(effect, error, weights=weights, scales=[2])
    np.testing.assert_allclose(shrunken.mean, kept * effect)
    np.testing.assert_allclose(shrunken.sd, np.sqrt(kept) * error)
    np.testing.assert_allclose(
        shrunken.lfsr, stats.norm.cdf(-np.abs(kept * effect) / (np.sqrt(kept) * error))
    )
    np.testing.assert_array_equal(shrunken.null, 0)


def test_posterior_of_a_spike_and_a_slab_by_bayes_rule():
    prior = NormalMixture(np.array([0.0, 2]), np.array([0.7, 0.3]))
    effect, error = np.array([[0.3, -2.5]]), np.array([[0.8, 1.0]])
    spike = 0.7 * stats.norm.pdf(effect, 0, error)
    slab = 0.3 * stats.norm.pdf(effect, 0, np.hypot(2, error))
    null, kept = spike / (spike + slab), 4 / (4 + error**2)
    posterior = prior.posterior(effect, error)
    np.testing.assert_allclose(posterior.null, null)
    np.testing.assert_allclose(posterior.mean, (1 - null) * kept * effect)
    second = (1 - null) * ((kept * effect) ** 2 + kept * error**2)
    np.testing.assert_allclose(posterior.sd, np.sqrt(second - posterior.mean**2))
    wrong = stats.norm.cdf(-np.abs(kept * effect) / (np.sqrt(kept) * error))
    np.testing.assert_allclose(posterior.lfsr, null + (1 - null) * wrong)


def test_what_is_not_known_stays_at_the_prior_and_what_has_no_error_stays():
    prior = NormalMixture(np.array([0.0, 2]), np.array([0.75, 0.25]))
    effect = np.array([9.0, np.nan, 1.5, 0.0, 1e6])
    posterior = prior.posterior(effect, np.array([np.nan, 1, 0, 0, np.inf]))
    np.testing.assert_allclose(posterior.mean, [0, 0, 1.5, 0, 0])
    np.testing.assert_allclose(posterior.sd, [1, 1, 0, 0, 1])  # sqrt(.25 * 4)
    np.testing.assert_allclose(posterior.null, [0.75, 0.75, 0, 1, 0.75])
    np.testing.assert_allclose(posterior.lfsr, [0.875, 0.875, 0, 1, 0.875])


def test_weights_are_those_of_highest_likelihood():
    _, effect, error = sparse_effects(50, 800, share=0.3)
    mixture = NormalMixture.fit(effect, error, scales=[0, 2])
    np.testing.assert_allclose(mixture.weights, [0.7, 0.3], atol=0.02)
    shares = np.linspace(0.01, 0.99, 981)
    spike = stats.norm.pdf(effect, 0, error).ravel()[:, None]
    slab = stats.norm.pdf(effect, 0, np.hypot(2, error)).ravel()[:, None]
    exact = shares[np.argmax(np.log((1 - shares) * spike + shares * slab).sum(axis=0))]
    assert mixture.weights[1] == pytest.approx(exact, abs=0.002)


@pytest.mark.parametrize("weights", ["row", "pooled"])
def test_sparse_truth_is_estimated_better_than_by_what_was_seen(weights):
    truth, effect, error = sparse_effects()
    shrunken = shrink_entries(effect, error, weights=weights)
    # The best that anyone can do who knows the prior.
    oracle = NormalMixture(np.array([0.0, 2]), np.array([0.9, 0.1])).posterior(effect, error)
    assert rmse(shrunken.mean, truth) == pytest.approx(rmse(oracle.mean, truth), rel=0.03)
    assert rmse(shrunken.mean, truth) < 0.5 * rmse(effect, truth)
    assert rmse(shrunken.mean, truth) < 0.9 * rmse(shrink_rows(effect, error), truth)
    np.testing.assert_allclose(
        np.sqrt(np.mean(shrunken.sd**2)), rmse(shrunken.mean, truth), rtol=0.1
    )


def test_the_sign_rate_is_the_share_of_wrong_signs():
    truth, effect, error = sparse_effects(100, 1000, seed=1)
    shrunken = shrink_entries(effect, error, weights="pooled")
    for low, high in ((0, 0.05), (0.05, 0.3)):
        called = (shrunken.lfsr >= low) & (shrunken.lfsr < high)
        wrong = np.sign(shrunken.mean[called]) != np.sign(truth[called])
        assert wrong.mean() == pytest.approx(shrunken.lfsr[called].mean(), abs=0.03)


def test_few_genes_that_tell_0_from_small_effects_badly_are_taken_for_0():
    truth, effect, error = sparse_effects(200, 70, share=0.05, seed=2)
    shrunken = shrink_entries(effect, error)
    wrong = np.sign(shrunken.mean) != np.sign(truth)
    assert wrong[shrunken.lfsr < 0.05].mean() < 0.06
    doubtful = (shrunken.lfsr > 0.05) & (shrunken.lfsr < 0.3)
    assert wrong[doubtful].mean() < 0.35
    assert shrunken.null.mean() == pytest.approx(0.95, abs=0.03)


def test_rows_without_effects_shrink_to_nothing():
    _, effect, error = sparse_effects(40, 400, share=0)
    shrunken = shrink_entries(effect, error)
    assert np.median(np.abs(shrunken.mean).max(axis=1)) < 0.1 * np.abs(effect).max(axis=1).mean()
    assert rmse(shrunken.mean, 0) < 0.1 * rmse(effect, 0)
    assert rmse(shrink_rows(effect, error), 0) < 0.15 * rmse(effect, 0)


def test_rows_have_weights_of_their_own_unless_pooled():
    _, null, error = sparse_effects(1, 400, share=0)
    _, strong, other = sparse_effects(1, 400, share=0.8, scale=5)
    effect, error = np.vstack([null, strong]), np.vstack([error, other])
    by_row, pooled = (shrink_entries(effect, error, weights=w) for w in ("row", "pooled"))
    np.testing.assert_allclose(by_row.mean[:1], shrink_entries(null, error[:1]).mean)
    assert np.abs(by_row.mean[0]).sum() < 0.5 * np.abs(pooled.mean[0]).sum()


def test_units_do_not_matter():
    _, effect, error = sparse_effects(3, 200)
    shrunken = shrink_entries(effect, error)
    scaled = shrink_entries(1e-3 * effect, 1e-3 * error)
    np.testing.assert_allclose(scaled.mean, 1e-3 * shrunken.mean, atol=2e-5)
    np.testing.assert_allclose(scaled.lfsr, shrunken.lfsr, atol=0.02)


@pytest.mark.parametrize("weights", ["row", "pooled"])
def test_rows_of_which_nothing_is_known_are_zero(weights):
    shrunken = shrink_entries(np.ones((1, 3)), np.full((1, 3), np.nan), weights=weights)
    for table, expected in zip(shrunken, (0, 0, 1, 1), strict=True):
        np.testing.assert_array_equal(table, expected)


def test_invalid_effects_raise_an_error():
    ones = np.ones((2, 3))
    for function in (shrink_rows, shrink_entries):
        with pytest.raises(InvalidArgumentError, match="shape"):
            function(ones, np.ones((3, 2)))
        with pytest.raises(InvalidArgumentError, match="negative"):
            function(ones, -ones)
        with pytest.raises(InvalidArgumentError, match="numbers"):
            function(ones, "ones")
    with pytest.raises(InvalidArgumentError, match="weights"):
        shrink_entries(ones, ones, weights="genes")


@pytest.mark.parametrize("value", [1e-6, 0.01, 0.5, 3, 1e4])
def test_trigamma_is_inverted(value):
    assert polygamma(1, _inverse_trigamma(value)) == pytest.approx(value, rel=1e-6)


def prior_of(seen, n_cells, control, n_controls, kurtosis=0.0):
    kurtosis = np.broadcast_to(kurtosis, control.shape)
    _, bias, error = _certainty(n_cells, kurtosis)
    _, control_bias, control_error = _certainty(n_controls, kurtosis)
    known = (seen > 0) & (control > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(seen / control) - bias + control_bias
    return _prior_of_variances(ratio[known], (error + control_error)[known])


@pytest.mark.parametrize(("n_cells", "prior_freedom"), [(10, 4), (30, 10), (5, 8)])
def test_the_prior_of_variances_is_recovered(n_cells, prior_freedom):
    rng = np.random.default_rng(n_cells)
    n_genes, n_controls, scale = 4000, 101, 1.7
    true_control = np.exp(rng.normal(size=n_genes))
    # A perturbation's variance is scaled inverse chi-square around that of the controls.
    true = scale * true_control * prior_freedom / rng.chisquare(prior_freedom, n_genes)
    seen = true * rng.chisquare(n_cells - 1, n_genes) / (n_cells - 1)
    control = true_control * rng.chisquare(n_controls - 1, n_genes) / (n_controls - 1)
    found_scale, found = prior_of(seen, n_cells, control, n_controls)
    assert found == pytest.approx(prior_freedom, rel=0.12)
    assert found_scale == pytest.approx(scale, rel=0.05)
    moderated = moderated_variance(seen[None], np.array([n_cells]), control, n_controls)[0]
    off = [np.mean(np.log(v / true) ** 2) for v in (moderated, seen, found_scale * control)]
    assert off[0] < min(off[1:])


def test_without_kurtosis_the_prior_is_that_of_smyth():
    rng = np.random.default_rng(1)
    seen, control = np.exp(rng.normal(size=(2, 50)))
    ratio = np.log(seen / control)
    spread = np.var(ratio, ddof=1) - polygamma(1, 9 / 2) - polygamma(1, 99 / 2)
    freedom = 2 * _inverse_trigamma(spread)
    bias = digamma(9 / 2) - np.log(9 / 2) - digamma(99 / 2) + np.log(99 / 2)
    bias -= digamma(freedom / 2) - np.log(freedom / 2)
    found = prior_of(seen, 10, control, 100)
    np.testing.assert_allclose(found, [np.exp(ratio.mean() - bias), freedom])


def test_unsteady_variances_of_rare_genes_are_no_differences_between_genes():
    rng = np.random.default_rng(0)
    n_cells, n_controls, n_genes = 20, 2000, 1000
    mean = np.exp(rng.normal(-1, 1.5, n_genes))
    cells, controls = (rng.poisson(mean, (n, n_genes)) for n in (n_cells, n_controls))
    seen, control = cells.var(axis=0, ddof=1), controls.var(axis=0, ddof=1)
    kurtosis = stats.kurtosis(controls)
    # Nothing differs between the two, so that the variance to believe is that of the controls.
    scale, freedom = prior_of(seen, n_cells, control, n_controls, kurtosis)
    assert freedom > 100
    assert scale == pytest.approx(1, abs=0.1)
    assert prior_of(seen, n_cells, control, n_controls)[1] < 20
    moderated = moderated_variance(seen[None], np.array([n_cells]), control, n_controls, kurtosis)
    assert rmse(moderated, mean) < 0.25 * rmse(seen, mean)


def test_variances_are_mixed_by_degrees_of_freedom():
    rng = np.random.default_rng(3)
    control = np.exp(rng.normal(size=200))
    kurtosis = rng.uniform(-1, 3, 200)
    seen = control * rng.chisquare(4, 200) / 4 * np.exp(rng.normal(0, 1, 200))
    counted = np.maximum(kurtosis, 0)
    scale, prior_freedom = prior_of(seen, 10, control, 500, counted)
    freedom = 2 / (2 / 9 + counted / 10)
    expected = (prior_freedom * scale * control + freedom * seen) / (prior_freedom + freedom)
    moderated = moderated_variance(seen[None], np.array([10]), control, 500, kurtosis)
    np.testing.assert_allclose(moderated[0], expected)


def test_single_cells_have_the_variance_of_the_controls_and_odd_genes_their_own():
    control = np.array([1.0, 4, 0, 2, 3])
    seen = np.array([[np.nan] * 5, [2.0, 9, 5, 0, 3]])
    moderated = moderated_variance(seen, np.array([1, 6]), control, 50)
    np.testing.assert_array_equal(moderated[0], [1, 4, np.nan, 2, 3])
    assert moderated[1, 2] == 5
    scale, prior_freedom = prior_of(seen[1], 6, control, 50)
    assert moderated[1, 3] == pytest.approx(scale * 2 / (1 + 5 / prior_freedom))


def test_an_outlier_does_not_stop_the_search_for_weights():
    _, effect, error = sparse_effects(1, 300, share=0)
    effect[0, 0], error[0, 0] = 30, 0.3
    shrunken = shrink_entries(effect, error)
    assert shrunken.mean[0, 0] == pytest.approx(30, rel=0.01)
    assert np.abs(shrunken.mean[0, 1:]).max() < 0.2 * np.abs(effect[0, 1:]).max()
