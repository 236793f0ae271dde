"""model.test_perturbations: whether cells differ, told without what the model has learned."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from model.builders import small_screen, train_small
from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE
from scvi_sams.datasets import simulate_screen
from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.model import _expression_axes
from scvi_sams.model._expression_axes import principal_features, strata_of_cells
from scvi_sams.train._statistics import chunks_of_cells

COLUMNS = ["n_cells", "n_compared", "statistic", "p_value", "q_value"]


def untrained(adata, model_cls=SAMSVAE, **setup):
    model_cls.setup_anndata(adata, **setup)
    return model_cls(adata, n_latent=3, n_hidden=8)


def screen(seed=0, **changes):
    settings = {
        "n_genes": 60,
        "n_controls": 200,
        "n_perturbations": 8,
        "cells_per_perturbation": 60,
        "n_combinations": 0,
        "n_null_perturbations": 4,
        "n_latent": 5,
    }
    return simulate_screen(seed=seed, **(settings | changes))


def strongest_effects(adata):
    """Of each perturbation, on any latent, in standard deviations of basal states."""
    truth = adata.uns["simulation"]
    effects = np.abs(truth["true_effects"] * truth["true_masks"]).max(axis=1)
    return pd.Series(effects, index=truth["perturbations"]).sort_index()


def test_perturbations_that_do_something_are_told_from_those_that_do_not():
    adata = screen(effect_scale=4.0)
    table = untrained(adata).test_perturbations()
    strength = strongest_effects(adata)
    assert (strength > 2).sum() >= 2
    assert table.columns.tolist() == COLUMNS
    assert (table.loc[strength > 2, "q_value"] < 1e-6).all()
    assert (table.loc[strength == 0, "p_value"] > 1e-3).all()
    assert (table["n_cells"] == 60).all()
    assert (table["n_compared"] == 200).all()
    pd.testing.assert_frame_equal(adata.uns["sams_tests"], table)


def test_training_plays_no_part():
    """The states of trained cells tell labels that were permuted apart; this test does not."""
    adata = screen(cells_per_perturbation=25, n_null_perturbations=8)
    model = untrained(adata)
    before = model.test_perturbations(key_added=None)
    model.train(max_epochs=3, enable_progress_bar=False)
    pd.testing.assert_frame_equal(model.test_perturbations(key_added=None), before)


def test_p_values_of_permuted_labels_are_uniform():
    adata = screen(effect_scale=4.0)
    rng = np.random.default_rng(0)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    p_values = []
    for _ in range(25):
        adata.obs["perturbation"] = rng.permutation(labels)
        p_values.append(untrained(adata.copy()).test_perturbations(key_added=None)["p_value"])
    p_values = np.concatenate(p_values)
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3
    low, high = stats.binom.interval(0.999, len(p_values), 0.05)
    assert low <= (p_values < 0.05).sum() <= high


def test_a_batch_is_no_effect_once_it_is_registered():
    adata = screen(n_null_perturbations=8, n_controls=240)
    rng = np.random.default_rng(1)
    counts = adata.X.toarray()
    # Controls are in both batches alike, perturbed cells mostly in the second.
    perturbed = (adata.obs["perturbation"] != "control").to_numpy()
    second = rng.random(adata.n_obs) < np.where(perturbed, 0.9, 0.4)
    counts[second, :20] *= 8
    adata.X = counts
    adata.obs["batch"] = np.where(second, "b", "a")
    adata.obs["amount"] = second + 0.01 * rng.normal(size=adata.n_obs)
    ignored = untrained(adata.copy()).test_perturbations()
    known = untrained(adata.copy(), batch_key="batch").test_perturbations()
    regressed = untrained(adata.copy(), continuous_covariate_keys=["amount"]).test_perturbations()
    assert (ignored["p_value"] < 1e-4).all()
    assert (known["p_value"] > 1e-3).all()
    assert (regressed["p_value"] > 1e-4).all()


def test_controls_that_differ_from_one_another_are_named(caplog):
    adata = screen(n_controls=240, effect_scale=4.0)
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    controls = np.flatnonzero(labels == "control")
    labels[controls] = np.random.default_rng(2).permutation(np.repeat(["NT1", "NT2", "NT3"], 80))
    strongest = strongest_effects(adata).idxmax()
    adata.obs["perturbation"] = labels
    names = ["NT1", "NT2", "NT3"]
    with caplog.at_level("WARNING", logger="scvi.sams"):
        alike = untrained(adata.copy(), control=names).test_perturbations(key_added=None)
    assert (alike.attrs["controls"] > 0.01).all()
    assert alike.attrs["controls"].index.tolist() == names
    assert "differ from the other control cells" not in caplog.text
    adata.obs["perturbation"] = np.where(labels == strongest, "NT4", labels)
    with caplog.at_level("WARNING", logger="scvi.sams"):
        found = untrained(adata, control=[*names, "NT4"]).test_perturbations()
    assert found.attrs["controls"]["NT4"] < 1e-6
    assert "Control labels" in caplog.text
    assert "'NT4'" in caplog.text


@pytest.mark.parametrize("model_cls", [CPAVAE, ConditionalVAE])
def test_all_models_say_the_same(model_cls):
    adata = small_screen()
    expected = untrained(adata.copy()).test_perturbations()
    pd.testing.assert_frame_equal(untrained(adata, model_cls).test_perturbations(), expected)


def test_cells_on_disk_give_the_same(tmp_path):
    adata = screen()
    expected = untrained(adata).test_perturbations()
    del adata.uns["sams_tests"]
    adata.write_h5ad(tmp_path / "screen.h5ad")
    backed = ad.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    table = untrained(backed).test_perturbations(key_added=None)
    pd.testing.assert_frame_equal(table, expected, rtol=1e-6)


def test_axes_are_found_from_some_cells_and_all_are_tested(monkeypatch):
    adata = screen(effect_scale=4.0)
    expected = untrained(adata).test_perturbations()
    asked = []

    def counted(manager, cells):
        asked.append(len(cells))
        return chunks_of_cells(manager, cells)

    monkeypatch.setattr(_expression_axes, "chunks_of_cells", counted)
    monkeypatch.setattr(_expression_axes, "_MOST_CELLS", 300)
    table, strength = untrained(adata).test_perturbations(), strongest_effects(adata)
    assert asked == [300, adata.n_obs]
    assert (table.loc[strength > 2, "q_value"] < 1e-6).all()
    assert (table.loc[strength == 0, "p_value"] > 1e-3).all()
    assert not table["statistic"].equals(expected["statistic"])
    same = ["n_cells", "n_compared"]
    pd.testing.assert_frame_equal(table[same], expected[same])


def test_features_are_the_principal_components_of_standardised_genes():
    """Log-normalised, centred within batches, of unit variance within them."""
    adata = screen(n_null_perturbations=8)
    batch = np.random.default_rng(0).integers(0, 2, adata.n_obs)
    adata.obs["batch"] = batch.astype(str)
    model = untrained(adata, batch_key="batch")
    counts = adata.X.toarray().astype(float)
    size = counts.sum(axis=1)
    logged = np.log1p(counts / size[:, None] * np.median(size))
    for value in (0, 1):
        logged[batch == value] -= logged[batch == value].mean(axis=0)
    logged /= logged.std(axis=0)
    left, singular, _ = np.linalg.svd(logged, full_matrices=False)
    manager = model.adata_manager
    found = principal_features(manager, strata_of_cells(manager), 3, counts=True)
    np.testing.assert_allclose(np.abs(found), np.abs(left * singular)[:, :3], atol=1e-8)


def test_values_that_are_no_counts_are_tested_as_they_are():
    adata = screen(effect_scale=4.0)
    adata.X = np.log1p(adata.X.toarray())
    SAMSVAE.setup_anndata(adata)
    model = SAMSVAE(adata, n_latent=3, n_hidden=8, gene_likelihood="normal")
    table, strength = model.test_perturbations(), strongest_effects(adata)
    assert (table.loc[strength > 2, "q_value"] < 1e-6).all()
    assert (table.loc[strength == 0, "p_value"] > 1e-3).all()


def test_numbers_of_axes_are_checked():
    model = untrained(small_screen())
    with pytest.raises(InvalidArgumentError, match="n_components"):
        model.test_perturbations(n_components=0)
    few = model.test_perturbations(n_components=2, key_added=None)
    assert not few["p_value"].equals(model.test_perturbations(key_added=None)["p_value"])
    assert train_small(small_screen()).test_perturbations(n_components=500).notna().all(axis=None)


def test_cells_are_compared_within_contexts():
    """A perturbation that does nothing, all of whose cells are of one of two cell types."""
    adata = screen(n_null_perturbations=8, cells_per_perturbation=120, n_cell_types=2)
    is_other = (adata.obs["cell_type"] == "type_1") & (adata.obs["perturbation"] == "P001")
    adata = adata[~is_other].copy()
    plain = untrained(adata.copy()).test_perturbations()
    in_contexts = untrained(adata, context_key="cell_type").test_perturbations()
    assert plain.loc["P001", "p_value"] < 1e-3
    assert in_contexts["p_value"].min() > 1e-2
    covariate = untrained(adata.copy(), categorical_covariate_keys=["cell_type"])
    pd.testing.assert_frame_equal(in_contexts, covariate.test_perturbations())
