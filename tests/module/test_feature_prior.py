"""Prior of masks and effects given features: when it is learned, and what is charged by it."""

import copy

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from module.builders import make_module
from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.module._feature_fit import Weights, prior_of
from scvi_sams.module._feature_prior import FeaturePrior

LOG_ODDS, SCALE = -2.197, 2.0
PRIOR = {"log_odds": LOG_ODDS, "scale": SCALE}
N_MEASURED, N_UNMEASURED, N_LATENT = 5, 2, 3


def simulated(n_perturbations, n_unused=0, share=0.0, seed=0):
    """Features of perturbations, and estimates of effects of which they explain a share."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n_perturbations + 2, 2))
    explained = features[:n_perturbations] @ rng.normal(size=(2, 6)) / np.sqrt(2)
    masks = rng.uniform(size=explained.shape) < 0.1 + 0.8 * share * (explained > 1)
    masks[:, 6 - n_unused :] = False
    effects = np.sqrt(share) * explained + np.sqrt(1 - share) * rng.normal(size=masks.shape)
    estimates = masks * SCALE * effects + 0.1 * rng.normal(size=masks.shape)
    return features, torch.tensor(estimates), torch.full(masks.shape, 0.01, dtype=torch.float64)


def fitted(features, effects, variance, codes=None):
    codes = torch.arange(len(effects)) if codes is None else codes
    n_perturbations = len(features) - 2
    prior = FeaturePrior(features, n_perturbations=n_perturbations, n_latent=6, **PRIOR)
    prior.fit(effects[codes], variance[codes], codes)
    return prior


def assert_says_nothing(prior):
    assert prior.unexplained == 1
    for table in (prior.of_measured, prior.held_out):
        np.testing.assert_array_equal(table[0], np.float32(LOG_ODDS))
        assert not table[1].any()
        assert (table[2] == SCALE**2).all()
    found = prior.of(torch.arange(len(prior.features)))
    np.testing.assert_array_equal(found.log_odds, np.float32(LOG_ODDS))
    assert not found.mean.any()
    assert (found.variance == SCALE**2).all()


# A large screen shows that there are no effects on unused dimensions, which no feature tells.
@pytest.mark.parametrize(("n_perturbations", "n_unused"), [(60, 0), (600, 0), (600, 3)])
def test_features_that_say_nothing_leave_the_prior_as_it_is(n_perturbations, n_unused):
    prior = fitted(*simulated(n_perturbations, n_unused))
    assert prior.is_fitted
    assert_says_nothing(prior)


def test_fewer_than_ten_perturbations_say_nothing():
    features, effects, variance = simulated(9, share=0.9)
    prior = fitted(features, effects, variance)
    assert not prior.is_fitted
    assert_says_nothing(prior)


def test_features_that_tell_of_effects_are_learned_from():
    features, effects, variance = simulated(300, share=0.9)
    prior = fitted(features, effects, variance)
    assert prior.unexplained < 0.6
    on = effects.abs() > 1
    chance = torch.sigmoid(prior.held_out[0])
    assert chance[on].mean() > 2 * chance[~on].mean()
    error = (effects - prior.held_out[1])[on]
    assert error.square().mean() < 0.6 * effects[on].square().mean()
    # Measured perturbations are charged by their own prior, which weights give for any.
    every = torch.arange(300)
    for measured, found in zip(prior.measured(every), prior.of(every), strict=True):
        torch.testing.assert_close(measured, found, rtol=1e-4, atol=1e-5)


def test_perturbations_without_an_estimate_have_a_prior_by_their_features():
    features, effects, variance = simulated(300, share=0.9)
    codes = torch.arange(0, 300, 2)
    prior = fitted(features, effects, variance, codes)
    assert (prior.held_out[:, 1::2] == prior.held_out[:, 1:2, :1]).all()
    on = effects[1::2].abs() > 1
    chance = torch.sigmoid(prior.of_measured[0, 1::2])
    assert chance[on].mean() > 2 * chance[~on].mean()


def test_a_fit_with_nothing_but_zeros_as_estimates_is_finite():
    features, effects, variance = simulated(60)
    assert_says_nothing(fitted(features, 0 * effects, variance))


def random_prior(seed=0, n_features=2):
    """Prior with weights that are random numbers, of a small module's size."""
    rng = np.random.default_rng(seed)
    n_rows = N_MEASURED + N_UNMEASURED
    features = rng.normal(size=(n_rows, n_features))
    prior = FeaturePrior(features, n_perturbations=N_MEASURED, n_latent=N_LATENT, **PRIOR)
    fill_randomly(prior, rng)
    return prior


