"""Conventions by name: what each reads, and what overrides it."""

import logging
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

from scvi_sams import SAMSVAE
from scvi_sams.exceptions import InvalidArgumentError, MissingControlError, MissingKeyError
from scvi_sams.labels._presets import PRESETS

SIZES = {"n_latent": 2, "n_hidden": 4}
FORMS = {
    "scperturb": ("perturbation", ["control", "KLF1", "MAP2K6", "KLF1_MAP2K6"]),
    "pertpy": ("perturbation", ["control", "KLF1", "MAP2K6", "MAP2K6_KLF1"]),
    "gears": ("condition", ["ctrl", "KLF1+ctrl", "ctrl+MAP2K6", "KLF1+MAP2K6"]),
    "perturbench": ("condition", ["control", "KLF1", "MAP2K6", "KLF1+MAP2K6"]),
    "state": ("gene", ["non-targeting", "KLF1", "MAP2K6", "HLA-A"]),
    "xatlas": ("gene_target", ["Non-Targeting", "KLF1", "MAP2K6", "KLF1|MAP2K6"]),
    "tahoe": ("drug", ["DMSO_TF", "Aspirin", "A|B+C_d", "Aspirin"]),
}
NAMES = {"state": ["HLA-A", "KLF1", "MAP2K6"], "tahoe": ["Aspirin", "A|B+C_d"]}


def screen(key, labels, **obs):
    obs = {key: [labels[cell % len(labels)] for cell in range(24)], **obs}
    counts = 1 + np.random.default_rng(0).poisson(3, (24, 5)).astype(np.float32)
    return AnnData(counts, obs=pd.DataFrame(obs, index=[f"c{cell}" for cell in range(24)]))


def registered(adata, **setup):
    SAMSVAE.setup_anndata(adata, **setup)
    return SAMSVAE(adata, **SIZES)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reads_its_form(name):
    key, labels = FORMS[name]
    model = registered(screen(key, labels), preset=name)
    assert model.perturbations == NAMES.get(name, ["KLF1", "MAP2K6"])
    setup = model.provenance["setup"]
    assert [setup["perturbation_key"], setup["control"]] == [key, labels[0]]
    assert "preset" not in setup
    assert all(type(setup[name]) in (str, type(None)) for name in ("control", "delimiter"))


@pytest.mark.parametrize("name", PRESETS)
def test_a_column_that_is_missing_is_named(name):
    adata = screen("guide", ["x", "y"])
    with pytest.raises(MissingKeyError) as error:
        SAMSVAE.setup_anndata(adata, preset=name)
    assert f"preset={name!r}" in str(error.value)
    assert repr(FORMS[name][0]) in str(error.value)
    assert "'guide'" in str(error.value)


def test_what_is_given_overrides_a_preset_even_if_it_is_the_default():
    adata = screen("perturbation", ["control", "KLF1", "MAP2K6", "KLF1+MAP2K6"])
    model = registered(
        adata, preset="gears", perturbation_key="perturbation", control="control", delimiter="+"
    )
    assert model.perturbations == ["KLF1", "MAP2K6"]
    whole = registered(adata, preset="scperturb", delimiter=None)
    assert whole.perturbations == ["KLF1", "KLF1+MAP2K6", "MAP2K6"]
    with pytest.raises(MissingControlError, match="'NT'"):
        SAMSVAE.setup_anndata(adata, preset="scperturb", control="NT")
    with pytest.raises(InvalidArgumentError, match="`preset` must be one of"):
        SAMSVAE.setup_anndata(adata, preset="GEARS")


def test_a_model_of_a_preset_is_saved_and_loaded(tmp_path):
    key, labels = FORMS["gears"]
    model = registered(screen(key, labels), preset="gears")
    model.save(tmp_path / "model")
    loaded = SAMSVAE.load(tmp_path / "model", screen(key, labels[::-1]), accelerator="cpu")
    assert loaded.perturbations == model.perturbations
    assert loaded.provenance == model.provenance


