"""Parts of the benchmark on their own: fingerprints, kept fits, predictions by group, extras."""

import enum
import functools
from pathlib import Path
from typing import ClassVar

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from evaluation.benchmark_builders import FakeModel, PairSplit, additive, run, small_screen
from scvi_sams.benchmark._methods import resolve_methods
from scvi_sams.benchmark._store import FitStore, Predictions, StoredFit, settings_text
from scvi_sams.evaluation import ControlMean, ModelMethod
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidCountsError,
    InvalidCovariateError,
    InvalidSplitError,
    SAMSError,
)
from scvi_sams.labels import _parsing


class Colour(enum.Enum):
    RED = 1


@pytest.fixture(scope="module")
def screen():
    return small_screen()


@pytest.fixture(scope="module")
def grouped(screen):
    adata = screen.copy()
    adata.obs["line"] = pd.Categorical(np.tile(["a", "b"], adata.n_obs // 2))
    return adata


# Fingerprints -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.float64(0.5), "0.5"),
        (np.int32(3), "3"),
        ({3, 1, 2}, '["1", "2", "3"]'),
        (frozenset("ba"), '["\\"a\\"", "\\"b\\""]'),
        (Path("some/where"), '"some/where"'),
        (Colour.RED, '"Colour.RED"'),
        (functools.partial(int, "7", base=8), '["builtins.int", ["7"], {"base": 8}]'),
        (np.linalg.norm, '"numpy.linalg.norm"'),
        (torch.float64, '"torch.float64"'),
    ],
    ids=["float", "int", "set", "frozenset", "path", "enum", "partial", "function", "torch"],
)
def test_a_setting_has_one_description(value, text):
    assert settings_text(value) == text


def test_arrays_differ_by_values_and_type():
    texts = {
        settings_text(array)
        for array in (np.arange(3), np.arange(3.0), np.arange(4), np.array([0, 1, 3]))
    }
    assert len(texts) == 4
    assert settings_text(np.arange(3)) == settings_text(np.arange(3))


def test_what_cannot_be_described_is_refused():
    with pytest.raises(SAMSError, match="cannot be described"):
        settings_text({"setting": iter(())})


# Methods ----------------------------------------------------------------------------------------


def test_a_model_can_be_named():
    (model,) = (m for name, m in resolve_methods(["CPAVAE"]).items() if name == "CPAVAE")
    assert model.model_class.__name__ == "CPAVAE"
    assert model.n_samples == 1000


@pytest.mark.parametrize("name", [3, "", " "])
def test_a_method_has_a_name(name):
    with pytest.raises(SAMSError, match="must be text"):
        resolve_methods({name: additive})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_samples": 0}, "positive"),
        ({"n_iwelbo_samples": -1}, "positive"),
        ({"data": "x"}, "'x'"),
    ],
)
def test_settings_of_a_model_are_checked(changes, named):
    with pytest.raises(SAMSError, match=named):
        ModelMethod(FakeModel, **changes)


def one_gene(train, perturbations):
    return additive(train, perturbations)[:, :1].copy()


def no_rows(train, perturbations):
    return additive(train, perturbations)[:0].copy()


def no_labels(train, perturbations):
    return ad.AnnData(np.zeros((1, train.n_vars)), var=train.var)


def no_table(train, perturbations):
    return np.zeros((len(perturbations), train.n_vars))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_table, "SAMSError: The function returned ndarray"),
        (no_labels, r"SAMSError: .* without obs\['perturbation'\]"),
        (one_gene, "MissingKeyError: 49 genes have no prediction"),
        (no_rows, "UnknownPerturbationError: There is no predicted row for 'P"),
    ],
)
def test_what_a_function_returns_wrongly_is_said_in_its_rows(screen, function, message):
    failures = run(screen, {"wrong": function}).failures
    assert set(failures["method"]) == {"wrong"}
    of_one = failures[failures["perturbation"] != "all"]
    assert of_one["message"].str.match(message).all()
    assert set(of_one["perturbation"]) == set(PairSplit(screen)(0).held_out)


def test_genes_of_a_prediction_may_be_in_another_order(screen):
    def reversed_genes(train, perturbations):
        return additive(train, perturbations)[:, ::-1].copy()

    scores = run(screen, {"straight": additive, "reversed": reversed_genes}).scores
    straight, turned = (
        scores.loc[scores["method"] == name, "value"].to_numpy()
        for name in ("straight", "reversed")
    )
    np.testing.assert_array_equal(straight, turned)


# Groups of cells --------------------------------------------------------------------------------


