"""The scatter plot shows every entry, and its number is that of the metrics."""

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection, PolyCollection
from matplotlib.text import Annotation, Text

from scvi_sams import plotting
from scvi_sams.evaluation import compare_ate
from scvi_sams.exceptions import SAMSError


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def make_tables(n_perturbations: int, n_genes: int) -> tuple[ad.AnnData, ad.AnnData]:
    rng = np.random.default_rng(0)
    truth = rng.standard_t(3, size=(n_perturbations, n_genes))
    tables = [
        ad.AnnData(
            effect,
            obs=pd.DataFrame(index=[f"P{i}" for i in range(n_perturbations)]),
            var=pd.DataFrame(index=[f"GENE{i}" for i in range(n_genes)]),
            uns={"ate": {"method": "lognorm", "target_sum": 1e4, "units": "some units"}},
        )
        for effect in (0.7 * truth, truth + 0.3 * rng.normal(size=truth.shape))
    ]
    return tables[0], tables[1]


def names(ax) -> list[Annotation]:
    return [text for text in ax.texts if isinstance(text, Annotation)]


def test_points_are_observed_against_predicted():
    predicted, observed = make_tables(4, 10)
    ax = plotting.ate_scatter(predicted, observed)
    (points,) = [c for c in ax.collections if isinstance(c, PathCollection)]
    np.testing.assert_allclose(
        points.get_offsets(), np.column_stack([observed.X.ravel(), predicted.X.ravel()])
    )
    assert ax.get_xlim() == ax.get_ylim()
    assert ax.get_xlim()[1] > max(np.abs(observed.X).max(), np.abs(predicted.X).max())
    assert ax.get_title() == "some units"
    identity = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert [(line.get_xy1(), line.get_slope()) for line in identity] == [((0, 0), 1)]


def test_many_points_are_counted_in_hexagons():
    predicted, observed = make_tables(40, 100)
    ax = plotting.ate_scatter(predicted, observed)
    (hexagons,) = [c for c in ax.collections if isinstance(c, PolyCollection)]
    assert hexagons.get_array().sum() == 4000


@pytest.mark.parametrize(("n_perturbations", "n_genes"), [(4, 10), (40, 100)])
def test_annotated_correlation_is_that_of_the_table(n_perturbations, n_genes):
    predicted, observed = make_tables(n_perturbations, n_genes)
    ax = plotting.ate_scatter(predicted[::-1, ::-1].copy(), observed)
    pearson = compare_ate(predicted, observed).loc["all", "pearson"]
    lines = ax.texts[0].get_text().split("\n")
    assert lines == [
        f"Pearson {pearson:.3f}",
        f"{n_perturbations} perturbations",
        f"{n_genes} genes",
    ]


def test_failed_predictions_are_drawn_at_zero_and_counted():
    predicted, observed = make_tables(4, 10)
    predicted.X[1, 3] = np.nan
    ax = plotting.ate_scatter(predicted, observed)
    offsets = ax.collections[0].get_offsets()
    np.testing.assert_array_equal(offsets[10:20, 1], 0)
    np.testing.assert_allclose(offsets[10:20, 0], observed.X[1])
    pearson = compare_ate(predicted, observed).loc["all", "pearson"]
    assert f"Pearson {pearson:.3f}" in ax.texts[0].get_text()
    assert "1 not predicted" in ax.texts[0].get_text()


def test_strongest_observed_entries_are_named_at_their_points():
    predicted, observed = make_tables(4, 10)
    observed.X[2, 5], observed.X[0, 1], observed.X[3, 0] = 30, -20, 10
    predicted.X[1, 1] = 15
    labels = names(plotting.ate_scatter(predicted, observed, label_top=3))
    assert [label.get_text() for label in labels] == ["GENE5 (P2)", "GENE1 (P0)", "GENE0 (P3)"]
    for label, (row, column) in zip(labels, [(2, 5), (0, 1), (3, 0)], strict=True):
        assert tuple(label.xy) == (observed.X[row, column], predicted.X[row, column])


def test_a_single_perturbation_needs_gene_names_only():
    predicted, observed = make_tables(1, 30)
    labels = names(plotting.ate_scatter(predicted, observed, label_top=1))
    strongest = observed.var_names[np.abs(observed.X[0]).argmax()]
    assert [label.get_text() for label in labels] == [strongest]


@pytest.mark.parametrize(("n_perturbations", "n_genes"), [(3, 50), (40, 100)])
def test_names_do_not_overlap_and_stay_inside(n_perturbations, n_genes):
    predicted, observed = make_tables(n_perturbations, n_genes)
    ax = plotting.ate_scatter(predicted, observed, label_top=12)
    ax.figure.draw_without_rendering()
    assert len(names(ax)) >= 6
    # The extent of an annotation includes the line to its point; that of its text does not.
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    inside = ax.get_window_extent().padded(1)
    assert all(inside.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_nothing_is_named_if_not_asked_for():
    assert names(plotting.ate_scatter(*make_tables(3, 10), label_top=0)) == []


def test_tables_of_different_methods_are_refused():
    predicted, observed = make_tables(3, 10)
    predicted.uns["ate"] = predicted.uns["ate"] | {"method": "mean"}
    with pytest.raises(SAMSError, match="method"):
        plotting.ate_scatter(predicted, observed)
