"""The benchmark: controls, failures, what methods see, and what the summary makes visible."""

import contextlib
import dataclasses
import logging
import signal
from unittest.mock import create_autospec

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from lightning.pytorch import Callback

from evaluation.benchmark_builders import (
    FailsForOne,
    FakeModel,
    PairSplit,
    additive,
    broken,
    collapsed,
    run,
    small_screen,
)
from scvi_sams import SAMSVAE, evaluation
from scvi_sams.benchmark._model import _truth
from scvi_sams.evaluation import ModelMethod
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidSplitError,
    MissingKeyError,
    SAMSError,
)

NEGATIVE, POSITIVE = "mean of perturbations", "half of the test cells"
TINY = ModelMethod(
    SAMSVAE,
    model_kwargs={"n_latent": 4, "n_hidden": 16, "effect_n_hidden": 8},
    train_kwargs={"max_epochs": 2, "accelerator": "cpu", "devices": 1},
    n_samples=40,
    n_posterior_samples=4,
    n_iwelbo_samples=5,
)
METHODS = {
    "additive": "additive",
    "function": additive,
    "collapsed": collapsed,
    "fails for one": FailsForOne(),
    "broken": broken,
    "tiny model": TINY,
}


@pytest.fixture(scope="module")
def screen():
    return small_screen()


@pytest.fixture(scope="module")
def result(screen):
    return evaluation.benchmark(
        screen,
        methods=METHODS,
        split=PairSplit(screen),
        seeds=(0, 1),
        modes=("sams", "perturbench", "systema", "distances"),
        progress_bar=False,
    )


@pytest.fixture(scope="module")
def summary(result):
    return result.summary().set_index(["metric", "over", "method"]).sort_index()


def test_mode_collapse_is_visible(summary):
    fit = summary.loc[("rmse_average", "perturbations")]
    assert fit["mean"]["collapsed"] < fit["mean"]["control mean"]
    for metric in ("rank_rmse_average", "rank_cosine_logfc"):
        rank = summary.loc[(metric, "perturbations")]
        for method in ("collapsed", "control mean", NEGATIVE):
            assert rank["mean"][method] == rank["chance"][method] == 0.5
        assert rank["mean"]["additive"] < 0.25
    assert (summary.loc["pearson_delta", "mean"].xs(NEGATIVE, level="method") == 0).all()


def test_positions_between_the_controls(summary):
    position = summary["position"].unstack("method").dropna(subset=[POSITIVE])
    assert len(position) > 5
    np.testing.assert_allclose(position[NEGATIVE].dropna(), 0, atol=1e-12)
    np.testing.assert_allclose(position[POSITIVE], 1)
    fit = summary.loc[("rmse_average", "perturbations")]
    means = fit["mean"]
    by_hand = (means["additive"] - means[NEGATIVE]) / (means[POSITIVE] - means[NEGATIVE])
    assert fit["position"]["additive"] == pytest.approx(by_hand)


def test_distances_have_controls_too(summary):
    distance = summary.loc[("energy_distance", "perturbations"), "mean"]
    assert set(distance.index) == {"control mean", "tiny model", POSITIVE}
    assert distance[POSITIVE] < distance["control mean"]