def test_a_function_may_predict_each_group(grouped):
    """The right predictions for group a, those of group a for group b: only b is wrong."""
    truth = {}

    def oracle(train, perturbations):
        counts = grouped.X.toarray()
        size = counts.sum(axis=1, keepdims=True)
        expression = np.log1p(train.uns["benchmark"]["target_sum"] * counts / size)
        rows, labels, lines = [], [], []
        for label in perturbations:
            own = (grouped.obs["perturbation"] == label).to_numpy()
            for line in "ab":
                cells = own & (grouped.obs["line"] == line).to_numpy()
                truth[label, line] = expression[cells].mean(axis=0)
                rows.append(truth[label, line] if line == "a" else truth[label, "a"])
                labels.append(label)
                lines.append(line)
        return ad.AnnData(
            np.array(rows),
            obs=pd.DataFrame(
                {"perturbation": labels, "line": lines}, index=[f"{i}" for i in range(len(rows))]
            ),
            var=train.var,
        )

    scores = run(grouped, {"oracle": oracle}, covariate_key="line").scores
    own = scores.query("method == 'oracle' and metric == 'rmse_average'")
    for label, line, value in zip(own["perturbation"], own["covariate"], own["value"], strict=True):
        difference = truth[label, line] - truth[label, "a"]
        assert value == pytest.approx(np.sqrt(np.mean(difference**2)), abs=1e-5)
    assert len(own) == 2 * len(PairSplit(grouped)(0).held_out)


def test_a_model_predicts_from_control_cells_of_the_group(grouped):
    asked = []

    class Seen(FakeModel):
        def predict(self, perturbations, indices, output):
            asked.append(set(self.adata.obs["line"].iloc[indices]))
            return super().predict(perturbations, indices, output)

    method = ModelMethod(Seen, n_samples=20, n_posterior_samples=2, n_iwelbo_samples=None)
    result = run(grouped, {"seen": method}, covariate_key="line")
    assert result.failures.empty
    assert Seen.arguments["categorical_covariate_keys"] == ["line"]
    assert {frozenset(lines) for lines in asked} == {frozenset("a"), frozenset("b")}


class PredictsTogether(FakeModel):
    """Counts that depend on the label and the cell; may not know a label."""

    asked: ClassVar[list[list[str]]] = []
    unknown: ClassVar[str | None] = None

    def predict(self, perturbations, indices, output):
        self.asked.append(list(perturbations))
        if self.unknown in perturbations:
            raise KeyError(self.unknown)
        noise = torch.rand(len(indices), self.adata.n_vars).numpy()
        counts = [np.floor(noise * (3 + sum(map(ord, label)) % 7)) for label in perturbations]
        return ad.AnnData(np.concatenate(counts).astype(np.float32))


@pytest.mark.parametrize("unknown", [None, "P005+P006"])
def test_cells_of_many_perturbations_are_predicted_at_once_as_of_each(screen, unknown, monkeypatch):
    method = ModelMethod(PredictsTogether, n_samples=30, n_posterior_samples=4)
    monkeypatch.setattr(PredictsTogether, "unknown", unknown)
    tables, calls = [], []
    for most in (2**26, 1):
        monkeypatch.setattr("scvi_sams.benchmark._model._VALUES_AT_ONCE", most)
        monkeypatch.setattr(PredictsTogether, "asked", [])
        tables.append(run(screen, {"model": method}, modes=("perturbench", "distances")).scores)
        calls.append(PredictsTogether.asked)
    pd.testing.assert_frame_equal(*tables)
    together, each = calls
    names = sorted({label for labels in each for label in labels})
    assert all(len(labels) == 1 for labels in each)
    of_model = tables[0][tables[0]["method"] == "model"]
    failed = of_model[of_model["status"] == "failed"]
    if unknown is None:
        assert together == [names] * 4
        assert failed.empty
    else:
        assert [label for label in names if label > unknown] in together
        assert set(failed["perturbation"]) - {"all"} == {unknown}


def test_a_model_of_contexts_takes_groups_for_contexts_unless_told_otherwise(grouped):
    registered = []

    class WithContexts(FakeModel):
        _has_contexts = True

        @classmethod
        def setup_anndata(cls, adata, **arguments):
            kept = ("context_key", "categorical_covariate_keys")
            registered.append({key: arguments[key] for key in kept if key in arguments})

    settings = [None, {"categorical_covariate_keys": ["line"]}, {}]
    few = {"n_samples": 20, "n_posterior_samples": 2, "n_iwelbo_samples": None}
    methods = {
        f"model {number}": ModelMethod(WithContexts, setup_kwargs=setup, **few)
        for number, setup in enumerate(settings)
    }
    assert run(grouped, methods, covariate_key="line").failures.empty
    assert registered == [{"context_key": "line"}, *settings[1:]]
    registered.clear()
    assert run(grouped, {"model": methods["model 0"]}).failures.empty
    assert registered == [{}]  # no covariate


