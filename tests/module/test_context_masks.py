"""Masks of what contexts share and of their own: against enumeration and simulation."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import softmax

from scvi_sams.module import _context_masks
from scvi_sams.module._context_masks import (
    Estimates,
    by_perturbation,
    fit_masks,
    mask_probabilities,
    of_rows,
)

ALPHA, BETA = 0.1, 2.0


def estimates_of(mean, variance, common):
    parts = (mean, variance, common)
    return Estimates(*(torch.as_tensor(values, dtype=torch.float32) for values in parts))


def by_enumeration(mean, variance, common, share):
    """Posterior of all masks of one perturbation and dimension: Gaussian densities of the sums."""
    exists = np.isfinite(variance)
    masks = list(product([0, 1], repeat=1 + len(mean)))
    masks = [m for m in masks if not np.array(m[1:])[~exists].any()]
    log_weights = []
    for shared, *own in masks:
        own = np.array(own)[exists]
        covariance = np.full((exists.sum(),) * 2, common + shared * BETA**2)
        covariance += np.diag(variance[exists] + own * BETA**2)
        density = stats.multivariate_normal(cov=covariance).logpdf(mean[exists])
        prior = np.log(ALPHA if shared else 1 - ALPHA)
        prior += np.where(own, np.log(share[exists]), np.log1p(-share[exists])).sum()
        log_weights.append(density + prior)
    return softmax(log_weights) @ np.array(masks)


def by_integration(mean, variance, common, share, n_points=400_001):
    """The same by a sum over what contexts share, on a grid so fine that it is exact."""
    x = np.linspace(-30, 30, n_points)
    on = np.log(ALPHA) + stats.norm.logpdf(x, scale=np.sqrt(common + BETA**2))
    off = np.log1p(-ALPHA) + stats.norm.logpdf(x, scale=np.sqrt(common))
    total, of_own = np.logaddexp(on, off), []
    for y, v, p in zip(mean, variance, share, strict=True):
        own = np.log(p) + stats.norm.logpdf(y, x, np.sqrt(v + BETA**2))
        same = np.log1p(-p) + stats.norm.logpdf(y, x, np.sqrt(v))
        total = total + np.logaddexp(own, same)
        of_own.append(np.exp(own - np.logaddexp(own, same)))
    weights = softmax(total)
    shared = weights @ np.exp(on - np.logaddexp(on, off))
    return np.array([shared, *(weights @ each for each in of_own)])


def found_by_module(mean, variance, common, share):
    estimates = estimates_of(mean[None, :, None], variance[None, :, None], np.full((1, 1), common))
    share = torch.as_tensor(share)[None, :, None]
    found = mask_probabilities(estimates, ALPHA, share, BETA)
    return np.array([found.shared.item(), *found.own[0, :, 0].tolist()])


CASES = {
    "nothing": ([0.05, -0.1], [0.04, 0.04]),
    "agree": ([1.5, 1.4], [0.04, 0.09]),
    "one of two": ([1.5, 0.0], [0.04, 0.04]),
    "one of three": ([0.1, 2.5, -0.1], [0.05, 0.05, 0.2]),
    "two of three": ([1.6, 1.4, 0.05], [0.05, 0.05, 0.02]),
    "of both signs": ([2.0, -1.8, 0.0], [0.05, 0.1, 0.3]),
    "unclear": ([0.5, 0.4, -0.3], [0.1, 0.2, 0.1]),
    "strong": ([6.0, 6.3, 0.2], [0.05, 0.05, 0.05]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [0.05, 0.3, 1e-4])
def test_probabilities_by_enumeration_and_integration(case, share):
    mean, variance = (np.array(values) for values in CASES[case])
    shares = np.linspace(share, 1.5 * share, len(mean))
    expected = by_enumeration(mean, variance, 0.03, shares)
    np.testing.assert_allclose(
        by_integration(mean, variance, 0.03, shares), expected, rtol=1e-6, atol=1e-8
    )
    found = found_by_module(mean, variance, 0.03, shares)
    np.testing.assert_allclose(found, expected, atol=0.01)


@pytest.mark.parametrize("seed", range(20))
def test_random_estimates_by_enumeration(seed):
    rng = np.random.default_rng(seed)
    n_contexts = rng.integers(1, 5)
    mean = rng.normal(scale=rng.choice([0.3, 1, 3], n_contexts))
    variance = rng.uniform(0.02, 0.5, n_contexts)
    variance[rng.random(n_contexts) < 0.2] = np.inf
    variance[0] = 0.1
    share = rng.uniform(0.01, 0.5, n_contexts)
    expected = by_enumeration(mean, variance, 0.05, share)
    found = found_by_module(np.where(np.isfinite(variance), mean, 0), variance, 0.05, share)
    np.testing.assert_allclose(found, expected, atol=0.01)


def test_perturbations_and_dimensions_do_not_mix(monkeypatch):
    """Nor does it matter how many are looked at at once."""
    rng = np.random.default_rng(3)
    shape = (7, 3, 4)
    mean, variance = rng.normal(scale=1.5, size=shape), rng.uniform(0.05, 0.3, shape)
    variance[2, 1:] = np.inf
    mean[2, 1:] = 0
    common, share = rng.uniform(0.01, 0.1, (7, 4)), rng.uniform(0.01, 0.4, shape)
    estimates = estimates_of(mean, variance, common)
    whole = mask_probabilities(estimates, ALPHA, torch.as_tensor(share), BETA)
    monkeypatch.setattr(_context_masks, "_VALUES_AT_ONCE", 1)
    singly = mask_probabilities(estimates, ALPHA, torch.as_tensor(share), BETA)
    for one, other in zip(whole, singly, strict=True):
        np.testing.assert_array_equal(one, other)
    for t, latent in product(range(7), range(4)):
        expected = by_enumeration(
            mean[t, :, latent], variance[t, :, latent], common[t, latent], share[t, :, latent]
        )
        assert whole.shared[t, latent].item() == pytest.approx(expected[0], abs=0.01)
        np.testing.assert_allclose(whole.own[t, :, latent], expected[1:], atol=0.01)


@pytest.mark.parametrize("effect", [0.0, 0.3, 0.8, -1.1, 5.0])
def test_one_context_without_effects_of_its_own_is_the_closed_formula(effect):
    """Log-odds as in ``SAMSVAEModule.start_masks``, of the variance of both errors."""
    variance, common = 0.06, 0.04
    found = found_by_module(np.array([effect]), np.array([variance]), common, np.array([1e-12]))
    v = variance + common
    logit = np.log(ALPHA / (1 - ALPHA)) + effect**2 / v / (2 + 2 * v / BETA**2)
    logit -= 0.5 * np.log1p(BETA**2 / v)
    assert found[0] == pytest.approx(1 / (1 + np.exp(-logit)), abs=0.01)
    assert found[1] == pytest.approx(0, abs=1e-6)


# Fitting ----------------------------------------------------------------------------------------


def simulated(seed, *, rho, pi, n_perturbations=120, n_contexts=3, n_latent=10):
    """Estimates drawn from the model, and the true masks."""
    rng = np.random.default_rng(seed)
    shape = (n_perturbations, n_contexts, n_latent)
    shared = rng.random((n_perturbations, n_latent)) < ALPHA
    has_some = rng.random((n_perturbations, n_contexts, 1)) < rho
    own = has_some & (rng.random(shape) < pi)
    variance = rng.uniform(0.02, 0.1, shape)
    effects = shared * rng.normal(scale=BETA, size=shared.shape)
    effects = effects + rng.normal(scale=0.1, size=shared.shape)
    mean = effects[:, None] + own * rng.normal(scale=BETA, size=shape)
    mean = mean + rng.normal(size=shape) * np.sqrt(variance)
    is_missing = rng.random(shape[:2]) < 0.2
    is_missing[:, 0] = False
    mean[is_missing], variance[is_missing], own[is_missing] = 0, np.inf, False
    estimates = estimates_of(mean, variance, np.full(shared.shape, 0.01))
    return estimates, shared, own, ~is_missing


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rho", "pi"), [(0.3, 0.25), (0.8, 0.1)])
def test_how_often_contexts_differ_is_found(seed, rho, pi):
    estimates, shared, own, exists = simulated(seed, rho=rho, pi=pi)
    found, prior = fit_masks(estimates, ALPHA, BETA)
    assert prior.rows == pytest.approx(rho, abs=0.15)
    assert prior.entries == pytest.approx(pi, rel=0.35)
    assert prior.rows * prior.entries == pytest.approx(own[exists].mean(), rel=0.2)
    of_own, of_shared = found.own.numpy(), found.shared.numpy()
    assert (of_own[~exists] == 0).all()
    # Calibrated: as many as are true.
    assert of_own[exists].sum() == pytest.approx(own.sum(), rel=0.15)
    assert of_shared.sum() == pytest.approx(shared.sum(), rel=0.15)
    is_called = of_own > 0.5
    assert own[is_called].mean() > 0.9
    assert is_called[own].mean() > 0.6
    assert shared[of_shared > 0.5].mean() > 0.9
    assert (of_shared > 0.5)[shared].mean() > 0.7


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_found_where_contexts_agree(seed):
    estimates, shared, _, exists = simulated(seed, rho=0, pi=0.2)
    found, prior = fit_masks(estimates, ALPHA, BETA)
    assert prior.rows * prior.entries < 0.002
    assert found.own.numpy()[exists].mean() < 0.002
    assert (found.own > 0.5).float().mean() < 1e-3
    assert (found.shared.numpy() > 0.5)[shared].mean() > 0.7


def test_of_many_perturbations_some_tell_of_all(monkeypatch):
    estimates, _, own, _ = simulated(4, rho=0.3, pi=0.25, n_perturbations=160)
    whole, prior = fit_masks(estimates, ALPHA, BETA)
    monkeypatch.setattr(_context_masks, "_MOST_FOR_PRIOR", 80)
    found, of_some = fit_masks(estimates, ALPHA, BETA)
    assert found.own.shape == own.shape
    assert of_some.rows == pytest.approx(prior.rows, rel=0.3)
    assert (found.own - whole.own).abs().mean() < 0.01


def test_another_mask_of_a_row_makes_a_mask_likelier():
    """Belief propagation: an unclear difference counts for more beside a clear one."""
    mean = np.zeros((40, 3, 6))
    mean[:10, 0, 0] = 3.0  # clear
    mean[:10, 0, 1] = mean[10:20, 0, 1] = 0.8  # unclear
    found, _ = fit_masks(
        estimates_of(mean, np.full(mean.shape, 0.06), np.full((40, 6), 0.01)), ALPHA, BETA
    )
    assert found.own[0, 0, 0] > 0.95
    assert found.own[0, 0, 1] > 2 * found.own[10, 0, 1]


# Tables -----------------------------------------------------------------------------------------


def test_rows_of_perturbations_and_back():
    owners = torch.tensor([0, 0, 0, 1, 2, 2])
    values = torch.arange(12.0).view(6, 2)
    table = by_perturbation(values, owners, torch.inf)
    assert table[:, :, 0].tolist() == [[0, 2, 4], [6, torch.inf, torch.inf], [8, 10, torch.inf]]
    assert table[2].tolist() == [[8, 9], [10, 11], [torch.inf, torch.inf]]
    np.testing.assert_array_equal(of_rows(table, owners), values)
