"""Likelihoods: what the decoder's logits mean, densities, draws and starting values."""

import numpy as np
import pytest
import torch
from scipy import stats

from module.builders import make_module
from module.reference import negative_binomial_log_pmf
from scvi_sams.module import TrainingStatistics
from scvi_sams.module._likelihoods import LIKELIHOODS

COUNT_LIKELIHOODS = pytest.mark.parametrize("name", ["nb", "poisson"])
SIZES = pytest.mark.parametrize("size_factor", [False, True], ids=["library", "size factor"])
N_GENES = 4


def make_likelihood(name, *, size_factor=False, n_genes=N_GENES, own=(-0.5, 0.1, 0.9, 1.6)):
    likelihood = LIKELIHOODS[name](n_genes, uses_size_factor=size_factor).double()
    with torch.no_grad():
        for parameter in likelihood.parameters():
            parameter.copy_(torch.tensor(own))
    return likelihood


def make_inputs(n_particles=3, n_cells=6, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0.5, 1, size=(n_particles, n_cells, N_GENES))
    x = rng.integers(0, 12, size=(n_cells, N_GENES))
    size = rng.uniform(0.5, 30, size=n_cells)
    return tuple(torch.as_tensor(a, dtype=torch.float64) for a in (x, logits, size))


def expected_means(logits, size, size_factor):
    rate = np.exp(logits.numpy())
    if not size_factor:
        rate = rate / rate.sum(-1, keepdims=True)
    return rate * size.numpy()[:, None]


# Rates and densities ----------------------------------------------------------------------------