def test_scores_are_those_of_the_metrics(screen, result):
    split = PairSplit(screen)(1)
    counts = screen.X.toarray().astype(float)
    size = counts.sum(axis=1)
    target_sum = np.median(size[split.train])
    expression = np.log1p(target_sum * counts / size[:, None])
    cells = ad.AnnData(expression, obs=screen.obs[["perturbation"]], var=screen.var[[]])
    is_control = (cells.obs["perturbation"] == "control").to_numpy()
    prediction = additive(cells[split.train].copy(), list(split.held_out))
    observed = cells[np.union1d(split.test, np.flatnonzero(is_control))]
    expected = evaluation.score_predictions(prediction, observed, modes=["perturbench"])
    scores = result.scores.query("seed == 1 and mode == 'perturbench'")
    keys = ["perturbation", "metric"]
    expected = expected.set_index(keys)["value"].sort_index()
    for method in ("additive", "function"):
        found = scores[scores["method"] == method].set_index(keys)["value"].sort_index()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_failures_are_rows(screen, result):
    failed = result.scores.query("method == 'broken' and mode == 'perturbench'")
    assert set(failed["status"]) == {"failed"}
    assert set(failed["message"]) == {"RuntimeError: it does not converge"}
    ranks = failed["metric"].str.startswith("rank")
    assert (failed.loc[ranks, "value"] == 1).all()
    assert failed.loc[~ranks, "value"].isna().all()
    partly = result.failures.query("method == 'fails for one'")
    tested = {(seed, p) for seed in (0, 1) for p in PairSplit(screen)(seed).held_out}
    expected = {(seed, p) for seed, p in tested if "P001" in p}
    assert expected
    assert set(zip(partly["seed"], partly["perturbation"], strict=True)) == expected
    assert partly["message"].str.startswith("KeyError").all()
    row = result.summary().query("method == 'fails for one' and metric == 'rmse_average'").iloc[0]
    assert row["n_failed"] == len(expected)
    assert np.isnan(row["mean"])
    assert np.isfinite(row["mean_of_succeeded"])
    assert result.runs.set_index(["method", "seed"]).loc[("broken", 0), "status"] == "failed"


def test_models_are_scored_on_likelihood_and_truth(screen, result):
    rows = result.scores.query("method == 'tiny model' and seed == 0").set_index("metric")
    assert rows.loc["iwelbo_held_out", "n_cells"] == len(PairSplit(screen)(0).test)
    assert -1000 < rows.loc["iwelbo_held_out", "value"] < -50
    assert "iwelbo_seen" not in rows.index
    for metric in ("mask_f1", "called_precision", "effect_f1", "mcc_basal", "mcc_perturbed"):
        assert 0 <= rows.loc[metric, "value"] <= 1
    assert (rows["status"] == "ok").all()


def test_called_entries_are_those_of_masks_and_test():
    masks = pd.DataFrame([[0.99, 0.01], [0.99, 0.99]], index=["A", "B"])
    tests = pd.DataFrame({"q_value": [0.01, 0.5]}, index=["A", "B"])
    model = create_autospec(SAMSVAE, instance=True)
    model.get_perturbation_masks.return_value = masks
    model.test_perturbations.return_value = tests
    cells = ad.AnnData(np.zeros((1, 1)))
    cells.uns["simulation"] = {
        "true_masks": np.array([[1, 0], [0, 0], [1, 1]]),
        "perturbations": ["A", "B", "never trained"],
    }
    found = {extra.metric: extra.value for extra in _truth(model, cells)}
    assert found["mask_precision"] == pytest.approx(1 / 3)
    assert found["called_precision"] == 1
    assert found["called_recall"] == 1


def test_a_mean_of_logarithms_is_predicted_from_training_controls(screen):
    split = PairSplit(screen)(0)
    method = ModelMethod(FakeModel, n_samples=80, n_posterior_samples=4)
    result = run(screen, {"fake": method}, split=split, target_sum=100.0)
    assert result.failures.empty
    known = np.concatenate([split.train, split.validation])
    assert set(FakeModel.seen) == set(screen.obs_names[known])
    assert [len(part) for part in FakeModel.split] == [len(split.train), len(split.validation)]
    # Half of the cells are (8, 2), half (0, 2) of 100.
    expected = np.zeros(screen.n_vars)
    expected[:2] = [np.log1p(80) / 2, (np.log1p(20) + np.log1p(100)) / 2]
    counts = screen.X.toarray()
    lognorm = np.log1p(100 * counts / counts.sum(axis=1, keepdims=True))
    rows = result.scores.query("method == 'fake' and metric == 'rmse_average'")
    for label, value in zip(rows["perturbation"], rows["value"], strict=True):
        observed = lognorm[(screen.obs["perturbation"] == label).to_numpy()].mean(axis=0)
        assert value == pytest.approx(np.sqrt(np.mean((expected - observed) ** 2)), rel=1e-4)


