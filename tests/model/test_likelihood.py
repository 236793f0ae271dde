"""ELBO and importance-weighted bound against closed forms."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import rel_entr

from model.builders import (
    N_LATENT,
    VARIANTS,
    assert_within_error,
    make_decoder_linear,
    set_effects,
    small_screen,
    train_small,
)

EFFECTS = np.random.default_rng(5).normal(scale=0.5, size=(4, N_LATENT))
MASK_PRIOR = 0.1
EFFECT_PRIOR_SCALE = 2.0
SCORES = ["get_elbo", "get_reconstruction_error", "get_iwelbo"]


def score(model, name, *args, seed=0, **kwargs):
    """Score every cell."""
    torch.manual_seed(seed)
    defaults = {"return_mean": False, "key_added": None}
    return getattr(model, name)(*args, **(defaults | kwargs))


def members_of(model):
    """Perturbations of each cell, cells x perturbations, from the labels."""
    labels = model.adata.obs["perturbation"].astype(str)
    return np.array(
        [[name in label.split("+") for name in model.perturbations] for label in labels]
    )


def global_share(model):
    """Each cell's share of the divergences of masks and mean-field effects, by hand."""
    module = model.module
    on = 1 / (1 + np.exp(-module.masks.logits.detach().numpy().astype(np.float64)))
    kl_masks = rel_entr(on, MASK_PRIOR) + rel_entr(1 - on, 1 - MASK_PRIOR)
    loc = module.effects.loc.detach().numpy().astype(np.float64)
    variance = module.effects.log_scale.detach().numpy().astype(np.float64)
    variance = np.exp(2 * variance)
    prior = EFFECT_PRIOR_SCALE**2
    kl_effects = 0.5 * ((loc**2 + variance) / prior - 1 - np.log(variance / prior))
    members = members_of(model)
    n_train = members[model.train_indices].sum(axis=0)
    return members @ ((kl_masks + kl_effects).sum(axis=1) / n_train)


def basal_kl(model):
    """KL(q(z_basal) || p) by hand, from the moments of many draws of a mean-field posterior."""
    torch.manual_seed(3)
    mean = model.get_latent_representation(key_added=None).astype(np.float64)
    draws = model.get_latent_representation(give_mean=False, n_samples=20_000, key_added=None)
    variance = draws.var(axis=0, dtype=np.float64)
    return 0.5 * (mean**2 + variance - 1 - np.log(variance)).sum(axis=1)


def test_elbo_is_minus_reconstruction_error_and_divergences(mean_field):
    elbo = score(mean_field, "get_elbo")
    reconstruction = score(mean_field, "get_reconstruction_error")
    expected = basal_kl(mean_field) + global_share(mean_field)
    # Variances of 20,000 draws are off by 1 %, hence divergences by 0.01 per dimension.
    np.testing.assert_allclose(-elbo - reconstruction, expected, atol=0.1)
    assert global_share(mean_field)[members_of(mean_field).sum(axis=1) == 2].min() > 0.3


def test_global_terms_are_weighed_by_training_cells_whichever_cells_are_scored(mean_field):
    whole = score(mean_field, "get_elbo", n_samples=500)
    held_out = mean_field.validation_indices
    assert len(held_out) > 5
    some = score(mean_field, "get_elbo", indices=held_out, n_samples=500)
    repeats = [score(mean_field, "get_elbo", seed=seed) for seed in range(20)]
    error = np.std(repeats, axis=0)[held_out] * (2 * 5 / 500) ** 0.5
    assert_within_error(some, whole[held_out], error)
    alone = mean_field.adata[held_out].copy()
    other = score(mean_field, "get_elbo", alone, n_samples=500)
    assert_within_error(other, whole[held_out], error)


@pytest.mark.parametrize("name", SCORES)
def test_the_mean_is_that_of_the_cells(any_variant, name):
    cells = score(any_variant, name)
    mean = score(any_variant, name, return_mean=True)
    assert isinstance(mean, float)
    assert mean == pytest.approx(cells.mean(), rel=1e-6)
    assert cells.shape == (any_variant.adata.n_obs,)


