"""Columns of obs in whose levels perturbations do different things, and the warning of training."""

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from scvi_sams import CPAVAE, SAMSVAE
from scvi_sams.datasets import papalexi21, simulate_screen
from scvi_sams.exceptions import InvalidArgumentError, MissingKeyError, SAMSError
from scvi_sams.interpretation import context_interactions
from scvi_sams.model import _context_tests

COLUMNS = [
    "registered_as",
    "n_levels",
    "n_tested",
    "n_differ",
    "share",
    "p_value",
    "most_different",
    "is_balanced",
    "differs",
]
SPECIFIC = {"cell_type_specific_share": 1.0}
SOME_SPECIFIC = {"cell_type_specific_share": 0.3}


def screen(seed=0, **changes):
    """Three cell types; two lanes that play no part."""
    settings = {
        "n_genes": 100,
        "n_controls": 300,
        "n_perturbations": 12,
        "cells_per_perturbation": 75,
        "n_combinations": 0,
        "n_cell_types": 3,
    }
    adata = simulate_screen(seed=seed, **(settings | changes))
    adata.obs["lane"] = np.random.default_rng(seed).choice(["a", "b"], adata.n_obs)
    return adata


def untrained(adata, model_cls=SAMSVAE, **setup):
    model_cls.setup_anndata(adata, **setup)
    return model_cls(adata, n_latent=3, n_hidden=8)


def random_states():
    return np.random.get_state()[1].copy(), torch.get_rng_state().numpy()  # noqa: NPY002


def warned(model, caplog, **train):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="scvi.sams"):
        model.train(max_epochs=1, enable_progress_bar=False, accelerator="cpu", **train)
    return [text for text in caplog.messages if "effects in the levels" in text]


@pytest.mark.parametrize(
    ("setup", "what"),
    [
        ({}, "not registered"),
        ({"batch_key": "cell_type"}, "batch"),
        ({"categorical_covariate_keys": ["cell_type"]}, "categorical covariate"),
    ],
)
def test_effects_of_one_cell_type_are_found_however_the_column_is_registered(setup, what):
    adata = screen(**SPECIFIC)
    table = context_interactions(untrained(adata, **setup))
    assert table.columns.tolist() == COLUMNS
    assert sorted(table.index) == ["cell_type", "lane"]
    row = table.loc["cell_type"]
    assert (row["registered_as"], row["n_levels"], row["n_tested"]) == (what, 3, 12)
    assert row["n_differ"] >= 6
    assert 0.55 < row["share"] < 0.75  # two thirds
    assert row["p_value"] < 1e-10
    assert row["differs"]
    assert not table.loc["lane", "differs"]


def test_perturbations_that_differ_are_those_that_do():
    adata = screen(**SOME_SPECIFIC, cells_per_perturbation=120, effect_scale=3.0)
    table = context_interactions(untrained(adata), "cell_type", per_perturbation=True)
    truth = adata.uns["simulation"]
    is_specific = ~pd.Series(truth["true_response"].all(axis=1), truth["perturbations"])
    assert is_specific.sum() == 4
    table = table.set_index("perturbation")
    sure = table["differs"] & (table["q_value"] < 0.01)
    assert sure.index[sure].isin(is_specific.index[is_specific]).all()
    found = table[table["differs"]]
    assert sure.sum() >= 3
    assert table.loc[sure, "share"].between(0.4, 0.9).all()
    assert (table["n_levels"] == 3).all()
    most = context_interactions(untrained(adata), "cell_type")["most_different"].iloc[0]
    assert most == found["squared_difference"].idxmax()


@pytest.mark.parametrize("log_sd", [0.5, 1.0])
def test_equal_effects_in_types_that_differ_a_lot_are_not_warned_of(log_sd):
    """Rates that differ by a factor of e between types make other differences of logarithms."""
    for seed in range(3):
        adata = screen(seed, cell_type_log_sd=log_sd, effect_scale=3.0)
        table = context_interactions(untrained(adata, batch_key="cell_type"))
        assert not table["differs"].any()
        assert table["share"].max() < 0.08


def test_p_values_of_columns_without_a_part_are_no_smaller_than_they_say():
    adata = screen(n_genes=40, effect_scale=3.0)
    model = untrained(adata, batch_key="cell_type")
    rng = np.random.default_rng(0)
    for number in range(40):
        adata.obs[f"null_{number}"] = rng.choice(["a", "b", "c"], adata.n_obs, p=[0.5, 0.3, 0.2])
    keys = [f"null_{number}" for number in range(40)]
    p_values = context_interactions(model, keys, per_perturbation=True)["p_value"]
    assert len(p_values) >= 400
    assert (p_values < 0.05).mean() < 0.08
    assert (p_values < 0.01).mean() < 0.025
    table = context_interactions(model, keys)
    assert not table["differs"].any()


