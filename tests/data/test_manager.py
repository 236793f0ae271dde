"""Registration that another tool wrote over, and registration from a saved registry."""

import numpy as np
import pandas as pd
import pytest
import scvi

from scvi_sams import SAMSVAE
from scvi_sams.data._field import registered_labels
from scvi_sams.exceptions import (
    InvalidCovariateError,
    InvalidDosageError,
    MissingKeyError,
    RegistrationError,
    SAMSError,
)

LABELS = ["control", "A", "B", "B+A"] * 6
CODES = [[-1, -1], [0, -1], [1, -1], [0, 1]] * 6


@pytest.fixture
def screen(make_screen):
    return make_screen(
        LABELS, batch=["x", "y"] * 12, plate=["r", "s", "t"] * 8, age=np.arange(24.0)
    )


def create(adata, **arguments):
    SAMSVAE.setup_anndata(adata, **arguments)
    return SAMSVAE(adata, n_latent=2, n_hidden=4, effect_n_hidden=4)


def codes_of(model):
    return registered_labels(model.adata_manager).codes


def batches_of(model):
    return model.adata_manager.get_from_registry("batch").ravel()


def test_another_tool_may_register_the_same_data(screen):
    model = create(screen, batch_key="batch")
    scvi.model.SCVI.setup_anndata(screen, batch_key="plate")
    np.testing.assert_array_equal(screen.obs["_scvi_batch"], [0, 1, 2] * 8)
    np.testing.assert_array_equal(batches_of(model), [0, 1] * 12)
    np.testing.assert_array_equal(codes_of(model), CODES)


def test_what_is_registered_is_read_without_writing_over_another_registration(
    screen, assert_unchanged, recwarn
):
    screen.obs_names = ["cell"] * screen.n_obs
    setup = {"categorical_covariate_keys": ["plate"], "continuous_covariate_keys": ["age"]}
    model = create(screen, batch_key="batch", **setup)
    create(screen, batch_key="plate", control="A", delimiter=None)
    before = screen.copy()
    recwarn.clear()
    np.testing.assert_array_equal(codes_of(model), CODES)
    np.testing.assert_array_equal(batches_of(model), [0, 1] * 12)
    read = model.adata_manager.get_from_registry
    np.testing.assert_array_equal(read("extra_categorical_covs")["plate"], [0, 1, 2] * 8)
    np.testing.assert_array_equal(read("extra_continuous_covs")["age"], np.arange(24))
    assert read("X") is screen.X
    assert not recwarn.list
    assert_unchanged(screen, before)
    model.adata_manager.validate()
    np.testing.assert_array_equal(screen.obs["_scvi_batch"], [0, 1] * 12)


def test_slots_of_scvi_that_were_deleted_are_written_again(screen):
    model = create(screen)
    screen.uns.clear()
    del screen.obsm["_scvi_perturbations"]
    np.testing.assert_array_equal(codes_of(model), CODES)


def test_a_registration_that_cannot_be_repeated_says_so_each_time_until_it_can(screen):
    model = create(screen, batch_key="batch")
    scvi.model.SCVI.setup_anndata(screen)
    screen.obs["batch"] = "z"
    before = screen.obsm["_scvi_perturbations"].copy()
    for _ in range(2):
        with pytest.raises(InvalidCovariateError, match=r"'z'.*'x', 'y'"):
            codes_of(model)
    assert model.adata_manager.adata is screen
    assert list(model.adata_manager.get_state_registry("batch")["categorical_mapping"]) == [
        "x",
        "y",
    ]
    np.testing.assert_array_equal(screen.obsm["_scvi_perturbations"], before)
    screen.obs["batch"] = ["x", "y"] * 12
    np.testing.assert_array_equal(batches_of(model), [0, 1] * 12)


def test_a_copy_of_registered_data_is_registered_on_its_own(screen):
    first = create(screen)
    copied = screen.copy()
    copied.obs["perturbation"] = ["control", "C", "B", "A"] * 6
    second = create(copied)
    assert (first.perturbations, second.perturbations) == (["A", "B"], ["A", "B", "C"])
    np.testing.assert_array_equal(codes_of(first), CODES)
    np.testing.assert_array_equal(codes_of(second).ravel(), [-1, 2, 1, 0] * 6)


