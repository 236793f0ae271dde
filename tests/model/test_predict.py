"""Counterfactual cells: whose basal state, whose perturbations, and what X holds."""

import anndata as ad
import numpy as np
import pytest
import torch
from scipy import sparse

from model.builders import (
    COVARIATES,
    N_LATENT,
    VARIANTS,
    assert_within_error,
    covariates_of,
    decode,
    decode_shares,
    make_decoder_linear,
    set_effects,
    small_screen,
    train_small,
)
from scvi_sams.exceptions import SAMSError, UnknownPerturbationError

LABELS = ["P003", "control", "P002+P004"]
EFFECTS = np.random.default_rng(5).normal(size=(4, N_LATENT))
N_REPEATS = 1500
"""How often a cell is asked for, where an average over its posterior is needed."""


def predict(model, labels=LABELS, *args, seed=0, **kwargs):
    torch.manual_seed(seed)
    return model.predict(labels, *args, **kwargs)


def cells_of(model, label):
    return np.flatnonzero(model.adata.obs["perturbation"] == label)


def drawn_basal(model, cell):
    torch.manual_seed(9)
    return model.get_latent_representation(
        indices=[cell], give_mean=False, n_samples=N_REPEATS, key_added=None
    )[:, 0]


def assert_same_average(values, expected):
    """Compare averages over two independent sets of draws (rows)."""
    error = np.hypot(values.std(axis=0), expected.std(axis=0)) / N_REPEATS**0.5
    assert_within_error(values.mean(axis=0), expected.mean(axis=0), error)


def test_rows_are_labels_then_cells(default_model):
    cells = [7, 3, 40]
    found = predict(default_model, indices=cells)
    names = list(default_model.adata.obs_names[cells])
    assert found.shape == (9, default_model.adata.n_vars)
    assert list(found.obs["source_cell"]) == names * 3
    assert list(found.obs["perturbation"].astype(str)) == [name for name in LABELS for _ in cells]
    assert list(found.var_names) == list(default_model.adata.var_names)
    assert found.obs_names.is_unique


def test_names_stay_unique_where_a_cell_is_asked_for_twice(default_model):
    found = predict(default_model, ["P001"], indices=[7, 7, 3])
    assert found.obs_names.is_unique
    names = list(default_model.adata.obs_names[[7, 7, 3]])
    assert list(found.obs["source_cell"]) == names


def test_control_cells_of_the_training_data_by_default(default_model):
    found = predict(default_model, ["P001"])
    names = default_model.adata.obs_names[cells_of(default_model, "control")]
    assert list(found.obs["source_cell"]) == list(names)


def test_every_cell_of_other_data(default_model):
    other = default_model.adata[[4, 9, 2]].copy()
    found = predict(default_model, ["P001"], other)
    assert list(found.obs["source_cell"]) == list(other.obs_names)


@pytest.mark.parametrize("variant", ["mean field", "correlated basal"])
@pytest.mark.parametrize("own", ["control", "P001", "P001+P003"])
def test_asked_for_perturbations_take_the_place_of_the_own_ones(variant, own):
    """Basal draws of the cell plus the asked-for effects, decoded by hand."""
    model = train_small(small_screen(), **VARIANTS[variant])
    set_effects(model, EFFECTS)
    cell = cells_of(model, own)[0]
    asked = ["P002+P004", "control", "P001"]
    found = predict(model, asked, indices=[cell] * N_REPEATS, output="rate")
    found = found.X.reshape(3, N_REPEATS, -1)
    basal = drawn_basal(model, cell)
    for values, shift in zip(found, (EFFECTS[1] + EFFECTS[3], 0, EFFECTS[0]), strict=True):
        assert_same_average(values, decode_shares(model, basal + shift))


def test_asking_for_what_a_cell_has_gives_its_normalised_expression():
    model = train_small(small_screen(), COVARIATES, **VARIANTS["mean field"])
    set_effects(model, EFFECTS)
    for label in ("control", "P003"):
        cell = cells_of(model, label)[0]
        found = predict(model, [label], indices=[cell] * N_REPEATS, output="rate").X
        expression = model.get_normalized_expression(
            indices=[cell], n_samples=N_REPEATS, return_mean=False
        )[:, 0]
        assert_same_average(found, expression)


def test_cells_keep_their_own_covariates(covariate_model):
    cell = cells_of(covariate_model, "control")[1]
    found = predict(covariate_model, ["control"], indices=[cell] * N_REPEATS, output="rate").X
    own = covariates_of(covariate_model.adata.obs.iloc[[cell]])
    basal = drawn_basal(covariate_model, cell)
    assert_same_average(found, decode_shares(covariate_model, basal, own))
    without = decode_shares(covariate_model, basal, 0 * own)
    assert np.abs(without.mean(axis=0) - found.mean(axis=0)).max() > 0.01


def test_doses_scale_the_shift():
    adata = small_screen()
    model = train_small(
        adata, {"layer": "normalised"}, gene_likelihood="normal", **VARIANTS["mean field"]
    )
    weight = np.random.default_rng(6).normal(size=(adata.n_vars, N_LATENT))
    make_decoder_linear(model, weight, np.zeros(adata.n_vars))
    set_effects(model, EFFECTS)
    labels, doses = ["P001", "P004+P002", "control"], ["2", "0.5+3", "1"]
    doubled, mixed, none = predict(model, labels, dosages=doses, indices=[0], output="rate").X
    np.testing.assert_allclose(doubled - none, 2 * EFFECTS[0] @ weight.T, atol=1e-3)
    expected = (0.5 * EFFECTS[3] + 3 * EFFECTS[1]) @ weight.T
    np.testing.assert_allclose(mixed - none, expected, atol=1e-3)


