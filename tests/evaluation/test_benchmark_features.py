"""Benchmarks of perturbations that no training cell carries, predicted from features."""

import numpy as np
import pandas as pd
import pytest

from evaluation.benchmark_builders import FakeModel, run
from scvi_sams import evaluation
from scvi_sams.datasets import simulate_screen
from scvi_sams.evaluation import ModelMethod, perturbation_hold_out
from scvi_sams.exceptions import InvalidArgumentError, MissingKeyError
from scvi_sams.features import FeatureTable

BASELINES = ["feature ridge", "feature neighbours", "shuffled features", "additive"]
FEW = {"n_samples": 20, "n_posterior_samples": 2, "n_iwelbo_samples": None}


@pytest.fixture(scope="module")
def screen():
    return simulate_screen(
        n_genes=60,
        n_controls=150,
        n_perturbations=60,
        cells_per_perturbation=25,
        n_combinations=0,
        n_latent=4,
        mask_probability=0.5,
        n_features=4,
        n_noise_features=4,
        feature_share=0.9,
        seed=3,
    )


@pytest.fixture(scope="module")
def table(screen):
    return screen.uns["perturbation_features"]


@pytest.fixture(scope="module")
def split(screen):
    return perturbation_hold_out(screen.obs["perturbation"], fraction=0.25, seed=1)


@pytest.fixture(scope="module")
def result(screen, split, table):
    return run(screen, BASELINES, split=split, modes=("sams",), perturbation_features=table)


def test_features_tell_unmeasured_perturbations_apart(result):
    scores = result.scores.query("perturbation == 'all'").set_index(["method", "metric"])["value"]
    pearson = scores.xs("pearson", level="metric")
    rmse = scores.xs("rmse", level="metric")
    mean = "mean of perturbations"
    for method in ("feature ridge", "feature neighbours"):
        assert pearson[method] > pearson[mean] + 0.15
        assert rmse[method] < 0.93 * rmse[mean]
    assert pearson["shuffled features"] < pearson[mean] + 0.05
    assert rmse["shuffled features"] > 0.97 * rmse[mean]


def test_what_needs_cells_of_a_perturbation_fails_with_its_reason(result, split):
    failed = result.failures
    assert set(failed["method"]) == {"additive"}
    single = failed[failed["perturbation"] != "all"]
    assert set(single["perturbation"]) == set(split.held_out)
    assert single["message"].str.contains("The single effect of").all()


def test_a_report_names_features_and_what_was_held_out(result, split, tmp_path):
    assert result.settings["data"]["features"].startswith("FeatureTable(60 perturbations x 8")
    held_out = result.settings["splits"][0]["held_out_perturbations"]
    assert held_out == list(split.held_out_perturbations)
    result.to_html(tmp_path / "report.html")
    assert "FeatureTable(60 perturbations x 8" in (tmp_path / "report.html").read_text()


def test_models_that_take_features_get_those_of_the_benchmark(screen, split, table):
    given = []

    class Plain(FakeModel):
        def __init__(self, adata, **arguments):
            super().__init__(adata)
            given.append((type(self).__name__, arguments))

    class TakesFeatures(Plain):
        _takes_features = True

    methods = {
        "takes": ModelMethod(TakesFeatures, model_kwargs={"n_latent": 3}, **FEW),
        "without": ModelMethod(TakesFeatures, model_kwargs={"perturbation_features": None}, **FEW),
        "plain": ModelMethod(Plain, **FEW),
    }
    result = run(screen, methods, split=split, perturbation_features=table)
    assert result.failures.empty
    (_, first), second, third = given
    assert first.keys() == {"perturbation_features", "n_latent"}
    assert isinstance(first["perturbation_features"], FeatureTable)
    np.testing.assert_array_equal(first["perturbation_features"].values, table)
    assert second == ("TakesFeatures", {"perturbation_features": None})
    assert third == ("Plain", {})
    given.clear()
    assert run(screen, {"takes": methods["takes"]}, split=split).failures.empty
    assert given == [("TakesFeatures", {"n_latent": 3})]


def test_baselines_keep_features_of_their_own(screen, split, table):
    names = [f"{of} ridge" for of in ("own", "given", "same")]
    own = evaluation.FeatureRidge(table.iloc[:, 4:])
    methods = dict(zip(names, [own, "feature ridge", evaluation.FeatureRidge(table)], strict=True))
    scores = run(screen, methods, split=split, perturbation_features=table).scores
    values = {name: scores.loc[scores["method"] == name, "value"].to_numpy() for name in names}
    np.testing.assert_array_equal(values["given ridge"], values["same ridge"])
    assert not np.allclose(values["own ridge"], values["same ridge"])
    assert own.features.n_features == 4


def test_without_features_the_rows_say_so(screen, split):
    result = run(screen, ["feature ridge"], split=split)
    failed = result.failures
    assert failed["message"].str.contains("`perturbation_features`").any()
    assert result.runs.set_index("method").loc["feature ridge", "status"] == "failed"
    assert result.settings["data"]["features"] == ""


def test_fits_are_kept_for_the_same_features_only(screen, split, table, tmp_path):
    def from_folder(features):
        arguments = {"split": split, "folder": tmp_path, "perturbation_features": features}
        runs = run(screen, ["feature ridge"], **arguments).runs
        return runs.set_index("method").loc["feature ridge", "from_folder"]

    assert not from_folder(table)
    assert from_folder(table.copy())
    assert from_folder("perturbation_features")
    changed = table.copy()
    changed.iloc[0, 0] += 1
    assert not from_folder(changed)
    assert not from_folder(table.iloc[:, ::-1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda table: table.set_axis(table.index + "x"), InvalidArgumentError, "no row of a pert"),
        (lambda table: table.T, InvalidArgumentError, "transpose"),
        (lambda table: table.to_numpy(), InvalidArgumentError, "`perturbation_features` must be"),
        (lambda table: "embedding", MissingKeyError, "'embedding'"),
    ],
)
def test_tables_that_do_not_fit_raise_before_anything_is_fitted(
    screen, split, table, change, error, message
):
    def never(train_adata, perturbations):
        pytest.fail("it was fitted")

    with pytest.raises(error, match=message):
        run(screen, {"mine": never}, split=split, perturbation_features=change(table))


def test_features_are_not_changed(screen, split, table):
    before = table.copy()
    run(screen, BASELINES[:1], split=split, perturbation_features=table)
    pd.testing.assert_frame_equal(table, before)