def test_a_method_sees_training_cells_only(screen):
    seen = []

    def look(train, perturbations):
        seen.append((train, perturbations))
        return additive(train, perturbations)

    split = PairSplit(screen)(0)
    run(screen, {"look": look}, split=split)
    ((train, perturbations),) = seen
    assert sorted(train.obs_names) == sorted(screen.obs_names[split.train])
    assert not set(split.held_out) & set(train.obs["perturbation"])
    assert set(perturbations) == set(split.held_out)
    counts = train.layers["counts"].toarray()
    target_sum = np.median(counts.sum(axis=1))
    expected = np.log1p(target_sum * counts / counts.sum(axis=1, keepdims=True))
    np.testing.assert_allclose(train.X.toarray(), expected, rtol=1e-5)
    assert train.uns["benchmark"]["target_sum"] == pytest.approx(target_sum)
    assert "true_latent" not in train.obsm


def test_the_data_stay_as_they_were(screen, result):
    untouched = small_screen()
    pd.testing.assert_frame_equal(screen.obs, untouched.obs)
    pd.testing.assert_frame_equal(screen.var, untouched.var)
    assert (screen.X != untouched.X).nnz == 0
    for slot in ("uns", "obsm", "layers"):
        assert list(getattr(screen, slot)) == list(getattr(untouched, slot))


def test_a_leak_is_refused_before_anything_is_fitted(screen):
    split = PairSplit(screen)(0)
    vars(split)["train"] = np.sort(np.append(split.train, split.test[0]))
    vars(split)["test"] = split.test[1:]
    calls = []

    def method(train, perturbations):
        calls.append(perturbations)
        return additive(train, perturbations)

    with pytest.raises(InvalidSplitError, match="leaks"):
        run(screen, {"method": method}, split=split)
    assert calls == []


def test_an_interrupt_stops(screen):
    def interrupted(train, perturbations):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(screen, {"interrupted": interrupted})


class PressCtrlC(Callback):
    """In the first training that it sees."""

    is_pressed = False

    def on_train_batch_end(self, trainer, plan, *arguments):
        if not self.is_pressed:
            self.is_pressed = True
            signal.raise_signal(signal.SIGINT)


def trains_a_model(train, perturbations):
    """Train a model on its own, and let no interrupt through."""
    counts = ad.AnnData(train.layers["counts"], obs=train.obs, var=train.var)
    SAMSVAE.setup_anndata(counts)
    model = SAMSVAE(counts, n_latent=2, n_hidden=4)
    with contextlib.suppress(SystemExit):
        model.train(max_epochs=2, callbacks=[trains_a_model.press], enable_progress_bar=False)
    return additive(train, perturbations)


def pressing_model(press):
    arguments = TINY.train_kwargs | {"callbacks": [press]}
    return dataclasses.replace(TINY, train_kwargs=arguments)


@pytest.fixture
def ctrl_c_is_heard():
    # In the background of a shell script, Ctrl-C is ignored from the start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    after = signal.signal(signal.SIGINT, before)
    assert after is signal.default_int_handler


@pytest.mark.parametrize("kind", ["model", "function"])
@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_in_a_training_stops_and_keeps_finished_fits_only(screen, tmp_path, caplog, kind):
    caplog.set_level(logging.WARNING, logger="scvi.sams")
    trains_a_model.press = press = PressCtrlC()
    second = pressing_model(press) if kind == "model" else trains_a_model
    methods = {"first": additive, "second": second, "third": additive}
    folder = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        run(screen, methods, folder=folder)
    assert press.is_pressed
    assert "Interrupted after 3 of 6 fits, which are stored in" in caplog.text
    again = run(screen, methods, folder=folder).runs.set_index("method")
    assert again.loc[["control mean", "mean of perturbations", "first"], "from_folder"].all()
    assert not again.loc[["second", "third"], "from_folder"].any()
    assert (again["status"] == "ok").all()