@pytest.mark.parametrize("name", SCORES)
def test_scores_do_not_depend_on_mini_batches(any_variant, name):
    settings = {"indices": [3, 90, 17, 60, 8, 41], "n_samples": 40}
    one = np.stack([score(any_variant, name, seed=s, **settings) for s in range(25)])
    other = np.stack(
        [score(any_variant, name, seed=50 + s, batch_size=2, **settings) for s in range(25)]
    )
    error = np.hypot(one.std(axis=0), other.std(axis=0)) / 25**0.5
    assert_within_error(one.mean(axis=0), other.mean(axis=0), error)
    assert np.ptp(one.mean(axis=0)) > 5 * np.median(error)


def test_one_importance_sample_estimates_the_elbo_without_global_terms(mean_field):
    bounds = np.stack([score(mean_field, "get_iwelbo", n_samples=1, seed=s) for s in range(300)])
    elbo = score(mean_field, "get_elbo", n_samples=300) + global_share(mean_field)
    assert_within_error(bounds.mean(axis=0), elbo, bounds.std(axis=0) * (2 / 300) ** 0.5)


def test_the_bound_rises_with_the_number_of_samples(any_variant):
    means = [
        np.mean([score(any_variant, "get_iwelbo", n_samples=n, seed=s).mean() for s in range(10)])
        for n in (1, 5, 50)
    ]
    assert means[0] + 0.1 < means[1]
    assert means[1] + 0.1 < means[2]
    elbo = score(any_variant, "get_elbo", n_samples=50).mean()
    assert elbo < means[1]


def test_masks_and_effects_are_drawn_once_for_all_cells():
    model = train_small(small_screen(), **VARIANTS["mean field"])
    with torch.no_grad():
        model.module.encoder.head.log_variance.bias.fill_(-30)
        model.module.encoder.head.log_variance.weight.zero_()
    cell = int(np.flatnonzero(members_of(model).sum(axis=1) == 2)[0])
    settings = {"indices": [cell] * 6, "batch_size": 1, "n_samples": 2}
    bounds = np.stack([score(model, "get_iwelbo", seed=seed, **settings) for seed in range(10)])
    assert bounds.std(axis=1).max() < 0.25 * bounds.mean(axis=1).std()


class LinearGaussian:
    """A model whose marginal likelihood is known: x = V (z + shift) + b + noise, z ~ Normal(0, I).

    The posterior of z_basal is not the best: Normal(mean, variance) for every cell, or, where the
    encoder sees the shift, Normal(mean - shift, variance).
    """

    noise = np.array([0.8, 1.0, 1.3])

    def __init__(self, variant, mean, variance):
        adata = small_screen(n_genes=3)
        rng = np.random.default_rng(0)
        self.weight, self.bias = rng.normal(size=(3, N_LATENT)), rng.normal(size=3)
        adata.layers["linear"] = self.bias + rng.normal(scale=2, size=(adata.n_obs, 3))
        self.model = train_small(
            adata, {"layer": "linear"}, gene_likelihood="normal", **VARIANTS[variant]
        )
        make_decoder_linear(self.model, self.weight, self.bias)
        set_effects(self.model, EFFECTS)
        head = self.model.module.encoder.head
        with torch.no_grad():
            head.loc.weight.zero_()
            head.log_variance.weight.zero_()
            head.loc.bias.fill_(mean)
            head.log_variance.bias.fill_(np.log(variance - 1e-4))
            self.model.module.likelihood.log_scale.copy_(torch.as_tensor(np.log(self.noise)))
        shifts = members_of(self.model) @ EFFECTS
        self.mean = mean - (shifts if variant == "correlated basal" else 0 * shifts)
        self.variance = variance
        self.residual = adata.layers["linear"] - shifts @ self.weight.T - self.bias
        """Expression less what is expected at z_basal = 0."""

    def log_marginal_likelihood(self):
        covariance = self.weight @ self.weight.T + np.diag(self.noise**2)
        return stats.multivariate_normal(np.zeros(3), covariance).logpdf(self.residual)

    def reconstruction_error(self):
        """Minus the expected log likelihood under the posterior."""
        log_prob = stats.norm(0, self.noise).logpdf(self.residual - self.mean @ self.weight.T)
        spread = self.variance * (self.weight**2).sum(axis=1) / self.noise**2
        return -log_prob.sum(axis=1) + 0.5 * spread.sum()

    def basal_kl(self):
        excess = self.mean**2 + self.variance - 1 - np.log(self.variance)
        return 0.5 * excess.sum(axis=1)


