"""The reliability diagram shows the bins it was given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from scvi_sams import evaluation, plotting


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def calibration_of(probabilities, truth):
    """One latent dimension: there is nothing to match."""
    return evaluation.mask_calibration(np.array(probabilities)[:, None], np.array(truth)[:, None])


def test_points_are_the_bins_that_are_not_empty():
    """.05 twice (one true), .95 four times (three true): errors .45 and .2, weights 2 and 4."""
    calibration = calibration_of([0.05, 0.05, 0.95, 0.95, 0.95, 0.95], [0, 1, 1, 1, 1, 0])
    ax = plotting.mask_calibration(calibration)
    (points,) = ax.collections
    np.testing.assert_allclose(points.get_offsets(), [[0.05, 0.5], [0.95, 0.75]])
    few, many = points.get_sizes()
    assert many / few == pytest.approx(np.log(5) / np.log(3))
    (label,) = [text.get_text() for text in ax.get_legend().get_texts()]
    assert label == "calibration error 0.283"


def test_several_runs_are_told_apart():
    runs = {
        "right": calibration_of([0.0, 1.0], [0, 1]),
        "wrong": calibration_of([0.2, 1.0], [1, 1]),
    }
    ax = plotting.mask_calibration(runs)
    first, second = ax.collections
    np.testing.assert_allclose(first.get_offsets(), [[0, 0], [1, 1]])
    np.testing.assert_allclose(second.get_offsets(), [[0.2, 1], [1, 1]])
    assert first.get_facecolor().tolist() != second.get_facecolor().tolist()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["right: calibration error 0.000", "wrong: calibration error 0.400"]


def test_the_diagonal_is_what_probabilities_promise():
    ax = plotting.mask_calibration(calibration_of([0.0, 1.0], [0, 1]))
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[0, 0], [1, 1]])
