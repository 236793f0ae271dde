"""Masks: what they cost under both priors, and their straight-through draws."""

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from scipy.special import betaln, digamma, expit
from torch.distributions import Bernoulli, kl_divergence

from module.builders import make_module, make_tensors
from scvi_sams.module._masks import BernoulliMaskPrior, BetaBernoulliMaskPrior, MaskPosterior

LOGITS = torch.tensor([[-4.0, -1.0, -0.2, 0.0], [0.3, 1.0, 2.5, 5.0]])
PRIORS = pytest.mark.parametrize(
    "prior",
    [BernoulliMaskPrior(0.1), BetaBernoulliMaskPrior(0.3, 2.7), BetaBernoulliMaskPrior(1.0, 10.0)],
    ids=["bernoulli", "beta sparse", "beta"],
)


def make_posterior(logits, temperature=1.0):
    posterior = MaskPosterior(*logits.shape, temperature=temperature)
    with torch.no_grad():
        posterior.logits.copy_(logits)
    return posterior


# Bernoulli prior --------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1e-4, 0.1, 0.5, 0.95])
def test_bernoulli_divergence_by_torch(alpha):
    logits = LOGITS.double()
    expected = kl_divergence(
        Bernoulli(logits=logits), Bernoulli(probs=torch.tensor(alpha, dtype=torch.float64))
    )
    np.testing.assert_allclose(BernoulliMaskPrior(alpha).kl(logits), expected, rtol=1e-9)


def test_bernoulli_divergence_by_hand():
    kl = BernoulliMaskPrior(0.1).kl(torch.tensor([0.0, np.log(0.25 / 0.75), np.log(0.1 / 0.9)]))
    # q = 1/2: log(.5/.1)/2 + log(.5/.9)/2; q = 1/4: .25 log 2.5 + .75 log(.75/.9); q = alpha: 0
    assert kl[0].item() == pytest.approx(0.5108256, abs=1e-6)
    assert kl[1].item() == pytest.approx(0.25 * np.log(2.5) + 0.75 * np.log(5 / 6), abs=1e-6)
    assert kl[2].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("logit", "expected"), [(50.0, np.log(10)), (-50.0, -np.log(0.9))])
def test_a_certain_mask_costs_minus_log_of_its_prior(logit, expected):
    prior = BernoulliMaskPrior(0.1)
    assert prior.kl(torch.tensor(logit)).item() == pytest.approx(expected, rel=1e-6)
    mask = torch.tensor(float(logit > 0))
    estimate = prior.monte_carlo_kl(torch.tensor(logit), mask)
    assert estimate.item() == pytest.approx(expected, rel=1e-6)


# Beta prior -------------------------------------------------------------------------------------


def factorised_bound(on, a, b, posterior_a, posterior_b):
    """E_q[log q(m) q(pi) - log p(m | pi) p(pi)] for q(pi) = Beta(posterior_a, posterior_b)."""
    log_pi = digamma(posterior_a) - digamma(posterior_a + posterior_b)
    log_not_pi = digamma(posterior_b) - digamma(posterior_a + posterior_b)
    entropy = -on * np.log(on) - (1 - on) * np.log1p(-on)
    divergence = (
        betaln(a, b)
        - betaln(posterior_a, posterior_b)
        + (posterior_a - a) * log_pi
        + (posterior_b - b) * log_not_pi
    )
    return -entropy - on * log_pi - (1 - on) * log_not_pi + divergence


@pytest.mark.parametrize(("a", "b"), [(0.3, 2.7), (1.0, 10.0), (2.0, 2.0)])
@pytest.mark.parametrize("logit", [-4.0, -1.0, 0.0, 1.0, 5.0])
def test_beta_closed_form_is_the_best_factorised_bound(a, b, logit):
    """Nothing is learned about the probabilities: a numerical optimiser finds no better q(pi)."""
    on = expit(logit)
    best = optimize.minimize(
        lambda logs: factorised_bound(on, a, b, *np.exp(logs)), x0=[0.0, 0.0], tol=1e-12
    )
    actual = BetaBernoulliMaskPrior(a, b).kl(torch.tensor(logit, dtype=torch.float64)).item()
    assert actual == pytest.approx(best.fun, abs=1e-7)
    np.testing.assert_allclose(np.exp(best.x), [a + on, b + 1 - on], rtol=1e-3)
    assert actual < factorised_bound(on, a, b, a, b)


