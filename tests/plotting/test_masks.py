"""The heatmap shows the numbers it was given, in an order that makes blocks visible."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from scvi_sams import plotting
from scvi_sams.exceptions import MissingKeyError
from scvi_sams.interpretation._row_order import order_of_rows


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def masks() -> pd.DataFrame:
    # Two modules, interleaved: rows A and C share columns, so do B and D.
    return pd.DataFrame(
        [[0.0, 0.9, 0.1], [0.8, 0.0, 0.0], [0.0, 1.0, 0.0], [0.7, 0.0, 0.1]],
        index=list("ABCD"),
        columns=["z0", "z1", "z2"],
    )


def shown(ax) -> pd.DataFrame:
    """Read the heatmap back: its array under its tick labels."""
    return pd.DataFrame(
        ax.images[0].get_array(),
        index=[label.get_text() for label in ax.get_yticklabels()],
        columns=[label.get_text() for label in ax.get_xticklabels()],
    )


def test_heatmap_is_the_reordered_input(masks):
    table = shown(plotting.masks(masks))
    pd.testing.assert_frame_equal(table.loc[masks.index, masks.columns], masks)
    # Column sums are 1.5, 1.9 and 0.2.
    assert table.columns.tolist() == ["z1", "z0", "z2"]
    neighbours = {frozenset(table.index[:2]), frozenset(table.index[2:])}
    assert neighbours == {frozenset("AC"), frozenset("BD")}


def test_order_can_be_kept(masks):
    pd.testing.assert_frame_equal(shown(plotting.masks(masks, order=False)), masks)


def test_order_does_not_depend_on_the_order_of_latent_dimensions(masks):
    table = shown(plotting.masks(masks))
    permuted = shown(plotting.masks(masks[["z2", "z0", "z1"]]))
    pd.testing.assert_frame_equal(permuted, table)


def test_probabilities_share_one_scale(masks):
    ax = plotting.masks(masks / 10)
    assert ax.images[0].get_clim() == (0, 1)
    assert ax.images[0].colorbar.ax.get_ylabel() == "inclusion probability"


def test_effects_are_aligned_and_centred_on_zero(masks):
    effects = pd.DataFrame(
        np.arange(12).reshape(4, 3) - 6.0, index=list("DCBA"), columns=["z2", "z1", "z0"]
    )
    ax = plotting.masks(masks, effects=effects, order=False)
    # Row A of the effects is (3, 4, 5) for z2, z1, z0.
    np.testing.assert_allclose(ax.images[0].get_array()[0], [5, 4, 3])
    expected = effects.loc[masks.index, masks.columns]
    np.testing.assert_allclose(ax.images[0].get_array(), expected)
    extreme = expected.abs().to_numpy().max()
    assert ax.images[0].get_clim() == pytest.approx((-extreme, extreme))
    assert "effect" in ax.images[0].colorbar.ax.get_ylabel()


def test_entries_that_were_not_called_are_blank(masks):
    called = masks > 0.75
    effects = 2 * masks - 3
    ax = plotting.masks(called, effects=effects, order=False)
    shown = ax.images[0].get_array()
    expected = effects.where(called, 0).to_numpy()
    np.testing.assert_allclose(shown, expected)


def test_threshold_blanks_by_probability_not_by_effect(masks):
    effects = masks * 0 + 5
    ax = plotting.masks(masks, effects=effects, threshold=0.75, order=False)
    expected = [[0, 5, 0], [5, 0, 0], [0, 5, 0], [0, 0, 0]]
    np.testing.assert_allclose(ax.images[0].get_array(), expected)


def test_effects_of_other_perturbations_are_refused(masks):
    with pytest.raises(MissingKeyError, match="'D'"):
        plotting.masks(masks, effects=masks.loc[["A", "B", "C"]])


@pytest.mark.parametrize("n", [1, 2])
def test_few_perturbations_need_no_clustering(masks, n):
    table = shown(plotting.masks(masks.iloc[:n]))
    assert table.index.tolist() == list("AB")[:n]


def test_no_effect_at_all_is_drawn(masks):
    ax = plotting.masks(masks, effects=masks * 0)
    np.testing.assert_array_equal(ax.images[0].get_array(), 0)
    low, high = ax.images[0].get_clim()
    assert low == -high < 0


@pytest.mark.parametrize("n_perturbations", [10, 60, 300])
def test_tick_labels_name_their_rows_and_do_not_overlap(n_perturbations):
    rng = np.random.default_rng(0)
    masks = pd.DataFrame(
        rng.random((n_perturbations, 120)), index=[f"PERT{i}" for i in range(n_perturbations)]
    )
    ax = plotting.masks(masks, order=False)
    ax.figure.draw_without_rendering()
    for labels, names in [
        (ax.get_yticklabels(), masks.index),
        (ax.get_xticklabels(), masks.columns),
    ]:
        boxes = [label.get_window_extent() for label in labels]
        assert len(boxes) >= 5
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
        step = round(len(names) / len(labels))
        assert [label.get_text() for label in labels] == [str(name) for name in names[::step]]
    assert len(ax.get_yticklabels()) == n_perturbations or n_perturbations > 60


def test_the_title_says_how_many_entries_are_called_and_how_many_may_be_false(masks):
    called = masks > 0.5
    assert plotting.masks(called).get_title() == ""
    called.attrs["expected_false"] = 0.0234
    assert plotting.masks(called).get_title() == "4 entries called, 2.3% expected to be false"
    used = called[["z0", "z1"]]
    assert plotting.masks(used, effects=masks).get_title().startswith("4 entries called")
    assert plotting.masks(masks).get_title() == ""


def test_more_rows_than_can_be_ordered_optimally_are_ordered_by_groups():
    rows = np.random.default_rng(0).random((600, 5))
    many = pd.DataFrame(rows, index=[f"P{row}" for row in range(600)])
    image = plotting.masks(many).images[0].get_array()
    columns = np.argsort(-rows.sum(axis=0), kind="stable")
    np.testing.assert_allclose(image, rows[order_of_rows(rows)][:, columns])


def test_as_many_perturbations_as_dimensions_of_which_none_is_called():
    """A square of zeros is no table of distances."""
    nothing = pd.DataFrame(np.zeros((4, 4), dtype=bool), index=list("ABCD"), columns=list("wxyz"))
    table = shown(plotting.masks(nothing))
    assert sorted(table.index) == list("ABCD")
    assert (table == 0).all(axis=None)
