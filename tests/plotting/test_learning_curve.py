"""Lines of a learning curve: where points stand, and what is said of cells."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from scvi_sams import plotting
from scvi_sams.exceptions import SAMSError

VALUES = {
    ("control mean", 10): [0.0, 0.0],
    ("control mean", None): [0.0, 0.0],
    ("A", 10): [0.3, 0.5],
    ("A", None): [0.8, 0.9],
}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def curve():
    rows = [
        {
            "method": method,
            "cells_per_perturbation": number,
            # More train of one seed than of the other, where all do.
            "n_cells": 10.0 if number else 39.0 + 2 * seed,
            "seed": seed,
            "pearson": value,
            "rmse": 1 - value,
        }
        for (method, number), values in VALUES.items()
        for seed, value in enumerate(values)
    ]
    return pd.DataFrame(rows[::-1]).astype({"cells_per_perturbation": "Int64"})


def test_lines_go_through_the_means_and_bands_from_lowest_to_highest(curve):
    ax = plotting.learning_curve(curve)
    lines = {line.get_label(): line for line in ax.lines}
    assert set(lines) == {"control mean", "A"}
    np.testing.assert_allclose(lines["A"].get_xdata(), [10, 40])
    np.testing.assert_allclose(lines["A"].get_ydata(), [0.4, 0.85])
    np.testing.assert_allclose(lines["control mean"].get_ydata(), 0)
    band = ax.collections[[line.get_label() for line in ax.lines].index("A")]
    corners = {tuple(np.round(corner, 9)) for corner in band.get_paths()[0].vertices}
    assert corners == {(10, 0.3), (10, 0.5), (40, 0.8), (40, 0.9)}
    assert lines["A"].get_color() != lines["control mean"].get_color()


def test_cells_are_on_a_logarithmic_axis_and_named(curve):
    ax = plotting.learning_curve(curve, "rmse")
    assert ax.get_xscale() == "log"
    assert [text.get_text() for text in ax.get_xticklabels()] == ["10", "all\n(40)"]
    assert "RMSE" in ax.get_ylabel()
    assert "lower is better" in ax.get_ylabel()


def test_a_missing_value_is_a_gap(curve):
    failed = (curve["method"] == "A") & (curve["cells_per_perturbation"] == 10)
    curve.loc[failed & (curve["seed"] == 1), "pearson"] = np.nan
    line = next(x for x in plotting.learning_curve(curve).lines if x.get_label() == "A")
    np.testing.assert_allclose(line.get_ydata(), [np.nan, 0.85])


@pytest.mark.parametrize(
    ("change", "metric", "message"),
    [
        (lambda curve: curve, "mse", "`metric` must be one of"),
        (lambda curve: curve, "rank", "no column 'rank'"),
        (lambda curve: curve.drop(columns="n_cells"), "rmse", "no column 'n_cells'"),
        (lambda curve: curve.iloc[:0], "rmse", "no rows"),
    ],
)
def test_what_cannot_be_drawn_is_said(curve, change, metric, message):
    with pytest.raises(SAMSError, match=message):
        plotting.learning_curve(change(curve), metric)
