"""The table of perturbations: every column against where it comes from."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from model.builders import (
    N_LATENT,
    VARIANTS,
    linear_normal,
    set_effects,
    small_screen,
    train_small,
)
from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus
from scvi_sams._fdr import mask_q_values
from scvi_sams.evaluation import active_at_fdr, consensus_masks
from scvi_sams.exceptions import MissingKeyError, SAMSError
from scvi_sams.interpretation import called_masks, entry_q_values, perturbation_hits

NAMES = ["P001", "P002", "P003", "P004"]


@pytest.fixture(scope="module")
def model():
    model = train_small(small_screen(), **VARIANTS["mean field"])
    set_effects(model, np.random.default_rng(5).normal(size=(4, N_LATENT)), 0.1)
    with torch.no_grad():
        model.module.masks.logits[0] = -40.0  # P001 does nothing
        model.module.masks.logits[1] = torch.tensor([40.0, 40.0, -40.0, 0.0])
    return model


def hits(model, **kwargs):
    torch.manual_seed(0)
    settings = {"n_samples": 2500, "n_posterior_samples": 100, "key_added": None}
    return perturbation_hits(model, **(settings | kwargs))


def test_active_latents_are_those_of_the_masks(model):
    masks = model.get_perturbation_masks(key_added=None)
    found = hits(model).loc[NAMES]
    np.testing.assert_allclose(found["expected_active_latents"], masks.sum(axis=1), rtol=1e-6)
    assert found.loc["P002", "expected_active_latents"] == pytest.approx(2.5)
    called = called_masks(model)
    assert list(found["active_latents"]) == list(called.sum(axis=1))
    assert list(found["unstable"]) == list((active_at_fdr(masks) & ~called).any(axis=1))
    assert found.loc["P001", "active_latents"] == 0
    # Of 11 entries one is active with probability 1/2: 1/22 are expected to be false.
    assert hits(model, fdr=0.04).loc["P002", "active_latents"] == 2
    assert hits(model, fdr=0.05).loc["P002", "active_latents"] == 3


def test_norms_and_genes_are_those_of_the_effects(model):
    found = hits(model)
    torch.manual_seed(0)
    ate = model.predict_ate(method="lograte", key_added=None)
    pd.testing.assert_frame_equal(
        found.loc[NAMES, list(ate.obs.columns[1:])],
        ate.obs.drop(columns="perturbation"),
        check_names=False,
    )
    assert (np.diff(found["effect_norm"]) <= 0).all()
    assert found.index[-1] == "P001"
    assert list(found.loc["P001", ["effect_norm", "genes_up", "genes_down"]]) == [0, "", ""]
    for name in NAMES[1:]:
        effect = ate[name].to_df().loc[name]
        sd = 10 * ate[name].to_df("standard_error").loc[name]  # of 100 draws
        up = effect[effect > 2 * sd].nlargest(5).index
        down = effect[effect < -2 * sd].nsmallest(5).index
        assert found.loc[name, "genes_up"] == ", ".join(up)
        assert found.loc[name, "genes_down"] == ", ".join(down)
    assert (found["genes_up"] + found["genes_down"]).str.len().max() > 0


def test_cells_are_those_trained_on(model):
    found = hits(model, min_cells=30).loc[NAMES]
    registered = model.adata.obs["perturbation"].astype(str)
    train = model.train_indices
    for name in NAMES:
        carries = registered.iloc[train].str.split("+").apply(lambda names, one=name: one in names)
        assert found.loc[name, "n_cells"] == carries.sum()
    assert list(found["few_cells"]) == list(found["n_cells"] < 30)
    assert not hits(model, min_cells=1)["few_cells"].any()


@pytest.mark.parametrize("model_cls", [SAMSVAE, CPAVAE, SVAEPlus])
def test_a_normal_likelihood_has_the_units_of_its_data(model_cls):
    model, weight = linear_normal(model_cls)
    found = hits(model, n_posterior_samples=2000, n_samples=2000)
    torch.manual_seed(1)
    rows = torch.arange(len(model.perturbations))
    shifts = model.module.global_posterior(rows, 20_000).shifts.detach().numpy()
    norms = np.linalg.norm(shifts @ weight.T, axis=-1).mean(axis=0)
    np.testing.assert_allclose(found.loc[model.perturbations, "effect_norm"], norms, rtol=0.1)


def test_models_without_masks_have_no_column_of_them():
    for model_cls in (CPAVAE, ConditionalVAE):
        found = hits(train_small(small_screen(), model_cls=model_cls))
        assert not any("latents" in column for column in found)
        assert (found["effect_norm"] > 0).all()


def test_the_table_is_written_only_if_asked_for_and_survives_a_file(tmp_path):
    model = train_small(small_screen())
    before = set(model.adata.uns)
    hits(model)
    assert set(model.adata.uns) == before
    found = hits(model, key_added="sams_hits")
    model.adata.write_h5ad(tmp_path / "screen.h5ad")
    read = ad.read_h5ad(tmp_path / "screen.h5ad").uns["sams_hits"]
    pd.testing.assert_frame_equal(
        read, found, check_dtype=False, check_index_type=False, check_column_type=False
    )


def table_of_tests(model, **q_values):
    """A table as ``test_perturbations`` returns it."""
    table = pd.DataFrame({"q_value": 0.9}, index=pd.Index(model.perturbations))
    table["q_value"] = table.index.map(q_values).astype(float).fillna(0.9)
    return table


def test_entries_are_called_where_masks_and_test_agree(model, caplog):
    masks = model.get_perturbation_masks(key_added=None)
    alone = active_at_fdr(masks)
    assert alone.loc["P002"].sum() == 3
    with caplog.at_level("INFO", logger="scvi.sams"):
        called = called_masks(model, tests=table_of_tests(model, P002=0.01, P003=0.06))
    pd.testing.assert_frame_equal(
        called.loc[["P002"]], alone.loc[["P002"]], check_names=False, check_flags=False
    )
    assert not called.drop(index="P002").any(axis=None)
    expected = 1 - masks.loc["P002"].to_numpy()[alone.loc["P002"]].mean()
    assert called.attrs["expected_false"] == pytest.approx(expected)
    assert f"{expected:.1%} of them are expected to be false" in caplog.text
    nothing = called_masks(model, tests=table_of_tests(model, P002=np.nan))
    assert not nothing.any(axis=None)
    assert nothing.attrs["expected_false"] == 0
    assert called_masks(model, fdr=0.1, tests=table_of_tests(model, P003=0.06)).loc["P003"].any()


def test_q_values_are_the_smallest_rates_that_call(model):
    masks = pd.DataFrame(
        {"latent_0": [0.98, 0.5, 0.9], "latent_1": [0.9, 0.1, 0.3]}, index=["P001", "P002", "P003"]
    )
    tests = table_of_tests(model, P001=0.01, P002=0.2, P003=np.nan)
    tests.loc["P003"] = np.nan
    found = entry_q_values(model, masks=masks, tests=tests, key_added=None)
    # Means of .02; of .02, .1, .1; and of these and .5.
    expected = [[0.02, 0.22 / 3], [0.2, 2.32 / 6], [1, 1]]
    np.testing.assert_allclose(found, expected)
    assert found.index.equals(masks.index)
    for fdr in (0.015, 0.03, 0.1, 0.19, 0.3, 0.5):
        called = called_masks(model, fdr=fdr, masks=masks, tests=tests)
        by_hand = active_at_fdr(masks, fdr) & (tests["q_value"] <= fdr).to_numpy()[:3, None]
        pd.testing.assert_frame_equal(called, by_hand, check_flags=False)


def test_q_values_are_those_of_the_model_and_are_written(model):
    found = entry_q_values(model)
    tests = model.test_perturbations(key_added=None)
    masks = model.get_perturbation_masks(key_added=None)
    np.testing.assert_allclose(
        found, np.maximum(mask_q_values(masks.to_numpy()), tests[["q_value"]].to_numpy())
    )
    pd.testing.assert_frame_equal(model.adata.uns.pop("sams_q_values"), found)
    assert "sams_q_values" in model.adata.uns["sams_provenance"]


@pytest.mark.parametrize(("n_doubtful", "warns"), [(1, False), (2, False), (3, True)])
def test_masks_that_the_test_denies_are_warned_of(n_doubtful, warns, model, caplog):
    names = [f"P{number}" for number in range(20)]
    masks = pd.DataFrame(0.99, index=names, columns=["latent_0"])
    tests = pd.DataFrame({"q_value": 0.01}, index=names)
    tests.iloc[:n_doubtful] = 0.5
    with caplog.at_level("WARNING", logger="scvi.sams"):
        called = called_masks(model, masks=masks, tests=tests)
    assert called.to_numpy().sum() == 20 - n_doubtful
    assert (f"masks of {n_doubtful} of 20 perturbations, such as 'P0'" in caplog.text) == warns


def test_masks_of_several_runs_can_be_called(model):
    consensus = consensus_masks([model, model])
    tests = table_of_tests(model, P002=0.01)
    found = called_masks(model, masks=consensus.masks, tests=tests)
    pd.testing.assert_frame_equal(found, called_masks(model, tests=tests), check_flags=False)
    assert found.attrs["expected_false"] == pytest.approx(1 / 6)
    assert not called_masks(model, masks=consensus.masks * 0.5, tests=tests).any(axis=None)
    with pytest.raises(MissingKeyError, match="no perturbation 'Q'"):
        called_masks(model, masks=consensus.masks.rename(index={"P001": "Q"}), tests=tests)


def test_a_hit_differs_and_changes_a_gene(model, monkeypatch, caplog):
    monkeypatch.setattr(
        type(model),
        "test_perturbations",
        lambda self, **_: table_of_tests(self, P001=0, P002=0, P003=0),
    )
    with caplog.at_level("WARNING", logger="scvi.sams"):
        found = hits(model)
    assert found["q_value"].reindex(NAMES).tolist() == [0, 0, 0, 0.9]
    # P001 does nothing by the model, and P004's cells do not differ.
    assert found["is_hit"].reindex(NAMES).tolist() == [False, True, True, False]
    assert found["unstable"].reindex(NAMES).tolist() == [False, False, False, True]
    assert "such as 'P004'" in caplog.text


@pytest.mark.parametrize("registered", [False, True])
def test_columns_that_go_together_with_a_perturbation_are_named(registered, caplog):
    adata = small_screen()
    labels = adata.obs["perturbation"].astype(str)
    rng = np.random.default_rng(0)
    adata.obs["lane"] = np.where(labels == "P002", "lane 2", "lane 1")
    adata.obs["replicate"] = rng.choice(["a", "b"], len(labels))
    adata.obs["guide"] = labels + "_g1"
    adata.obs["depth"] = np.where(labels == "P002", 2.0, 1.0)
    setup = {"batch_key": "lane"} if registered else {}
    with caplog.at_level("WARNING", logger="scvi.sams"):
        found = hits(train_small(adata, setup=setup))
    expected = [""] * 4 if registered else ["", "lane", "", ""]
    assert found["confounded"].reindex(NAMES).tolist() == expected
    assert ("confounded with unregistered columns" in caplog.text) == (not registered)


def test_wrong_rates_are_refused(model):
    with pytest.raises(SAMSError, match="not 2"):
        hits(model, fdr=2)
    with pytest.raises(SAMSError, match="not 1"):
        hits(model, interval=1.5)
