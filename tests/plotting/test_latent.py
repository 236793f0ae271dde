"""The UMAPs show every cell in the colour of its label and leave the data alone."""

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from matplotlib.colors import to_rgba

from scvi_sams import plotting
from scvi_sams.exceptions import MissingKeyError, SAMSError

GREY = to_rgba("#DDDDDD")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def make_cells(n_labels: int) -> ad.AnnData:
    """Label i has 3 + i cells, spread around a point of its own in the perturbed space."""
    rng = np.random.default_rng(0)
    label_of_cell = rng.permutation(np.repeat(np.arange(n_labels), 3 + np.arange(n_labels)))
    basal = rng.normal(size=(len(label_of_cell), 4))
    centres = 30 * rng.normal(size=(n_labels, 4))
    return ad.AnnData(
        obs=pd.DataFrame(
            {"perturbation": pd.Categorical([f"P{label}" for label in label_of_cell])},
            index=[f"cell{i}" for i in range(len(label_of_cell))],
        ),
        obsm={"X_sams": basal, "X_sams_perturbed": basal + centres[label_of_cell]},
    )


def colors_by_label(ax) -> dict[str, tuple]:
    handles = ax.get_legend().legend_handles
    texts = ax.get_legend().get_texts()
    return {
        text.get_text(): tuple(handle.get_facecolor()[0])
        for handle, text in zip(handles, texts, strict=True)
    }


def drawn_colors(ax) -> tuple[int, dict[tuple, int]]:
    """Return the number of grey cells and the number of cells of each colour."""
    colors, counts = np.unique(ax.collections[0].get_facecolors(), axis=0, return_counts=True)
    drawn = dict(zip(map(tuple, colors), counts, strict=True))
    return drawn.pop(GREY, 0), drawn


def test_panels_are_titled_and_have_no_ticks():
    panels = plotting.latent(make_cells(4))
    assert [ax.get_title() for ax in panels] == ["basal state", "with perturbation effects"]
    for ax in panels:
        assert len(ax.get_xticks()) == len(ax.get_yticks()) == 0
        assert ax.get_xlabel() == "UMAP 1"
    assert panels[0].get_legend() is None
    assert panels[1].get_legend().get_title().get_text() == "perturbation"


def test_few_labels_are_all_colored():
    cells = make_cells(4)
    panels = plotting.latent(cells)
    colors = colors_by_label(panels[-1])
    assert list(colors) == ["P3", "P2", "P1", "P0"]
    assert len(set(colors.values())) == 4
    expected = {colors[f"P{i}"]: 3 + i for i in range(4)}
    for ax in panels:
        assert drawn_colors(ax) == (0, expected)


def test_only_the_largest_groups_are_colored():
    panels = plotting.latent(make_cells(12))
    colors = colors_by_label(panels[-1])
    assert list(colors) == [f"P{i}" for i in range(11, 2, -1)] + ["3 others"]
    assert colors.pop("3 others") == GREY
    assert len(set(colors.values())) == 9
    assert GREY not in colors.values()
    n_grey, drawn = drawn_colors(panels[0])
    assert n_grey == 3 + 4 + 5
    assert drawn == {color: 3 + int(label[1:]) for label, color in colors.items()}


def test_chosen_labels_are_highlighted():
    panels = plotting.latent(make_cells(5), highlight=["P0", "P4"])
    colors = colors_by_label(panels[-1])
    assert list(colors) == ["P0", "P4", "3 others"]
    n_grey, drawn = drawn_colors(panels[1])
    assert n_grey == 4 + 5 + 6
    assert drawn == {colors["P0"]: 3, colors["P4"]: 7}


def test_cells_of_separate_groups_are_drawn_apart_in_their_colors():
    ax = plotting.latent(make_cells(6), basis=["X_sams_perturbed"], highlight=["P4", "P5"])[0]
    cells = ax.collections[0]
    for color in (colors_by_label(ax)["P4"], colors_by_label(ax)["P5"]):
        own = (cells.get_facecolors() == color).all(axis=1)
        group, others = cells.get_offsets()[own], cells.get_offsets()[~own]
        centre = group.mean(axis=0)
        farthest = np.linalg.norm(group - centre, axis=1).max()
        assert farthest < np.linalg.norm(others - centre, axis=1).min()


def test_the_same_data_gives_the_same_picture():
    cells = make_cells(4)
    first, second = (plotting.latent(cells, basis=["X_sams"])[0] for _ in range(2))
    np.testing.assert_array_equal(
        first.collections[0].get_offsets(), second.collections[0].get_offsets()
    )


def test_other_representations_and_colors():
    cells = make_cells(4)
    cells.obs["batch"] = np.arange(cells.n_obs) % 2
    cells.obsm["X_pca"] = cells.obsm["X_sams"]
    (ax,) = plotting.latent(cells, basis=["X_pca"], color="batch")
    assert ax.get_title() == "X_pca"
    assert set(colors_by_label(ax)) == {"0", "1"}


def test_one_axes_per_representation():
    _, axes = plt.subplots(1, 2)
    assert list(plotting.latent(make_cells(4), axes=axes)) == list(axes)
    with pytest.raises(SAMSError, match="2 representations"):
        plotting.latent(make_cells(4), axes=[axes[0]])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"basis": ["X_scvi"]}, MissingKeyError, "'X_scvi'"),
        ({"color": "guide"}, MissingKeyError, "'guide'"),
        ({"highlight": ["P0", "Z"]}, SAMSError, "'Z'"),
        ({"highlight": [f"P{i}" for i in range(10)]}, SAMSError, "at most 9"),
    ],
)
def test_errors_name_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        plotting.latent(make_cells(12), **arguments)


def test_neighbors_of_many_cells():
    """From 8,192 cells on scanpy searches approximately, with another library underneath."""
    cells = ad.AnnData(np.random.default_rng(0).normal(size=(8_200, 3)).astype(np.float32))
    sc.pp.neighbors(cells, use_rep="X", n_neighbors=5)
    assert cells.obsp["connectivities"].shape == (8_200, 8_200)
    assert np.diff(cells.obsp["distances"].indptr).min() >= 4
