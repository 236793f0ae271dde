"""Figures of a benchmark: where methods stand, and what is said of failures."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from scvi_sams import plotting
from scvi_sams.evaluation import BenchmarkResult
from scvi_sams.exceptions import SAMSError

METHODS = ["control mean", "mean of perturbations", "good", "failing", "half of the test cells"]
RMSE = dict(zip(METHODS, (3.0, 2.0, 1.5, 2.5, 1.0), strict=True))
RANK = dict(zip(METHODS, (0.5, 0.5, 0.1, 0.4, 0.0), strict=True))


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def scores():
    rows = []
    for method in METHODS:
        for name, offset in (("A", -0.1), ("B", 0.0), ("C", 0.1)):
            failed = method == "failing" and name == "A"
            shared = {
                "method": method,
                "seed": 0,
                "perturbation": name,
                "mode": "perturbench",
                "higher_is_better": False,
                "status": "failed" if failed else "ok",
                "message": "",
                "n_cells": 9,
            }
            value = np.nan if failed else RMSE[method] + offset
            rows.append(shared | {"metric": "rmse_average", "value": value, "chance": np.nan})
            value = 1.0 if failed else RANK[method]
            rows.append(shared | {"metric": "rank_rmse_average", "value": value, "chance": 0.5})
    return pd.DataFrame(rows)


@pytest.fixture
def summary(scores):
    return BenchmarkResult(scores, pd.DataFrame(), {}).summary()


def points(ax):
    """Marker of every method: position, and whether it is hollow."""
    lines = [line for line in ax.lines if line.get_marker() not in ("None", "")]
    return [
        (line.get_xdata()[0], line.get_ydata()[0], to_hex(line.get_markerfacecolor()) == "#ffffff")
        for line in lines
    ]


def test_every_method_stands_at_its_mean(summary):
    ax = plotting.benchmark_metric(summary, "rmse_average")
    named = [label.get_text() for label in ax.get_yticklabels()]
    found = {named[int(y)]: (x, hollow) for x, y, hollow in points(ax)}
    for method in set(METHODS) - {"failing"}:
        assert found[method] == (pytest.approx(RMSE[method]), False)
    # A failed; the mean of B and C is 2.55.
    assert found["failing"] == (pytest.approx(2.55), True)
    assert "1 of 3 failed" in [text.get_text() for text in ax.texts]
    assert "lower is better" in ax.get_xlabel()


def test_better_is_right_and_up(summary):
    ax = plotting.benchmark_specificity(summary)
    assert ax.xaxis_inverted()
    assert ax.yaxis_inverted()
    handles, names = ax.get_legend_handles_labels()
    assert names[:5] == [*METHODS[:3], "failing (1 failed)", METHODS[4]]
    places = {(round(x, 2), round(y, 2)) for x, y, _ in points(ax)}
    assert (1.5, 0.1) in places
    assert (2.0, 0.5) in places
    chance = handles[names.index("chance: perturbations not distinguished")]
    assert set(chance.get_ydata()) == {0.5}


def test_perturbations_of_two_methods(scores):
    ax = plotting.benchmark_perturbations(scores, "failing")
    x, y = ax.collections[-1].get_offsets().T
    np.testing.assert_allclose(x, [2.0, 2.1])
    np.testing.assert_allclose(y, [2.5, 2.6])
    assert ax.get_title() == "failing: better in 0 of 2, 1 failed"


def test_unknown_names_are_named(summary, scores):
    with pytest.raises(SAMSError, match="'rmse'"):
        plotting.benchmark_metric(summary, "rmse")
    with pytest.raises(SAMSError, match="'ours'"):
        plotting.benchmark_perturbations(scores, "ours")


def test_a_metric_of_two_modes_needs_one(summary):
    both = pd.concat([summary, summary.assign(mode="sams")])
    with pytest.raises(SAMSError, match="pass `mode`, one of 'perturbench', 'sams'"):
        plotting.benchmark_metric(both, "rmse_average")
    ax = plotting.benchmark_metric(both, "rmse_average", mode="sams")
    assert len(points(ax)) == len(METHODS)


def test_without_chance_and_controls_there_are_no_lines_for_them(summary):
    few = summary[summary["method"].isin(["good", "failing"])].assign(chance=np.nan)
    ax = plotting.benchmark_specificity(few)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "good",
        "failing (1 failed)",
    ]
    ax = plotting.benchmark_metric(few, "rmse_average", mode="perturbench")
    assert not ax.patches
    assert not [text for text in ax.texts if text.get_text() == "chance"]


def test_two_methods_without_a_common_perturbation(scores):
    apart = scores[
        ~((scores["method"] == "good") & scores["perturbation"].isin(["A", "B"]))
        & ~((scores["method"] == "failing") & (scores["perturbation"] == "C"))
    ]
    ax = plotting.benchmark_perturbations(apart, "good", reference="failing", mode=None)
    assert ax.get_title().startswith("good: better in 0 of 0")
    assert len(ax.collections[-1].get_offsets()) == 0
