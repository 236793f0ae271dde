"""Gene programs of latent dimensions: known Jacobians, invariances, what is written and refused."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from model.builders import (
    COVARIATES,
    N_LATENT,
    SHIFTS_ONLY,
    copy_without_registration,
    covariates_of,
    decode_shares,
    linear_normal,
    make_decoder_linear,
    shift_of,
    small_screen,
    train_small,
)
from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus
from scvi_sams.exceptions import SAMSError
from scvi_sams.module._likelihoods import Likelihood


def programs(model, *args, **kwargs):
    return model.get_latent_programs(*args, **({"n_cells": None, "key_added": None} | kwargs))


def basal_states(model, adata=None):
    return model.get_latent_representation(adata, key_added=None).astype(np.float64)


@pytest.mark.parametrize("model_cls", [SAMSVAE, CPAVAE, SVAEPlus])
def test_programs_of_a_linear_decoder_are_its_weights(model_cls):
    model, weight = linear_normal(model_cls)
    found = programs(model)
    np.testing.assert_allclose(found, weight, rtol=1e-4, atol=1e-5)
    assert list(found.index) == list(model.adata.var_names)
    assert list(found.columns) == [f"latent_{i}" for i in range(N_LATENT)]
    np.testing.assert_allclose(programs(model, n_cells=7), weight, rtol=1e-4, atol=1e-5)


def test_programs_of_a_softmax_are_its_jacobian():
    """d log2(1 + T p_g) / dz = T p_g (W_g - sum_h p_h W_h) / (1 + T p_g) / ln 2, per cell."""
    model = train_small(small_screen(), **SHIFTS_ONLY)
    weight = np.random.default_rng(6).normal(size=(model.adata.n_vars, N_LATENT))
    make_decoder_linear(model, weight, np.linspace(-1, 1, model.adata.n_vars))
    labels = model.adata.obs["perturbation"]
    z = basal_states(model) + np.stack([shift_of(model, label) for label in labels])
    share = decode_shares(model, z)
    rate = 1e3 * share
    centred = weight[None] - (share @ weight)[:, None]
    slope = (rate / (1 + rate) / np.log(2))[..., None] * centred
    np.testing.assert_allclose(
        programs(model, target_sum=1e3), slope.mean(axis=0), rtol=1e-3, atol=1e-4
    )
    mean = (rate[..., None] * centred).mean(axis=0)
    np.testing.assert_allclose(
        programs(model, target_sum=1e3, method="mean"), mean, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("setup", [None, COVARIATES], ids=["none", "covariates"])
def test_programs_are_small_differences(setup):
    model = train_small(small_screen(), setup, **SHIFTS_ONLY)
    obs = model.adata.obs
    z = basal_states(model) + np.stack([shift_of(model, label) for label in obs["perturbation"]])
    covariates = None if setup is None else covariates_of(obs)

    def expression(states):
        return np.log2(1 + 1e4 * decode_shares(model, states, covariates))

    # A unit of the decoder that bends within a step would blur the difference.
    step = 1e-5
    steps = step * np.eye(N_LATENT)
    expected = np.stack(
        [((expression(z + s) - expression(z - s)) / (2 * step)).mean(axis=0) for s in steps], axis=1
    )
    np.testing.assert_allclose(programs(model), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["lograte", "mean"])
@pytest.mark.parametrize(
    ("kind", "clamped"),
    [("nb", False), ("size factor", False), ("size factor", True), ("normal", False)],
    ids=["shares", "rates", "rates at their bound", "values"],
)
def test_programs_summed_over_cells_first_are_those_of_the_whole(
    kind, clamped, method, monkeypatch
):
    """Both ways that programs are computed in are the derivative of the same function."""
    adata = small_screen()
    if kind == "normal":
        model, _ = linear_normal(SAMSVAE)
    else:
        setup = {}
        if kind == "size factor":
            adata.obs["size"] = np.asarray(adata.X.sum(axis=1)).ravel()
            setup = {"size_factor_key": "size"}
        model = train_small(adata, setup, direct_effects=True)
    if clamped:
        with torch.no_grad():
            model.module.decoder.to_genes.bias[:5] = 1e3
    found = programs(model, method=method)
    monkeypatch.setattr(Likelihood, "has_rate_slope", False)
    expected = programs(model, method=method)
    assert (expected.abs().max() > 0).all()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().max())
    assert bool((found.iloc[:5] == 0).all(axis=None)) == clamped


def test_the_order_and_number_of_batches_of_cells_play_no_part(default_model):
    whole = programs(default_model)
    order = np.random.default_rng(0).permutation(default_model.adata.n_obs)
    permuted = copy_without_registration(default_model.adata)[order].copy()
    np.testing.assert_allclose(programs(default_model, permuted), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(programs(default_model, batch_size=7), whole, rtol=1e-5, atol=1e-6)


def test_a_program_is_the_mean_over_its_cells(default_model):
    cells = np.arange(default_model.adata.n_obs)
    parts = [
        programs(default_model, indices=cells < 50),
        programs(default_model, indices=cells[50:]),
    ]
    n_rest = len(cells) - 50
    mean = (50 * parts[0] + n_rest * parts[1]) / len(cells)
    np.testing.assert_allclose(programs(default_model), mean, rtol=1e-4, atol=1e-5)


def test_some_cells_are_drawn_the_same_way_in_each_call(default_model):
    first = programs(default_model, n_cells=20)
    pd.testing.assert_frame_equal(first, programs(default_model, n_cells=20))
    assert np.abs(first - programs(default_model)).max(axis=None) > 1e-3


def test_a_dimension_that_is_switched_off_has_no_program():
    model = train_small(small_screen())
    model.module.switch_off_latents(torch.tensor([False, True, False, False]))
    found = programs(model)
    assert (found["latent_1"] == 0).all()
    assert (found.drop(columns="latent_1").abs().max() > 0).all()


def test_programs_are_written_to_varm_and_survive_a_file(tmp_path):
    model = train_small(small_screen())
    found = model.get_latent_programs()
    before = found.copy()
    model.adata.write_h5ad(tmp_path / "screen.h5ad")
    read = ad.read_h5ad(tmp_path / "screen.h5ad").varm["sams_programs"]
    pd.testing.assert_frame_equal(read, before, check_index_type=False, check_column_type=False)
    found.iloc[:] = 7
    pd.testing.assert_frame_equal(model.adata.varm["sams_programs"], before)


def test_no_key_no_change(default_model):
    programs(default_model)
    assert "sams_programs" not in default_model.adata.varm


def test_wrong_input_is_refused(default_model):
    with pytest.raises(SAMSError, match="`method` must be one of"):
        programs(default_model, method="lognorm")
    with pytest.raises(SAMSError, match="no cells"):
        programs(default_model, indices=[])


def test_perturbations_that_are_no_latent_shifts_have_no_programs():
    assert not hasattr(ConditionalVAE, "get_latent_programs")
