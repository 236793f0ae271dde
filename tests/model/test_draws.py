"""Summaries of draws: by hand, and as torch has them."""

import math

import pytest
import torch

from scvi_sams.model._draws import bounds, mean_and_error, quantiles


def test_mean_error_and_interval_by_hand():
    """0, 1, 2, 3, 10: mean 3.2, variance 15.7; the quarters lie at the second and the fourth."""
    draws = torch.tensor([[10.0], [2.0], [0.0], [3.0], [1.0]])
    mean, error = mean_and_error(draws)
    low, high = bounds(draws, interval=0.5)
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


def test_large_means_do_not_drown_the_error():
    draws = 1e4 + torch.tensor([[-1.0], [1.0]])
    assert mean_and_error(draws)[1].item() == pytest.approx(1)