def test_beta_divergence_of_a_certain_mask_by_hand():
    """q(m = 1) = 1: minus the log of the prior mean a / (a + b)."""
    kl = BetaBernoulliMaskPrior(1.0, 4.0).kl(torch.tensor([60.0, -60.0], dtype=torch.float64))
    np.testing.assert_allclose(kl, [np.log(5), np.log(5 / 4)], rtol=1e-9)


def test_a_concentrated_beta_prior_is_a_bernoulli_prior():
    logits = LOGITS.double()
    expected = BernoulliMaskPrior(0.2).kl(logits)
    distances = [
        (BetaBernoulliMaskPrior(0.2 * c, 0.8 * c).kl(logits) - expected).abs().max().item()
        for c in (1.0, 10.0, 100.0, 1e4)
    ]
    assert distances[-1] < 1e-3
    assert np.all(np.diff(distances) < 0)


@pytest.mark.parametrize("concentration", [1.0, 100.0, 1e4, 1e6])
def test_beta_divergence_in_float32(concentration):
    """Log-gamma functions of large arguments cancel."""
    prior = BetaBernoulliMaskPrior(0.2 * concentration, 0.8 * concentration)
    np.testing.assert_allclose(prior.kl(LOGITS), prior.kl(LOGITS.double()), atol=1e-4)


@pytest.mark.parametrize("concentration", [0.1, 1e4])
def test_beta_estimate_is_finite_at_extreme_concentrations(concentration):
    """Draws of a sparse Beta underflow to 0."""
    torch.manual_seed(0)
    prior = BetaBernoulliMaskPrior(0.05 * concentration, 0.95 * concentration)
    posterior = make_posterior(LOGITS)
    masks = posterior.sample(torch.arange(2), 2000)
    estimate = prior.monte_carlo_kl(posterior.logits, masks)
    estimate.mean().backward()
    assert torch.isfinite(estimate).all()
    assert torch.isfinite(posterior.logits.grad).all()


# Both priors ------------------------------------------------------------------------------------


@PRIORS
def test_estimate_averages_to_the_closed_form(prior):
    torch.manual_seed(1)
    n = 40_000
    posterior = make_posterior(LOGITS.double())
    posterior.double()
    with torch.no_grad():
        masks = posterior.sample(torch.arange(2), n)
        estimate = prior.monte_carlo_kl(posterior.logits, masks)
        error = estimate.mean(0) - prior.kl(posterior.logits)
    assert estimate.shape == (n, 2, 4)
    assert (error.abs() < 5 * estimate.std(0) / np.sqrt(n)).all()


@PRIORS
def test_divergence_is_positive_and_grows_with_certainty(prior):
    kl = prior.kl(torch.linspace(0, 12, 30, dtype=torch.float64))
    assert (kl >= 0).all()
    assert (kl.diff() > 0).all()


@PRIORS
@pytest.mark.parametrize("logit", [-50.0, -16.0, 16.0, 50.0])
def test_extreme_logits_are_finite(prior, logit):
    logits = torch.full((1, 3), logit, requires_grad=True)
    posterior = make_posterior(logits.detach())
    torch.manual_seed(0)
    masks = posterior.sample(torch.tensor([0]), 5)
    for value in (prior.kl(logits), prior.monte_carlo_kl(logits, masks.detach())):
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()


@PRIORS
@pytest.mark.parametrize("logit", [-30.0, -18.0, -10.0, -1.0, 1.0, 10.0, 14.0, 18.0, 30.0])
def test_gradient_of_extreme_logits_is_not_lost(prior, logit):
    """A mask that is nearly certain must find its way back: float32 against float64."""
    gradients = []
    for dtype in (torch.float32, torch.float64):
        logits = torch.tensor([logit], dtype=dtype, requires_grad=True)
        prior.kl(logits).sum().backward()
        gradients.append(logits.grad.item())
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-2, abs=0)


