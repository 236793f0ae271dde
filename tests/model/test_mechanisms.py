"""Masks and effects: closed forms, agreement with draws from the posterior, what is written."""

import copy

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from model.builders import N_LATENT, VARIANTS, assert_within_error, small_screen, train_small

NAMES = ["P001", "P002", "P003", "P004"]
COLUMNS = ["latent_0", "latent_1", "latent_2", "latent_3"]
N_DRAWS = 20_000
N_GETTER_DRAWS = 500


def drawn_shifts(model):
    torch.manual_seed(0)
    with torch.no_grad():
        draw = model.module.global_posterior(torch.arange(len(NAMES)), N_DRAWS)
    return draw.shifts.numpy().astype(np.float64)


def moments_and_errors(draws):
    """Mean and variance of draws, and the error of both times the root of the number of draws."""
    mean = draws.mean(axis=0)
    squares = (draws - mean) ** 2
    return mean, squares.mean(axis=0), draws.std(axis=0), squares.std(axis=0)


def test_masks_are_inclusion_probabilities(any_variant):
    masks = any_variant.get_perturbation_masks(key_added=None)
    logits = any_variant.module.masks.logits.detach().numpy()
    np.testing.assert_allclose(masks, 1 / (1 + np.exp(-logits)), rtol=1e-5)
    assert masks.to_numpy().min() >= 0
    assert masks.to_numpy().max() <= 1
    assert list(masks.index) == NAMES == any_variant.perturbations
    assert list(masks.columns) == COLUMNS
    assert masks.index.name == "perturbation"


def test_masks_are_how_often_an_effect_is_drawn(any_variant):
    masks = any_variant.get_perturbation_masks(key_added=None).to_numpy()
    share = (drawn_shifts(any_variant) != 0).mean(axis=0)
    assert_within_error(share, masks, np.sqrt(masks * (1 - masks) / N_DRAWS))


def test_effects_are_the_moments_of_draws(any_variant):
    effects = any_variant.get_perturbation_effects(key_added=None)
    mean, variance, error_of_mean, error_of_variance = moments_and_errors(drawn_shifts(any_variant))
    # The getter itself averages over draws where effects depend on masks.
    per_draw = (1 / N_DRAWS + 1 / N_GETTER_DRAWS) ** 0.5
    assert_within_error(effects.mean, mean, error_of_mean * per_draw)
    assert_within_error(effects.sd**2, variance, error_of_variance * per_draw)
    assert list(effects.mean.index) == NAMES
    assert list(effects.sd.columns) == COLUMNS


def test_mean_field_effects_have_exact_moments(mean_field):
    module = mean_field.module
    loc = module.effects.loc.detach().numpy().astype(np.float64)
    scale = module.effects.log_scale.detach().exp().numpy().astype(np.float64)
    on = 1 / (1 + np.exp(-module.masks.logits.detach().numpy().astype(np.float64)))
    effects = mean_field.get_perturbation_effects(key_added=None)
    np.testing.assert_allclose(effects.mean, on * loc, atol=1e-5)
    np.testing.assert_allclose(
        effects.sd, np.sqrt(on * scale**2 + on * (1 - on) * loc**2), rtol=1e-4
    )


def test_effects_are_the_same_in_each_call_and_leave_the_random_state_alone(any_variant):
    torch.manual_seed(1)
    first = any_variant.get_perturbation_effects(key_added=None)
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    second = any_variant.get_perturbation_effects(key_added=None)
    pd.testing.assert_frame_equal(first.mean, second.mean)
    pd.testing.assert_frame_equal(first.sd, second.sd)


def test_effects_do_not_depend_on_how_many_rows_are_held_in_memory(any_variant, monkeypatch):
    whole = any_variant.get_perturbation_effects(key_added=None)
    monkeypatch.setattr("scvi_sams.module._effect_moments._ROWS_PER_CHUNK", 3)
    # A copy knows no moments yet.
    monkeypatch.setattr(any_variant, "module", copy.deepcopy(any_variant.module))
    parts = any_variant.get_perturbation_effects(key_added=None)
    np.testing.assert_allclose(parts.mean, whole.mean, atol=1e-6)
    np.testing.assert_allclose(parts.sd, whole.sd, atol=1e-6)


@pytest.mark.parametrize("variant", ["mean field", "both correlated"])
def test_tables_in_uns_survive_a_file(tmp_path, variant):
    model = train_small(small_screen(), **VARIANTS[variant])
    masks = model.get_perturbation_masks()
    effects = model.get_perturbation_effects()
    model.get_perturbation_masks(key_added="again")
    model.adata.write_h5ad(tmp_path / "screen.h5ad")
    read = ad.read_h5ad(tmp_path / "screen.h5ad").uns
    for written in (read["sams_masks"], read["again"]):
        assert isinstance(written, pd.DataFrame)
        pd.testing.assert_frame_equal(
            written, masks, check_index_type=False, check_column_type=False
        )
    for name in ("mean", "sd"):
        pd.testing.assert_frame_equal(
            read["sams_effects"][name],
            getattr(effects, name),
            check_index_type=False,
            check_column_type=False,
        )


def test_no_key_no_change():
    model = train_small(small_screen())
    before = set(model.adata.uns)
    model.get_perturbation_masks(key_added=None)
    model.get_perturbation_effects(key_added=None)
    assert set(model.adata.uns) == before


def test_what_was_written_does_not_change_with_the_returned_table():
    model = train_small(small_screen())
    masks = model.get_perturbation_masks()
    effects = model.get_perturbation_effects()
    before = masks.copy(), effects.mean.copy()
    masks.iloc[:] = 7
    effects.mean.iloc[:] = 7
    pd.testing.assert_frame_equal(model.adata.uns["sams_masks"], before[0])
    pd.testing.assert_frame_equal(model.adata.uns["sams_effects"]["mean"], before[1])


def test_masks_start_at_the_initial_probability_and_effects_at_zero_mean():
    model = train_small(
        small_screen(),
        max_epochs=1,
        spread=False,
        train={"plan_kwargs": {"lr": 0.0, "table_lr": 0.0}},
        mask_initial_probability=0.2,
        **VARIANTS["mean field"],
    )
    masks = model.get_perturbation_masks(key_added=None)
    np.testing.assert_allclose(masks, np.full((len(NAMES), N_LATENT), 0.2), rtol=1e-5)
    assert (model.get_perturbation_effects(key_added=None).mean == 0).all(axis=None)
