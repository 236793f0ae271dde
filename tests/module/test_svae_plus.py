"""SVAE+: densities in its own coordinates, z given the perturbation, and the mask probabilities."""

from unittest import mock

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch.distributions import Normal, kl_divergence

from module.builders import all_of, make_module, make_tensors, score
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.module import SVAEPlusModule
from scvi_sams.module._masks import PointEstimateMaskPrior

# One perturbation per cell; the last has no training cells.
CODES = [[-1], [0], [1], [1], [2], [4]]
DOSES = [[0], [1], [1], [1], [1], [1]]


@pytest.fixture
def module():
    return make_module(SVAEPlusModule)


@pytest.fixture
def tensors():
    return make_tensors(codes=CODES, doses=DOSES)


def q_z(module, x):
    """q(z | x) from the encoder's layers, by hand."""
    encoder = module.encoder
    values = (torch.log1p(x) - module.input_mean) / module.input_sd
    hidden = torch.nn.functional.leaky_relu(encoder.from_x(values))
    variance = encoder.head.log_variance(hidden).exp() + 1e-4
    return Normal(encoder.head.loc(hidden), variance.sqrt())


def fixed_masks(values):
    """Patch the draws of masks by a table, perturbations x latents."""

    def sample(posterior, rows, n_particles):
        return values[rows].expand(n_particles, -1, -1)

    return mock.patch("scvi_sams.module._masks.MaskPosterior.sample", sample)


MASKS = torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 0], [1, 0, 0]])


def test_local_divergence_is_that_from_the_mean_of_the_perturbation(module, tensors):
    """KL(q(z | x) || Normal(m_t * mu_t, I)), for a control KL(q(z | x) || Normal(0, I))."""
    with fixed_masks(MASKS):
        output = score(module, tensors)
    prior_mean = torch.cat([MASKS * module.means, torch.zeros(1, 3)])[torch.tensor(CODES)[:, 0]]
    expected = kl_divergence(q_z(module, tensors[REGISTRY_KEYS.X]), Normal(prior_mean, 1.0)).sum(-1)
    torch.testing.assert_close(output.kl_local["kl_z_basal"], expected, rtol=1e-5, atol=1e-5)
    plain = kl_divergence(q_z(module, tensors[REGISTRY_KEYS.X]), Normal(0.0, 1.0)).sum(-1)
    assert (output.kl_local["kl_z_basal"] - plain)[1:5].abs().min() > 1e-3


def test_the_posterior_of_the_state_does_not_see_the_perturbation(module, tensors):
    torch.manual_seed(0)
    outputs = module.inference(module.read_batch(tensors))
    expected = q_z(module, tensors[REGISTRY_KEYS.X])
    state = outputs["qz"].loc + outputs["shift"]
    assert outputs["shift"].abs().max() > 0.1
    torch.testing.assert_close(state, expected.loc.expand_as(state), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outputs["qz"].scale, expected.scale.expand_as(state))


def test_without_means_it_is_a_plain_vae(module, tensors):
    """The bound of a cell is log p(x | z) - KL(q(z | x) || Normal(0, I)) at the same draws."""
    with torch.no_grad():
        module.means.zero_()
    torch.manual_seed(0)
    with mock.patch.object(torch, "randn", all_of(torch.ones)):
        output = score(module, tensors)
    x = tensors[REGISTRY_KEYS.X]
    posterior = q_z(module, x)
    z = posterior.loc + posterior.scale
    hidden = torch.nn.functional.leaky_relu(module.decoder.from_z(z))
    shares = torch.softmax(module.decoder.to_genes(hidden), dim=-1)
    theta = module.likelihood.log_inverse_dispersion.exp().detach().numpy()
    mean = (x.sum(1, keepdim=True) * shares).detach().numpy()
    log_px = stats.nbinom.logpmf(x.numpy(), theta, theta / (theta + mean)).sum(1)
    reconstruction = output.reconstruction_loss["reconstruction_loss"].detach().numpy()
    np.testing.assert_allclose(reconstruction, -log_px, rtol=1e-4)
    kl = kl_divergence(posterior, Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(output.kl_local["kl_z_basal"], kl, rtol=1e-5, atol=1e-5)


def test_importance_weights_are_those_of_the_state(module, tensors):
    """log p(x | z) + log p(z | t) - log q(z | x): moving the coordinates changes no density."""
    cells = module.read_batch(tensors)
    shift = (MASKS * module.means)[torch.tensor(CODES)[:, 0]][None]
    noise = torch.ones(1, len(cells.x), module.n_latent)
    weights = module.log_importance_weights(cells, shift, noise)
    posterior = q_z(module, cells.x)
    z = posterior.loc + posterior.scale
    logits = module.decoder.to_genes(module.decoder(z[None], None))
    log_px = module.likelihood.log_prob(cells.x, logits, cells.size)
    expected = log_px + (Normal(shift, 1.0).log_prob(z) - posterior.log_prob(z)).sum(-1)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-4)


