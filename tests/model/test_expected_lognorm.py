"""Expected log-normalised counts: sums over all counts, and cells drawn one by one."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from scvi_sams.module import LIKELIHOODS
from scvi_sams.module._expected_lognorm import ExpectedLognorm

THETA = np.array([0.1, 1.0, 3.0, 100.0, 1e5])
"""Inverse dispersions, the last as good as Poisson."""


def likelihood_of(name, n_genes, *, uses_size_factor, theta=None):
    likelihood = LIKELIHOODS[name](n_genes, uses_size_factor=uses_size_factor)
    if theta is not None:
        likelihood.log_inverse_dispersion.data = torch.tensor(np.log(theta), dtype=torch.float32)
    return likelihood.requires_grad_(False)


def expected(likelihood, logits, library_size, target_sum):
    """Of cells of one size, or of several, each with its share."""
    sizes = np.array([[library_size], [1.0]]) if np.isscalar(library_size) else library_size
    table = ExpectedLognorm(likelihood, sizes, target_sum, torch.device("cpu"))
    return table(torch.as_tensor(logits, dtype=torch.float32)).numpy()


def sum_over_counts(pmf, mean, f):
    """E[f(x)], up to where nothing is left."""
    counts = np.arange(int(300 * mean + 400))
    probability = pmf(counts)
    np.testing.assert_allclose(probability.sum(), 1, atol=1e-7)
    return (probability * f(counts)).sum()


def nb_pmf(theta, mean):
    return lambda x: stats.nbinom.pmf(x, theta, theta / (theta + mean))


@pytest.mark.parametrize("mean", [1e-6, 1e-3, 0.1, 0.7, 3.0, 40.0, 900.0])
@pytest.mark.parametrize(("library_size", "target_sum"), [(1e4, 1e4), (2e3, 1e4), (0.5, 1.0)])
def test_with_a_size_factor_it_is_the_sum_over_all_counts(mean, library_size, target_sum):
    def f(x):
        return np.log2(1 + target_sum * x / library_size)

    logits = np.full((1, len(THETA)), math.log(mean / library_size))
    nb = likelihood_of("nb", len(THETA), uses_size_factor=True, theta=THETA)
    found = expected(nb, logits, library_size, target_sum)[0]
    by_hand = [sum_over_counts(nb_pmf(theta, mean), mean, f) for theta in THETA]
    np.testing.assert_allclose(found, by_hand, atol=1.5e-4)
    poisson = likelihood_of("poisson", 1, uses_size_factor=True)
    found = expected(poisson, logits[:, :1], library_size, target_sum).item()
    assert found == pytest.approx(sum_over_counts(stats.poisson(mean).pmf, mean, f), abs=1.5e-4)


@pytest.mark.parametrize("share", [1e-7, 1e-4, 0.03, 0.3, 0.6])
def test_a_gene_is_part_of_the_size_that_it_is_normalised_by(share):
    """With the other genes' sum at its expectation, whichever the gene's own count is."""
    library_size, target_sum, mean = 1e3, 1e4, 1e3 * share
    rest = library_size - mean
    logits = np.log([[share, 1 - share]])
    for theta in THETA:
        nb = likelihood_of("nb", 2, uses_size_factor=False, theta=np.array([theta, 1.0]))
        found = expected(nb, logits, library_size, target_sum)[0, 0]
        by_hand = sum_over_counts(
            nb_pmf(theta, mean), mean, lambda x: np.log2(1 + target_sum * x / (x + rest))
        )
        assert found == pytest.approx(by_hand, abs=3e-4)


@pytest.mark.parametrize("uses_size_factor", [False, True])
def test_over_several_sizes_it_is_their_average(uses_size_factor):
    sizes = np.array([[30.0, 400.0, 9000.0, 1.0], [0.2, 0.5, 0.3, 0.0]])
    nb = likelihood_of("nb", len(THETA), uses_size_factor=uses_size_factor, theta=THETA)
    logits = np.log(np.random.default_rng(0).dirichlet(np.full(len(THETA), 0.5), size=50))
    found = expected(nb, logits, sizes, 1e4)
    of_sizes = [expected(nb, logits, float(size), 1e4) for size in sizes[0, :3]]
    np.testing.assert_allclose(found, np.einsum("s,sbg->bg", sizes[1, :3], of_sizes), atol=3e-4)
    assert np.abs(found - of_sizes[1]).max() > 0.1


def test_it_is_the_mean_of_drawn_cells():
    """Of whole cells, normalised by the sum of what was drawn."""
    rng = np.random.default_rng(0)
    n_genes, n_cells, library_size = 100, 40_000, 1e3
    theta = rng.lognormal(1, 0.5, n_genes)
    logits = rng.normal(scale=1.5, size=n_genes)
    mean = library_size * np.exp(logits) / np.exp(logits).sum()
    counts = rng.poisson(rng.gamma(theta, mean / theta, (n_cells, n_genes)))
    drawn = np.log2(1 + 1e4 * counts / counts.sum(axis=1, keepdims=True))
    nb = likelihood_of("nb", n_genes, uses_size_factor=False, theta=theta)
    found = expected(nb, logits[None], library_size, 1e4)[0]
    error = drawn.std(axis=0) / n_cells**0.5
    # Half the squared coefficient of variation of the size is what is left out.
    left_out = 0.5 * (counts.sum(axis=1).std() / library_size) ** 2 / math.log(2)
    assert 0.001 < left_out < 0.02
    assert (np.abs(found - drawn.mean(axis=0)) < 4 * error + left_out).all()
    assert found.max() > 9
    assert found.min() < 2


def test_means_beyond_the_table_are_at_its_ends():
    """Where nothing is expected, and half a billion counts."""
    poisson = likelihood_of("poisson", 1, uses_size_factor=True)
    logits = np.array([[-60.0], [-16.0], [20.0], [40.0]])
    found = expected(poisson, logits, 1.0, 1.0)[:, 0]
    np.testing.assert_allclose(found[:2], 0, atol=1e-6)
    np.testing.assert_allclose(found[2:], 20.0 / math.log(2), atol=1e-3)