def test_a_group_without_training_controls_has_no_prediction(grouped):
    split = PairSplit(grouped)(0)
    is_control = (grouped.obs["perturbation"] == "control").to_numpy()
    lost = np.flatnonzero(is_control & (grouped.obs["line"] == "b").to_numpy())
    for part in ("train", "validation"):
        vars(split)[part] = np.setdiff1d(getattr(split, part), lost)
    vars(split)["test"] = np.union1d(split.test, lost)
    fewer = ModelMethod(FakeModel, n_samples=20, n_posterior_samples=2, n_iwelbo_samples=None)
    result = run(
        grouped, {"additive": "additive", "model": fewer}, covariate_key="line", split=split
    )
    for method in ("additive", "model"):
        failed = result.failures[result.failures["method"] == method]
        single = failed[failed["covariate"] == "b"]
        assert (
            single["message"].str.contains("There is no training control cell of level 'b'").all()
        )
        assert len(single)
        assert "a" not in set(failed["covariate"])


# Columns ----------------------------------------------------------------------------------------


def test_a_column_of_labels_is_read_once(screen, monkeypatch):
    """Whatever the number of methods, seeds and metrics; what is predicted is read beside it."""
    columns = []
    number = _parsing.factorize

    def counted(values, error):
        columns.append(len(values))
        return number(values, error)

    split = PairSplit(screen)(0)
    monkeypatch.setattr(_parsing, "factorize", counted)
    modes = ("sams", "perturbench", "cell-eval", "systema")
    methods = ["additive", "training mean", "EB-shrunken mean", "additive of shrunken singles"]
    methods += ["ridge on principal components", "decoder only"]
    run(screen, methods, split=split, seeds=(0, 1), modes=modes)
    assert columns.count(screen.n_obs) == 1
    columns.remove(screen.n_obs)
    assert max(columns) <= len(split.held_out)


def test_sizes_may_be_given(screen):
    adata = screen.copy()
    total = np.asarray(adata.X.sum(axis=1)).ravel()
    adata.obs["size"] = total * 2
    own = run(screen, {"additive": "additive"}, target_sum=100.0).scores
    doubled = run(adata, {"additive": "additive"}, size_factor_key="size", target_sum=200.0).scores
    pd.testing.assert_series_equal(doubled["value"], own["value"])


@pytest.mark.parametrize(
    ("change", "arguments", "error", "named"),
    [
        (lambda adata: None, {"target_sum": 0}, SAMSError, "target_sum"),
        (
            lambda adata: adata.obs.insert(0, "line", [np.nan] + ["a"] * (adata.n_obs - 1)),
            {"covariate_key": "line"},
            InvalidCovariateError,
            "1 cell has no 'line'",
        ),
        (
            lambda adata: setattr(adata, "obs_names", ["twice"] * adata.n_obs),
            {},
            SAMSError,
            "unique",
        ),
        (
            lambda adata: adata.obs.insert(0, "size", np.zeros(adata.n_obs)),
            {"size_factor_key": "size"},
            InvalidCountsError,
            "a size factor in the column 'size' that is zero",
        ),
    ],
    ids=["target sum", "no group", "names", "size factor"],
)
@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_data_that_cannot_be_compared_are_refused(screen, change, arguments, error, named):
    adata = screen.copy()
    change(adata)
    with pytest.raises(error, match=named):
        run(adata, ["additive"], **arguments)


def test_cells_without_counts_are_refused(screen):
    adata = screen.copy()
    adata.X = sparse.csr_matrix(adata.X.toarray() * (np.arange(adata.n_obs) > 0)[:, None])
    with pytest.raises(InvalidCountsError, match="1 cell has no counts"):
        run(adata, ["additive"])


def test_a_split_that_tests_controls_only_is_refused(screen):
    split = PairSplit(screen)(0)
    labels = screen.obs["perturbation"].astype(str).to_numpy()
    controls = np.flatnonzero(labels == "control")
    vars(split)["train"] = np.setdiff1d(split.train, controls[:5])
    vars(split)["validation"] = np.setdiff1d(split.validation, controls[:5])
    vars(split)["test"] = controls[:5]
    vars(split)["held_out"] = ()
    with pytest.raises(InvalidSplitError, match="nothing to predict"):
        run(screen, ["additive"], split=split)


# Extras -----------------------------------------------------------------------------------------


