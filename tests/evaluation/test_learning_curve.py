"""Learning curves: which cells train, which are tested, and what more cells buy."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from evaluation.benchmark_builders import FailsForOne, FakeModel, broken
from scvi_sams.datasets import simulate_screen
from scvi_sams.evaluation import (
    ModelMethod,
    TrainingMean,
    benchmark,
    compare_ate,
    learning_curve,
    make_split,
    observed_ate,
)
from scvi_sams.exceptions import InvalidArgumentError, MissingKeyError, SAMSError

CELLS = (5, 20, None)


@pytest.fixture(scope="module")
def screen():
    adata = simulate_screen(
        n_genes=60,
        n_controls=120,
        n_perturbations=8,
        cells_per_perturbation=80,
        n_combinations=2,
        cells_per_combination=30,
        n_latent=4,
        mask_probability=0.4,
        library_size=2000.0,
    )
    return adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()


class Watching:
    """The training mean, which keeps what it was fitted to and asked for."""

    def __init__(self):
        self.seen = []

    def __call__(self, train, perturbations):
        self.seen.append((train, list(perturbations)))
        return TrainingMean().fit(train).predict(perturbations)


@pytest.fixture(scope="module")
def watched(screen):
    method = Watching()
    curve = learning_curve(
        screen, {"watching": method}, cells=CELLS, seeds=(0, 1), progress_bar=False
    )
    # In the order of the rows: numbers of cells, then seeds.
    seen = dict(zip([(n, seed) for n in CELLS for seed in (0, 1)], method.seen, strict=True))
    return curve, seen


def trained_cells(train):
    return train.obs["perturbation"].astype(str).value_counts()


def test_as_many_cells_train_as_were_asked_for(screen, watched):
    _, seen = watched
    for (number, _), (train, _) in seen.items():
        n_cells = trained_cells(train)
        assert len(n_cells) == 11
        assert n_cells.pop("control") == 60  # all that may train, whatever the number
        combined = n_cells.index.str.contains("+", regex=False)
        assert (n_cells[combined] == min(number or 15, 15)).all()  # 15 of a pair may train
        assert (n_cells[~combined] == min(number or 40, 40)).all()


def test_numbers_are_nested_and_seeds_differ(watched):
    _, seen = watched
    few, more, everything = (set(seen[n, 0][0].obs_names) for n in CELLS)
    assert few < more < everything
    assert everything != set(seen[None, 1][0].obs_names)


def test_tested_cells_never_train_and_are_the_same_for_all_numbers(screen, watched):
    curve, seen = watched
    target_sum = float(np.median(np.asarray(screen.X.sum(axis=1))))
    names = seen[5, 0][1]
    for seed in (0, 1):
        may_train = seen[None, seed][0].obs_names
        tested = ~screen.obs_names.isin(may_train)
        is_control = (screen.obs["perturbation"] == "control").to_numpy()
        observed = observed_ate(
            screen, target_sum=target_sum, indices=np.flatnonzero(tested | is_control)
        )
        for number in CELLS:
            train = seen[number, seed][0]
            assert not tested[screen.obs_names.get_indexer(train.obs_names)].any()
            # The mean of the training cells, minus the same controls as on the other side.
            predicted = TrainingMean().fit(train).predict(names)
            lognorm = np.log1p(
                target_sum * screen.X[is_control].toarray() / screen.X[is_control].sum(axis=1)
            )
            effects = (np.asarray(predicted.X) - np.asarray(lognorm.mean(axis=0))) / np.log(2)
            table = ad.AnnData(
                effects,
                obs=pd.DataFrame(index=names),
                var=pd.DataFrame(index=screen.var_names),
                uns={"ate": {"method": "lognorm", "target_sum": target_sum}},
            )
            scores = compare_ate(table, observed)
            row = curve[(curve["method"] == "watching") & (curve["seed"] == seed)]
            asked = row["cells_per_perturbation"]
            row = row[asked.isna() if number is None else asked == number].squeeze()
            assert row["pearson"] == pytest.approx(scores.loc["all", "pearson"], rel=1e-4)
            assert row["rmse"] == pytest.approx(scores.loc["all", "rmse"], rel=1e-4)
            assert row["mean_pearson"] == pytest.approx(
                scores["pearson"].iloc[:-1].mean(), rel=1e-4
            )


def test_one_row_per_number_method_and_seed(watched):
    curve, _ = watched
    methods = ["control mean", "mean of perturbations", "watching", "half of the test cells"]
    assert list(curve) == [
        "method", "cells_per_perturbation", "n_cells", "seed", "pearson", "rmse", "mean_pearson",
        "rank", "n_failed", "message",
    ]  # fmt: skip
    expected = [(m, n, s) for n in (5, 20, -1) for m in methods for s in (0, 1)]
    found = curve[["method", "cells_per_perturbation", "seed"]].fillna(-1)
    assert [tuple(row) for row in found.to_numpy()] == expected
    assert curve.groupby("n_cells").size().to_dict() == {5: 8, 20: 8, 40: 8}
    assert (curve["n_failed"] == 0).all()
    assert (curve["message"] == "").all()


def test_more_cells_make_a_mean_better(watched):
    curve, _ = watched
    of_mean = curve[curve["method"] == "watching"].groupby("n_cells").mean(numeric_only=True)
    assert (np.diff(of_mean["pearson"]) > 0.005).all()
    assert (np.diff(of_mean["mean_pearson"]) > 0.005).all()
    # The error of a mean of n cells beside that of the tested ones falls as sqrt(1/n + 1/40).
    rmse = of_mean["rmse"].to_numpy()
    assert (np.diff(rmse) < 0).all()
    assert rmse[0] / rmse[2] == pytest.approx(np.sqrt((1 / 5 + 1 / 40) / (2 / 40)), rel=0.15)
    assert of_mean["rank"].iloc[-1] < 0.05
    same = curve[curve["method"] == "mean of perturbations"]
    np.testing.assert_allclose(same["rank"], 0.5)
    half = curve[curve["method"] == "half of the test cells"].groupby("seed")["pearson"]
    assert (half.nunique() == 1).all()


def test_same_seeds_same_numbers(screen, watched):
    curve, _ = watched
    again = learning_curve(
        screen, {"watching": Watching()}, cells=(20,), seeds=(1,), progress_bar=False
    )
    chosen = curve[(curve["cells_per_perturbation"] == 20) & (curve["seed"] == 1)]
    pd.testing.assert_frame_equal(again, chosen.reset_index(drop=True))


def test_a_share_may_train(screen):
    method = Watching()
    learning_curve(
        screen, {"x": method}, cells=[None], seeds=[0], train_size=0.25, progress_bar=False
    )
    n_cells = trained_cells(method.seen[0][0])
    assert n_cells["control"] == 30
    singles = n_cells[~n_cells.index.str.contains("+", regex=False)].drop("control")
    assert (singles == 20).all()


def test_data_and_finished_fits_are_kept(screen, tmp_path):
    before = screen.copy()
    method = Watching()
    arguments = {"seeds": (0,), "folder": tmp_path, "progress_bar": False}
    first = learning_curve(screen, {"x": method}, cells=(5, None), **arguments)
    assert len(method.seen) == 2
    second = learning_curve(screen, {"x": method}, cells=(5, None), **arguments)
    assert len(method.seen) == 2
    pd.testing.assert_frame_equal(first, second)
    assert (screen.X != before.X).nnz == 0
    pd.testing.assert_frame_equal(screen.obs, before.obs)


def test_models_hold_cells_out_by_themselves(screen):
    class Recorded(FakeModel):
        def train(self, **arguments):
            type(self).arguments = arguments

    method = ModelMethod(Recorded, train_kwargs={"train_size": 0.8}, n_samples=20)
    curve = learning_curve(
        screen, {"model": method}, cells=[10], seeds=[0], target_sum=1e4, progress_bar=False
    )
    assert (curve["n_failed"] == 0).all()
    # The cells that train, and no division of them.
    assert len(Recorded.seen) == 60 + 10 * 10
    assert Recorded.arguments == {"train_size": 0.8, "enable_progress_bar": False}


def test_a_given_validation_part_is_that_of_a_model(screen):
    labels = screen.obs["perturbation"]
    is_control = (labels == "control").to_numpy()
    cells = np.concatenate([np.flatnonzero(is_control), np.flatnonzero(~is_control)])
    split = make_split(labels, cells[:300], cells[300:400], cells[400:], name="mine")
    method = ModelMethod(FakeModel, n_samples=20)
    benchmark(
        screen, methods={"m": method}, split=split, seeds=[0], modes=["sams"], progress_bar=False
    )
    assert [len(part) for part in FakeModel.split] == [300, 100]


def test_failures_are_counted(screen):
    curve = learning_curve(
        screen,
        {"one": FailsForOne(), "all": broken},
        cells=[5],
        seeds=[0],
        progress_bar=False,
    ).set_index("method")
    names = screen.obs["perturbation"].cat.categories.drop("control")
    one, every = curve.loc["one"], curve.loc["all"]
    assert one["n_failed"] == names.str.contains("P001").sum()
    assert every["n_failed"] == len(names) == 10
    assert "it does not converge" in every["message"]
    assert every["pearson"] == 0
    assert every["rmse"] > curve.loc["half of the test cells", "rmse"]
    assert np.isnan(every["mean_pearson"])
    assert every["rank"] == 1
    assert curve.loc["control mean", "message"] == ""


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cells": ()}, InvalidArgumentError, "`cells`.*at least one"),
        ({"cells": (5, 5)}, InvalidArgumentError, "each once"),
        ({"cells": (0,)}, InvalidArgumentError, "`cells` must be a whole number of at least 1"),
        ({"cells": (2.5,)}, InvalidArgumentError, "`cells`"),
        ({"cells": 10}, InvalidArgumentError, "`cells` must be numbers of cells or None, not 10"),
        ({"cells": "all"}, InvalidArgumentError, "'all'"),
        ({"seeds": (1, 1)}, SAMSError, "each once"),
        ({"seeds": (-1,)}, InvalidArgumentError, "`seeds`"),
        ({"train_size": 1.0}, InvalidArgumentError, "`train_size`"),
        ({"train_size": 0}, InvalidArgumentError, "`train_size`"),
        ({"methods": ["medium mean"]}, SAMSError, "'medium mean'"),
        ({"perturbation_key": "guide"}, MissingKeyError, "'guide'"),
        ({"target_sum": -1.0}, SAMSError, "`target_sum`"),
        ({"control": "NT"}, SAMSError, "NT"),
        ({"versions": {"x": "1"}}, SAMSError, "'x'"),
    ],
)
def test_bad_arguments_are_named(screen, changes, error, message):
    arguments = {"methods": ["additive"], "progress_bar": False} | changes
    with pytest.raises(error, match=message):
        learning_curve(screen, **arguments)
