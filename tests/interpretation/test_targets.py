"""How far perturbations change their own genes: predicted, direct and observed, by hand."""

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from model.builders import make_decoder_linear, small_screen, train_small
from model.test_direct_effects import fill, tables
from scvi_sams import SVAEPlus
from scvi_sams.datasets import simulate_screen
from scvi_sams.exceptions import InvalidArgumentError, MissingKeyError, UnknownPerturbationError
from scvi_sams.interpretation import target_knockdown

TARGETS = {"P001": "gene_0003", "P002": "gene_0010", "P004": "gene_0001"}
GENES = [2, 9, 0]
ROWS = [0, 1, 3]
FEW = {"n_samples": 400, "n_posterior_samples": 200, "key_added": None}


def flat(setup, **kwargs):
    """A model whose latent states change no gene, with direct effects filled in by hand."""
    model = train_small(small_screen(dosages=[0.5, 1.0]), setup, max_epochs=1, **kwargs)
    n_genes = model.adata.n_vars
    make_decoder_linear(model, np.zeros((n_genes, 4)), np.linspace(-1, 1, n_genes))
    fill(model)
    return model


@pytest.fixture(scope="module")
def counts():
    """Rates that are not scaled to shares."""
    return flat({"size_factor_key": "transcriptome", "dosage_key": "dosage"})


@pytest.fixture(scope="module")
def normal():
    return flat({"layer": "normalised", "dosage_key": "dosage"}, gene_likelihood="normal")


@pytest.fixture
def table(counts):
    return target_knockdown(counts, target_genes=TARGETS, **FEW).loc[list(TARGETS)]


def alone(adata, name):
    return ((adata.obs["perturbation"] == name) & (adata.obs["dosage"] == "1.0")).to_numpy()


def test_predicted_changes_are_log2_of_what_is_added_to_log_rates(table):
    filled = tables()
    added = (filled.mean + filled.correction).numpy()[ROWS, GENES]
    # The mean rate is the exponential of what is added: half the variance above the mean log rate.
    of_logs = added - filled.uncertainty.numpy()[ROWS, GENES] ** 2 / 2
    np.testing.assert_allclose(table["lfc"], of_logs / np.log(2), atol=1e-4)
    assert list(table["gene"]) == list(TARGETS.values())


def test_intervals_are_as_wide_as_what_is_not_known(counts):
    many = FEW | {"n_samples": 4000, "n_posterior_samples": 4000}
    filled = tables()
    for interval, deviations in ((0.95, 1.96), (0.5, 0.674)):
        table = target_knockdown(counts, target_genes=TARGETS, interval=interval, **many)
        table = table.loc[list(TARGETS)]
        width = 2 * deviations * filled.uncertainty.numpy()[ROWS, GENES] / np.log(2)
        np.testing.assert_allclose(table["lfc_high"] - table["lfc_low"], width, rtol=0.08)
        assert (table["lfc_low"] < table["lfc"]).all()
        assert (table["lfc"] < table["lfc_high"]).all()


def test_the_direct_part_is_that_of_the_tables(table):
    filled = tables()
    direct = filled.mean.numpy()[ROWS, GENES]
    np.testing.assert_allclose(table["direct"], direct / np.log(2), rtol=1e-6)
    np.testing.assert_allclose(table["lfsr"], filled.sign_error.numpy()[ROWS, GENES], rtol=1e-6)


def test_observed_changes_are_those_of_counts_per_size_of_cells_with_dose_one(counts, table):
    adata = counts.adata
    x, size = adata.X.toarray(), adata.obs["transcriptome"].to_numpy()
    control = (adata.obs["perturbation"] == "control").to_numpy()
    for gene, (name, row) in zip(GENES, table.iterrows(), strict=True):
        cells = alone(adata, name)
        assert row["n_cells"] == cells.sum()
        assert 0 < cells.sum() < (adata.obs["perturbation"] == name).sum()
        treated = (x[cells, gene].sum() + 0.5) / size[cells].sum()
        base = (x[control, gene].sum() + 0.5) / size[control].sum()
        assert row["observed"] == pytest.approx(np.log2(treated / base), rel=1e-5)


