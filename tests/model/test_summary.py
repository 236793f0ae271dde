"""The summary of a model: each line against where it comes from."""

import numpy as np
import pytest
import torch

from model.builders import COVARIATES, VARIANTS, set_effects, small_screen, train_small
from scvi_sams import CPAVAE, SAMSVAE
from scvi_sams.datasets import simulate_screen


def of(model, part):
    return model.summary().loc[part, "value"].to_dict()


@pytest.fixture(scope="module")
def model():
    model = train_small(small_screen(), COVARIATES, **VARIANTS["mean field"], max_epochs=3)
    set_effects(model, np.ones((4, 4)))
    with torch.no_grad():
        model.module.masks.logits.fill_(-40.0)
        model.module.masks.logits[0, [0, 2]] = 40.0
        model.module.masks.logits[3, 2] = 40.0
    return model


def test_the_screen_is_that_registered(model):
    screen = of(model, "screen")
    labels = model.adata.obs["perturbation"].astype(str)
    carrying = [labels.str.split("+").map(set(model.perturbations).intersection)]
    counts = sorted(sum(name in one for one in carrying[0]) for name in model.perturbations)
    median = int(np.median(counts))
    assert screen == {
        "cells": str(len(labels)),
        "genes": "24",
        "control cells": "50",
        "perturbations": f"4 ({counts[0]} / {median} / {counts[-1]} cells, min / median / max)",
        "combinations": "2",
        "labels": "perturbation",
        "batches": "lane",
        "categorical covariates": "donor",
        "continuous covariates": "age",
    }


def test_settings_are_those_that_differ_from_the_defaults(model):
    assert of(model, "model") == {
        "class": "SAMSVAE",
        "latent dimensions": "4",
        "likelihood": "nb",
        "n_hidden": "16",
        "effect_n_hidden": "8",
        "direct_effects": "False",
        "stacking": "False",
        "correlated_basal": "False",
        "correlated_effects": "False",
    }


def test_training_is_told_as_it_ended(model):
    training = of(model, "training")
    assert training["epochs"] == "3"
    assert training["training cells"] == str(len(model.train_indices))
    assert training["ending"] == "All planned epochs were trained."
    assert training["seed"] == "not set"
    assert training["batch_size"] == "64"


def test_masks_in_use_are_counted(model):
    assert of(model, "masks") == {
        "entries more likely on than off": "3 of 16",
        "latent dimensions in use": "2 of 4",
        "perturbations with an entry": "2 of 4",
    }


def test_warnings_name_what_to_look_at(model):
    (few,) = of(model, "warnings").values()
    assert few.startswith("4 perturbations have fewer than 50 training cells: effects are shrunken")
    untrained = SAMSVAE(model.adata, n_latent=3)
    assert of(untrained, "training") == {"state": "not trained"}
    assert "results are meaningless" in of(untrained, "warnings")["1"]
    assert "masks" not in untrained.summary().index.get_level_values("part")


def test_masks_that_say_nothing_are_warned_of():
    model = train_small(small_screen(), **VARIANTS["mean field"])
    for value, told in ((-40.0, "All masks are off"), (40.0, "All masks are on")):
        with torch.no_grad():
            model.module.masks.logits.fill_(value)
        assert any(told in line for line in of(model, "warnings").values())


def test_models_without_masks_have_no_lines_of_them():
    model = train_small(small_screen(), model_cls=CPAVAE)
    assert "masks" not in model.summary().index.get_level_values("part")
    assert of(model, "model")["class"] == "CPAVAE"


def test_a_model_without_its_data_says_the_same(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = SAMSVAE.load(tmp_path / "model", adata=False)
    assert loaded.summary().equals(model.summary())


def test_guides_contexts_and_features_are_named():
    adata = simulate_screen(
        n_genes=30, n_controls=60, n_perturbations=4, cells_per_perturbation=60,
        n_combinations=0, guides_per_perturbation=2, n_cell_types=2, n_features=3,
    )  # fmt: skip
    features = adata.uns["perturbation_features"]
    known = adata[adata.obs["perturbation"] != "P004"].copy()
    model = train_small(
        known, {"guide_key": "guide", "context_key": "cell_type"},
        perturbation_features=features, spread=False,
    )  # fmt: skip
    screen = of(model, "screen")
    assert screen["guides"] == "6 (guide)"
    assert screen["contexts"] == "type_1, type_2 (cell_type)"
    assert screen["perturbations without cells"] == "1, with features"
    described = of(model, "model")["perturbation_features"]
    assert "perturbations = 4" in described
    assert "features = 3" in described