# Masks ------------------------------------------------------------------------------------------


def by_hand(on, probability, beta):
    """KL(Bernoulli(on) || Bernoulli(probability)) - log Beta(probability | 1, beta)."""
    divergence = on * np.log(on / probability) + (1 - on) * np.log((1 - on) / (1 - probability))
    return divergence - stats.beta.logpdf(probability, 1, beta)


@pytest.mark.parametrize("beta", [1.5, 2.0, 10.0])
def test_cost_of_a_mask_is_the_least_over_probabilities(beta):
    logits = torch.tensor([-6.0, -1.0, 0.0, 0.7, 4.0], dtype=torch.float64)
    costs = PointEstimateMaskPrior(beta).kl(logits).numpy()
    for logit, cost in zip(logits.numpy(), costs, strict=True):
        on = 1 / (1 + np.exp(-logit))
        least = optimize.minimize_scalar(
            lambda p, on=on: by_hand(on, p, beta), bounds=(1e-9, 1 - 1e-9), method="bounded"
        )
        assert cost == pytest.approx(by_hand(on, on / beta, beta), rel=1e-9)
        assert cost <= least.fun + 1e-12
        assert cost == pytest.approx(least.fun, abs=1e-6)


@pytest.mark.parametrize(("beta", "expected"), [(2.0, 1.38629), (5.0, 2.50201), (10.0, 3.25083)])
def test_cost_of_an_entry_that_is_on(beta, expected):
    """log b - (b - 1) log(1 - 1 / b); certain masks have finite costs and gradients."""
    logits = torch.tensor([60.0, -60.0], requires_grad=True)
    costs = PointEstimateMaskPrior(beta).kl(logits)
    assert (costs[0] - costs[1]).item() == pytest.approx(expected, abs=1e-4)
    costs.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_every_entry_of_a_perturbation_is_paid_for(module):
    kl = module.global_posterior(torch.tensor([1, 4]), 1).kl
    assert set(kl) == {"masks"}
    on = torch.sigmoid(module.masks.logits[[1, 4]]).detach().double().numpy()
    np.testing.assert_allclose(kl["masks"][0].detach(), by_hand(on, on / 4, 4).sum(1), rtol=1e-4)


def test_monte_carlo_estimate_averages_to_the_closed_form(module):
    n = 20_000
    rows = torch.arange(5)
    torch.manual_seed(0)
    with torch.no_grad():
        masks = module.masks.sample(rows, n)
        estimates = module.mask_prior.monte_carlo_kl(module.masks.logits, masks)
        exact = module.mask_prior.kl(module.masks.logits)
    error = estimates.std(0) / n**0.5
    assert ((estimates.mean(0) - exact).abs() < 5 * error).all()


def test_means_start_at_a_tenth_of_a_standard_normal():
    module = make_module(SVAEPlusModule, seed=None, n_perturbations=400, n_latent=25)
    means = module.means.detach()
    # 10,000 numbers: standard errors of 0.001 and 0.0007.
    assert means.mean().abs() < 0.005
    assert means.std().item() == pytest.approx(0.1, abs=0.004)
