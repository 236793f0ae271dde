"""Control cells to which observed and predicted effects are relative."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from evaluation.benchmark_builders import additive
from scvi_sams.evaluation import TrainingMean, benchmark, learning_curve, random_cells
from scvi_sams.exceptions import InvalidArgumentError, InvalidSplitError, MissingControlError

N_GENES = 40


def screen(n_controls=60, levels=(), effect=0.0, seed=0):
    """Counts of five perturbations and controls; without an effect all cells are alike."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(["control", *"ABCDE"], [n_controls, *[60] * 5])
    rates = rng.gamma(2.0, 2.0, size=N_GENES) * np.ones((len(labels), 1))
    for number, label in enumerate("ABCDE"):
        rates[labels == label, number] *= np.exp(effect)
    obs = pd.DataFrame({"perturbation": labels}, index=np.arange(len(labels)).astype(str))
    if levels:
        obs["batch"] = rng.choice(levels, size=len(labels))
        rates *= np.where(obs["batch"] == levels[0], 1.0, 2.0)[:, None] ** (np.arange(N_GENES) % 2)
    order = rng.permutation(len(labels))
    counts = sparse.csr_matrix(rng.poisson(rates)[order].astype(np.float32))
    return ad.AnnData(counts, obs=obs.iloc[order])


def split_of(adata):
    return lambda seed: random_cells(
        adata.obs["perturbation"], fractions=(0.5, 0.0, 0.5), seed=seed
    )


def scores(adata, methods=("training mean",), reference="test", seeds=(0,), **arguments):
    arguments = {"modes": ["sams"], "target_sum": 100.0} | arguments
    result = benchmark(
        adata,
        methods=list(methods) if isinstance(methods, tuple) else methods,
        split=split_of(adata),
        seeds=list(seeds),
        reference=reference,
        progress_bar=False,
        **arguments,
    )
    assert result.settings["reference"] == reference
    return result.scores.set_index(["method", "metric", "perturbation"])["value"].sort_index()


def means_by_hand(adata, cells):
    """Mean of ``log(1 + 100 x / size)`` of each label among some cells."""
    counts = adata.X[cells].toarray()
    logged = np.log1p(100 * counts / counts.sum(axis=1, keepdims=True))
    return pd.DataFrame(logged).groupby(adata.obs["perturbation"].to_numpy()[cells]).mean()


def test_effects_are_relative_to_controls_of_their_own_side():
    adata = screen(effect=0.7)
    split = split_of(adata)(0)
    train, test = (means_by_hand(adata, cells) for cells in (split.train, split.test))
    found = scores(adata)
    predicted, observed = (
        (part.loc[list("ABCDE")] - part.loc["control"]).to_numpy() / np.log(2)
        for part in (train, test)
    )
    for number, label in enumerate("ABCDE"):
        r = np.corrcoef(predicted[number], observed[number])[0, 1]
        error = np.sqrt(np.square(predicted[number] - observed[number]).mean())
        assert found["training mean", "pearson", label] == pytest.approx(r, abs=1e-4)
        assert found["training mean", "rmse", label] == pytest.approx(error, abs=1e-4)
        nothing = np.sqrt(np.square(observed[number]).mean())
        assert found["control mean", "rmse", label] == pytest.approx(nothing, abs=1e-4)


def test_without_effects_shared_controls_look_like_a_good_prediction():
    adata = screen(n_controls=20)
    seeds = range(10)
    shared, apart = (
        scores(adata, reference=reference, seeds=seeds).loc["training mean", "pearson"]
        for reference in ("all", "test")
    )
    own = [label != "all" for label in shared.index]
    assert shared[own].mean() > 0.3
    assert abs(apart[own].mean()) < 0.1


def test_half_of_the_test_cells_has_the_error_of_other_controls():
    adata = screen(n_controls=20)
    shared, apart = (
        scores(adata, reference=reference, seeds=range(10)).loc["half of the test cells", "pearson"]
        for reference in ("all", "test")
    )
    assert abs(apart.mean()) < 0.1 < shared.mean()