@COUNT_LIKELIHOODS
def test_shares_of_the_library_add_up_to_one(name):
    _, logits, size = make_inputs()
    likelihood = make_likelihood(name)
    rate = likelihood.rate(logits)
    assert (rate > 0).all()
    np.testing.assert_allclose(rate.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(
        likelihood.mean(logits, size).sum(-1), size.expand(3, -1), rtol=1e-12
    )
    ratio = rate[0, 0, 1] / rate[0, 0, 0]
    assert ratio.item() == pytest.approx((logits[0, 0, 1] - logits[0, 0, 0]).exp().item())


@COUNT_LIKELIHOODS
@SIZES
def test_mean_of_a_cell(name, size_factor):
    """With a size factor the rates are not tied to one another: factor * exp(logit)."""
    _, logits, size = make_inputs()
    mean = make_likelihood(name, size_factor=size_factor).mean(logits, size)
    np.testing.assert_allclose(mean, expected_means(logits, size, size_factor), rtol=1e-12)


@SIZES
def test_negative_binomial_density(size_factor):
    x, logits, size = make_inputs()
    likelihood = make_likelihood("nb", size_factor=size_factor)
    theta = likelihood.log_inverse_dispersion.exp().detach().numpy()
    mean = expected_means(logits, size, size_factor)
    expected = stats.nbinom.logpmf(x.numpy(), theta, theta / (theta + mean)).sum(-1)
    np.testing.assert_allclose(likelihood.log_prob(x, logits, size).detach(), expected, rtol=1e-9)
    np.testing.assert_allclose(
        negative_binomial_log_pmf(x.numpy(), np.log(mean), theta).sum(-1), expected, rtol=1e-9
    )


@SIZES
def test_poisson_density(size_factor):
    x, logits, size = make_inputs()
    likelihood = make_likelihood("poisson", size_factor=size_factor)
    expected = stats.poisson.logpmf(x.numpy(), expected_means(logits, size, size_factor)).sum(-1)
    np.testing.assert_allclose(likelihood.log_prob(x, logits, size), expected, rtol=1e-10)


def test_an_absurd_poisson_mean_stays_finite_and_is_pulled_down():
    """Means of exp(200) in single precision, beside one that is exact: exp(29)."""
    likelihood = LIKELIHOODS["poisson"](3, uses_size_factor=True)
    logits = torch.tensor([[[200.0, 29.0, 1.0]]], requires_grad=True)
    x = torch.tensor([[2.0, 0.0, 3.0]])
    log_prob = likelihood.log_prob(x, logits, torch.ones(1))
    log_prob.sum().backward()
    linear = np.exp(30) * (1 + 200 - 30)
    expected = 2 * 200 - linear - np.log(2) - np.exp(29) + 3 - np.e - np.log(6)
    assert log_prob.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(
        logits.grad[0, 0], [2 - np.exp(30), -np.exp(29), 3 - np.e], rtol=1e-5
    )
    # The norm of the gradient, which is clipped by it, is finite as well.
    assert torch.isfinite(logits.grad.norm())


def test_normal_density_and_mean():
    x, logits, size = make_inputs()
    likelihood = make_likelihood("normal")
    x = x / 3 - 1
    scale = likelihood.log_scale.exp().detach().numpy()
    expected = stats.norm.logpdf(x.numpy(), logits.numpy(), scale).sum(-1)
    np.testing.assert_allclose(likelihood.log_prob(x, logits, size).detach(), expected, rtol=1e-10)
    assert torch.equal(likelihood.mean(logits, size), logits)
    assert torch.equal(likelihood.rate(logits), logits)


def test_only_the_normal_likelihood_is_for_other_values_than_counts():
    assert {name: kind.is_count_likelihood for name, kind in LIKELIHOODS.items()} == {
        "nb": True,
        "poisson": True,
        "normal": False,
    }


# Draws ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nb", "poisson", "normal"])
@SIZES
def test_moments_of_draws(name, size_factor):
    """Mean and variance per gene and cell, within five standard errors of 40,000 draws."""
    _, logits, size = make_inputs(n_particles=1, n_cells=2)
    likelihood = make_likelihood(name, size_factor=size_factor)
    torch.manual_seed(4)
    with torch.no_grad():
        draws = likelihood.sample(logits.expand(40_000, -1, -1), size).numpy()
    mean = expected_means(logits, size, size_factor)[0]
    if name == "nb":
        variance = mean + mean**2 / likelihood.log_inverse_dispersion.exp().detach().numpy()
    elif name == "poisson":
        variance = mean
    else:
        mean = logits[0].numpy()
        variance = np.broadcast_to(likelihood.log_scale.exp().detach().numpy() ** 2, mean.shape)
    assert_moments(draws, mean, variance)
    if name != "normal":
        assert (draws >= 0).all()
        assert (draws == np.rint(draws)).all()


def assert_moments(draws, mean, variance):
    n = len(draws)
    squares = (draws - mean) ** 2
    assert (np.abs(draws.mean(0) - mean) < 5 * np.sqrt(variance / n)).all()
    assert (np.abs(squares.mean(0) - variance) < 5 * squares.std(0) / np.sqrt(n)).all()


@pytest.mark.parametrize("theta", [0.01, 1e6])
def test_draws_at_extreme_dispersions(theta):
    likelihood = make_likelihood("nb", size_factor=True, own=[np.log(theta)] * N_GENES)
    logits = torch.tensor([0.1, 1.0, 5.0, 60.0], dtype=torch.float64).log()
    torch.manual_seed(6)
    with torch.no_grad():
        draws = likelihood.sample(logits.expand(100_000, 1, -1), torch.ones(1)).numpy()
    mean = logits.exp().numpy()[None]
    assert_moments(draws, mean, mean + mean**2 / theta)


def test_draws_differ_between_particles_and_cells():
    likelihood = make_likelihood("nb")
    torch.manual_seed(0)
    draws = likelihood.sample(torch.zeros(2, 2, N_GENES), torch.full((2,), 1e4))
    assert len(torch.unique(draws.flatten(0, 1), dim=0)) == 4


# Starting values --------------------------------------------------------------------------------


def make_statistics(x, size=None, n_perturbations=5):
    """Moments by numpy, of counts divided by their size, or of plain values."""
    scaled = x if size is None else x / size[:, None]
    inputs = x if size is None else np.log1p(x)
    return TrainingStatistics(
        n_cells=len(x),
        cells_per_perturbation=torch.zeros(n_perturbations),
        input_mean=torch.as_tensor(inputs.mean(0), dtype=torch.float32),
        input_sd=torch.as_tensor(inputs.std(0), dtype=torch.float32),
        scaled_mean=torch.as_tensor(scaled.mean(0), dtype=torch.float32),
        scaled_variance=torch.as_tensor(scaled.var(0), dtype=torch.float32),
        inverse_size_mean=1.0 if size is None else float((1 / size).mean()),
        cell_sizes=torch.ones(2, 3) / 3,
    )


def start_at(x, size, name, size_factor):
    """Module at the statistics of data, with every other parameter zero."""
    module = make_module(
        seed=None, gene_likelihood=name, uses_size_factor=size_factor, n_genes=x.shape[1]
    )
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    module.set_training_statistics(make_statistics(x, size))
    return module


@pytest.mark.parametrize("name", ["nb", "poisson"])
@SIZES
def test_an_untrained_decoder_predicts_the_mean_of_the_data(name, size_factor):
    rng = np.random.default_rng(0)
    x = rng.poisson([0.2, 3, 10, 40, 1], size=(200, 5)) + 1.0
    size = rng.uniform(0.5, 2, size=200) if size_factor else x.sum(axis=1)
    module = start_at(x, size, name, size_factor)
    z = torch.zeros(1, 1, module.n_latent)
    rate = module.likelihood.rate(module.decode(z, z, None))[0, 0].detach()
    np.testing.assert_allclose(rate, (x / size[:, None]).mean(0), rtol=1e-5)


def test_an_untrained_normal_decoder_predicts_mean_and_variance():
    rng = np.random.default_rng(0)
    x = rng.normal([0, -3, 5, 1, 2], [1, 0.1, 3, 2, 0.5], size=(200, 5))
    module = start_at(x, None, "normal", False)
    z = torch.zeros(1, 1, module.n_latent)
    np.testing.assert_allclose(
        module.decode(z, z, None)[0, 0].detach(), x.mean(0), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(module.likelihood.log_scale.exp().detach(), x.std(0), rtol=1e-5)


def simulate_counts(theta, size, rate, seed=0):
    rng = np.random.default_rng(seed)
    mean = size[:, None] * rate
    return rng.negative_binomial(theta, theta / (theta + mean)).astype(float)


def test_moments_recover_the_dispersion():
    rng = np.random.default_rng(2)
    theta = np.array([0.5, 1.0, 3.0, 10.0, 3.0, 1.0])
    mean = np.array([5, 50, 5, 50, 1, 1.0])
    size = np.full(100_000, 5000.0)
    x = rng.negative_binomial(theta, theta / (theta + mean), size=(len(size), len(theta)))
    statistics = make_statistics(x.astype(float), size)
    likelihood = LIKELIHOODS["nb"](6, uses_size_factor=True)
    likelihood.initialise(
        statistics.scaled_mean, statistics.scaled_variance, statistics.inverse_size_mean
    )
    estimate = likelihood.log_inverse_dispersion.exp().detach().numpy()
    np.testing.assert_allclose(estimate, theta, rtol=0.08)


@pytest.mark.parametrize("name", ["nb", "poisson", "normal"])
@SIZES
def test_genes_that_never_vary_or_have_no_counts(name, size_factor):
    rng = np.random.default_rng(0)
    x = rng.poisson(3, size=(50, 5)).astype(float)
    x[:, 1] = 0
    x[:, 2] = 4
    x[:, 4] += 1
    counts = name != "normal"
    size = None
    if counts:
        size = rng.uniform(0.5, 2, size=50) if size_factor else x.sum(axis=1)
    module = start_at(x, size, name, size_factor)
    for parameter in module.parameters():
        assert torch.isfinite(parameter).all()
    z = torch.zeros(1, 1, module.n_latent)
    rate = module.likelihood.rate(module.decode(z, z, None))[0, 0].detach()
    if counts:
        others = np.array([0, 2, 3, 4])
        assert 0 < rate[1] < rate[others].min()
    else:
        assert rate[1] == 0
    log_prob = module.likelihood.log_prob(
        torch.as_tensor(x, dtype=torch.float32),
        module.decode(z.expand(1, 50, -1), z, None),
        torch.as_tensor(np.ones(50) if size is None else size, dtype=torch.float32),
    )
    assert torch.isfinite(log_prob).all()


def test_data_without_any_count_gives_finite_values():
    likelihood = LIKELIHOODS["nb"](3, uses_size_factor=True)
    bias = likelihood.initialise(torch.zeros(3), torch.zeros(3), 1.0)
    assert torch.isfinite(bias).all()
    assert torch.isfinite(likelihood.log_inverse_dispersion).all()


# From the decoder's last layer ------------------------------------------------------------------


@pytest.mark.parametrize("name", list(LIKELIHOODS))
@SIZES
def test_mean_from_the_last_layer_is_that_of_its_logits(name, size_factor):
    likelihood = make_likelihood(name, size_factor=size_factor)
    x, _, size = make_inputs()
    torch.manual_seed(0)
    hidden = torch.randn(3, len(x), 5, dtype=torch.float64, requires_grad=True)
    to_genes = torch.nn.Linear(5, N_GENES).double()
    arguments = [hidden, *to_genes.parameters(), *likelihood.parameters()]
    mean, each = likelihood.mean_decoded_log_prob(x, hidden, to_genes, size)
    expected = likelihood.log_prob(x, to_genes(hidden), size)
    np.testing.assert_allclose(each, expected.detach(), rtol=1e-10)
    assert not each.requires_grad
    for got, want in zip(
        torch.autograd.grad(mean, arguments),
        torch.autograd.grad(expected.mean(), arguments),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)
