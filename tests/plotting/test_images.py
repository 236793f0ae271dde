"""Every figure against a stored image: what it looks like, beyond the numbers in it."""

import shutil

import matplotlib as mpl
import pytest
from matplotlib.testing.compare import compare_images

from plotting.drawings import BASELINE, DRAWINGS, MATPLOTLIB, draw
from scvi_sams import plotting
from scvi_sams.plotting import _benchmark

# Root mean square over values from 0 to 255. Two environments with the same matplotlib gave 0, one
# wrong letter in a note gave 0.34, a marker 10 % wider 0.8.
TOLERANCE = 0.2

with_the_same_letters = pytest.mark.skipif(
    not mpl.__version__.startswith(f"{MATPLOTLIB}."),
    reason=f"the images are of matplotlib {MATPLOTLIB}, and other versions set letters elsewhere",
)


def difference(name, folder):
    # Copied, because a picture of the difference is written beside the expected one.
    expected = shutil.copy(BASELINE / f"{name}.png", folder / f"{name}-expected.png")
    actual = folder / f"{name}.png"
    draw(name, actual)
    return compare_images(expected, actual, tol=TOLERANCE)


def test_every_function_has_an_image():
    assert set(plotting.__all__) <= set(DRAWINGS)
    assert {path.stem for path in BASELINE.glob("*.png")} == set(DRAWINGS)


@with_the_same_letters
@pytest.mark.parametrize("name", DRAWINGS)
def test_a_figure_looks_as_it_did(name, tmp_path):
    assert difference(name, tmp_path) is None


@with_the_same_letters
def test_a_changed_figure_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(_benchmark, "_METHOD_COLOUR", "#007292")
    assert "RMS" in difference("benchmark_metric", tmp_path)
