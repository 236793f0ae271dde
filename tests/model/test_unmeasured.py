"""Perturbations that no cell carries, as users predict them."""

import copy
import json
import logging

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from lightning.pytorch import Callback

from model.builders import (
    COVARIATES,
    TRAINING,
    copy_without_registration,
    make_decoder_linear,
    small_screen,
)
from scvi_sams import CPAVAE, SAMSVAE, tl
from scvi_sams.exceptions import InvalidArgumentError, SAMSError, UnknownPerturbationError

HELD_OUT = ["P003", "P007"]
LABELS = ["P003", "P001+P003", "P003+P007", "P001"]
SAMPLES = {"n_samples": 400, "n_posterior_samples": 40, "key_added": None}


def screen(held_out=HELD_OUT, **changes):
    """Screen in which no cell carries some of the perturbations that have features."""
    settings = {"n_perturbations": 12, "n_features": 3, "n_combinations": 4} | changes
    adata = small_screen(**settings)
    labels = adata.obs["perturbation"].astype(str)
    is_held_out = [bool({*held_out} & {*label.split("+")}) for label in labels]
    return adata[~np.array(is_held_out)].copy()


def trained(adata=None, setup=None, train=None, **changes):
    adata = screen() if adata is None else adata
    SAMSVAE.setup_anndata(adata, **(setup or {}))
    torch.manual_seed(0)
    settings = {"n_latent": 4, "n_hidden": 16, "effect_n_hidden": 8}
    settings["perturbation_features"] = adata.uns["perturbation_features"]
    model = SAMSVAE(adata, **(settings | changes))
    training = {k: v for k, v in TRAINING.items() if k != "plan_kwargs"} | {"max_epochs": 4}
    model.train(**(training | (train or {})))
    return model


def effects(model, labels=LABELS, **arguments):
    scvi.settings.seed = 0
    return model.predict_ate(labels, **(SAMPLES | arguments))


@pytest.fixture(scope="module")
def model():
    return trained()


@pytest.fixture(scope="module")
def in_contexts():
    return trained(screen(n_cell_types=2), {"context_key": "cell_type"})


def test_what_was_measured_is_said(model):
    assert list(model.unmeasured) == HELD_OUT
    assert not {*model.perturbations} & {*HELD_OUT}
    ate = effects(model, [*LABELS, "P001+P002"])
    assert ate.obs["measured"].tolist() == [False, False, False, True, True]
    assert "measured" not in effects(trained(perturbation_features=None), ["P001"]).obs


@pytest.mark.parametrize(
    ("of_screen", "setup", "settings", "train"),
    [
        ({"escape_rate": 0.3}, {}, {"responses": True}, {}),
        ({"guides_per_perturbation": 2}, {"guide_key": "guide"}, {"responses": True}, {}),
        ({"dosages": [1.0, 2.0]}, {"dosage_key": "dosage"}, {}, {}),
        ({}, COVARIATES, {}, {}),
        ({}, {"size_factor_key": "transcriptome"}, {}, {}),
        ({}, {"layer": "normalised"}, {"gene_likelihood": "normal"}, {}),
        ({}, {}, {"gene_likelihood": "poisson"}, {}),
        ({}, {}, {}, {"plan_kwargs": {"dense_fraction": 0.0}}),
        ({}, {}, {"direct_effects": False}, {}),
        ({}, {}, {"direct_effects": False, "stacking": False}, {}),
        ({}, {}, {"correlated_effects": False, "correlated_basal": False}, {}),
    ],
    ids=[
        "responses",
        "guides",
        "doses",
        "covariates",
        "size factors",
        "normal",
        "poisson",
        "no dense phase",
        "no direct effects",
        "paper",
        "mean field",
    ],
)
def test_every_kind_of_model_predicts_them(of_screen, setup, settings, train):
    found = trained(screen(**of_screen), setup, train, **settings)
    is_count = settings.get("gene_likelihood") != "normal"
    ate = effects(found, method="lognorm" if is_count else "mean")
    alone = effects(found, ["P003"], method="lognorm" if is_count else "mean")
    np.testing.assert_array_equal(ate["P003"].X, alone.X)
    for values in (ate.X, *ate.layers.values()):
        assert np.isfinite(values).all()
    assert (ate.layers["interval_low"] <= ate.X + 1e-6).all()
    assert (ate.layers["interval_low"] < ate.layers["interval_high"]).any(axis=1)[:3].all()
    cells = found.predict(["P003", "P003+P001", "control"], output="rate")
    assert np.isfinite(cells.X).all()
    if found.stacking is not None:  # else a mask that is off in a single sample may be all there is
        by_label = [cells[cells.obs["perturbation"] == label].X for label in ("P003", "control")]
        assert (by_label[0] != by_label[1]).any()