def test_replicates_of_a_real_screen_are_not_warned_of():
    """What strong knock-outs do in three replicates differs surely, but by little."""
    adata = papalexi21()
    table = context_interactions(
        untrained(adata, size_factor_key="total_counts", batch_key="replicate")
    )
    row = table.loc["replicate"]
    assert row["registered_as"] == "batch"
    assert row["share"] < 0.05
    assert row["n_differ"] == 0
    assert not row["differs"]


def test_training_warns_of_columns_once(caplog):
    adata = screen(**SPECIFIC)
    (text,) = warned(untrained(adata), caplog)
    for part in ("'cell_type'", "not registered", "of 12 perturbations", "`context_key`"):
        assert part in text
    assert "tl.context_interactions(model)" in text
    assert "lane" not in text
    (text,) = warned(untrained(adata, batch_key="cell_type"), caplog)
    assert "'cell_type' (batch;" in text
    (text,) = warned(untrained(adata, CPAVAE), caplog)
    assert not warned(untrained(screen()), caplog)


def test_a_column_that_is_a_context_is_not_warned_of(caplog):
    adata = screen(**SPECIFIC, cells_per_perturbation=150)
    adata.obs["lineage"] = np.where(adata.obs["cell_type"] == "type_1", "x", "y")
    model = untrained(adata, context_key="cell_type")
    assert not warned(model, caplog)
    table = context_interactions(model)
    assert table.loc["cell_type", "registered_as"] == "context"
    assert table.loc["cell_type", "p_value"] < 1e-10
    # Within contexts there is one lineage, and effects are the same in both lanes.
    assert sorted(table.index) == ["cell_type", "lane"]
    of_lanes = context_interactions(model, "lane", per_perturbation=True)
    assert sorted(of_lanes["context"].unique()) == ["type_1", "type_2", "type_3"]
    assert not of_lanes["differs"].any()
    assert (of_lanes["p_value"] < 0.05).mean() < 0.2


def test_within_contexts_another_column_that_matters_is_found(caplog):
    adata = screen(**SPECIFIC, n_cell_types=2, cells_per_perturbation=150, n_controls=400)
    rng = np.random.default_rng(0)
    adata.obs["tissue"] = rng.choice(["liver", "lung"], adata.n_obs)
    (text,) = warned(untrained(adata, context_key="tissue"), caplog)
    assert "'cell_type'" in text
    assert "tissue" not in text


def test_levels_that_perturbations_change_are_no_contexts():
    """Clusters of expression: within them effects are what is left of effects."""
    adata = screen(**SPECIFIC)
    is_typed = adata.obs["cell_type"].to_numpy() == "type_1"
    perturbed = (adata.obs["perturbation"] != "control").to_numpy()
    rng = np.random.default_rng(0)
    adata.obs["leiden"] = np.where(
        rng.random(adata.n_obs) < np.where(perturbed, 0.9, 0.6), is_typed.astype(str), "other"
    )
    table = context_interactions(untrained(adata), ["leiden", "cell_type"])
    assert table.loc["leiden", "n_differ"] > 0
    assert not table.loc["leiden", "is_balanced"]
    assert not table.loc["leiden", "differs"]
    assert table.loc["cell_type", "differs"]
    registered = context_interactions(untrained(adata, batch_key="leiden"), "leiden")
    assert registered.loc["leiden", "differs"]


def test_columns_that_cannot_be_contexts_are_passed_over():
    adata = screen()
    labels = adata.obs["perturbation"].astype(str)
    adata.obs["guide"] = labels + np.where(np.arange(adata.n_obs) % 2, "_1", "_2")
    adata.obs["is_control"] = labels == "control"
    adata.obs["target_class"] = labels.str[:3]
    adata.obs["number"] = np.arange(adata.n_obs) % 3
    adata.obs["barcode"] = adata.obs_names
    adata.obs["one"] = "x"
    adata.obs["missing"] = None
    adata.obs["when"] = pd.to_datetime("2024-01-01")
    adata.obs["lists"] = [[1]] * adata.n_obs
    adata.obs["again"] = adata.obs["lane"].map({"a": "first", "b": "second"})
    adata.obs["rare"] = np.where(np.arange(adata.n_obs) < 20, "few", "many")
    adata.obs["half"] = pd.Series(np.where(np.arange(adata.n_obs) % 2, "x", "y"), adata.obs_names)
    adata.obs.loc[adata.obs_names[::3], "half"] = None
    adata.obs["flag"] = np.random.default_rng(3).random(adata.n_obs) < 0.5
    table = context_interactions(untrained(adata))
    assert sorted(table.index) == ["cell_type", "flag", "half", "lane"]
    asked = context_interactions(untrained(adata), ["guide", "again", "number", "missing"])
    assert asked["n_tested"].tolist() == [0, 12, 12, 0]
    assert asked.loc["guide", ["share", "p_value"]].isna().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"n_controls": 5},
        {"cells_per_perturbation": 3},
        {"n_cell_types": 1},
        {"n_genes": 1},
        {"library_size": 12.0},
    ],
)
def test_small_and_odd_screens_train_without_a_word(changes, caplog):
    adata = screen(**changes)
    adata.obs["few"] = np.where(np.arange(adata.n_obs) % 7, "x", "y")
    assert not warned(untrained(adata), caplog)