# Draws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0])
def test_draws_are_zeros_and_ones_with_the_right_mean(temperature):
    torch.manual_seed(2)
    n = 20_000
    masks = make_posterior(LOGITS, temperature).sample(torch.arange(2), n).detach()
    assert torch.equal(masks, masks.round())
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    on = torch.sigmoid(LOGITS)
    error = (masks.mean(0) - on).abs()
    assert (error < 5 * (on * (1 - on) / n).sqrt()).all()


def test_draws_are_of_the_rows_asked_for_and_independent():
    logits = torch.tensor([[9.0, -9.0], [-9.0, 9.0], [0.0, 0.0]])
    torch.manual_seed(3)
    masks = make_posterior(logits).sample(torch.tensor([1, 2]), 4000).detach()
    assert masks.shape == (4000, 2, 2)
    np.testing.assert_allclose(masks[:, 0].mean(0), [0, 1], atol=0.01)
    both = (masks[:, 1, 0] * masks[:, 1, 1]).mean().item()
    assert both == pytest.approx(0.25, abs=5 * np.sqrt(0.25 * 0.75 / 4000))
    lagged = (masks[1:, 1, 0] * masks[:-1, 1, 0]).mean().item()
    assert lagged == pytest.approx(0.25, abs=0.04)


def test_certain_masks_never_flip():
    torch.manual_seed(0)
    masks = make_posterior(torch.tensor([[50.0, -50.0]])).sample(torch.tensor([0]), 1000)
    assert (masks[..., 0] == 1).all()
    assert (masks[..., 1] == 0).all()


def test_gradients_pass_straight_through():
    """E[d sigmoid(logit + noise) / d logit] at temperature 1, for logistic noise, by quadrature."""
    torch.manual_seed(5)
    n = 20_000
    posterior = make_posterior(torch.tensor([[0.0, 1.5, -3.0]]))
    posterior.sample(torch.tensor([0]), n).sum().backward()
    noise = stats.logistic.ppf((np.arange(100_000) + 0.5) / 100_000)
    soft = expit(noise[:, None] + [0.0, 1.5, -3.0])
    np.testing.assert_allclose(posterior.logits.grad[0] / n, (soft * (1 - soft)).mean(0), rtol=0.03)


@pytest.mark.parametrize("probability", [0.5, 0.9, 0.01])
def test_starting_probability(probability):
    posterior = MaskPosterior(4, 3, initial_probability=probability)
    np.testing.assert_allclose(posterior.inclusion_probability.detach(), probability, rtol=1e-5)


def test_the_concentration_is_that_of_the_prior_with_the_given_mean():
    """Beta(a, b) with a + b = 2.5 and mean 0.2."""
    prior = make_module(mask_prior_probability=0.2, mask_prior_concentration=2.5).mask_prior
    assert (prior.a, prior.b) == pytest.approx((0.5, 2.0))
    assert prior.log_odds == pytest.approx(np.log(0.2 / 0.8))


@pytest.mark.parametrize("estimate", ["kl", "monte_carlo_kl"])
def test_a_concentration_near_zero_costs_a_finite_price_of_the_same_type(estimate):
    """Probabilities of masks are then 0 or 1 up to rounding."""
    prior = BetaBernoulliMaskPrior(1e-3, 1e-3)
    logits = torch.tensor([[-60.0, 0.0, 60.0]])
    masks = torch.tensor([[[1.0, 1.0, 0.0]]])
    torch.manual_seed(0)
    cost = prior.kl(logits) if estimate == "kl" else prior.monte_carlo_kl(logits, masks)
    assert torch.isfinite(cost).all()
    assert cost.dtype == torch.float32


def test_one_posterior_predictive_draw_unless_more_are_asked_for():
    module, tensors = make_module(), make_tensors()
    assert module.sample(tensors).shape == (1, *tensors["X"].shape)