class Scored(FakeModel):
    """Has a likelihood for cells it has seen, and none for others."""

    error: Exception = SAMSError("no such cells")

    def get_iwelbo(self, cells, indices, n_samples, key_added):
        raise self.error


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (SAMSError("no such cells"), "undefined", "no such cells"),
        (ZeroDivisionError("by zero"), "failed", "ZeroDivisionError: by zero"),
    ],
)
def test_a_score_of_a_model_that_fails_is_a_row(screen, monkeypatch, error, status, message):
    monkeypatch.setattr(Scored, "error", error)
    method = ModelMethod(Scored, n_samples=20, n_posterior_samples=2)
    rows = run(screen, {"model": method}).scores.query("metric == 'iwelbo_held_out'")
    assert rows[["status", "message"]].to_numpy().tolist() == [[status, message]]
    assert rows["value"].isna().all()


def test_extras_that_fail_as_a_whole_are_a_row(screen):
    class Broken(FakeModel):
        @property
        def get_iwelbo(self):
            raise RuntimeError("lost")

    method = ModelMethod(Broken, n_samples=20, n_posterior_samples=2)
    result = run(screen, {"model": method})
    rows = result.scores.query("metric == 'extras'")
    assert rows[["status", "message"]].to_numpy().tolist() == [["failed", "RuntimeError: lost"]]
    assert result.runs.set_index("method").loc["model", "status"] == "ok"


def test_an_interrupt_that_lightning_made_an_exit_stops(screen):
    class Interrupted(FakeModel):
        def train(self, **arguments):
            raise SystemExit(0)

    with pytest.raises(KeyboardInterrupt):
        run(screen, {"model": ModelMethod(Interrupted)})


# Kept fits --------------------------------------------------------------------------------------


def fit_of(value, key="k" * 20):
    asked = ("a", "P1")
    profiles = ad.AnnData(np.full((1, 2), value), obs=pd.DataFrame({"line": ["a"]}, index=["0"]))
    record = {"status": "ok", "key": key}
    return StoredFit(Predictions(profiles, profiles.copy(), {asked: "why"}), record)


def test_a_fit_comes_back_as_it_was(tmp_path):
    store = FitStore(tmp_path)
    store.prepare()
    place = store.place("Some Method!", 3, "0123456789abcdefgh")
    assert place.name == "some-method-seed3-0123456789abcdef"
    key = "0123456789abcdefgh"
    assert store.load(place, key) is None
    store.save(place, fit_of(4.0, key))
    found = store.load(place, key)
    assert found.record == {"status": "ok", "key": key}
    assert found.predictions.messages == {("a", "P1"): "why"}
    assert found.predictions.cells.X.tolist() == [[4.0, 4.0]]


def test_of_two_processes_with_one_fit_the_first_is_kept(tmp_path):
    store = FitStore(tmp_path)
    store.prepare()
    place = store.place("method", 0, "k" * 20)
    store.save(place, fit_of(1.0))
    store.save(place, fit_of(2.0))
    assert store.load(place, "k" * 20).predictions.profiles.X.tolist() == [[1.0, 1.0]]
    assert [path.name for path in store.folder.iterdir()] == [place.name]


def test_a_place_that_is_taken_by_something_else_is_an_error(tmp_path):
    store = FitStore(tmp_path)
    store.prepare()
    place = store.place("method", 0, "k" * 20)
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match=r"not empty|exist"):
        store.save(place, fit_of(1.0))
    assert (place / "notes.txt").read_text() == "mine"


def test_what_was_not_finished_is_cleared_away(tmp_path):
    store = FitStore(tmp_path)
    store.prepare()
    half = store.folder / ".partial-1"
    half.mkdir()
    (half / "prediction.h5ad").write_text("half")
    (store.folder / ".partial-2.csv").write_text("half")
    store.prepare()
    assert list(store.folder.iterdir()) == []


def test_predicted_cells_are_kept_with_a_fit(screen, tmp_path):
    methods = {"model": ModelMethod(FakeModel, n_samples=20, n_posterior_samples=2)}
    arguments = {"folder": tmp_path, "modes": ("distances",)}
    first, again = (run(screen, methods, **arguments) for _ in range(2))
    assert again.runs["from_folder"].any()
    pd.testing.assert_frame_equal(again.scores, first.scores)
    assert set(first.scores["mode"]) == {"distances"}


# Models of normalised expression ----------------------------------------------------------------