def test_doses_multiply_what_is_predicted():
    adata = screen(dosages=[1.0, 2.0])
    found = trained(
        adata, {"dosage_key": "dosage", "layer": "normalised"}, gene_likelihood="normal"
    )
    with torch.no_grad():
        found.module.features.effect_weights.fill_(0.5)
    scvi.settings.seed = 0
    mean = found.get_perturbation_effects(["P003"], key_added=None).mean.to_numpy()
    assert np.abs(mean).max() > 0.01
    ate = effects(found, ["P003", "P003"], dosages=[1, 2], method="mean")
    # The part on genes doubles; so does the shift, which the decoder bends.
    direct = found.module.direct
    tables = direct.answers.tables
    without = tables._replace(correction=torch.zeros_like(tables.correction))
    direct.answers = direct.answers._replace(tables=without)
    shifts = effects(found, ["P003", "P003"], dosages=[1, 2], method="mean")
    on_genes = ate.X - shifts.X
    np.testing.assert_allclose(on_genes[1], 2 * on_genes[0], rtol=1e-3, atol=1e-4)
    assert np.linalg.norm(on_genes[0]) > 0.01


def test_combinations_are_sums_in_any_order():
    adata = screen()
    found = trained(adata, {"layer": "normalised"}, gene_likelihood="normal")
    make_decoder_linear(found, np.random.default_rng(6).normal(size=(24, 4)), np.zeros(24))
    with torch.no_grad():
        found.module.features.effect_weights.fill_(0.5)
    labels = ["P003", "P007", "P003+P007", "P001", "P003+P001"]
    ate = effects(found, labels, method="mean")
    other_way = effects(found, ["P007+P003"], method="mean")
    np.testing.assert_array_equal(ate.X[2], other_way.X[0])
    np.testing.assert_allclose(ate.X[2], ate.X[0] + ate.X[1], atol=1e-4)
    np.testing.assert_allclose(ate.X[4], ate.X[0] + ate.X[3], atol=1e-4)
    assert np.linalg.norm(ate.X[0]) > 0.1
    interactions = found.predict_interactions(["P003+P007", "P001+P003"], n_samples=200)
    np.testing.assert_allclose(interactions.X, 0, atol=1e-4)


def test_predictions_do_not_depend_on_what_else_was_asked_for(model):
    fresh = copy.deepcopy(model)
    fresh.module.direct.forget()
    alone = effects(fresh, ["P007"])
    effects(fresh, ["P003"])
    both = effects(fresh, ["P003", "P007"])
    for name in ("interval_low", "interval_high"):
        np.testing.assert_array_equal(alone.layers[name], both["P007"].layers[name])
    np.testing.assert_array_equal(alone.X, both["P007"].X)


def test_tables_of_masks_and_effects_of_any(model):
    names = ["P007", "P001", "P003", "P007"]
    masks = model.get_perturbation_masks(names, key_added=None)
    moments = model.get_perturbation_effects(names, key_added=None)
    assert masks.index.tolist() == names
    for table in (masks, *moments):
        assert np.isfinite(table.to_numpy()).all()
        every = [*model.perturbations, *model.unmeasured]
    whole = model.get_perturbation_masks(every, key_added=None)
    pd.testing.assert_frame_equal(whole.loc[names], masks)
    measured = model.get_perturbation_masks(key_added=None)
    pd.testing.assert_frame_equal(whole.loc[model.perturbations], measured)
    prior = model.module.features.of(torch.tensor([len(model.perturbations)]))
    chance = torch.sigmoid(prior.log_odds) * ~model.module.masks.is_excluded
    np.testing.assert_allclose(masks.loc["P003"], chance[0], rtol=1e-6)


@pytest.mark.parametrize("fixture", ["model", "in_contexts"])
@pytest.mark.parametrize("table", ["get_perturbation_masks", "get_perturbation_effects"])
def test_one_name_or_none(fixture, table, request):
    get = getattr(request.getfixturevalue(fixture), table)
    one, several, none = (get(names, key_added=None) for names in ("P003", ["P003"], []))
    if table == "get_perturbation_effects":
        one, several, none = one.mean, several.mean, none.mean
    pd.testing.assert_frame_equal(one, several)
    assert none.shape == (0, 4)