@pytest.mark.parametrize(
    ("select", "words"), [([1, 0, 2, 3], "order"), ([0, 1, 2], "1 are missing")]
)
def test_a_saved_model_refuses_other_genes(screen, tmp_path, assert_unchanged, select, words):
    create(screen).save(tmp_path / "model")
    other = screen[:, select].copy()
    before = other.copy()
    with (
        pytest.warns(UserWarning, match="var_names"),
        pytest.raises(MissingKeyError, match=words),
    ):
        SAMSVAE.load(tmp_path / "model", adata=other, accelerator="cpu")
    assert_unchanged(other, before)


def test_data_whose_genes_were_renamed_are_not_saved_with_the_model(screen, tmp_path):
    model = create(screen)
    names = screen.var_names
    screen.var_names = [f"ENSG{i}" for i in range(4)]
    with pytest.raises(MissingKeyError, match="var_names changed"):
        model.save(tmp_path / "model", save_anndata=True)
    assert not (tmp_path / "model").exists()
    screen.var_names = names
    model.save(tmp_path / "model", save_anndata=True)
    loaded = SAMSVAE.load(tmp_path / "model", accelerator="cpu")
    np.testing.assert_array_equal(codes_of(loaded), CODES)


def test_a_model_that_was_loaded_without_cells_asks_for_them(screen, tmp_path):
    model = create(screen)
    model.is_trained_ = True
    model.save(tmp_path / "model")
    loaded = SAMSVAE.load(tmp_path / "model", adata=False, accelerator="cpu")
    with pytest.raises(RegistrationError, match="`adata`"):
        loaded.get_latent_representation()
    np.testing.assert_allclose(
        loaded.get_latent_representation(screen[:5]),
        model.get_latent_representation()[:5],
        atol=1e-6,
    )


@pytest.mark.parametrize("keys", ["age", ["age"], ("age",), np.array(["age"])])
def test_covariate_keys_may_be_one_or_several(screen, keys):
    model = create(screen, continuous_covariate_keys=keys)
    values = model.adata_manager.get_from_registry("extra_continuous_covs")
    np.testing.assert_array_equal(values["age"], np.arange(24))


@pytest.mark.parametrize("keys", ["plate", ("plate",)])
def test_category_keys_may_be_one_or_several(screen, keys):
    model = create(screen, categorical_covariate_keys=keys)
    values = model.adata_manager.get_from_registry("extra_categorical_covs")
    np.testing.assert_array_equal(values["plate"], [0, 1, 2] * 8)


def test_a_batch_of_text_and_numbers_is_refused(make_screen):
    adata = make_screen(LABELS, batch=[1, "x"] * 12)
    with pytest.raises(InvalidCovariateError, match=r"'batch'.*astype"):
        SAMSVAE.setup_anndata(adata, batch_key="batch")


@pytest.mark.parametrize(
    "values",
    [pd.to_datetime(["2020-01-01"] * 24), [1j] * 24, [[1]] * 24],
    ids=["dates", "complex", "lists"],
)
@pytest.mark.parametrize("continuous", [True, False])
def test_what_is_no_number_is_no_continuous_covariate(make_screen, values, continuous):
    adata = make_screen(LABELS, x=values)
    keys = {"continuous_covariate_keys": ["x"]} if continuous else {"size_factor_key": "x"}
    with pytest.raises(InvalidCovariateError, match=r"'x'.*'c0'.*24 such cells"):
        SAMSVAE.setup_anndata(adata, **keys)


def test_lists_are_no_batches(make_screen):
    with pytest.raises(InvalidCovariateError, match=r"x contains \[1\]"):
        SAMSVAE.setup_anndata(make_screen(LABELS, x=[[1]] * 24), batch_key="x")


def test_cells_without_expression_are_refused(screen):
    screen.X = None
    with pytest.raises(MissingKeyError, match=r"adata\.X is empty"):
        create(screen)


def test_two_sources_of_doses_are_refused(screen):
    screen.obsm["dosage"] = np.ones((24, 2))
    with pytest.raises(InvalidDosageError, match=r"'age'.*'dosage'"):
        SAMSVAE.setup_anndata(screen, dosage_key="age", dosage_obsm_key="dosage")


@pytest.mark.parametrize("dosages", [["1"], ["1"] * 3])
def test_another_number_of_doses_than_labels_is_refused(screen, dosages):
    model = create(screen)
    with pytest.raises(SAMSError):
        model.predict_ate(["A", "B"], dosages=dosages)
