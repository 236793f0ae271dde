"""Differential expression: closed forms, simulated truth, both comparisons in one form."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from model.builders import (
    N_LATENT,
    SHIFTS_ONLY,
    TRAINING,
    VARIANTS,
    make_decoder_linear,
    set_effects,
    small_screen,
    train_small,
)
from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus
from scvi_sams.datasets import simulate_screen, simulated_rates
from scvi_sams.exceptions import MissingKeyError, SAMSError, UnknownPerturbationError

EFFECTS = np.random.default_rng(5).normal(size=(4, N_LATENT))
DELTA = 0.25


def compare(model, *args, **kwargs):
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (scvi-tools pairs cells by it)
    return model.differential_expression(*args, **kwargs)


@pytest.fixture(scope="module")
def log_linear():
    """Return a model whose log rates are linear in the latent state, and its weights."""
    adata = small_screen()
    model = train_small(adata, {"size_factor_key": "transcriptome"}, **VARIANTS["mean field"])
    weight = np.random.default_rng(6).normal(size=(adata.n_vars, N_LATENT)) / 3
    make_decoder_linear(model, weight, np.zeros(adata.n_vars))
    set_effects(model, EFFECTS)
    return model, weight


def test_fold_changes_of_a_log_linear_decoder_are_its_weights(log_linear):
    model, weight = log_linear
    for label, shift in (("P002", EFFECTS[1]), ("P003+P001", EFFECTS[0] + EFFECTS[2])):
        found = compare(model, group1=label, pseudocounts=0.0).loc[model.adata.var_names]
        expected = weight @ shift / np.log(2)
        np.testing.assert_allclose(found["lfc_mean"], expected, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found["lfc_std"], 0, atol=1e-3)
        np.testing.assert_allclose(found["lfc_z"], expected / found["lfc_error"], atol=0.01)
        beyond = np.abs(expected) - DELTA - found["lfc_error"].to_numpy()
        is_sure = np.abs(beyond) > 0.01
        is_larger = beyond > 0
        np.testing.assert_array_equal(found["proba_de"][is_sure], is_larger[is_sure])
        np.testing.assert_array_equal(found["is_de_fdr_0.05"][is_sure], is_larger[is_sure])
        assert 0 < is_larger.sum() < len(is_larger)


def test_the_error_is_that_of_counts_in_so_many_cells(log_linear):
    """Of a pair, variances of both perturbations; a pseudocount damps it as it does the change."""
    model, _ = log_linear
    adata = model.adata
    n_cells = model.module.cells_per_perturbation.numpy()
    is_control = (adata.obs["perturbation"] == "control").to_numpy()
    size = np.median(adata.obs["transcriptome"][is_control])
    for label, n_treated in (("P002", n_cells[1]), ("P001+P003", 1 / (1 / n_cells[[0, 2]]).sum())):
        for pseudocounts in (0.0, 3.0):
            found = compare(model, group1=label, pseudocounts=pseudocounts)
            variance = 0.0
            for scale, n in ((found["scale1"], n_treated), (found["scale2"], is_control.sum())):
                of_log = 1 / (n * size * scale + 0.5)
                variance += of_log * (scale / (scale + pseudocounts)) ** 2
            np.testing.assert_allclose(found["lfc_error"], np.sqrt(variance) / np.log(2), rtol=1e-3)


def test_the_best_founded_of_equally_likely_genes_lead(log_linear):
    found = compare(log_linear[0], group1="P002", pseudocounts=0.0)
    assert found["proba_de"].nunique() == 2  # what changes is known
    for _, genes in found.groupby("proba_de"):
        assert (np.diff(genes["lfc_z"].abs()) <= 0).all()
        assert (np.diff(genes["lfc_mean"].abs()) > 0).any()  # another order


def test_a_gene_that_is_hardly_expressed_does_not_lead():
    """It and another change as much; it has a count in some thirty cells, the other ten each."""
    adata = small_screen(n_controls=200, cells_per_perturbation=100)
    model = train_small(adata, {"size_factor_key": "transcriptome"}, **VARIANTS["mean field"])
    size = np.median(adata.obs["transcriptome"][adata.obs["perturbation"] == "control"])
    weight = np.zeros((adata.n_vars, N_LATENT))
    weight[[4, 9], 0] = 1.0
    mean = np.full(adata.n_vars, 1.0)
    mean[[4, 9]] = [0.03, 10]
    make_decoder_linear(model, weight, np.log(mean / size))
    for sign in (-1, 1):
        set_effects(model, np.repeat([[1.5 * sign, 0, 0, 0]], 4, axis=0))
        found = compare(model, group1="P001")
        assert found.index[0] == adata.var_names[9]
        assert found["proba_de"].iloc[0] == 1
        hardly = found.loc[adata.var_names[4]]
        assert 0 < sign * hardly["lfc_mean"] < 0.7 * sign * found["lfc_mean"].iloc[0]
        assert 0 < sign * hardly["lfc_z"] < 0.3 * sign * found["lfc_z"].iloc[0]


def test_the_change_is_that_of_the_mean_over_cells():
    """Not the mean of changes of single cells, which a bent decoder makes another."""
    model = train_small(small_screen(), **VARIANTS["mean field"])
    set_effects(model, 3 * EFFECTS)
    found = compare(model, group1="P002", n_samples=40_000, pseudocounts=0.0)
    control = np.flatnonzero(model.adata.obs["perturbation"] == "control")
    torch.manual_seed(0)
    rates = model.predict(["P002", "control"], indices=np.tile(control, 100), output="rate").X
    treated, untreated = rates.reshape(2, -1, model.adata.n_vars)
    expected = np.log2(treated.mean(axis=0) / untreated.mean(axis=0))
    distance = np.abs(found.loc[model.adata.var_names, "lfc_mean"] - expected).max()
    assert distance < 0.1  # of means over ten cells
    assert np.abs(np.log2(treated / untreated).mean(axis=0) - expected).max() > 2 * distance


def test_two_perturbations_are_compared_with_one_another(log_linear):
    model, weight = log_linear
    found = compare(model, group1="P001", group2="P004", pseudocounts=0.0)
    expected = weight @ (EFFECTS[0] - EFFECTS[3]) / np.log(2)
    np.testing.assert_allclose(
        found.loc[model.adata.var_names, "lfc_mean"], expected, rtol=1e-3, atol=1e-3
    )
    swapped = compare(model, group1="P004", group2="P001", pseudocounts=0.0)
    np.testing.assert_allclose(swapped.loc[found.index, "lfc_mean"], -found["lfc_mean"], atol=1e-3)
    assert (found["comparison"] == "P001 vs P004").all()


def test_a_pseudocount_shrinks_fold_changes_of_weakly_expressed_genes(log_linear):
    model, _ = log_linear
    plain = compare(model, group1="P002", pseudocounts=0.0)
    sizes = model.adata.obs.loc[model.adata.obs["perturbation"] == "control", "transcriptome"]
    default = compare(model, group1="P002")
    assert default["pseudocounts"].iloc[0] == pytest.approx(0.1 / sizes.median(), rel=1e-5)
    shrunken = compare(model, group1="P002", pseudocounts=1e3).loc[plain.index]
    assert (shrunken["lfc_mean"].abs() < 0.01 * plain["lfc_mean"].abs().max()).all()


def test_no_perturbation_differs_in_nothing_from_none(log_linear):
    found = compare(log_linear[0], group1="control")
    assert (found["proba_de"] == 0).all()
    assert (found[["lfc_min", "lfc_max"]] == 0).all(axis=None)
    assert not found["is_de_fdr_0.05"].any()


def trained_to_the_end(**settings):
    """Return a model of a screen with known truth."""
    adata = simulate_screen(
        n_genes=120, n_controls=300, n_perturbations=6, cells_per_perturbation=150,
        n_combinations=0, n_latent=5, mask_probability=0.3, seed=0,
    )  # fmt: skip
    SAMSVAE.setup_anndata(adata)
    torch.manual_seed(0)
    model = SAMSVAE(adata, n_latent=6, n_hidden=64, **settings)
    plan = {"plan_kwargs": {"dense_fraction": 0.5}}
    model.train(max_epochs=40, **(TRAINING | {"batch_size": 128} | plan))
    return model


@pytest.fixture(scope="module")
def trained():
    return trained_to_the_end()


@pytest.fixture(scope="module")
def trained_by_shifts():
    return trained_to_the_end(**SHIFTS_ONLY)


def true_rates(adata, label):
    """Rates of the same cells with a perturbation and without."""
    simulation = adata.uns["simulation"]
    row = list(simulation["perturbations"]).index(label)
    shift = (simulation["true_masks"] * simulation["true_effects"])[row]
    z = np.random.default_rng(1).normal(size=(2000, len(shift)))
    return simulated_rates(adata, z + shift), simulated_rates(adata, z)


def true_probabilities(adata, label):
    """P(|log2 fold change| > delta) of a cell in the likelier direction, and its mean."""
    treated, control = true_rates(adata, label)
    change = np.log2(treated / control)
    return np.maximum((change > DELTA).mean(0), (change < -DELTA).mean(0)), change.mean(0)


def test_differential_genes_are_the_true_ones(trained):
    """Those whose mean over cells changes by more than delta."""
    adata = trained.adata
    found = compare(trained)
    n_true, n_called, n_false = 0, 0, 0
    for label in trained.perturbations:
        table = found[found["group1"] == label].loc[adata.var_names]
        treated, control = (rates.mean(axis=0) for rates in true_rates(adata, label))
        change = np.log2(treated / control)
        is_true = np.abs(change) > DELTA
        assert np.corrcoef(table["lfc_mean"], change)[0, 1] > 0.9
        assert roc_auc_score(is_true, table["proba_de"]) > 0.85
        called = table["is_de_fdr_0.05"].to_numpy()
        n_true += is_true.sum()
        n_called += called.sum()
        n_false += (called & ~is_true).sum()
    assert n_called > 0.65 * n_true
    assert n_false < 0.06 * n_called


def genes_that_differ_between_cells(model):
    """Probabilities, in truth, of the genes that are called at a rate of .2."""
    adata = model.adata
    found = compare(model, groupby="perturbation", group2="control", fdr_target=0.2)
    probabilities = []
    for label in model.perturbations:
        table = found[found["group1"] == label].loc[adata.var_names]
        probability, change = true_probabilities(adata, label)
        assert np.corrcoef(table["lfc_mean"], change)[0, 1] > 0.9
        probabilities.append(probability[table["is_de_fdr_0.2"].to_numpy()])
    return np.concatenate(probabilities)


def test_cells_of_two_groups_differ_in_the_true_genes(trained_by_shifts):
    """Cells differ among themselves too, so few genes are sure to differ between any two."""
    called = genes_that_differ_between_cells(trained_by_shifts)
    assert (called > 0.5).all()
    assert len(called) > 50


def test_as_many_genes_differ_between_cells_as_is_said(trained):
    """Direct effects are less smooth: they call more genes, and keep to the rate all the same."""
    called = genes_that_differ_between_cells(trained)
    assert len(called) > 150
    assert called.mean() > 0.8


def test_both_comparisons_have_the_same_form(default_model):
    cells = compare(default_model, groupby="perturbation", group2="control")
    perturbations = compare(default_model)
    assert set(cells.columns) == set(perturbations.columns)
    for table in (cells, perturbations):
        assert np.isfinite(table.select_dtypes("number").to_numpy()).all()
        for _, genes in table.groupby("comparison"):
            assert set(genes.index) == set(default_model.adata.var_names)
            assert (np.diff(genes["proba_de"]) <= 0).all()
    assert list(dict.fromkeys(perturbations["group1"])) == default_model.perturbations
    assert set(perturbations["group2"]) == {"control"}


def test_statistics_by_hand(default_model):
    counts = default_model.adata.X.toarray()
    labels = default_model.adata.obs["perturbation"].astype(str).to_numpy()
    for found in (
        compare(default_model, group1="P002"),
        compare(default_model, groupby="perturbation", group1="P002", group2="control"),
    ):
        table = found.loc[default_model.adata.var_names]
        for number, label in ((1, "P002"), (2, "control")):
            of_group = counts[labels == label]
            np.testing.assert_allclose(table[f"raw_mean{number}"], of_group.mean(0), rtol=1e-5)
            np.testing.assert_allclose(
                table[f"non_zeros_proportion{number}"], (of_group > 0).mean(0)
            )
    unseen = compare(default_model, group1="P001+P002+P003")
    assert unseen["raw_mean1"].isna().all()
    assert unseen["proba_de"].notna().all()
    assert "raw_mean1" not in compare(default_model, group1="P002", all_stats=False)


def test_groups_by_position_are_groups_by_column(default_model):
    labels = default_model.adata.obs["perturbation"].astype(str).to_numpy()
    by_column = compare(default_model, groupby="perturbation", group1="P002")
    mask = compare(default_model, idx1=labels == "P002")
    positions = compare(
        default_model, idx1=np.flatnonzero(labels == "P002"), idx2=np.flatnonzero(labels != "P002")
    )
    assert set(by_column["comparison"]) == {"P002 vs Rest"}
    for other in (mask, positions):
        assert set(other["comparison"]) == {"one vs two"}
        columns = ["proba_de", "lfc_mean", "raw_mean1", "raw_mean2"]
        pd.testing.assert_frame_equal(other[columns], by_column[columns])


def test_batches_can_be_evened_out(covariate_model):
    settings = {"groupby": "perturbation", "group1": "P001", "group2": "control"}
    evened = compare(covariate_model, **settings, batch_correction=True)
    plain = compare(covariate_model, **settings)
    assert (evened.sort_index()["lfc_mean"] != plain.sort_index()["lfc_mean"]).any()
    one = compare(
        covariate_model, **settings, batch_correction=True, batchid1=["lane_a"], batchid2=["lane_a"]
    )
    assert np.isfinite(one["lfc_mean"]).all()
    vanilla = compare(covariate_model, **settings, mode="vanilla")
    np.testing.assert_allclose(vanilla["proba_m1"] + vanilla["proba_m2"], 1)


@pytest.mark.parametrize("model_cls", [CPAVAE, ConditionalVAE, SVAEPlus])
def test_other_models_too(model_cls):
    model = train_small(small_screen(), model_cls=model_cls)
    found = compare(model, group1="P001")
    assert found["lfc_mean"].abs().max() > 0
    assert np.isfinite(found["lfc_mean"]).all()


def test_the_data_are_left_as_they_were(default_model):
    before = default_model.adata.copy()
    compare(default_model)
    compare(default_model, groupby="perturbation", group1="P001")
    after = default_model.adata
    pd.testing.assert_frame_equal(after.obs, before.obs)
    pd.testing.assert_frame_equal(after.var, before.var)
    assert set(after.uns) == set(before.uns)
    assert set(after.obsm) == set(before.obsm)


def test_wrong_input_is_refused(default_model, normal_model):
    with pytest.raises(MissingKeyError, match="'cluster'"):
        default_model.differential_expression(groupby="cluster")
    with pytest.raises(UnknownPerturbationError, match="'P9'"):
        default_model.differential_expression(groupby="perturbation", group1="P9")
    with pytest.raises(UnknownPerturbationError, match="'P9'"):
        default_model.differential_expression(group1="P9")
    with pytest.raises(SAMSError, match="`idx2` needs `idx1`"):
        default_model.differential_expression(idx2=[1])
    with pytest.raises(SAMSError, match="not both"):
        default_model.differential_expression(groupby="perturbation", idx1=[1])
    with pytest.raises(SAMSError, match="no cells in `idx1`"):
        default_model.differential_expression(idx1=[])
    with pytest.raises(SAMSError, match="use_permutation"):
        default_model.differential_expression(group1="P001", use_permutation=True)
    with pytest.raises(SAMSError, match="'other'"):
        default_model.differential_expression(mode="other")
    with pytest.raises(SAMSError, match="normal likelihood"):
        normal_model.differential_expression()
