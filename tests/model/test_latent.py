"""Latent representation: which cell gets which row, and what basal and perturbed differ by."""

import anndata as ad
import numpy as np
import pytest
import torch
from scipy import sparse

from model.builders import TRAINING, assert_within_error, shift_of, small_screen, train_small
from scvi_sams.exceptions import MissingKeyError, SAMSError, UnknownPerturbationError

REPRESENTATIONS = pytest.mark.parametrize("representation", ["basal", "perturbed"])


def latent(model, *args, **kwargs):
    return model.get_latent_representation(*args, key_added=None, **kwargs)


def snapshot(adata):
    return {
        # Some versions of anndata list X among the layers, as None.
        name: {key: np.array(slot[key], copy=True) for key in slot if key is not None}
        for name, slot in {"obs": adata.obs, "obsm": adata.obsm, "layers": adata.layers}.items()
    } | {"uns": set(adata.uns)}


def shuffled_cells(model, seed=0):
    return np.random.default_rng(seed).permutation(model.adata.n_obs)


@REPRESENTATIONS
def test_rows_follow_indices(any_variant, representation):
    every = latent(any_variant, representation=representation)
    order = shuffled_cells(any_variant)
    assert np.abs(every - every[order]).max() > 0.5
    for indices in (order, order[:7], np.array([5, 2, 5, -1]), list(order[:3])):
        some = latent(any_variant, indices=indices, representation=representation)
        np.testing.assert_allclose(some, every[indices], atol=1e-5)


def test_a_boolean_index_selects_in_order_of_the_cells(default_model):
    every = latent(default_model)
    mask = default_model.adata.obs["perturbation"].isin(["P001", "control"]).to_numpy()
    np.testing.assert_allclose(latent(default_model, indices=mask), every[mask], atol=1e-5)


@REPRESENTATIONS
def test_a_cell_does_not_depend_on_its_mini_batch(any_variant, representation):
    every = latent(any_variant, representation=representation)
    small_batches = latent(any_variant, representation=representation, batch_size=7)
    np.testing.assert_allclose(small_batches, every, atol=1e-5)


@REPRESENTATIONS
def test_a_cell_does_not_depend_on_the_data_it_comes_with(any_variant, representation):
    every = latent(any_variant, representation=representation)
    for cells in (shuffled_cells(any_variant), np.array([11]), shuffled_cells(any_variant)[:9]):
        other = any_variant.adata[cells].copy()
        found = latent(any_variant, other, representation=representation)
        np.testing.assert_allclose(found, every[cells], atol=1e-5)


def test_other_data_may_spell_combinations_otherwise(default_model):
    every = latent(default_model, representation="perturbed")
    other = default_model.adata.copy()
    labels = other.obs["perturbation"].astype(str)
    assert labels.str.contains("+", regex=False).any()
    other.obs["perturbation"] = ["+".join(reversed(label.split("+"))) for label in labels]
    np.testing.assert_allclose(
        latent(default_model, other, representation="perturbed"), every, atol=1e-5
    )


def test_perturbed_minus_basal_is_the_sum_of_mean_effects(any_variant):
    difference = latent(any_variant, representation="perturbed") - latent(any_variant)
    labels = any_variant.adata.obs["perturbation"].astype(str)
    expected = np.stack([shift_of(any_variant, label) for label in labels])
    np.testing.assert_allclose(difference, expected, atol=1e-5)
    assert (difference[labels == "control"] == 0).all()
    assert np.abs(difference[labels != "control"]).max() > 0.5


def test_effects_are_weighted_by_dose(dosage_model):
    difference = latent(dosage_model, representation="perturbed") - latent(dosage_model)
    obs = dosage_model.adata.obs
    rows = zip(obs["perturbation"].astype(str), obs["dosage"].astype(str), strict=True)
    expected = np.stack([shift_of(dosage_model, label, dosage) for label, dosage in rows])
    np.testing.assert_allclose(difference, expected, atol=1e-5)


@REPRESENTATIONS
def test_the_mean_is_what_draws_average_to(mean_field, representation):
    torch.manual_seed(0)
    draws = latent(mean_field, representation=representation, give_mean=False, n_samples=3000)
    assert draws.shape == (3000, mean_field.adata.n_obs, 4)
    error = draws.std(axis=0) / 3000**0.5
    assert_within_error(
        draws.mean(axis=0), latent(mean_field, representation=representation), error
    )


def test_cells_share_draws_of_masks_and_effects(any_variant):
    """With the same seed the basal draws are the same, and what is left are those of effects."""
    mask = (any_variant.adata.obs["perturbation"] == "P002").to_numpy()
    arguments = {"indices": mask, "give_mean": False, "n_samples": 4000}
    torch.manual_seed(0)
    basal = latent(any_variant, **arguments)
    torch.manual_seed(0)
    shift = latent(any_variant, representation="perturbed", **arguments) - basal
    np.testing.assert_allclose(shift, np.repeat(shift[:, :1], mask.sum(), axis=1), atol=1e-3)
    effects = any_variant.get_perturbation_effects(key_added=None)
    shift = shift[:, 0].astype(np.float64)
    # Means of correlated effects are themselves averages over 500 draws.
    error = shift.std(axis=0) * (1 / 4000 + 1 / 500) ** 0.5
    assert_within_error(shift.mean(axis=0), effects.mean.loc["P002"], error)