def test_the_mean_of_perturbations_has_no_specificity():
    """Exactly: its predictions equal the reference of Systema."""
    found = benchmark(
        screen(effect=0.7),
        methods=["training mean"],
        split=split_of(screen(effect=0.7)),
        seeds=[0],
        modes=["systema"],
        reference="test",
        progress_bar=False,
    ).scores
    of_mean = found[found["method"] == "mean of perturbations"]
    correlations = of_mean.loc[of_mean["metric"].str.startswith("pearson"), "value"]
    assert correlations.tolist() == [0] * 10


def test_each_level_has_its_own_controls():
    adata = screen(levels=("a", "b"), effect=0.7, n_controls=120)
    found = scores(adata, covariate_key="batch")
    split = split_of(adata)(0)
    observed, predicted = [], []
    for level in ("a", "b"):
        is_level = (adata.obs["batch"] == level).to_numpy()
        train, test = (
            means_by_hand(adata, cells[is_level[cells]]) for cells in (split.train, split.test)
        )
        observed.append((test.loc[list("ABCDE")] - test.loc["control"]).to_numpy())
        predicted.append((train.loc[list("ABCDE")] - train.loc["control"]).to_numpy())
    error = np.sqrt(np.square(np.subtract(predicted, observed)).mean(axis=2)) / np.log(2)
    # Without the level, the training mean is an effect that is the same in both.
    of_mean = found["training mean", "rmse"].drop("all")
    assert len(of_mean) == error.size
    nothing = np.sqrt(np.square(observed).mean(axis=2)) / np.log(2)
    by_hand = np.sort(nothing.ravel())
    of_none = np.sort(found["control mean", "rmse"].drop("all").to_numpy())
    np.testing.assert_allclose(of_none, by_hand, atol=0.02)


def test_finished_fits_are_scored_again(tmp_path):
    adata = screen(effect=0.7)
    calls = []

    def watching(train, perturbations):
        calls.append(1)
        return additive(train, perturbations)

    methods = {"watching": watching}
    found = [
        scores(adata, methods, reference, folder=tmp_path)["watching", "rmse", "A"]
        for reference in ("all", "test", "all")
    ]
    assert len(calls) == 1
    assert found[0] == found[2] != found[1]


def test_learning_curves_with_test_controls():
    adata = screen(effect=0.7)
    curve = learning_curve(
        adata,
        {"mean": TrainingMean()},
        cells=(10, None),
        seeds=[0],
        target_sum=100.0,
        reference="test",
        progress_bar=False,
    ).set_index(["method", "n_cells"])
    all_cells = curve.loc[("mean", 30.0)]
    by_shared = learning_curve(
        adata, {"mean": TrainingMean()}, cells=(10, None), seeds=[0], target_sum=100.0,
        progress_bar=False,
    ).set_index(["method", "n_cells"])  # fmt: skip
    assert all_cells["rmse"] < curve.loc[("mean", 10.0), "rmse"]
    assert all_cells["pearson"] != by_shared.loc[("mean", 30.0), "pearson"]


def test_wrong_references_raise():
    adata = screen()
    with pytest.raises(InvalidArgumentError, match="one of"):
        scores(adata, reference="train")

    def without_test_controls(seed):
        split = split_of(adata)(seed)
        is_control = (adata.obs["perturbation"] == "control").to_numpy()
        moved = split.test[is_control[split.test]]
        return type(split)(
            **vars(split)
            | {
                "train": np.concatenate([split.train, moved]),
                "test": np.setdiff1d(split.test, moved),
            }
        )

    with pytest.raises(InvalidSplitError, match="no control cells among the test cells"):
        benchmark(
            adata,
            methods=["training mean"],
            split=without_test_controls,
            seeds=[0],
            reference="test",
            progress_bar=False,
        )
    with_levels = screen(levels=("a", "b"))
    is_b = (with_levels.obs["batch"] == "b") & (with_levels.obs["perturbation"] == "control")
    few = with_levels[~is_b.to_numpy()].copy()
    with pytest.raises(MissingControlError):
        scores(few, covariate_key="batch")
