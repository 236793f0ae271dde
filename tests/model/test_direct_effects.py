"""Direct effects and stacking as users see them: tables, switches, and what results say of them."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from model.builders import make_decoder_linear, small_screen, train_small
from model.test_versions import FOLDER, MADE_BY
from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus
from scvi_sams.exceptions import InvalidArgumentError, SAMSError, UnknownPerturbationError
from scvi_sams.module._direct_effects import Residuals

N_PERTURBATIONS, N_GENES = 4, 24
NAMES = ["P001", "P002", "P003", "P004"]
WEIGHTS = {"model": 0.5, "entrywise": 0.25, "rowwise": 0.25}
FEW = {"n_samples": 40, "n_posterior_samples": 20, "key_added": None}


def tables(n_kept=N_GENES, seed=0):
    rng = np.random.default_rng(seed)
    shape = (N_PERTURBATIONS, n_kept)
    genes = np.sort(rng.permuted(np.tile(np.arange(N_GENES), (4, 1)), axis=1)[:, :n_kept])
    values = [rng.normal(size=shape), rng.uniform(0.1, 1, shape), rng.uniform(0, 1, shape)]
    values += [rng.normal(size=shape), rng.uniform(0.1, 1, shape)]
    return Residuals(
        torch.as_tensor(rng.uniform(0.3, 1, N_PERTURBATIONS), dtype=torch.float32),
        torch.as_tensor(genes, dtype=torch.int32),
        *(torch.as_tensor(table, dtype=torch.float32) for table in values),
    )


def fill(model, filled=None):
    filled = tables() if filled is None else filled
    model.module.direct.measure(torch.zeros(0, 1), torch.zeros(0, 1))
    model.module.direct.fill(filled, torch.tensor(list(WEIGHTS.values())))
    return filled


@pytest.fixture(scope="module")
def trained():
    return train_small(small_screen(), max_epochs=1)


@pytest.fixture
def model(trained):
    fill(trained)
    trained.stacking = True
    yield trained
    trained.adata.uns.pop("sams_direct_effects", None)


@pytest.fixture(scope="module")
def flat():
    """A model of normal expression whose latent states change no gene."""
    adata = small_screen(dosages=[0.5, 1.0])
    setup = {"layer": "normalised", "dosage_key": "dosage"}
    model = train_small(adata, setup, max_epochs=1, gene_likelihood="normal")
    make_decoder_linear(model, np.zeros((N_GENES, 4)), np.linspace(-1, 1, N_GENES))
    return model


def test_tables_are_those_of_the_module(model):
    filled = tables()
    direct = model.get_direct_effects()
    for found, expected in zip(direct, (filled.mean, filled.sd, filled.sign_error), strict=True):
        assert list(found.index) == NAMES
        assert found.index.name == "perturbation"
        assert list(found.columns) == list(model.adata.var_names)
        np.testing.assert_array_equal(found.to_numpy(), expected.numpy())


def test_some_perturbations_in_the_order_that_they_are_asked_for(model):
    everything = model.get_direct_effects(key_added=None)
    some = model.get_direct_effects(["P003", "P001"], key_added="mine")
    for part, whole in zip(some, everything, strict=True):
        pd.testing.assert_frame_equal(part, whole.loc[["P003", "P001"]])
    assert list(model.adata.uns.pop("mine")["perturbations"]) == ["P003", "P001"]
    assert "sams_direct_effects" not in model.adata.uns


def test_genes_that_are_not_kept_have_no_effect(model):
    filled = fill(model, tables(n_kept=3))
    direct = model.get_direct_effects(key_added=None)
    for row, name in enumerate(NAMES):
        kept = filled.genes[row].long().numpy()
        rest = np.setdiff1d(np.arange(N_GENES), kept)
        for table, values, otherwise in (
            (direct.mean, filled.mean, 0),
            (direct.sd, filled.sd, 0),
            (direct.lfsr, filled.sign_error, 1),
        ):
            np.testing.assert_array_equal(table.loc[name].to_numpy()[kept], values[row].numpy())
            assert (table.loc[name].to_numpy()[rest] == otherwise).all()


def test_what_is_written_survives_a_file(model, tmp_path):
    direct = model.get_direct_effects()
    direct.mean.iloc[0, 0] += 1  # what the user does with a table does not change the data
    model.predict_ate(NAMES[:2], **FEW | {"key_added": "sams_ate"})
    model.adata.write_h5ad(tmp_path / "screen.h5ad")
    written = ad.read_h5ad(tmp_path / "screen.h5ad").uns
    kept = written["sams_direct_effects"]
    np.testing.assert_array_equal(kept["mean"], tables().mean.numpy())
    np.testing.assert_array_equal(kept["sd"], tables().sd.numpy())
    np.testing.assert_array_equal(kept["lfsr"], tables().sign_error.numpy())
    assert list(kept["perturbations"]) == NAMES
    assert list(kept["genes"]) == list(model.adata.var_names)
    assert kept["units"] == "natural log of the rate"
    assert "sams_direct_effects" in written["sams_provenance"]
    assert bool(written["sams_ate"]["direct_effects"]) is True
    assert {name: float(w) for name, w in written["sams_ate"]["stacking"].items()} == WEIGHTS


def test_predictions_of_means_add_direct_effects_and_what_stacking_adds(flat):
    filled = fill(flat)
    flat.stacking = True
    labels, doses = ["P001", "P003", "P002+P004"], [1.0, 0.5, 1.0]
    singles = (filled.mean + filled.correction).numpy()
    expected = [singles[0], 0.5 * singles[2], singles[1] + singles[3]]
    ate = flat.predict_ate(labels, dosages=doses, method="mean", **FEW)
    np.testing.assert_allclose(ate.X, expected, atol=1e-5)
    flat.stacking = False
    direct = filled.mean.numpy()
    expected = [direct[0], 0.5 * direct[2], direct[1] + direct[3]]
    ate = flat.predict_ate(labels, dosages=doses, method="mean", **FEW)
    np.testing.assert_allclose(ate.X, expected, atol=1e-5)
    cells = flat.predict(["P003"], indices=[0, 1], output="rate")
    bias = np.linspace(-1, 1, N_GENES)
    np.testing.assert_allclose(cells.X, [bias + direct[2]] * 2, atol=1e-5)
    flat.stacking = True
    cells = flat.predict(["P003"], indices=[0, 1], output="rate")
    np.testing.assert_allclose(cells.X, [bias + singles[2]] * 2, atol=1e-5)


def test_units_are_those_of_the_data_where_expression_is_no_count(flat):
    fill(flat)
    flat.get_direct_effects()
    assert flat.adata.uns["sams_direct_effects"]["units"] == "units of the data"


@pytest.mark.parametrize("is_on", [True, False])
def test_results_say_what_they_are_made_of(model, is_on):
    model.stacking = is_on
    expected = {"direct_effects": True, "stacking": WEIGHTS if is_on else "none"}
    few = {"n_samples": 40, "n_posterior_samples": 20}
    descriptions = [
        model.predict_ate(NAMES[:1], **FEW).uns["ate"],
        model.predict(NAMES[:1], indices=[0]).uns["prediction"],
        model.predict_interactions(["P001+P002"], **few).uns["interaction"],
    ]
    for description in descriptions:
        assert {key: description[key] for key in expected} == expected


def test_results_of_models_without_either_say_so():
    without = train_small(small_screen(), max_epochs=1, direct_effects=False, stacking=False)
    published = train_small(small_screen(), max_epochs=1, model_cls=SVAEPlus)
    for model in (without, published):
        description = model.predict_ate(NAMES[:1], **FEW).uns["ate"]
        assert description["direct_effects"] is False
        assert description["stacking"] == "none"


def test_stacking_is_turned_off_and_on(model):
    assert model.stacking == WEIGHTS
    model.stacking = False
    assert model.stacking is None
    model.stacking = True
    assert model.stacking == WEIGHTS
    with pytest.raises(InvalidArgumentError, match="`stacking`"):
        model.stacking = 0.5
    assert model.stacking == WEIGHTS


@pytest.mark.parametrize("model_cls", [SAMSVAE, CPAVAE, ConditionalVAE])
def test_what_a_model_was_made_without_cannot_be_turned_on(model_cls):
    model = train_small(
        small_screen(), max_epochs=1, model_cls=model_cls, direct_effects=False, stacking=False
    )
    assert model.stacking is None
    model.stacking = False
    with pytest.raises(SAMSError, match="made with stacking=False"):
        model.stacking = True
    with pytest.raises(SAMSError, match="made with direct_effects=False"):
        model.get_direct_effects()
    assert "sams_direct_effects" not in model.adata.uns


def test_stacking_goes_without_direct_effects():
    model = train_small(small_screen(), max_epochs=1, direct_effects=False)
    assert sum(model.stacking.values()) == pytest.approx(1)
    description = model.predict_ate(NAMES[:1], **FEW).uns["ate"]
    assert description["direct_effects"] is False
    assert description["stacking"] == model.stacking
    with pytest.raises(SAMSError, match="made with direct_effects=False"):
        model.get_direct_effects()


def test_a_training_without_stacking_has_weights_for_later():
    torch.manual_seed(0)
    model = SAMSVAE(registered(), n_latent=4, n_hidden=16)
    model.stacking = False
    model.train(max_epochs=2, batch_size=64, accelerator="cpu", enable_progress_bar=False)
    assert model.stacking is None
    model.stacking = True
    assert sum(model.stacking.values()) == pytest.approx(1)
    assert len(set(model.stacking.values())) > 1  # of the held-out cells, not equal ones


def registered():
    adata = small_screen()
    SAMSVAE.setup_anndata(adata)
    return adata


def test_before_training_there_are_no_effects():
    model = SAMSVAE(registered(), n_latent=4, n_hidden=16)
    assert model.stacking is None
    with pytest.warns(UserWarning, match="trained"):
        direct = model.get_direct_effects(key_added=None)
    assert (direct.mean == 0).all(axis=None)
    assert (direct.sd == 0).all(axis=None)
    assert (direct.lfsr == 1).all(axis=None)


def test_an_unknown_name_is_an_error(model):
    with pytest.raises(UnknownPerturbationError, match="P01"):
        model.get_direct_effects(["P01"])


@pytest.mark.parametrize("n_kept", [N_GENES, 3])
@pytest.mark.parametrize("is_on", [True, False])
def test_a_loaded_model_has_the_tables_and_the_switch(model, tmp_path, n_kept, is_on):
    fill(model, tables(n_kept))
    model.stacking = is_on
    model.save(tmp_path / "model")
    loaded = SAMSVAE.load(tmp_path / "model", model.adata, accelerator="cpu")
    for found, expected in zip(
        loaded.get_direct_effects(key_added=None),
        model.get_direct_effects(key_added=None),
        strict=True,
    ):
        pd.testing.assert_frame_equal(found, expected)
    assert loaded.stacking == (WEIGHTS if is_on else None)
    predicted = []
    for one in (model, loaded):
        torch.manual_seed(0)
        predicted.append(one.predict_ate(NAMES, **FEW).X)
    np.testing.assert_allclose(*predicted, rtol=1e-5, atol=1e-6)
    loaded.stacking = True
    assert loaded.stacking == WEIGHTS


@pytest.mark.parametrize("name", MADE_BY)
def test_a_model_saved_before_there_were_tables_loads_without(name):
    model = SAMSVAE.load(FOLDER / name, accelerator="cpu")
    assert model.stacking is None
    description = model.predict_ate(NAMES[:1], **FEW).uns["ate"]
    assert description["direct_effects"] is False
    assert description["stacking"] == "none"
    with pytest.raises(SAMSError, match="with a version without direct effects"):
        model.get_direct_effects()
    with pytest.raises(SAMSError, match="with a version without stacking"):
        model.stacking = True
    model.train(max_epochs=1, batch_size=64, accelerator="cpu", enable_progress_bar=False)
    assert sum(model.stacking.values()) == pytest.approx(1)
    assert (model.get_direct_effects(key_added=None).lfsr < 1).any(axis=None)