def fill_randomly(prior, rng):
    with torch.no_grad():
        n_weights = prior.features.shape[1]
        for name in ("mask", "effect"):
            shape = (n_weights, N_LATENT)
            getattr(prior, f"{name}_weights").copy_(torch.tensor(rng.normal(size=shape)))
            roots = rng.normal(scale=0.3, size=(N_LATENT, n_weights, n_weights))
            covariance = roots @ roots.transpose(0, 2, 1)
            getattr(prior, f"{name}_covariance").copy_(torch.tensor(covariance))
        prior.unexplained.fill_(0.3)
        prior.of_measured.copy_(torch.stack(prior.of(torch.arange(N_MEASURED))))


def test_prior_of_unmeasured_perturbations_is_that_of_their_features():
    prior = random_prior()
    weights = Weights(
        prior.mask_weights.numpy(),
        prior.mask_covariance.numpy(),
        prior.effect_weights.numpy(),
        prior.effect_covariance.numpy(),
        0.3,
    )
    found = prior.of(torch.tensor([6, 5]))
    expected = prior_of(prior.features[[6, 5]].numpy(), weights, LOG_ODDS, SCALE**2)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_moments_are_those_of_masked_effects():
    prior = random_prior().of(torch.tensor([5]))
    mean, second = prior.moments()
    generator = np.random.default_rng(0)
    n_samples = 400_000
    chance = torch.sigmoid(prior.log_odds).numpy()
    masks = generator.uniform(size=(n_samples, N_LATENT)) < chance
    noise = generator.normal(size=(n_samples, N_LATENT))
    effects = masks * (prior.mean.numpy() + prior.variance.sqrt().numpy() * noise)
    np.testing.assert_allclose(mean[0], effects.mean(axis=0), atol=0.02)
    np.testing.assert_allclose(second[0], np.square(effects).mean(axis=0), rtol=0.02)


def test_permuted_dimensions_have_the_prior_of_where_they_were():
    prior = random_prior()
    before = prior.of(torch.arange(7))
    measured = copy.deepcopy(prior.of_measured)
    order, signs = torch.tensor([2, 0, 1]), torch.tensor([1.0, -1.0, -1.0])
    prior.permute(order, signs)
    after = prior.of(torch.arange(7))
    torch.testing.assert_close(after.log_odds, before.log_odds[:, order])
    torch.testing.assert_close(after.mean, before.mean[:, order] * signs)
    torch.testing.assert_close(after.variance, before.variance[:, order])
    torch.testing.assert_close(prior.of_measured[0], measured[0][:, order])
    torch.testing.assert_close(prior.of_measured[1], measured[1][:, order] * signs)
    torch.testing.assert_close(prior.of_measured[2], measured[2][:, order])


def module_with_features(**changes):
    rng = np.random.default_rng(1)
    features = rng.normal(size=(N_MEASURED + N_UNMEASURED, 2))
    module = make_module(features=features, **({"correlated_effects": False} | changes))
    fill_randomly(module.features, rng)
    return module.eval()


