"""Bars, volcanoes and curves: what is drawn is what is in the tables."""

import itertools

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from scipy import stats

from scvi_sams import pl
from scvi_sams.exceptions import MissingKeyError, SAMSError

UP, DOWN, REST = "#d55e00", "#0072b2", "#bbbbbb"


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def programs(n_genes: int = 200) -> pd.DataFrame:
    values = np.random.default_rng(0).normal(size=(n_genes, 2))
    values[:, 1] = 0
    return pd.DataFrame(
        values, index=[f"g{i}" for i in range(n_genes)], columns=["latent_0", "latent_1"]
    )


@pytest.mark.parametrize("n_genes", [3, 20, 60])
def test_bars_are_the_strongest_changes_increases_on_top(n_genes: int):
    table = programs()
    ax = pl.program_genes(table, "latent_0", n_genes=n_genes)
    lengths = np.array([bar.get_width() for bar in ax.patches])
    strongest = table["latent_0"].loc[table["latent_0"].abs().nlargest(n_genes).index]
    np.testing.assert_allclose(lengths, strongest.sort_values())
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == list(strongest.sort_values().index)
    colours = [to_hex(bar.get_facecolor()) for bar in ax.patches]
    assert colours == [UP if length > 0 else DOWN for length in lengths]


def test_names_of_bars_do_not_overlap():
    ax = pl.program_genes(programs(), "latent_0", n_genes=40)
    ax.figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_programs_that_cannot_be_drawn_are_refused():
    with pytest.raises(MissingKeyError, match="'latent_7'"):
        pl.program_genes(programs(), "latent_7")
    with pytest.raises(SAMSError, match="switched off"):
        pl.program_genes(programs(), "latent_1")


def ate(n_draws: int | None = None, n_genes: int = 300) -> ad.AnnData:
    rng = np.random.default_rng(0)
    effects = rng.normal(scale=0.5, size=(2, n_genes)) * (rng.random((2, n_genes)) < 0.3)
    description = {} if n_draws is None else {"n_posterior_samples": n_draws}
    return ad.AnnData(
        effects,
        obs=pd.DataFrame(index=["A", "B"]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]),
        # Of a prediction the error is that of a mean of draws.
        layers={
            "standard_error": rng.uniform(0.02, 0.3, size=effects.shape) / (n_draws or 1) ** 0.5
        },
        uns={"ate": {"units": "log2", **description}},
    )


def drawn_points(ax) -> pd.DataFrame:
    points = ax.collections[0]
    table = pd.DataFrame(np.asarray(points.get_offsets()), columns=["x", "y"])
    return table.assign(colour=[to_hex(c) for c in points.get_facecolors()]).sort_values("x")


@pytest.mark.parametrize("n_draws", [None, 100])
def test_a_volcano_shows_effects_and_how_sure_they_are(n_draws):
    table = ate(n_draws)
    ax = pl.effect_volcano(table, "B", min_effect=0.2)
    found = drawn_points(ax)
    effect, error = table.X[1], table.layers["standard_error"][1]
    z = np.abs(effect) / error
    if n_draws is None:
        height = -np.log10(2 * stats.norm.sf(z))
        sure = stats.false_discovery_control(2 * stats.norm.sf(z)) < 0.05
    else:
        height = z / 10
        sure = height > 2
    sure &= np.abs(effect) >= 0.2
    order = np.lexsort((height, effect))
    found = found.iloc[np.lexsort((found["y"], found["x"]))]
    np.testing.assert_allclose(found["x"], effect[order])
    np.testing.assert_allclose(found["y"], height[order], atol=1e-9)
    colours = np.where(sure, np.where(effect > 0, UP, DOWN), REST)[order]
    assert list(found["colour"]) == list(colours)
    n_up, n_down = (sure & (effect > 0)).sum(), (sure & (effect < 0)).sum()
    assert ax.get_title() == f"B: {n_up} up, {n_down} down"
    assert n_up > 0


def test_a_volcano_names_the_strongest_genes():
    table = ate()
    ax = pl.effect_volcano(table, "A", label_top=4)
    named = {text.get_text() for text in ax.texts}
    strongest = table.var_names[np.argsort(-np.abs(table.X[0]))[:12]]
    assert named
    assert named <= set(strongest)


def test_an_effect_of_nothing_has_no_coloured_genes():
    table = ate(100)
    table.X[:] = table.layers["standard_error"][:] = 0
    ax = pl.effect_volcano(table, "A")
    assert set(drawn_points(ax)["colour"]) == {REST}
    assert ax.get_title() == "A: 0 up, 0 down"


def test_tables_without_the_row_or_errors_are_refused():
    table = ate()
    with pytest.raises(MissingKeyError, match="'C'"):
        pl.effect_volcano(table, "C")
    del table.layers["standard_error"]
    with pytest.raises(MissingKeyError, match="standard_error"):
        pl.effect_volcano(table, "A")


def curves(n_genes: int = 12) -> ad.AnnData:
    dose = np.array([2.0, 0.0, 1.0, 3.0, 1.0])
    slope = np.random.default_rng(0).normal(size=n_genes)
    effect = np.outer(dose, slope)
    return ad.AnnData(
        effect,
        obs=pd.DataFrame(
            {
                "perturbation": pd.Categorical(["A"] * 4 + ["B"]),
                "dosage": dose,
                "is_measured_range": dose <= 2,
            },
            index=[f"r{i}" for i in range(5)],
        ),
        var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]),
        layers={"interval_low": effect - 1, "interval_high": effect + 1},
        uns={"ate": {"units": "log2"}},
    )


def test_curves_run_over_ascending_doses_of_the_strongest_genes():
    table = curves()
    ax = pl.dose_response(table, "A", n_genes=3)
    lines = [line for line in ax.lines if len(line.get_xdata()) == 4]
    strongest = np.argsort(-np.abs(table.X[3]))[:3]
    assert len(lines) == 3
    for line, gene in zip(lines, strongest, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), [0, 1, 2, 3])
        np.testing.assert_allclose(line.get_ydata(), table.X[[1, 2, 0, 3], gene])
    assert {text.get_text() for text in ax.texts} >= set(table.var_names[strongest])


def test_doses_beyond_those_measured_are_shaded_from_the_last_one():
    table = curves()
    shaded = pl.dose_response(table, "A").patches
    assert [patch.get_x() for patch in shaded] == [2.0]
    table.obs["is_measured_range"] = True
    assert not pl.dose_response(table, "A").patches


@pytest.mark.parametrize("n_genes", [2, 12])
def test_names_at_the_ends_of_curves_do_not_overlap(n_genes: int):
    table = curves()
    table.X[:] *= 1e-3  # all curves end at nearly the same place
    ax = pl.dose_response(table, "A", n_genes=n_genes)
    ax.figure.draw_without_rendering()
    names = [text for text in ax.texts if text.get_text().startswith("g")]
    boxes = [name.get_window_extent() for name in names]
    assert len(boxes) == n_genes
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_genes_can_be_chosen_and_unknown_ones_are_refused():
    table = curves()
    ax = pl.dose_response(table, "A", ["g3"])
    assert {text.get_text() for text in ax.texts} >= {"g3"}
    with pytest.raises(MissingKeyError, match="'g99'"):
        pl.dose_response(table, "A", ["g99"])
    with pytest.raises(MissingKeyError, match="'C'"):
        pl.dose_response(table, "C")
