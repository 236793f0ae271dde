"""Masks of rows of which some have none: what they cost, by enumeration."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.special import expit

from scvi_sams.module._masks import NEVER, RowwiseMaskPrior

LOGITS = torch.tensor(
    [[-9.0, -9.0, -8.0], [-2.0, -1.0, 0.5], [3.0, -4.0, -4.0], [5.0, 2.0, 4.0], [-12.0, 9.0, -3.0]]
)
PRIORS = pytest.mark.parametrize(("rho", "pi"), [(0.3, 0.2), (0.01, 0.4), (0.9, 0.05)])


def enumerated(logits):
    """All masks of a row, and their posterior probabilities."""
    masks = np.array(list(product([0, 1], repeat=len(logits))))
    on = expit(np.asarray(logits, dtype=np.float64))
    return masks, np.prod(np.where(masks == 1, on, 1 - on), axis=1)


def log_prior(masks, probability):
    return np.where(masks == 1, np.log(probability), np.log1p(-probability)).sum(axis=1)


def bound(logits, rho, pi, on):
    """E[log q(a) q(m) - log p(a) p(m | a)] with q(a) = ``on``, a sum over a and all masks."""
    masks, weights = enumerated(logits)
    total = 0.0
    for share, prior, entry in ((on, rho, pi), (1 - on, 1 - rho, NEVER)):
        terms = np.log(share) + np.log(weights) - np.log(prior) - log_prior(masks, entry)
        total += share * (weights * terms).sum()
    return total


@PRIORS
def test_the_divergence_is_the_best_bound(rho, pi):
    """No probability of a row having masks gives a smaller one, and one gives the same."""
    found = RowwiseMaskPrior(rho, pi).kl(LOGITS)
    assert found.shape == (len(LOGITS),)
    shares = expit(np.linspace(-30, 30, 60_001))
    for row, logits in enumerate(LOGITS):
        # Linear in the terms of either case: of each once.
        masks, weights = enumerated(logits)
        if_on, if_off = (
            (weights * (np.log(weights) - log_prior(masks, entry))).sum() for entry in (pi, NEVER)
        )
        bounds = shares * (np.log(shares / rho) + if_on)
        bounds += (1 - shares) * (np.log1p(-shares) - np.log1p(-rho) + if_off)
        best = shares[bounds.argmin()]
        assert bounds.min() == pytest.approx(bound(logits, rho, pi, best), rel=1e-9, abs=1e-9)
        assert found[row].item() == pytest.approx(bounds.min(), rel=1e-4, abs=2e-4)


@PRIORS
def test_the_estimate_is_of_the_divergence_from_the_mixture(rho, pi):
    """Its mean over all masks: KL(q(m) || p(m)), which the closed form is an upper bound of."""
    prior = RowwiseMaskPrior(rho, pi)
    closed_form = prior.kl(LOGITS)
    for row, logits in enumerate(LOGITS):
        masks, weights = enumerated(logits)
        drawn = torch.tensor(masks, dtype=torch.float32)[:, None]
        estimates = prior.monte_carlo_kl(logits[None], drawn)[:, 0].numpy()
        mixture = np.logaddexp(
            np.log(rho) + log_prior(masks, pi), np.log1p(-rho) + log_prior(masks, NEVER)
        )
        np.testing.assert_allclose(estimates, np.log(weights) - mixture, rtol=1e-4, atol=2e-4)
        mean = (weights * estimates).sum()
        assert mean <= closed_form[row].item() + 1e-4
        # What is lost is the divergence of q(a) from p(a | m).
        if_on = np.log(rho) + log_prior(masks, pi) - mixture
        found = expit((weights * (if_on - np.log1p(-np.exp(if_on)))).sum())
        lost = found * (np.log(found) - if_on)
        lost += (1 - found) * (np.log1p(-found) - np.log1p(-np.exp(if_on)))
        assert closed_form[row].item() - mean == pytest.approx((weights * lost).sum(), abs=5e-4)


def test_rows_by_either_estimator():
    prior = RowwiseMaskPrior(0.3, 0.2)
    masks = torch.bernoulli(torch.sigmoid(LOGITS).expand(4, -1, -1))
    closed_form = prior.kl_of_rows("closed_form", LOGITS, masks)
    np.testing.assert_array_equal(closed_form, prior.kl(LOGITS)[None])
    estimates = prior.kl_of_rows("monte_carlo", LOGITS, masks)
    np.testing.assert_array_equal(estimates, prior.monte_carlo_kl(LOGITS, masks))
    assert estimates.shape == (4, len(LOGITS))


def test_where_all_rows_have_masks_it_is_bernoulli():
    on = torch.sigmoid(LOGITS.double())
    expected = on * (on / 0.2).log() + (1 - on) * ((1 - on) / 0.8).log()
    found = RowwiseMaskPrior(1 - 1e-9, 0.2).kl(LOGITS.double())
    np.testing.assert_allclose(found, expected.sum(dim=1), rtol=1e-5, atol=1e-5)


def test_a_second_mask_of_a_row_costs_less_than_the_first():
    prior = RowwiseMaskPrior(0.05, 0.2)
    logits = torch.full((3, 8), -9.0)
    logits[1, 0] = logits[2, :2] = 9.0
    none, one, two = prior.kl(logits).tolist()
    assert 0 < none < 0.2
    assert one - none > two - one + 2


def test_of_a_mask_of_which_nothing_is_known():
    expected = 0.3 * 0.2 + 0.7 * NEVER
    found = torch.sigmoid(RowwiseMaskPrior(0.3, 0.2).marginal_log_odds())
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("both", [(0.3, 0.2), (1e-6, 0.5), (0.999, 1e-6)])
def test_what_was_set_is_saved(both):
    prior = RowwiseMaskPrior(0.5, 0.05)
    prior.set_to(*both)
    other = RowwiseMaskPrior(0.5, 0.05)
    other.load_state_dict(prior.state_dict())
    assert other.probabilities == pytest.approx(both, rel=1e-4)


def test_gradients_are_finite_far_out():
    logits = torch.tensor([[-40.0, 40.0, 0.0], [-20.0, -20.0, -20.0]], requires_grad=True)
    RowwiseMaskPrior(1e-4, 1e-3).kl(logits).sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 1] > 0 or logits.grad[0, 1] == pytest.approx(0, abs=1e-6)