@pytest.mark.parametrize("likelihood", ["nb", "normal"])
def test_the_gene_that_an_unmeasured_perturbation_targets_changes_as_those_of_others(likelihood):
    screen = small_screen(
        n_perturbations=14, n_features=3, n_combinations=0, knockdown=(0.75, 0.85), n_genes=60
    )
    names = screen.uns["simulation"]["perturbations"]
    hidden = names[:3]
    left = screen[~screen.obs["perturbation"].isin(hidden).to_numpy()].copy()
    if likelihood == "normal":
        left.X = np.log2(1 + np.asarray(left.X.toarray()))
    found = trained(left, gene_likelihood=likelihood)
    scale = {"method": "mean"} if likelihood == "normal" else {}
    ate = effects(found, hidden, **scale)
    table = ate.to_df()
    own = np.array([table.loc[name, name] for name in hidden])
    # A gene that is not expressed cannot fall.
    controls = left[left.obs["perturbation"] == "control"].X
    level = np.asarray(controls.mean(axis=0)).ravel()[left.var_names.get_indexer(hidden)]
    assert (own < 0).all()
    of_others = table.to_numpy()[~np.isin(table.columns, hidden)[None].repeat(3, axis=0)]
    assert (own[level > 1] < np.quantile(of_others, 0.02)).all()
    change = ate.uns["ate"]["lfc_of_target_genes"]
    if likelihood == "nb":
        assert change == pytest.approx(np.log2(0.2), abs=0.5)
    found.stacking = False
    assert "lfc_of_target_genes" not in effects(found, hidden, **scale).uns["ate"]


def test_unknown_names_raise(model):
    for names in (["P999"], ["control"], ["P001+P003"], [3]):
        with pytest.raises(UnknownPerturbationError):
            model.get_perturbation_masks(names)
    with pytest.raises(UnknownPerturbationError, match="P999"):
        model.predict_ate(["P003", "P999"])
    with pytest.raises(UnknownPerturbationError, match="There are no cells with 'P003'"):
        model.get_direct_effects(["P003"])


def test_in_contexts_they_have_a_prediction_in_each(in_contexts):
    ate = effects(in_contexts, ["P003", "P001"], context=["type_1", "type_2"])
    assert ate.obs["measured"].tolist() == [False, True, False, True]
    assert ate.obs["context"].tolist() == ["type_1", "type_1", "type_2", "type_2"]
    for label in ("type_1", "type_2"):
        alone = effects(in_contexts, ["P003"], context=label)
        assert np.isfinite(alone.X).all()
    in_one = in_contexts.get_perturbation_effects(["P003"], context="type_1", key_added=None)
    anywhere = in_contexts.get_perturbation_effects(["P003"], key_added=None)
    # The prior of what is a context's own has a mean of 0, and widens the effect.
    np.testing.assert_allclose(in_one.mean, anywhere.mean, atol=1e-6)
    assert (in_one.sd.to_numpy() > 0).all()


def test_tests_of_cells_point_to_predictions(in_contexts):
    with pytest.raises(
        UnknownPerturbationError, match=r"There are no cells with 'P003'.*predict_ate"
    ):
        tl.context_effects(in_contexts, ["P001", "P003"])


@pytest.mark.parametrize("held_out", [HELD_OUT[:1], []], ids=["one", "none"])
def test_few_unmeasured_perturbations(held_out):
    found = trained(screen(held_out))
    assert list(found.unmeasured) == held_out
    ate = effects(found, ["P001", *held_out])
    assert np.isfinite(ate.X).all()
    assert ("measured" in ate.obs) == bool(held_out)


def test_three_measured_perturbations_are_enough():
    names = ["P001", "P002", "P004"]
    others = [f"P{number:03}" for number in range(1, 13) if f"P{number:03}" not in names]
    found = trained(screen(others))
    assert found.perturbations == names
    assert found.module.features.unexplained == 1
    assert np.isfinite(effects(found, ["P003", "P001"]).X).all()


def test_features_that_say_nothing_change_no_training():
    adata = screen()
    rng = np.random.default_rng(0)
    names = [*pd.unique(adata.obs["perturbation"].astype(str)), "U"]
    noise = {name: rng.normal(size=2) for name in names if "+" not in name and name != "control"}
    ate, bounds = [], []
    for features in (None, noise):
        found = trained(adata, perturbation_features=features)
        ate.append(effects(found, ["P001", "P002"]).X)
        bounds.append(found.history["elbo_train"].to_numpy(dtype=float))
    assert found.module.features.unexplained == 1
    np.testing.assert_allclose(bounds[1], bounds[0], rtol=1e-4)
    np.testing.assert_allclose(ate[1], ate[0], atol=0.01)


@pytest.mark.parametrize("has_data", [True, False])
def test_a_saved_model_predicts_the_same(model, has_data, tmp_path):
    before = effects(model, library_size=300.0, basal="prior")
    model.save(tmp_path / "model")
    adata = copy_without_registration(model.adata)
    del adata.uns["perturbation_features"]
    loaded = SAMSVAE.load(tmp_path / "model", adata=adata if has_data else None)
    assert list(loaded.unmeasured) == HELD_OUT
    after = effects(loaded, library_size=300.0, basal="prior")
    for name in ("interval_low", "interval_high"):
        np.testing.assert_allclose(after.layers[name], before.layers[name], atol=1e-5)
    np.testing.assert_allclose(after.X, before.X, atol=1e-5)
    assert json.dumps(loaded.provenance) == json.dumps(model.provenance)