def test_all_are_differences_of_means_where_expression_is_no_count(normal):
    table = target_knockdown(normal, target_genes=TARGETS, **FEW).loc[list(TARGETS)]
    filled = tables()
    direct = filled.mean.numpy()[ROWS, GENES]
    np.testing.assert_allclose(table["direct"], direct, rtol=1e-6)
    added = direct + filled.correction.numpy()[ROWS, GENES]
    np.testing.assert_allclose(table["lfc"], added, atol=1e-5)
    x = normal.adata.layers["normalised"]
    control = (normal.adata.obs["perturbation"] == "control").to_numpy()
    for gene, (name, row) in zip(GENES, table.iterrows(), strict=True):
        cells = alone(normal.adata, name)
        expected = x[cells, gene].mean() - x[control, gene].mean()
        assert row["observed"] == pytest.approx(expected, rel=1e-4)


def test_the_strongest_decrease_comes_first(counts):
    table = target_knockdown(counts, target_genes=TARGETS, **FEW)
    assert table["lfc"].is_monotonic_increasing
    assert sorted(table.index) == sorted(TARGETS)
    assert table.index.name == "perturbation"


def test_perturbations_without_a_gene_are_named(counts, caplog):
    caplog.set_level(logging.INFO, logger="scvi.sams")
    targets = {"P001": "gene_0003", "P002": "not measured"}
    table = target_knockdown(counts, target_genes=targets, **FEW)
    assert list(table.index) == ["P001"]
    assert table.attrs["without_gene"] == ["P002", "P003", "P004"]
    assert "3 perturbations have no gene among those measured, such as 'P002'" in caplog.text


def test_perturbations_of_which_no_cell_is_alone_have_no_observation():
    adata = small_screen()
    adata = adata[adata.obs["perturbation"] != "P001"].copy()
    model = train_small(adata, max_epochs=1)
    table = target_knockdown(model, target_genes=TARGETS, **FEW)
    assert table.loc["P001", "n_cells"] == 0
    assert np.isnan(table.loc["P001", "observed"])
    assert table["observed"].drop("P001").notna().all()


def test_models_without_direct_effects_have_no_direct_part():
    for kwargs in ({"direct_effects": False}, {"model_cls": SVAEPlus}):
        model = train_small(small_screen(), max_epochs=1, **kwargs)
        table = target_knockdown(model, target_genes=TARGETS, **FEW)
        columns = ["gene", "dosage", "lfc", "lfc_low", "lfc_high", "n_cells", "observed"]
        assert list(table.columns) == columns


def test_the_table_is_written_and_survives_a_file(counts, tmp_path):
    table = target_knockdown(counts, target_genes=TARGETS, **FEW | {"key_added": "sams_targets"})
    counts.adata.write_h5ad(tmp_path / "screen.h5ad")
    written = ad.read_h5ad(tmp_path / "screen.h5ad").uns
    counts.adata.uns.pop("sams_targets")
    pd.testing.assert_frame_equal(written["sams_targets"], table, check_dtype=False)
    assert "sams_targets" in written["sams_provenance"]


def test_what_cannot_be_a_target_is_an_error(counts):
    with pytest.raises(MissingKeyError, match=r"'P001', 'P002'.*'gene_0001'.*`target_genes`"):
        target_knockdown(counts)
    with pytest.raises(UnknownPerturbationError, match="P9"):
        target_knockdown(counts, target_genes={"P9": "gene_0001"})
    with pytest.raises(InvalidArgumentError, match="`target_genes`"):
        target_knockdown(counts, target_genes=["gene_0001"])
    assert "sams_targets" not in counts.adata.uns


def test_knock_downs_of_a_simulated_panel_are_found():
    torch.manual_seed(0)
    panel = simulate_screen(
        n_genes=70,
        n_controls=1000,
        n_perturbations=8,
        cells_per_perturbation=300,
        n_combinations=0,
        n_latent=4,
        effect_scale=0.0,
        gene_bias_sd=0.3,
        inverse_dispersion=20.0,
        library_size=2000.0,
        knockdown=(0.7, 0.9),
    )
    model = train_small(panel, max_epochs=3, spread=False)
    table = target_knockdown(model)
    truth = panel.uns["simulation"]
    removed = pd.Series(truth["true_own_gene_effects"], truth["perturbations"])[table.index]
    assert list(table["gene"]) == list(table.index)
    assert table.attrs["without_gene"] == []
    assert (table["lfsr"] < 0.01).all()
    assert (table["lfc_high"] < -1).all()
    # The error of 300 cells, whose states differ too, and shrinkage.
    np.testing.assert_allclose(table["lfc"], removed / np.log(2), atol=0.25)
    np.testing.assert_allclose(table["lfc"], table["observed"], atol=0.2)