def test_a_model_may_be_given_normalised_expression(screen):
    seen = {}

    class Normalised(FakeModel):
        @classmethod
        def setup_anndata(cls, adata, **arguments):
            super().setup_anndata(adata, **arguments)
            seen["train"] = adata.X.toarray()

        def predict(self, perturbations, indices, output):
            rows = np.zeros((len(indices), self.adata.n_vars))
            rows[:, 0] = 2.0
            return ad.AnnData(rows)

        def get_iwelbo(self, cells, indices, n_samples, key_added):
            seen["test"] = cells.X.toarray()
            return 0.0

    split = PairSplit(screen)(0)
    method = ModelMethod(Normalised, n_samples=8, n_posterior_samples=2, data="lognorm")
    result = run(screen, {"model": method}, split=split, target_sum=100.0)
    counts = screen.X.toarray()
    expression = np.log1p(100 * counts / counts.sum(axis=1, keepdims=True))
    known = np.concatenate([split.train, split.validation])
    np.testing.assert_allclose(seen["train"], expression[known], rtol=1e-5)
    np.testing.assert_allclose(seen["test"], expression[split.test], rtol=1e-5)
    # What it predicts is taken as it is.
    rows = result.scores.query("method == 'model' and metric == 'rmse_average'")
    predicted = np.zeros(screen.n_vars)
    predicted[0] = 2.0
    for label, value in zip(rows["perturbation"], rows["value"], strict=True):
        observed = expression[(screen.obs["perturbation"] == label).to_numpy()].mean(axis=0)
        assert value == pytest.approx(np.sqrt(np.mean((predicted - observed) ** 2)), rel=1e-4)


def test_columns_that_settings_of_a_model_name_are_there(screen):
    adata = screen.copy()
    adata.obs["lane"] = pd.Categorical(np.tile(["x", "y"], adata.n_obs // 2))
    adata.obs["age"] = np.arange(adata.n_obs) / 10
    seen = {}

    class Columns(FakeModel):
        @classmethod
        def setup_anndata(cls, adata, **arguments):
            super().setup_anndata(adata, **arguments)
            seen.update(adata.obs)

    setup = {"batch_key": "lane", "continuous_covariate_keys": ["age"]}
    method = ModelMethod(Columns, setup_kwargs=setup, n_samples=8, n_posterior_samples=2)
    run(adata, {"model": method})
    assert {"lane", "age", "perturbation"} <= set(seen)
    assert Columns.arguments["batch_key"] == "lane"


def test_scores_of_groups_are_summarised_over_perturbations_and_groups(grouped):
    result = run(grouped, {"additive": "additive"}, covariate_key="line")
    own = result.scores.query("method == 'additive' and metric == 'rmse_average'")
    row = result.summary().query("method == 'additive' and metric == 'rmse_average'").iloc[0]
    assert row["n_perturbations"] == len(own) == 2 * len(PairSplit(grouped)(0).held_out)
    assert row["mean"] == pytest.approx(own["value"].mean())


class WithoutPairs(ControlMean):
    """A user's own baseline: its public ``fit`` leaves out cells first."""

    seen: ClassVar[list[str]] = []

    def fit(self, train_adata):
        is_pair = train_adata.obs["perturbation"].astype(str).str.contains("+", regex=False)
        self.seen.extend(train_adata.obs["perturbation"].astype(str))
        return super().fit(train_adata[~is_pair.to_numpy()])

    def _learn(self, expression, labels, genes):
        assert not any("+" in name for name in labels.names)
        super()._learn(expression, labels, genes)


def test_a_baseline_with_a_fit_of_its_own_is_fitted_by_it(screen):
    result = run(screen, {"mine": WithoutPairs()}, seeds=[0])
    assert set(result.runs["status"]) == {"ok"}
    assert "control" in WithoutPairs.seen


@pytest.mark.parametrize(
    ("argument", "value", "wanted"),
    [
        ("seeds", 3, "whole numbers"),
        ("seeds", [1.5], "a whole number of at least 0"),
        ("seeds", [-1], "a whole number of at least 0"),
        ("methods", None, "a dict of methods by name"),
        ("methods", "additive", "a dict of methods by name"),
        ("target_sum", "x", "a number above 0"),
        ("versions", 3, "a dict"),
        ("folder", 3, "the path of a file or folder"),
        ("n_jobs", 0, "number of parallel fits"),
        ("n_jobs", "all", "a whole number"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(screen, argument, value, wanted):
    arguments = {"methods": {"mine": additive}} | {argument: value}
    with pytest.raises(InvalidArgumentError, match=f"`{argument}`.*{wanted}"):
        run(screen, **arguments)


@pytest.mark.parametrize("split", [None, "random", lambda seed: None])
def test_a_split_is_a_split_or_makes_one(screen, split):
    with pytest.raises(InvalidSplitError, match="`split`"):
        run(screen, {"mine": additive}, split=split)