def test_divergences_are_from_the_prior_given_features():
    module = module_with_features()
    rows = torch.tensor([3, 0, 4])
    torch.manual_seed(0)
    found = module.global_posterior(rows, 2).kl
    prior = module.features.measured(rows)
    posterior = Normal(module.effects.loc[rows], module.effects.log_scale[rows].exp())
    effects = kl_divergence(posterior, Normal(prior.mean, prior.variance.sqrt())).sum(dim=1)
    torch.testing.assert_close(found["effects"].mean(dim=0), effects, rtol=1e-4, atol=1e-4)
    on = Bernoulli(logits=module.masks.logits[rows])
    masks = kl_divergence(on, Bernoulli(logits=prior.log_odds)).sum(dim=1)
    torch.testing.assert_close(found["masks"].mean(dim=0), masks, rtol=1e-4, atol=1e-4)


def test_estimated_divergences_have_that_expectation():
    module = module_with_features(kl_estimator="monte_carlo")
    rows = torch.arange(5)
    torch.manual_seed(0)
    with torch.no_grad():
        found = module.global_posterior(rows, 20_000).kl
        module.kl_estimator = "closed_form"
        exact = module.global_posterior(rows, 1).kl
    for name, values in found.items():
        error = values.std(dim=0) / len(values) ** 0.5
        assert ((values.mean(dim=0) - exact[name].mean(dim=0)).abs() < 5 * error + 1e-4).all()


@pytest.mark.parametrize("correlated_effects", [False, True])
def test_a_prior_that_says_nothing_charges_as_none_does(correlated_effects):
    features = np.random.default_rng(1).normal(size=(7, 2))
    same = {"correlated_effects": correlated_effects}
    plain, given = make_module(**same), make_module(features=features, **same)
    given.load_state_dict(plain.state_dict(), strict=False)
    draws = []
    for module in (plain, given):
        torch.manual_seed(0)
        draws.append(module.train().global_posterior(torch.arange(5), 3))
    torch.testing.assert_close(draws[0].shifts, draws[1].shifts)
    for name, values in draws[0].kl.items():
        torch.testing.assert_close(values, draws[1].kl[name])


def test_samples_of_unmeasured_perturbations_are_of_the_prior():
    module = module_with_features()
    module.masks.is_excluded[1] = True
    rows = torch.tensor([1, 5, 6])
    with torch.no_grad():
        torch.manual_seed(0)
        draw = module.global_posterior(rows, 40_000)
        mean, sd = module.shift_moments(rows)
    error = draw.shifts.std(dim=0) / 40_000**0.5
    assert ((draw.shifts.mean(dim=0) - mean).abs() < 5 * error + 1e-4).all()
    torch.testing.assert_close(draw.shifts.std(dim=0), sd, rtol=0.05, atol=1e-3)
    first, second = module.features.of(rows[1:]).moments()
    kept = torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(mean[1:], first * kept)
    torch.testing.assert_close(sd[1:], (second - first.square()).sqrt() * kept)
    assert not draw.shifts[:, 1:, 1].any()
    # What is drawn has no posterior to be charged for.
    assert all(not values[:, 1:].any() for values in draw.kl.values())
    chance = module.chance_of_effect(rows)
    torch.testing.assert_close(chance[0], module.masks.inclusion_probability[1])
    expected = torch.sigmoid(module.features.of(rows[1:]).log_odds) * kept
    torch.testing.assert_close(chance[1:], expected)


def test_an_effect_that_is_all_but_certain_has_a_standard_deviation():
    module = module_with_features()
    module.features.effect_weights.fill_(3000.0)
    module.features.effect_covariance.zero_()
    module.features.mask_weights.fill_(0.0)
    module.features.mask_weights[-1] = 40.0
    _, sd = module.shift_moments(torch.tensor([5, 6]))
    assert torch.isfinite(sd).all()


def test_priors_of_masks_that_have_their_own_probability_cannot_have_features():
    features = np.zeros((7, 1))
    with pytest.raises(InvalidArgumentError, match="mask_prior_concentration"):
        make_module(features=features, mask_prior_concentration=2.0)
