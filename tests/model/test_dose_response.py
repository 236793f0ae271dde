"""Effects over doses: linear where the decoder is, the arms of predict_ate everywhere."""

import anndata as ad
import numpy as np
import pytest
import torch

from model.builders import (
    N_LATENT,
    VARIANTS,
    make_decoder_linear,
    set_effects,
    small_screen,
    train_small,
)
from scvi_sams import CPAVAE, ConditionalVAE, SVAEPlus
from scvi_sams.exceptions import InvalidDosageError, SAMSError, UnknownPerturbationError

EFFECTS = np.random.default_rng(5).normal(size=(4, N_LATENT))
DOSES = {"dosage_key": "dosage"}


def dosed_screen():
    return small_screen(dosages=[0.5, 1.0, 2.0])


def curves(model, *args, **kwargs):
    torch.manual_seed(0)
    return model.predict_dose_response(*args, **({"key_added": None} | kwargs))


def test_a_curve_of_a_linear_decoder_is_a_line():
    adata = dosed_screen()
    setup = DOSES | {"layer": "normalised"}
    model = train_small(adata, setup, gene_likelihood="normal", **VARIANTS["mean field"])
    weight = np.random.default_rng(6).normal(size=(adata.n_vars, N_LATENT))
    make_decoder_linear(model, weight, np.zeros(adata.n_vars))
    set_effects(model, EFFECTS)
    found = curves(model, ["P002", "P004"], [0, 0.25, 3])
    expected = np.outer([0, 0.25, 3, 0, 0.25, 3], np.ones(adata.n_vars))
    expected[:3] *= weight @ EFFECTS[1]
    expected[3:] *= weight @ EFFECTS[3]
    np.testing.assert_allclose(found.X, expected, rtol=1e-4, atol=1e-4)
    assert list(found.obs["perturbation"]) == ["P002"] * 3 + ["P004"] * 3
    assert list(found.obs["dosage"]) == [0, 0.25, 3] * 2
    assert list(found.obs["is_measured_range"]) == [True, True, False] * 2
    assert found.obs_names[1] == "P002@0.25"


def test_no_dose_is_no_effect_and_the_curve_is_that_of_predict_ate(dosage_model):
    found = curves(dosage_model, ["P001"], [0.0, 0.7, 2.0])
    for values in (found.X, found.layers["interval_low"], found.layers["interval_high"]):
        assert (values[0] == 0).all()
    torch.manual_seed(0)
    ate = dosage_model.predict_ate(
        ["P001"] * 3, dosages=[0, 0.7, 2], method="lograte", n_samples=5000, key_added=None
    )
    assert list(ate.obs_names) == list(found.obs_names) == ["P001@0", "P001@0.7", "P001@2"]
    np.testing.assert_array_equal(found.X, ate.X)
    assert np.abs(found.X).max() > 0.1
    assert found.uns["ate"]["units"] == ate.uns["ate"]["units"]


def test_the_grid_ends_at_the_largest_dose_of_each_perturbation():
    adata = dosed_screen()
    labels, doses = adata.obs["perturbation"].astype(str), adata.obs["dosage"].astype(str)
    adata.obs["dosage"] = np.where(labels == "P003", "0.5", doses)
    model = train_small(adata, DOSES)
    found = curves(model, n_doses=5).obs
    expected = dict.fromkeys(model.perturbations, 0.0)
    for label, dose in zip(labels, adata.obs["dosage"], strict=True):
        names = [name for name in label.split("+") if name != "control"]
        parts = [float(part) for part in str(dose).split("+")]
        parts = parts * len(names) if len(parts) == 1 else parts
        for name, part in zip(names, parts, strict=False):
            expected[name] = max(expected[name], part)
    largest = found.groupby("perturbation", observed=True)["dosage"].max()
    np.testing.assert_allclose(largest, list(expected.values()))
    assert (found.groupby("perturbation", observed=True).size() == 5).all()
    assert found["is_measured_range"].all()


def test_curves_are_written_only_if_asked_for_and_survive_a_file(tmp_path):
    model = train_small(dosed_screen(), DOSES)
    before = set(model.adata.uns)
    curves(model)
    assert set(model.adata.uns) == before
    found = curves(model, ["P001", "P003"], key_added="curves")
    model.adata.write_h5ad(tmp_path / "screen.h5ad")
    read = ad.read_h5ad(tmp_path / "screen.h5ad").uns["curves"]
    np.testing.assert_array_equal(read["effect"], found.X)
    np.testing.assert_array_equal(read["interval_low"], found.layers["interval_low"])
    np.testing.assert_array_equal(read["dosages"], found.obs["dosage"])
    assert list(read["perturbations"]) == list(found.obs["perturbation"])
    assert read["units"] == found.uns["ate"]["units"]
    curves(model, ["P001"], interval=None, key_added="curves")
    model.adata.write_h5ad(tmp_path / "screen.h5ad")
    read = ad.read_h5ad(tmp_path / "screen.h5ad").uns["curves"]
    assert "standard_error" in read
    assert "interval_low" not in read


@pytest.mark.parametrize("model_cls", [CPAVAE, ConditionalVAE])
def test_other_models_that_are_linear_in_the_dose(model_cls):
    model = train_small(dosed_screen(), DOSES, model_cls=model_cls)
    found = curves(model, ["P001"], [0.0, 2.0])
    assert np.abs(found.X[0]).max() == 0 < np.abs(found.X[1]).max()


def test_without_registered_doses_there_is_no_curve(default_model):
    with pytest.raises(InvalidDosageError, match=r"without doses.*`dosage_key`"):
        curves(default_model)
    ones = small_screen()
    ones.obsm["matrix"] = np.zeros((ones.n_obs, 2))
    ones.obsm["matrix"][:60, 0] = ones.obsm["matrix"][60:90, 1] = 1
    setup = {"dosage_obsm_key": "matrix", "perturbation_names": ["X", "Y"]}
    with pytest.raises(InvalidDosageError, match="all are 0 or 1"):
        curves(train_small(ones, setup))
    assert not hasattr(SVAEPlus, "predict_dose_response")


def test_wrong_input_is_refused(dosage_model):
    with pytest.raises(UnknownPerturbationError, match="'P9'"):
        curves(dosage_model, ["P9"])
    with pytest.raises(UnknownPerturbationError, match=r"'P001\+P002'.*predict_ate"):
        curves(dosage_model, ["P001+P002"])
    with pytest.raises(InvalidDosageError, match="-1"):
        curves(dosage_model, ["P001"], [0, -1])
    with pytest.raises(InvalidDosageError, match="nan"):
        curves(dosage_model, ["P001"], [0, np.nan])
    with pytest.raises(SAMSError, match=r"`n_doses`.*at least 2, not 1"):
        curves(dosage_model, n_doses=1)