def test_combinations_and_doses_are_treatments_of_their_own():
    adata = screen(
        n_combinations=2,
        n_perturbations=3,
        cells_per_perturbation=200,
        cells_per_combination=250,
        dosages=[0.5, 1.0],
    )
    adata.obs["dosage"] = adata.obs["dosage"].astype(str)
    plain = context_interactions(untrained(adata), "lane", per_perturbation=True)
    singles = ["P001", "P002", "P003"]
    combinations = adata.obs["perturbation"][adata.obs["n_perturbations"] == 2].unique().tolist()
    assert sorted(plain["perturbation"]) == sorted([*singles, *combinations])
    dosed = untrained(adata, dosage_key="dosage")
    names = context_interactions(dosed, "lane", per_perturbation=True)["perturbation"].tolist()
    assert {"P001@0.5", "P001@1"} <= set(names)
    assert any("+" in name and name.endswith(("@0.5+0.5", "@0.5+1")) for name in names)


def test_values_that_are_no_counts_are_compared_as_they_are():
    adata = screen(**SPECIFIC)
    adata.X = np.log1p(adata.X.toarray())
    SAMSVAE.setup_anndata(adata)
    model = SAMSVAE(adata, n_latent=3, n_hidden=8, gene_likelihood="normal")
    assert context_interactions(model).loc["cell_type", "differs"]


def test_a_covariate_is_taken_out():
    """Cells of one perturbation in one lane have more of what a covariate changes."""
    adata = screen(n_genes=40, cells_per_perturbation=150, n_null_perturbations=12)
    rng = np.random.default_rng(0)
    chosen = (adata.obs["perturbation"] == "P001") & (adata.obs["lane"] == "a")
    amount = (rng.random(adata.n_obs) < np.where(chosen, 1.0, 0.2)).astype(float)
    adata.obs["amount"] = amount
    counts = adata.X.toarray()
    counts[:, :20] *= np.where(amount, 8, 1)[:, None]
    adata.X = counts
    models = untrained(adata.copy()), untrained(adata, continuous_covariate_keys=["amount"])
    tables = [context_interactions(model, "lane", per_perturbation=True) for model in models]
    ignored, known = (table.set_index("perturbation").loc["P001", "p_value"] for table in tables)
    assert ignored < 1e-6
    assert known > 0.01


def test_of_large_screens_some_cells_are_read(monkeypatch):
    adata = screen(**SPECIFIC)
    model = untrained(adata)
    asked = []
    read = _context_tests.chunks_of_cells
    monkeypatch.setattr(
        _context_tests, "chunks_of_cells", lambda m, cells: asked.append(cells) or read(m, cells)
    )
    table = context_interactions(model, max_cells=600)
    labels = adata.obs["perturbation"].to_numpy()
    (cells,) = asked
    assert len(cells) <= 600
    assert (np.diff(cells) > 0).all()
    assert (labels[cells] == "control").sum() == 200
    kept = pd.Series(labels[cells]).value_counts().drop("control")
    assert (kept == 75).all()
    assert len(kept) == table.loc["cell_type", "n_tested"] == 5
    again = context_interactions(model, max_cells=600)
    pd.testing.assert_frame_equal(table, again)


def test_nothing_is_changed():
    """Neither the data nor the state of random generators."""
    adata = screen(**SPECIFIC)
    model = untrained(adata)
    before, states = adata.copy(), random_states()
    table = context_interactions(model)
    for state, expected in zip(random_states(), states, strict=True):
        np.testing.assert_array_equal(state, expected)
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert adata.uns.keys() == before.uns.keys()
    assert (adata.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(context_interactions(model), table)


def test_cells_on_disk_give_the_same(tmp_path):
    adata = screen(**SPECIFIC)
    expected = context_interactions(untrained(adata))
    adata.write_h5ad(tmp_path / "screen.h5ad")
    backed = ad.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    found = context_interactions(untrained(backed))
    pd.testing.assert_frame_equal(found, expected, rtol=1e-6)


def test_wrong_arguments_and_models_without_cells_are_refused(tmp_path):
    model = untrained(screen())
    with pytest.raises(MissingKeyError, match="'tissue'"):
        context_interactions(model, ["lane", "tissue"])
    for arguments in ({"keys": 3}, {"keys": [3]}, {"max_cells": 99}, {"per_perturbation": "yes"}):
        with pytest.raises(InvalidArgumentError, match=next(iter(arguments))):
            context_interactions(model, **arguments)
    model.train(max_epochs=1, enable_progress_bar=False)
    model.save(tmp_path / "model")
    with pytest.raises(SAMSError, match="without data"):
        context_interactions(SAMSVAE.load(tmp_path / "model", adata=False))
