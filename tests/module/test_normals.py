"""Divergences of normal posteriors, against those of torch.distributions."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from scvi_sams.module._networks import divergence_from_prior, draw_particles, log_ratio_to_prior

SCALES = [1.0, 2.0, 0.3]


@pytest.fixture
def posterior():
    generator = torch.Generator().manual_seed(0)
    loc = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    return Normal(loc, torch.rand(3, 4, 5, generator=generator, dtype=torch.float64) + 0.1)


@pytest.mark.parametrize("scale", SCALES)
def test_divergences_are_those_of_torch(posterior, scale):
    expected = kl_divergence(posterior, Normal(torch.zeros(5).double(), scale)).sum(-1)
    torch.testing.assert_close(divergence_from_prior(posterior, scale), expected)


@pytest.mark.parametrize("scale", SCALES)
def test_the_mean_log_ratio_is_the_divergence(posterior, scale):
    torch.manual_seed(0)
    one = Normal(posterior.loc[:1], posterior.scale[:1])
    ratios = log_ratio_to_prior(one, draw_particles(one, 100_000), scale)
    error = ratios.std(0) / 100_000**0.5
    assert ((ratios.mean(0) - divergence_from_prior(one, scale)[0]).abs() < 4 * error).all()


@pytest.mark.parametrize("scale", SCALES)
def test_a_posterior_that_is_the_prior_costs_nothing(scale):
    prior = Normal(torch.zeros(2, 7), torch.full((2, 7), scale))
    torch.testing.assert_close(divergence_from_prior(prior, scale), torch.zeros(2))
    draws = draw_particles(prior, 2)
    torch.testing.assert_close(log_ratio_to_prior(prior, draws, scale), torch.zeros(2))


def test_particles_have_the_mean_and_spread_of_their_posterior(posterior):
    torch.manual_seed(0)
    one = Normal(posterior.loc[:1], posterior.scale[:1])
    draws = draw_particles(one, 100_000)
    assert draws.shape == (100_000, 4, 5)
    assert ((draws.mean(0) - one.loc[0]).abs() < 5 * one.scale[0] / 100_000**0.5).all()
    torch.testing.assert_close(draws.std(0), one.scale[0], rtol=0.02, atol=0)