def test_draws_at_mean_shifts_are_of_the_basal_state_alone(any_variant):
    arguments = {"give_mean": False, "mean_shifts": True, "n_samples": 500}
    torch.manual_seed(0)
    basal = latent(any_variant, **arguments)
    torch.manual_seed(0)
    shift = latent(any_variant, representation="perturbed", **arguments) - basal
    mean_shift = latent(any_variant, representation="perturbed") - latent(any_variant)
    np.testing.assert_allclose(shift, np.repeat(mean_shift[None], 500, axis=0), atol=1e-4)
    # Normal(mean, sd) of each cell: its mean is that of give_mean, and its spread is not nothing.
    error = basal.std(axis=0) / 500**0.5
    assert_within_error(basal.mean(axis=0), latent(any_variant), error)
    assert basal.std(axis=0).min() > 0.01


def test_draws_differ_and_one_draw_has_no_axis_of_draws(default_model):
    torch.manual_seed(0)
    one = latent(default_model, give_mean=False)
    two = latent(default_model, give_mean=False, n_samples=2, indices=[3, 1])
    assert one.shape == (default_model.adata.n_obs, 4)
    assert two.shape == (2, 2, 4)
    assert (two[0] != two[1]).all()
    assert (one != latent(default_model)).any()


def test_results_are_written_to_obsm_with_nan_for_other_cells():
    model = train_small(small_screen())
    basal = model.get_latent_representation()
    perturbed = model.get_latent_representation(representation="perturbed")
    np.testing.assert_array_equal(model.adata.obsm["X_sams"], basal)
    np.testing.assert_array_equal(model.adata.obsm["X_sams_perturbed"], perturbed)

    indices = [9, 4, 20]
    some = model.get_latent_representation(indices=indices, key_added="some")
    written = model.adata.obsm["some"]
    np.testing.assert_array_equal(written[indices], some)
    others = np.setdiff1d(np.arange(model.adata.n_obs), indices)
    assert np.isnan(written[others]).all()

    draws = model.get_latent_representation(indices=indices, give_mean=False)
    written = model.adata.obsm["X_sams"]
    np.testing.assert_array_equal(written[indices], draws)
    np.testing.assert_array_equal(written[others], basal[others])
    model.get_latent_representation()

    other = model.adata[:5].copy()
    del other.obsm["X_sams"]
    found = model.get_latent_representation(other)
    np.testing.assert_array_equal(other.obsm["X_sams"], found)
    np.testing.assert_array_equal(model.adata.obsm["X_sams"], basal)


def test_what_was_written_does_not_change_with_the_returned_array():
    model = train_small(small_screen())
    basal = model.get_latent_representation()
    before = basal.copy()
    basal[:] = 0
    np.testing.assert_array_equal(model.adata.obsm["X_sams"], before)


def test_no_key_no_change():
    model = train_small(small_screen())
    before = snapshot(model.adata)
    latent(model, indices=[3, 2])
    latent(model, representation="perturbed", give_mean=False, n_samples=2)
    after = snapshot(model.adata)
    assert after["uns"] == before["uns"]
    for slot in ("obs", "obsm", "layers"):
        assert after[slot].keys() == before[slot].keys()
        for key, value in before[slot].items():
            np.testing.assert_array_equal(after[slot][key], value)


@pytest.mark.parametrize("dense", [False, True], ids=["csr", "dense"])
def test_backed_data_gives_the_same(default_model, tmp_path, dense):
    adata = default_model.adata.copy()
    if dense:
        adata.X = adata.X.toarray()
    assert sparse.issparse(adata.X) != dense
    adata.write_h5ad(tmp_path / "screen.h5ad")
    backed = ad.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    order = shuffled_cells(default_model)[:40]
    found = latent(default_model, backed, indices=order, batch_size=16)
    np.testing.assert_allclose(found, latent(default_model, indices=order), atol=1e-5)
    backed.file.close()


def test_an_unknown_representation_is_refused(default_model):
    with pytest.raises(SAMSError, match="shifted"):
        latent(default_model, representation="shifted")


def test_unknown_perturbations_are_named_and_leave_the_data_as_it_was(default_model):
    other = default_model.adata[:6].copy()
    other.obs["perturbation"] = ["control", "P001", "P1", "P9+P001", "control", "P002"]
    for key in [key for key in other.obsm if key.startswith("_scvi")]:
        del other.obsm[key]
    for key in [key for key in other.uns if key.startswith("_scvi")]:
        del other.uns[key]
    before = snapshot(other)
    with pytest.raises(UnknownPerturbationError, match="'P1', 'P9'"):
        default_model.get_latent_representation(other)
    after = snapshot(other)
    assert after["uns"] == before["uns"]
    assert {slot: after[slot].keys() for slot in ("obs", "obsm")} == {
        slot: before[slot].keys() for slot in ("obs", "obsm")
    }


def test_genes_in_another_order_are_refused(default_model):
    with pytest.raises(MissingKeyError, match="order"):
        latent(default_model, default_model.adata[:, ::-1].copy())


def test_rows_of_one_model_do_not_mix_with_those_of_another():
    adata = small_screen()
    first = train_small(adata)
    first.get_latent_representation()
    second = train_small(adata, max_epochs=3)
    some = second.get_latent_representation(indices=[0, 1])
    np.testing.assert_array_equal(adata.obsm["X_sams"][:2], some)
    assert np.isnan(adata.obsm["X_sams"][2:]).all()
    second.train(max_epochs=1, **TRAINING)
    second.get_latent_representation(indices=[5])
    assert np.isnan(np.delete(adata.obsm["X_sams"], 5, axis=0)).all()
