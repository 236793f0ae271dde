"""Summaries of draws: by hand, and as torch has them."""

import math

import numpy as np
import pytest
import torch

from scvi_sams.model._contrast import DrawnEffect, bounds, quantiles, summary


def test_mean_error_and_interval_by_hand():
    """0, 1, 2, 3, 10: mean 3.2, variance 15.7; the quarters lie at the second and the fourth."""
    draws = torch.tensor([[10.0], [2.0], [0.0], [3.0], [1.0]])
    mean, error, low, high = summary(draws, interval=0.5)
    assert mean.item() == pytest.approx(3.2)
    assert error.item() == pytest.approx(math.sqrt(15.7 / 5))
    assert (low.item(), high.item()) == (1, 3)


@pytest.mark.parametrize("shape", [(2,), (7, 4), (100, 3, 5)])
@pytest.mark.parametrize("probabilities", [(0.0, 1.0), (0.025, 0.5, 0.975)])
def test_quantiles_are_those_of_torch(shape, probabilities):
    draws = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = draws.clone()
    for found, probability in zip(quantiles(draws, probabilities), probabilities, strict=True):
        torch.testing.assert_close(found, torch.quantile(draws, probability, dim=0))
    assert torch.equal(draws, before)


def test_what_is_not_a_number_stays_none():
    draws = torch.tensor([[1.0, math.nan], [2.0, 1.0], [3.0, 2.0]])
    low, high = quantiles(draws, (0.0, 1.0))
    assert (low[0].item(), high[0].item()) == (1, 3)
    assert torch.isnan(low[1])
    assert torch.isnan(high[1])


@pytest.mark.parametrize("shape", [(2,), (7, 4), (100, 300, 5)])
def test_mean_and_error_are_those_of_torch(shape):
    draws = 3 + torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mean, error = summary(draws, None)
    torch.testing.assert_close(mean, draws.mean(0))
    torch.testing.assert_close(error, draws.std(0) / math.sqrt(len(draws)))


def test_large_means_do_not_drown_the_error():
    draws = 1e4 + torch.tensor([[-1.0], [1.0]])
    assert summary(draws, None)[1].item() == pytest.approx(1)


@pytest.mark.parametrize("n_draws", [2, 3, 4, 5, 7, 8, 100, 101, 103, 500])
@pytest.mark.parametrize("interval", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("shape", [(), (3,), (300, 2)])
def test_bounds_are_quantiles(n_draws, interval, shape):
    """Ties and many columns included."""
    generator = torch.Generator().manual_seed(n_draws)
    draws = torch.randn(n_draws, *shape, generator=generator).mul(4).round().div(4).double()
    before = draws.clone()
    low, high = bounds(draws, interval)
    both = torch.tensor([0.5 - interval / 2, 0.5 + interval / 2], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([low, high]), torch.quantile(draws, both, dim=0))
    assert torch.equal(torch.stack(summary(draws, interval)[2:]), torch.stack([low, high]))
    assert torch.equal(draws, before)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_bounds_where_draws_are_infinite_or_nan(precision):
    draws = torch.randn(100, 4, generator=torch.Generator().manual_seed(1), dtype=precision)
    draws[:50, 1] = torch.inf
    draws[:50, 2] = -torch.inf
    draws[7, 3] = torch.nan
    low, high = bounds(draws, 0.95)
    of_summary = torch.stack(summary(draws, 0.95)[2:])
    torch.testing.assert_close(of_summary, torch.stack([low, high]), equal_nan=True)
    assert low.dtype == precision
    finite = torch.quantile(draws[:, 0], torch.tensor([0.025, 0.975], dtype=precision))
    torch.testing.assert_close(torch.stack([low[0], high[0]]), finite)
    assert high[1] == torch.inf
    assert low[2] == -torch.inf
    assert torch.isnan(torch.stack([low[3], high[3]])).all()


def test_what_follows_samples_of_exact_mean_adds_no_error():
    """Residuals of a least squares fit, gene by gene, over the samples that it leaves free."""
    rng = np.random.default_rng(0)
    n_draws, n_shift, n_genes = 40, 3, 6
    shift, direct = rng.normal(size=(n_draws, n_shift)), rng.normal(size=(n_draws, n_genes))
    noise = 0.1 * rng.normal(size=(n_draws, n_genes))
    effects = 2 + shift @ rng.normal(size=(n_shift, n_genes)) + 0.7 * direct + noise
    draws, of_shift, added = (torch.as_tensor(values) for values in (effects, shift, direct))
    mean, error = summary(draws, None, caused_by=DrawnEffect(of_shift[:, None], added[:, None]))
    np.testing.assert_allclose(mean, effects.mean(axis=0))
    for gene in range(n_genes):
        design = np.column_stack([np.ones(n_draws), shift, direct[:, gene]])
        _, (squares,), *_ = np.linalg.lstsq(design, effects[:, gene])
        by_hand = np.sqrt(squares / (n_draws - design.shape[1]) / n_draws)
        assert float(error[gene]) == pytest.approx(by_hand)
    plain = effects.std(axis=0, ddof=1) / np.sqrt(n_draws)
    assert (error.numpy() < 0.2 * plain).all()
    # Shifts that do not vary explain nothing, and many numbers would explain anything.
    constant = DrawnEffect(torch.ones(n_draws, 1, n_shift, dtype=draws.dtype), None)
    many = DrawnEffect(torch.as_tensor(rng.normal(size=(n_draws, 2, 10))), None)
    for cause in (None, constant, many):
        _, error = summary(draws, None, caused_by=cause)
        np.testing.assert_allclose(error, plain)
    np.testing.assert_array_equal(draws, effects)
