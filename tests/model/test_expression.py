"""Normalised expression and posterior predictive draws against decoding by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

from model.builders import (
    assert_within_error,
    covariates_of,
    decode,
    decode_shares,
    small_screen,
    train_small,
)
from scvi_sams.exceptions import MissingKeyError

N_DRAWS = 2000
CELLS = [31, 4, 77, 100]


def expression(model, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return model.get_normalized_expression(*args, **kwargs)


def drawn_states(model, cells=CELLS):
    torch.manual_seed(9)
    return model.get_latent_representation(
        indices=cells,
        representation="perturbed",
        give_mean=False,
        n_samples=N_DRAWS,
        key_added=None,
    ).astype(np.float64)


def assert_same_average(values, expected):
    error = np.hypot(values.std(axis=0), expected.std(axis=0)) / N_DRAWS**0.5
    assert_within_error(values.mean(axis=0), expected.mean(axis=0), error)


def test_expression_is_decoded_from_the_perturbed_state(any_variant):
    found = expression(any_variant, indices=CELLS, n_samples=N_DRAWS, return_mean=False)
    assert found.shape == (N_DRAWS, len(CELLS), any_variant.adata.n_vars)
    assert_same_average(found, decode_shares(any_variant, drawn_states(any_variant)))


def test_the_mean_is_the_average_over_draws(default_model):
    draws = expression(default_model, indices=CELLS, n_samples=7, return_mean=False)
    mean = expression(default_model, indices=CELLS, n_samples=7)
    np.testing.assert_allclose(mean, draws.mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("library_size", [1.0, 1e4])
def test_expression_sums_to_the_library_size(any_variant, library_size):
    found = expression(any_variant, library_size=library_size, n_samples=2)
    np.testing.assert_allclose(found.sum(axis=1), library_size, rtol=1e-5)
    assert found.to_numpy().min() >= 0


def test_a_table_has_cells_and_genes_by_name(default_model):
    adata = default_model.adata
    genes = list(adata.var_names[[5, 0, 3]])
    found = expression(default_model, indices=CELLS, gene_list=genes)
    assert isinstance(found, pd.DataFrame)
    assert list(found.index) == list(adata.obs_names[CELLS])
    assert list(found.columns) == genes
    array = expression(default_model, indices=CELLS, gene_list=genes, return_numpy=True)
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, found)
    every = expression(default_model, indices=CELLS)
    np.testing.assert_allclose(every[genes], found, rtol=1e-5)


def test_rows_follow_indices(default_model):
    n_cells = default_model.adata.n_obs
    order = np.random.default_rng(0).permutation(n_cells)
    one = expression(default_model, n_samples=300)
    other = expression(default_model, indices=order, n_samples=300, batch_size=13, seed=1)
    pairs = zip(one.to_numpy()[order], other.to_numpy(), strict=True)
    matched = [np.corrcoef(*pair)[0, 1] for pair in pairs]
    assert np.min(matched) > 0.95
    assert list(other.index) == list(default_model.adata.obs_names[order])


@pytest.mark.parametrize("lane", ["lane_a", "lane_b"])
def test_transform_batch_changes_the_batch_and_nothing_else(covariate_model, lane):
    found = expression(
        covariate_model, indices=CELLS, transform_batch=lane, n_samples=N_DRAWS, return_mean=False
    )
    obs = covariate_model.adata.obs.iloc[CELLS]
    assert obs["lane"].nunique() == 2
    states = drawn_states(covariate_model)
    as_lane = covariates_of(obs.assign(lane=lane))
    assert_same_average(found, decode_shares(covariate_model, states, as_lane))

    own = expression(covariate_model, indices=CELLS, n_samples=N_DRAWS, return_mean=False)
    assert_same_average(own, decode_shares(covariate_model, states, covariates_of(obs)))
    same = (obs["lane"] == lane).to_numpy()
    np.testing.assert_allclose(found[:, same], own[:, same], rtol=1e-4)
    assert np.abs(found[:, ~same].mean(axis=0) - own[:, ~same].mean(axis=0)).max() > 0.01


def test_expression_per_unit_of_the_size_factor(size_factor_model):
    found = expression(
        size_factor_model, indices=CELLS, n_samples=N_DRAWS, return_mean=False, library_size=3.0
    )
    assert_same_average(
        found, 3 * np.exp(decode(size_factor_model, drawn_states(size_factor_model)))
    )


def test_a_normal_likelihood_is_not_scaled(normal_model):
    arguments = {"indices": CELLS, "n_samples": N_DRAWS, "return_mean": False}
    found = expression(normal_model, **arguments, library_size=1e4)
    np.testing.assert_array_equal(found, expression(normal_model, **arguments))
    assert_same_average(found, decode(normal_model, drawn_states(normal_model)))


def test_a_layer_is_written_only_if_asked_for():
    model = train_small(small_screen())
    layers = set(model.adata.layers)
    expression(model)
    assert set(model.adata.layers) == layers
    found = expression(model, indices=CELLS, key_added="denoised", return_numpy=True)
    written = model.adata.layers["denoised"]
    np.testing.assert_array_equal(written[CELLS], found)
    assert np.isnan(np.delete(written, CELLS, axis=0)).all()
    whole = expression(model, key_added="denoised")
    np.testing.assert_array_equal(model.adata.layers["denoised"], whole)
    some = expression(model, indices=[3], key_added="denoised", return_numpy=True)
    written = model.adata.layers["denoised"]
    np.testing.assert_array_equal(written[[3]], some)
    np.testing.assert_array_equal(np.delete(written, 3, axis=0), np.delete(whole, 3, axis=0))


def test_unknown_genes_and_batches_are_named(covariate_model):
    with pytest.raises(MissingKeyError, match="no_gene"):
        expression(covariate_model, gene_list=["gene_0001", "no_gene"])
    with pytest.raises(MissingKeyError, match="'lane_c'"):
        expression(covariate_model, transform_batch="lane_c")
    with pytest.raises(MissingKeyError, match="no_gene"):
        covariate_model.posterior_predictive_sample(gene_list=["no_gene"])


def predictive(model, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return model.posterior_predictive_sample(*args, **kwargs)


def observed_size(model, cells):
    return np.asarray(model.adata.X[cells].sum(axis=1)).ravel()


@pytest.mark.parametrize("name", ["mean_field", "poisson_model", "covariate_model"])
def test_predictive_counts_average_to_rate_times_size(request, name):
    model = request.getfixturevalue(name)
    drawn = predictive(model, indices=CELLS, n_samples=N_DRAWS)
    assert drawn.shape == (len(CELLS), model.adata.n_vars, N_DRAWS)
    assert (drawn == np.rint(drawn)).all()
    assert drawn.min() >= 0
    covariates = covariates_of(model.adata.obs.iloc[CELLS]) if name == "covariate_model" else None
    shares = decode_shares(model, drawn_states(model), covariates)
    means = observed_size(model, CELLS)[:, None] * shares
    assert_same_average(np.moveaxis(drawn, -1, 0), means)


def test_predictive_counts_of_a_size_factor_model(size_factor_model):
    drawn = predictive(size_factor_model, indices=CELLS, n_samples=N_DRAWS)
    size = size_factor_model.adata.obs["transcriptome"].to_numpy()[CELLS]
    rates = np.exp(decode(size_factor_model, drawn_states(size_factor_model)))
    assert_same_average(np.moveaxis(drawn, -1, 0), size[:, None] * rates)


def test_predictive_values_of_a_normal_likelihood_have_its_scale(normal_model):
    drawn = predictive(normal_model, indices=CELLS, n_samples=N_DRAWS)
    means = decode(normal_model, drawn_states(normal_model))
    assert_same_average(np.moveaxis(drawn, -1, 0), means)
    scale = normal_model.module.likelihood.log_scale.detach().exp().numpy()
    np.testing.assert_allclose(drawn.var(axis=-1), means.var(axis=0) + scale**2, rtol=0.2)


def test_predictive_genes_and_cells_are_those_asked_for(default_model):
    genes = list(default_model.adata.var_names[[5, 0]])
    every = predictive(default_model, indices=CELLS)
    assert every.shape == (len(CELLS), default_model.adata.n_vars)
    np.testing.assert_array_equal(
        predictive(default_model, indices=CELLS, gene_list=genes), every[:, [5, 0]]
    )
    low, high = np.argsort(observed_size(default_model, slice(None)))[[0, -1]]
    drawn = predictive(default_model, indices=[high, low], n_samples=50, batch_size=1)
    totals = drawn.sum(axis=1).mean(axis=-1)
    np.testing.assert_allclose(totals, observed_size(default_model, [high, low]), rtol=0.2)
