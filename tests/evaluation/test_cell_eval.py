"""cell-eval's metrics against values computed by hand, scipy and, if installed, cell-eval."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from scvi_sams.metrics import _cell_eval
from scvi_sams.metrics._cell_eval import (
    de_overlap,
    discrimination_scores,
    log2_fold_change,
    wilcoxon_fdr,
)
from scvi_sams.metrics._scoring import score_predictions


def test_discrimination_by_hand():
    # Observed effects at 0, 1, 5; predictions at 0.2, 4, 0.9. A is nearest to its own (0); the
    # prediction of B is nearest to 5, then 1; that of C to 1, 0, 5.
    observed, predicted = np.array([[0.0], [1], [5]]), np.array([[0.2], [4], [0.9]])
    np.testing.assert_allclose(discrimination_scores(predicted, observed), [1, 2 / 3, 1 / 3])


def test_discrimination_takes_l1_distances():
    # From (0, 0) to (2, 2) and (3, 0): L1 takes 4 and 3, L2 would take 2.8 and 3.
    observed = np.array([[2.0, 2], [3, 0]])
    np.testing.assert_allclose(discrimination_scores(np.zeros((2, 2)), observed), [0.5, 1])


def test_target_genes_are_left_out_of_their_own_perturbation_only():
    # Gene 0, A's target, is the only one that tells A.
    observed = np.array([[-9.0, 0, 0], [0, 1, 0], [0, 0, 3]])
    predicted = np.array([[-9.0, 1, 0], [0, 1, 0], [0, 0, 3]])
    np.testing.assert_allclose(discrimination_scores(predicted, observed), [1, 1, 1])
    without = discrimination_scores(predicted, observed, target_genes=[[0], [], []])
    np.testing.assert_allclose(without, [2 / 3, 1, 1])


def test_discrimination_of_collapsed_and_failed_predictions():
    rng = np.random.default_rng(0)
    observed = rng.normal(size=(8, 30))
    same = np.repeat(observed.mean(axis=0, keepdims=True), 8, axis=0)
    scores = discrimination_scores(same, observed)
    # The observed effects stand in one order: each position is taken once.
    np.testing.assert_allclose(np.sort(scores), np.arange(1, 9) / 8)
    assert scores.mean() == pytest.approx(9 / 16)
    predicted = observed.copy()
    predicted[3, 5] = np.nan
    np.testing.assert_allclose(
        discrimination_scores(predicted, observed), [1] * 3 + [1 / 8] + [1] * 4
    )


def test_discrimination_is_the_rank_with_sides_exchanged():
    from scvi_sams.metrics._perturbench import rank_scores

    observed, predicted = np.random.default_rng(1).normal(size=(2, 9, 12))
    exchanged = rank_scores(observed, predicted, "mae", version="2024")
    np.testing.assert_allclose(discrimination_scores(predicted, observed), 1 - exchanged)


def test_fold_change_of_geometric_means_by_hand():
    mean, control = np.log1p([4.0, 1, 2, 0, 0]), np.log1p([1.0, 4, 0, 2, 0])
    change = log2_fold_change(mean, control)
    np.testing.assert_allclose(change, [2, -2, np.inf, -np.inf, 0])
    assert log2_fold_change(np.array([-0.1]), np.array([0.0])) == [0]


@pytest.mark.parametrize("to_matrix", [np.asarray, sparse.csr_array])
def test_rank_sum_test_agrees_with_scipy(to_matrix, monkeypatch):
    monkeypatch.setattr(_cell_eval, "_GENES_AT_ONCE", 3)  # two full chunks and a rest
    rng = np.random.default_rng(0)
    control = np.log1p(rng.poisson(1.0, size=(60, 8)))  # with many ties
    groups = [np.log1p(rng.poisson(rate, size=(n, 8))) for rate, n in ((1.0, 25), (2.0, 40))]
    groups[1] += 0.1 * rng.random(groups[1].shape)  # without ties
    for cells in (control, *groups):
        cells[:, 0] = 0
    groups[0][:, 1] = control[:, 1] = 0
    groups[0][:5, 1] = 1
    found = wilcoxon_fdr([to_matrix(cells) for cells in groups], to_matrix(control))
    for cells, fdr in zip(groups, found, strict=True):
        p_values = stats.mannwhitneyu(cells, control, method="asymptotic").pvalue
        expected = stats.false_discovery_control(np.nan_to_num(p_values, nan=1))
        np.testing.assert_allclose(fdr, expected, rtol=1e-10)
    assert found[0, 0] == found[1, 0] == 1


def test_overlap_by_hand():
    # Genes 0, 1, 2 are DE. Of the predicted changes, the largest three are of genes 4, 0 and 3.
    observed_fdr = np.array([0.01, 0.04, 0.0, 0.05, 0.9])
    change = np.array([-3.0, 1, 0.5, 2, np.inf])
    assert de_overlap(change, observed_fdr) == pytest.approx(1 / 3)
    # Significant are 0, 1, 3: the top three hold 0 and 1.
    predicted_fdr = np.array([0.0, 0.0, 0.06, 0.0, 0.5])
    assert de_overlap(change, observed_fdr, predicted_fdr=predicted_fdr) == pytest.approx(2 / 3)
    at_threshold = np.where(predicted_fdr < 0.05, 0.05, predicted_fdr)
    assert de_overlap(change, observed_fdr, predicted_fdr=at_threshold) == 0
    assert de_overlap(change, observed_fdr, fdr=1e-3) == 0
    assert de_overlap(np.array([0.0, 0, 9, 0, 1]), observed_fdr, fdr=1e-3) == 1


def test_overlap_of_no_change_and_of_no_differentially_expressed_gene():
    assert de_overlap(np.zeros(3), np.array([0.0, 0.0, 1])) == 0
    assert de_overlap(np.array([1.0, 2, 3]), np.ones(3)) == 0


def screen(seed, *, n_cells=60, n_genes=40):
    """Cells of six perturbations named after genes, and control cells."""
    rng = np.random.default_rng(7)
    genes = [f"g{i}" for i in range(n_genes)]
    base = rng.uniform(-0.5, 1.5, size=n_genes)
    labels = ["control", *genes[:6]]
    effects = [np.zeros(n_genes), *(rng.normal(size=(6, n_genes)) * 0.6)]
    rng = np.random.default_rng(seed)
    counts = np.concatenate(
        [rng.poisson(np.exp(base + effect), size=(n_cells, n_genes)) for effect in effects]
    )
    obs = pd.DataFrame({"perturbation": np.repeat(labels, n_cells)})
    obs.index = obs.index.astype(str)
    expression = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 100)
    return ad.AnnData(expression, obs=obs, var=pd.DataFrame(index=genes))


def test_agrees_with_cell_eval(tmp_path):
    evaluator_module = pytest.importorskip("cell_eval")
    observed, predicted = screen(0), screen(1)
    is_control = (observed.obs["perturbation"] == "control").to_numpy()
    predicted.X[is_control] = observed.X[is_control]  # control cells stand on both sides
    evaluator = evaluator_module.MetricsEvaluator(
        adata_pred=predicted.copy(),
        adata_real=observed.copy(),
        control_pert="control",
        pert_col="perturbation",
        num_threads=1,
        outdir=str(tmp_path / "out"),
    )
    theirs, _ = evaluator.compute(profile="full", write_csv=False)
    theirs = pd.DataFrame(theirs.to_dict(as_series=False)).set_index("perturbation")
    ours = score_predictions(predicted, observed, modes=["cell-eval"])
    ours = ours.pivot(index="perturbation", columns="metric", values="value")
    for our_name, their_name in {
        "mae": "mae",
        "discrimination_l1": "discrimination_score_l1",
        "de_overlap": "overlap_at_N",
    }.items():
        expected = theirs[their_name].reindex(ours.index).astype(float)
        np.testing.assert_allclose(ours[our_name], expected, atol=1e-6, err_msg=our_name)
    # Neither all right nor all wrong, or the comparison would show little.
    assert 0 < ours["de_overlap"].min() < ours["de_overlap"].max() < 1