@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_stops_a_learning_curve(screen, caplog):
    caplog.set_level(logging.WARNING, logger="scvi.sams")
    methods = {"model": pressing_model(PressCtrlC()), "next": additive}
    with pytest.raises(KeyboardInterrupt):
        evaluation.learning_curve(screen, methods, cells=(5, None), seeds=[0], progress_bar=False)
    assert "lost: pass a `folder`" in caplog.text


def test_two_workers_give_the_same_result_as_one(screen):
    methods = {"function": additive, "tiny model": TINY}
    one, two = (run(screen, methods, n_jobs=n_jobs) for n_jobs in (1, 2))
    pd.testing.assert_frame_equal(one.scores, two.scores, rtol=1e-6)


def test_groups_are_predicted_one_by_one(screen):
    screen = screen.copy()
    screen.obs["line"] = pd.Categorical(np.tile(["a", "b"], screen.n_obs // 2))
    result = run(screen, {"additive": "additive"}, covariate_key="line", split=PairSplit(screen))
    assert result.failures.empty
    tested = set(PairSplit(screen)(0).held_out)
    own = result.scores[result.scores["method"] == "additive"]
    assert set(zip(own["perturbation"], own["covariate"], strict=True)) == {
        (label, line) for label in tested for line in "ab"
    }
    # Nothing changes: the prediction is the training control mean of the own line.
    none = result.scores.query("method == 'control mean' and metric == 'rank_rmse_average'")
    assert (none["value"] == 0.5).all()


def test_the_interval_draws_perturbations_not_seeds(screen):
    split = PairSplit(screen)(0)
    few, many = (
        run(screen, [], split=split, seeds=seeds).summary().set_index(["method", "metric"])
        for seeds in ((0,), (0, 1))
    )
    # The same cells and perturbations twice are no more evidence than once.
    row = ("control mean", "rmse_average")
    pd.testing.assert_series_equal(few.loc[row, ["low", "high"]], many.loc[row, ["low", "high"]])
    assert few.loc[row, "low"] < few.loc[row, "mean"] < few.loc[row, "high"]
    assert many.loc[row, "sd_over_seeds"] == 0
    assert many.loc[row, "n_perturbations"] == len(split.held_out)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"methods": {"x": "SAMS"}}, SAMSError, "SAMSVAE"),
        ({"methods": {NEGATIVE: additive}}, SAMSError, "always run"),
        ({"methods": {"x": SAMSVAE}}, SAMSError, "ModelMethod"),
        ({"methods": {"x": 3}}, SAMSError, "int"),
        ({"modes": ["fit"]}, SAMSError, "fit"),
        ({"seeds": [1, 1]}, SAMSError, "once"),
        ({"seeds": None}, InvalidArgumentError, "`seeds` must be .* not None"),
        ({"seeds": 3}, InvalidArgumentError, "`seeds` must be .* not 3"),
        ({"seeds": "012"}, InvalidArgumentError, "not '012'"),
        ({"seeds": [0.5]}, InvalidArgumentError, "`seeds` must be a whole number"),
        ({"seeds": [-1]}, InvalidArgumentError, "at least 0, not -1"),
        ({"split": None}, InvalidSplitError, "`split` gave NoneType"),
        ({"split": lambda seed: {}}, InvalidSplitError, "dict"),
        ({"control": "ctrl"}, InvalidSplitError, "ctrl"),
        ({"layer": "raw"}, MissingKeyError, "raw"),
        ({"batch_key": "lane"}, MissingKeyError, "lane"),
        ({"versions": {"x": "1"}}, SAMSError, "'x'"),
    ],
)
def test_bad_arguments_are_named(screen, changes, error, named):
    with pytest.raises(error, match=named):
        run(screen, **({"methods": {"additive": "additive"}} | changes))
