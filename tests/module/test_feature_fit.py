"""The prior given features: a fixed point of its equations, and weights that were simulated."""

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from scvi_sams.module._feature_fit import (
    Estimates,
    Prior,
    Weights,
    fit_weights,
    held_out_prior,
    log_evidence,
    prior_of,
)

LOG_ODDS, BETA2 = -1.0, 4.0


def simulated(n_perturbations=150, noise=0.05, seed=0, scale=1.0):
    """Estimates of two dimensions: features tell of masks and effects of the first one only."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n_perturbations, 3))
    features[:, -1] = 1
    of_masks = np.array([[2.5, 0], [0, 0], [0.5, 0.5]])
    of_effects = np.array([[0, 0], [1.8, 0], [0, 0]])
    masks = rng.uniform(size=(n_perturbations, 2)) < expit(LOG_ODDS + features @ of_masks * scale)
    sd = np.array([0.6, 2.0])
    effects = features @ of_effects * scale + sd * rng.normal(size=masks.shape)
    variance = np.full(masks.shape, noise)
    estimates = masks * effects + np.sqrt(noise) * rng.normal(size=masks.shape)
    return features, Estimates(estimates, variance), of_masks, of_effects


def log_factor(effects, noise, mean, variance):
    """Log density if the mask is on, less that if it is off."""
    on = norm.logpdf(effects, mean, np.sqrt(noise + variance))
    return on - norm.logpdf(effects, 0, np.sqrt(noise))


def test_weights_that_were_simulated_are_recovered():
    features, estimates, of_masks, of_effects = simulated(600)
    found = fit_weights(features, estimates, LOG_ODDS, BETA2)
    # Within three posterior standard deviations, but for what shrinkage takes.
    for means, covariances, truth in (
        (found.masks, found.covariance_of_masks, of_masks),
        (found.effects, found.covariance_of_effects, of_effects),
    ):
        sd = np.sqrt(np.diagonal(covariances, axis1=1, axis2=2)).T
        assert (np.abs(means - truth) < 3 * sd + 0.2 * np.abs(truth)).all()
    assert found.effects[1, 0] > 1.6 > 0.3 > np.abs(np.delete(found.effects.ravel(), 2)).max()
    assert found.masks[0, 0] > 2.0 > 0.4 > np.abs(found.masks[1]).max()
    # Effects around what features say: sd .6 and 2 of a prior of 2, in about as many entries.
    on = [expit(LOG_ODDS + features @ of_masks)[:, place].sum() for place in (0, 1)]
    expected = (on[0] * 0.36 + on[1] * 4.0) / sum(on) / BETA2
    assert found.unexplained == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("dimension", [0, 1])
def test_the_fit_is_a_fixed_point_of_its_equations(dimension):
    features, estimates, *_ = simulated(40, noise=0.3, seed=2)
    found = fit_weights(features, estimates, LOG_ODDS, BETA2, n_steps=3000)
    effects, noise = (part[:, dimension] for part in estimates)
    unexplained = found.unexplained * BETA2
    squared = []  # second moments of weights, mean over both dimensions
    for means, covariances in (
        (found.masks, found.covariance_of_masks),
        (found.effects, found.covariance_of_effects),
    ):
        own = np.square(means) + np.diagonal(covariances, axis1=1, axis2=2).T
        squared.append((own[:, dimension] + own.mean(axis=1)) / 2)
    spread = [
        np.array([phi @ covariances[dimension] @ phi for phi in features])
        for covariances in (found.covariance_of_masks, found.covariance_of_effects)
    ]
    prior_logit = LOG_ODDS + features @ found.masks[:, dimension]
    mean = features @ found.effects[:, dimension]
    on = expit(prior_logit + log_factor(effects, noise, mean, unexplained + spread[1]))

    precision = np.diag(1 / squared[1])
    target = np.zeros(3)
    for phi, probability, effect, error in zip(features, on, effects, noise, strict=True):
        weight = probability / (error + unexplained)
        precision += weight * np.outer(phi, phi)
        target += weight * effect * phi
    np.testing.assert_allclose(
        found.covariance_of_effects[dimension], np.linalg.inv(precision), rtol=1e-3, atol=1e-6
    )
    np.testing.assert_allclose(
        found.effects[:, dimension], np.linalg.solve(precision, target), rtol=1e-3, atol=1e-4
    )

    xi = np.sqrt(prior_logit**2 + spread[0])
    precision, target = np.diag(1 / squared[0]), np.zeros(3)
    for phi, probability, width in zip(features, on, xi, strict=True):
        curvature = np.tanh(width / 2) / (2 * width)
        precision += curvature * np.outer(phi, phi)
        target += (probability - 0.5 - curvature * LOG_ODDS) * phi
    np.testing.assert_allclose(
        found.covariance_of_masks[dimension], np.linalg.inv(precision), rtol=1e-3, atol=1e-6
    )
    np.testing.assert_allclose(
        found.masks[:, dimension], np.linalg.solve(precision, target), rtol=1e-3, atol=1e-4
    )


def test_a_dimension_without_effects_learns_no_weights():
    features, estimates, *_ = simulated(120, noise=0.01)
    effects = estimates.effects * [1, 0]
    found = fit_weights(features, Estimates(effects, estimates.variance), LOG_ODDS, BETA2)
    alone = fit_weights(features, Estimates(*(part[:, :1] for part in estimates)), LOG_ODDS, BETA2)
    assert not found.masks[:, 1].any()
    assert not found.effects[:, 1].any()
    assert not found.covariance_of_effects[1].any()
    np.testing.assert_allclose(found.effects[:, 0], alone.effects[:, 0], rtol=1e-10)
    assert found.unexplained == pytest.approx(alone.unexplained)
    nothing = fit_weights(features, Estimates(0 * effects, estimates.variance), LOG_ODDS, BETA2)
    assert nothing.unexplained == 1
    assert not nothing.masks.any()


def test_features_that_say_nothing_shrink_to_the_prior_without_them():
    features, estimates, *_ = simulated(400, scale=0.0)
    rng = np.random.default_rng(5)
    masks = rng.uniform(size=(400, 2)) < expit(LOG_ODDS)
    effects = masks * rng.normal(scale=2, size=masks.shape)
    effects += np.sqrt(0.05) * rng.normal(size=masks.shape)
    found = fit_weights(features, Estimates(effects, estimates.variance), LOG_ODDS, BETA2)
    prior = prior_of(features, found, LOG_ODDS, BETA2)
    assert np.abs(prior.log_odds - LOG_ODDS).mean() < 0.2
    assert np.abs(prior.mean).mean() < 0.2
    np.testing.assert_allclose(prior.variance, BETA2, rtol=0.2)


def test_prior_without_weights_is_the_one_without_features():
    features = np.random.default_rng(0).normal(size=(7, 4))
    prior = prior_of(features, Weights.nothing(4, 2), LOG_ODDS, BETA2)
    assert (prior.log_odds == LOG_ODDS).all()
    assert (prior.mean == 0).all()
    assert (prior.variance == BETA2).all()


def test_prior_averages_over_what_is_not_known_of_weights():
    rng = np.random.default_rng(3)
    n_features, n_latent = 2, 3
    roots = rng.normal(scale=0.5, size=(2, n_latent, n_features, n_features))
    covariances = roots @ roots.transpose(0, 1, 3, 2)
    means = rng.normal(size=(2, n_features, n_latent))
    weights = Weights(means[0], covariances[0], means[1], covariances[1], 0.4)
    features = rng.normal(size=(4, n_features))
    prior = prior_of(features, weights, LOG_ODDS, BETA2)
    n_samples = 200_000
    for latent in range(n_latent):
        u = rng.multivariate_normal(means[0][:, latent], covariances[0][latent], n_samples)
        chance = expit(LOG_ODDS + features @ u.T).mean(axis=1)
        # MacKay's formula is approximate.
        np.testing.assert_allclose(expit(prior.log_odds[:, latent]), chance, atol=0.02)
        w = rng.multivariate_normal(means[1][:, latent], covariances[1][latent], n_samples)
        effects = features @ w.T
        np.testing.assert_allclose(prior.mean[:, latent], effects.mean(axis=1), atol=0.03)
        expected = 0.4 * BETA2 + effects.var(axis=1)
        np.testing.assert_allclose(prior.variance[:, latent], expected, rtol=0.03)


def test_log_evidence_is_that_of_the_mixture():
    rng = np.random.default_rng(1)
    effects, noise = rng.normal(size=(5, 2)), rng.uniform(0.1, 1, size=(5, 2))
    prior = Prior(rng.normal(size=(5, 2)), rng.normal(size=(5, 2)), rng.uniform(1, 3, size=(5, 2)))
    chance = expit(prior.log_odds)
    off = norm.pdf(effects, 0, np.sqrt(noise))
    on = norm.pdf(effects, prior.mean, np.sqrt(noise + prior.variance))
    expected = np.log((1 - chance) * off + chance * on) - np.log(off)
    found = log_evidence(Estimates(effects, noise), prior)
    np.testing.assert_allclose(found, expected.sum(axis=1))


def test_held_out_priors_do_not_know_their_own_perturbation():
    features, estimates, *_ = simulated(60)
    folds = np.arange(60) % 5
    prior = held_out_prior(features, estimates, LOG_ODDS, BETA2, folds)
    changed = estimates.effects.copy()
    changed[folds == 2] = 17.0
    other = held_out_prior(features, Estimates(changed, estimates.variance), LOG_ODDS, BETA2, folds)
    for one, two in zip(prior, other, strict=True):
        np.testing.assert_array_equal(one[folds == 2], two[folds == 2])
        assert (one[folds != 2] != two[folds != 2]).all(axis=1).any()
    without = Prior(*(np.full((60, 2), value) for value in (LOG_ODDS, 0.0, BETA2)))
    gain = log_evidence(estimates, prior) - log_evidence(estimates, without)
    assert gain.mean() > 2 * gain.std() / np.sqrt(60)