def test_a_copy_predicts_the_same(model):
    before = effects(model)
    np.testing.assert_array_equal(effects(copy.deepcopy(model)).X, before.X)


def test_training_goes_on_after_predictions():
    found = trained()
    before = effects(found)
    found.train(max_epochs=2, **{k: v for k, v in TRAINING.items() if k != "plan_kwargs"})
    after = effects(found)
    assert (after.X != before.X).any(axis=1).all()
    found.module.direct.forget()
    np.testing.assert_array_equal(effects(found).X, after.X)


def test_a_key_of_uns_is_the_table_that_is_there():
    by_key = trained(perturbation_features="perturbation_features")
    by_table = trained()
    np.testing.assert_array_equal(effects(by_key).X, effects(by_table).X)


def test_records_hold_a_hash_in_place_of_the_table(model):
    table = model.adata.uns["perturbation_features"]
    settings = model.provenance["settings"]["perturbation_features"]
    assert (settings["perturbations"], settings["features"]) == table.shape
    assert len(settings["sha256"]) == 64
    other = trained(perturbation_features=2 * table)
    assert other.provenance["settings"]["perturbation_features"] != settings
    card = model.card()
    assert "2 perturbations without cells, predicted from their features: P003, P007" in card
    assert settings["sha256"] in card
    model.predict_ate(["P003"], n_samples=100, n_posterior_samples=10)
    written = json.loads(model.adata.uns["sams_provenance"]["sams_ate"])
    assert written["settings"]["perturbation_features"] == settings
    assert len(model.adata.uns["sams_provenance"]["sams_ate"]) < 5000


def test_genes_are_compared_between_any_two(model):
    found = model.differential_expression(group1=HELD_OUT, n_samples=400)
    assert found["comparison"].unique().tolist() == ["P003 vs control", "P007 vs control"]
    assert np.isfinite(found["lfc_mean"]).all()
    assert found["raw_mean1"].isna().all()
    # What is not known of them is in samples; what is left is the error of control cells.
    control = model.differential_expression(group1="P001", n_samples=400)
    ordered = found[found["group1"] == "P003"]["lfc_error"]
    assert (ordered < control["lfc_error"].reindex(ordered.index)).all()
    both = model.differential_expression(group1="P003", group2="P001", n_samples=400)
    assert (both["lfc_error"] > 0).all()


def test_features_that_a_model_does_not_take_raise():
    adata = screen()
    CPAVAE.setup_anndata(adata)
    with pytest.raises(SAMSError, match="perturbation_features"):
        CPAVAE(adata, perturbation_features=adata.uns["perturbation_features"])
    SAMSVAE.setup_anndata(adata)
    with pytest.raises(InvalidArgumentError, match="mask_prior_concentration"):
        SAMSVAE(
            adata,
            perturbation_features=adata.uns["perturbation_features"],
            mask_prior_concentration=2.0,
        )


def test_the_table_of_the_user_is_left_as_it_is():
    adata = screen()
    before = adata.uns["perturbation_features"].copy()
    found = trained(adata)
    adata.uns["perturbation_features"].iloc[:] = 0.0
    features = found.init_params_["non_kwargs"]["perturbation_features"]
    pd.testing.assert_frame_equal(features.to_frame(), before, check_names=False)


def test_a_missing_row_is_warned_of(caplog):
    adata = screen()
    table = adata.uns["perturbation_features"].drop(index=["P001"])
    with caplog.at_level(logging.WARNING, "scvi.sams"):
        found = trained(adata, perturbation_features=table)
    assert "no row for 1 of 10 measured perturbations: 'P001'" in caplog.text
    assert np.isfinite(effects(found, ["P001", "P003"]).X).all()


class Stop(Callback):
    """Fail at the start of the last epoch."""

    def on_train_epoch_start(self, trainer, plan):
        if trainer.current_epoch == 3:
            raise RuntimeError("stopped")


def test_a_stopped_training_goes_on_with_the_same_features(tmp_path):
    path = tmp_path / "run.ckpt"
    whole = trained()
    with pytest.raises(RuntimeError, match="stopped"):
        trained(train={"checkpoint_path": path, "callbacks": [Stop()]})
    other = 2 * screen().uns["perturbation_features"]
    with pytest.raises(InvalidArgumentError, match="of another training"):
        trained(perturbation_features=other, train={"checkpoint_path": path})
    resumed = trained(train={"checkpoint_path": path})
    assert not path.exists()
    np.testing.assert_array_equal(effects(resumed).X, effects(whole).X)


def test_what_is_no_anndata_raises_before_its_features_are_read():
    with pytest.raises(SAMSError, match="AnnData"):
        SAMSVAE(pd.DataFrame(np.eye(3)), perturbation_features={"A": [1.0]})