def test_outputs_are_one_prediction_in_three_units(any_variant):
    rate = predict(any_variant, output="rate")
    np.testing.assert_allclose(rate.X.sum(axis=1), 1, rtol=1e-5)
    assert rate.X.min() >= 0
    lognorm = predict(any_variant, target_sum=500)
    np.testing.assert_allclose(lognorm.X, np.log1p(500 * rate.X), rtol=1e-5)
    assert lognorm.uns["prediction"]["output"] == "lognorm"
    assert lognorm.uns["prediction"]["target_sum"] == 500
    assert "natural" in lognorm.uns["prediction"]["log"]
    assert rate.uns["prediction"]["output"] == "rate"

    counts = predict(any_variant, output="counts")
    assert sparse.issparse(counts.X)
    assert (counts.X.data == np.rint(counts.X.data)).all()
    assert counts.X.data.min() >= 0
    assert counts.uns["prediction"]["output"] == "counts"


@pytest.mark.parametrize(
    ("setup", "likelihood"),
    [(None, "nb"), (None, "poisson"), ({"size_factor_key": "transcriptome"}, "nb")],
    ids=["nb", "poisson", "size factor"],
)
def test_counts_are_drawn_at_the_size_of_the_cell(setup, likelihood):
    model = train_small(small_screen(), setup, gene_likelihood=likelihood)
    cell = cells_of(model, "control")[0]
    size = model.adata.obs["transcriptome"].iloc[cell] if setup else model.adata.X[cell].sum()
    counts = predict(model, ["control"], indices=[cell] * N_REPEATS, output="counts").X.toarray()
    logits = decode(model, drawn_basal(model, cell))
    rate = np.exp(logits) if setup else decode_shares(model, drawn_basal(model, cell))
    assert_same_average(counts, size * rate)
    rates = predict(model, ["control"], indices=[cell] * N_REPEATS, output="rate").X
    assert_same_average(rates, rate)


def test_a_normal_likelihood_gives_means_and_draws(normal_model):
    cell = cells_of(normal_model, "control")[0]
    arguments = {"labels": ["control"], "indices": [cell] * N_REPEATS}
    mean = predict(normal_model, **arguments, output="rate").X
    drawn = predict(normal_model, **arguments, output="counts").X
    by_hand = decode(normal_model, drawn_basal(normal_model, cell))
    assert_same_average(mean, by_hand)
    assert_same_average(drawn, by_hand)
    scale = normal_model.module.likelihood.log_scale.detach().exp().numpy()
    # The spread of a variance over n draws is sqrt(2 / n) of it.
    np.testing.assert_allclose(drawn.var(axis=0), by_hand.var(axis=0) + scale**2, rtol=0.2)
    with pytest.raises(SAMSError, match="output='rate'"):
        predict(normal_model, ["P001"])


def test_each_cell_starts_from_its_own_basal_state():
    model = train_small(small_screen(), **VARIANTS["mean field"])
    set_effects(model, EFFECTS)
    with torch.no_grad():
        model.module.encoder.head.log_variance.bias.fill_(-30)
        model.module.encoder.head.log_variance.weight.zero_()
    cells = cells_of(model, "P001")
    found = predict(model, ["P002"], indices=cells, output="rate").X
    basal = model.get_latent_representation(indices=cells, key_added=None)
    expected = decode_shares(model, basal + EFFECTS[1])
    # What is left of the posterior is a standard deviation of 0.01.
    np.testing.assert_allclose(np.log(found), np.log(expected), atol=0.2)
    assert np.abs(np.log(expected) - np.log(expected[::-1])).max() > 1


def test_rows_do_not_depend_on_the_size_of_mini_batches():
    model = train_small(small_screen(), **VARIANTS["both correlated"])
    with torch.no_grad():
        model.module.encoder.head.log_variance.bias.fill_(-30)
        model.module.encoder.head.log_variance.weight.zero_()
    order = np.random.default_rng(0).permutation(model.adata.n_obs)[:30]
    whole = predict(model, indices=order, output="rate").X
    parts = predict(model, indices=order, output="rate", batch_size=4).X
    np.testing.assert_allclose(np.log(parts), np.log(whole), atol=0.3)


def test_a_seed_fixes_the_result(default_model):
    first = predict(default_model, ["P001"], seed=2)
    np.testing.assert_array_equal(predict(default_model, ["P001"], seed=2).X, first.X)
    assert (predict(default_model, ["P001"], seed=3).X != first.X).any()


def test_the_data_stays_as_it_was(default_model):
    adata = default_model.adata
    before = {name: set(getattr(adata, name)) for name in ("obs", "obsm", "uns", "layers")}
    predict(default_model)
    assert {name: set(getattr(adata, name)) for name in before} == before


@pytest.mark.parametrize("output", ["lognorm", "counts"])
def test_predictions_survive_a_file(default_model, tmp_path, output):
    found = predict(default_model, indices=[1, 2], output=output)
    found.write_h5ad(tmp_path / "predicted.h5ad")
    read = ad.read_h5ad(tmp_path / "predicted.h5ad")
    np.testing.assert_array_equal(read.to_df(), found.to_df())
    assert read.uns["prediction"]["output"] == output
    assert list(read.obs["source_cell"]) == list(found.obs["source_cell"])


def test_unknown_perturbations_and_outputs_are_refused(default_model):
    with pytest.raises(UnknownPerturbationError, match="'P9'"):
        predict(default_model, ["P001+P9"])
    with pytest.raises(SAMSError, match="normalised"):
        predict(default_model, ["P001"], output="normalised")