@pytest.mark.parametrize(
    ("variant", "mean", "variance"),
    [("mean field", 0.0, 1.0), ("mean field", 0.2, 1.5), ("correlated basal", 0.2, 1.5)],
)
def test_the_bound_approaches_the_exact_marginal_likelihood(monkeypatch, variant, mean, variance):
    case = LinearGaussian(variant, mean, variance)
    exact = case.log_marginal_likelihood()
    assert np.ptp(exact) > 1
    bound = score(case.model, "get_iwelbo", n_samples=20_000)
    np.testing.assert_allclose(bound, exact, atol=1.5)
    assert np.median(np.abs(bound - exact)) < 0.03
    # Many samples are computed in parts.
    monkeypatch.setattr("scvi_sams.model._cells._MAX_ELEMENTS", 3 * 128 * 700)
    bound = score(case.model, "get_iwelbo", n_samples=20_000, seed=1)
    assert np.median(np.abs(bound - exact)) < 0.03


@pytest.mark.parametrize("variant", ["mean field", "correlated basal"])
def test_the_elbo_of_a_linear_model_has_a_closed_form(variant):
    case = LinearGaussian(variant, 0.2, 0.6)
    repeats = np.stack(
        [score(case.model, "get_reconstruction_error", n_samples=200, seed=s) for s in range(40)]
    )
    assert_within_error(
        repeats.mean(axis=0), case.reconstruction_error(), repeats.std(axis=0) / 39**0.5
    )
    elbo = score(case.model, "get_elbo", n_samples=200, seed=0)
    expected = -repeats[0] - case.basal_kl() - global_share(case.model)
    np.testing.assert_allclose(elbo, expected, rtol=1e-4, atol=1e-3)
    assert (elbo < case.log_marginal_likelihood()).all()


@pytest.mark.parametrize("name", SCORES)
def test_values_are_written_to_obs_with_nan_for_other_cells(name):
    model = train_small(small_screen())
    key = name.replace("get_", "sams_")
    columns = set(model.adata.obs)
    score(model, name)
    assert set(model.adata.obs) == columns

    torch.manual_seed(0)
    values = getattr(model, name)(indices=[9, 2, 30], return_mean=False)
    written = model.adata.obs[key].to_numpy()
    np.testing.assert_array_equal(written[[9, 2, 30]], values)
    assert np.isnan(np.delete(written, [9, 2, 30])).all()
    getattr(model, name)()
    before = model.adata.obs[key].to_numpy(copy=True)
    values = getattr(model, name)(indices=[9, 2, 30], return_mean=False)
    now = model.adata.obs[key].to_numpy()
    np.testing.assert_array_equal(now[[9, 2, 30]], values)
    np.testing.assert_array_equal(np.delete(now, [9, 2, 30]), np.delete(before, [9, 2, 30]))
    torch.manual_seed(0)
    getattr(model, name)(key_added="own")
    np.testing.assert_array_equal(model.adata.obs["own"], score(model, name))


def test_cells_that_fit_worse_score_worse(default_model):
    """Counts shuffled among genes cannot be as likely as the counts."""
    shuffled = default_model.adata.copy()
    rng = np.random.default_rng(0)
    shuffled.X = rng.permuted(shuffled.X.toarray(), axis=1)
    for name, sign in (("get_elbo", 1), ("get_iwelbo", 1), ("get_reconstruction_error", -1)):
        own = score(default_model, name).mean()
        assert sign * (own - score(default_model, name, shuffled).mean()) > 1
