"""A metric and a split are each declared in one place, and used everywhere from there."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from evaluation.benchmark_builders import run, small_screen
from scvi_sams import evaluation
from scvi_sams.evaluation import make_split, score_predictions
from scvi_sams.exceptions import SAMSError
from scvi_sams.labels._parsing import read_labels
from scvi_sams.metrics._comparison import Metric
from scvi_sams.metrics._scoring import METRICS

LARGEST_ERROR = Metric(
    "mine",
    "largest_error",
    "fit",
    "largest |x - y| of mean log1p expression",
    "a test",
    higher_is_better=False,
    score=lambda group: np.abs(group.predicted - group.observed).max(axis=1),
)


@pytest.fixture(scope="module")
def screen():
    return small_screen()


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(METRICS, (LARGEST_ERROR.mode, LARGEST_ERROR.metric), LARGEST_ERROR)


def table(values, labels):
    return ad.AnnData(
        np.array(values, dtype=float),
        obs=pd.DataFrame({"perturbation": labels}, index=[f"{i}" for i in range(len(labels))]),
    )


def test_a_metric_is_scored_once_it_is_declared(registered):
    observed = table([[1, 1], [2, 0], [2, 4]], ["control", "a", "a"])
    scores = score_predictions(table([[2, 5]], ["a"]), observed, modes=["mine"])
    assert scores[["perturbation", "metric", "value", "status"]].to_numpy().tolist() == [
        ["a", "largest_error", 3.0, "ok"]
    ]
    failed = score_predictions(table([[np.nan, 5]], ["a"]), observed, modes=["mine"])
    assert failed["status"].tolist() == ["nan"]
    described = evaluation.describe_metrics().query("mode == 'mine'")
    assert described["definition"].tolist() == [LARGEST_ERROR.definition]


def test_a_declared_metric_is_in_the_summary_of_a_benchmark(registered, screen):
    result = run(
        screen, ["additive"], split=every_third_pair(screen.obs["perturbation"]), modes=["mine"]
    )
    summary = result.summary().set_index("method")
    assert set(summary["metric"]) == {"largest_error"}
    assert set(summary["axis"]) == {"fit"}
    assert not summary["higher_is_better"].any()
    assert summary.loc["mean of perturbations", "position"] == 0
    assert summary.loc["half of the test cells", "position"] == 1
    axes = result.describe_metrics().set_index("metric")["axis"]
    assert axes["largest_error"] == "fit"


def test_a_mode_without_such_a_metric_is_unknown(screen):
    with pytest.raises(SAMSError, match="no mode 'mine'"):
        run(screen, ["additive"], modes=["mine"])


def every_third_pair(labels, *, control="control", delimiter="+"):
    """Test every third combination and train on all other cells: a split of one function."""
    labels = read_labels(labels, control, delimiter)
    held_out = [name for name in labels.names if "+" in name][::3]
    tested = np.isin(labels.canonical, held_out)
    return make_split(
        labels, np.flatnonzero(~tested), [], np.flatnonzero(tested), name="x", held_out=held_out
    )


def test_a_split_is_one_function(screen, tmp_path):
    split = every_third_pair(screen.obs["perturbation"])
    result = run(screen, ["additive"], split=split)
    assert set(result.scores["perturbation"]) == set(split.held_out)
    split.save(tmp_path / "split.json")
    again = evaluation.Split.load(tmp_path / "split.json", screen.obs["perturbation"])
    np.testing.assert_array_equal(again.test, split.test)
    # Columns that were read already and those that were not are one and the same.
    evaluation.check_split(split, read_labels(screen.obs["perturbation"], "control", "+"))