def test_the_table_in_the_documentation_is_that_of_the_code():
    page = (Path(__file__).parents[2] / "docs" / "anndata.md").read_text(encoding="utf-8")
    for name, preset in PRESETS.items():
        (row,) = re.findall(rf'^\| `"{name}"` \|.*$', page, re.MULTILINE)
        row = row.replace("\\|", "|")
        for value in (preset.perturbation_key, preset.control, preset.delimiter):
            assert (f'`"{value}"`' if value is not None else "`None`") in row


# Control ----------------------------------------------------------------------------------------


@pytest.fixture
def warnings_of():
    """Return what registering labels warns of."""
    messages = []

    class Records(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("scvi.sams"), Records(logging.WARNING)
    logger.addHandler(handler)
    yield lambda labels, **setup: (
        messages.clear(),
        SAMSVAE.setup_anndata(screen("perturbation", labels), **setup),
        list(messages),
    )[-1]
    logger.removeHandler(handler)


def test_each_kind_of_name_is_warned_of_once(warnings_of):
    labels = ["control", "NT_1", "Safe-Targeting", "multiple", "nan", "STAT1g1", "STAT1g2", "B"]
    controls, unassigned, guides = warnings_of(labels)
    for part in ("'NT_1', 'Safe-Targeting'", "`control`", "'NT*'"):
        assert part in controls
    for part in ("'multiple', 'nan'", "drop these cells"):
        assert part in unassigned
    for part in ("'STAT1g1', 'STAT1g2' (STAT1)", "`perturbation_key`"):
        assert part in guides
    assert warnings_of(labels[:1] + labels[-1:]) == []
    assert warnings_of(labels[:4] + labels[-1:], control=[*labels[:4]]) == []


def test_a_likely_delimiter_is_named(warnings_of):
    labels = ["control", "KLF1", "MAP2K6", "STAT1", "KLF1_MAP2K6", "STAT1_KLF1"]
    (warning,) = warnings_of(labels)
    for part in ("2 labels", "'KLF1_MAP2K6'", "delimiter='_'"):
        assert part in warning
    assert warnings_of(labels, delimiter="_") == []
    assert warnings_of(labels, delimiter=None) == []


@pytest.mark.parametrize("control", ["NT_*", "is_control", [True, False, False] * 8])
def test_controls_by_pattern_or_marks_train_as_named_ones(control, tmp_path):
    labels = ["NT_1", "A", "B", "NT_2", "A+NT_1", "B+A"]
    adata = screen("perturbation", labels, is_control=[True, False, False] * 8)
    model = registered(adata, control=control)
    assert model.perturbations == ["A", "B"]
    training = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}
    model.train(**training)
    few = {"n_samples": 20, "n_posterior_samples": 2}
    torch.manual_seed(0)
    plain = model.predict_ate(["A", "NT_1"], **few)
    torch.manual_seed(0)
    np.testing.assert_array_equal(model.predict_ate(["A+NT_2", "NT_2"], **few).X, plain.X)
    assert abs(plain.X[1]).max() == 0 < abs(plain.X[0]).max()
    assert len(model.differential_expression(group1="A", n_samples=10))
    model.save(tmp_path / "model", save_anndata=True)
    loaded = SAMSVAE.load(tmp_path / "model", accelerator="cpu")
    assert loaded.provenance["setup"] == model.provenance["setup"]


def test_marks_and_a_dosage_matrix_contradict_each_other():
    adata = screen("perturbation", ["control", "A"])
    adata.obsm["doses"] = pd.DataFrame({"A": [0.0, 1.0] * 12}, index=adata.obs_names)
    with pytest.raises(InvalidArgumentError, match="rows of zeros"):
        SAMSVAE.setup_anndata(adata, dosage_obsm_key="doses", control=np.arange(24) % 2 == 0)
