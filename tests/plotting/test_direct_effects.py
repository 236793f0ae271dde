"""The heatmap of direct effects: which are chosen, how they are ordered, and what is marked."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from scvi_sams import pl
from scvi_sams.exceptions import InvalidArgumentError, SAMSError
from scvi_sams.model._direct_effects import DirectEffectTables

ROWS, GENES = ["A", "B", "C", "D"], ["a", "b", "c", "d", "e"]
MEAN = [
    [-3.0, 0.0, 0.0, 0.5, 9.0],  # e: large, but nobody knows its sign
    [0.0, -2.0, 0.1, 0.4, 0.0],
    [0.0, 0.2, 0.0, 0.0, 0.0],
    [1.0, 0.0, -2.5, 0.0, 0.0],
]
LFSR = [
    [0.0, 1.0, 1.0, 0.01, 0.6],
    [1.0, 0.0, 0.3, 0.02, 1.0],
    [1.0, 0.2, 1.0, 1.0, 1.0],
    [0.04, 1.0, 0.0, 1.0, 1.0],
]


@pytest.fixture
def effects():
    mean, lfsr = (pd.DataFrame(values, index=ROWS, columns=GENES) for values in (MEAN, LFSR))
    return DirectEffectTables(mean, mean.abs() / 2, lfsr)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def drawn(ax):
    """The picture as a table, and the entries that have a dot."""
    rows, genes = ([t.get_text() for t in axis.get_ticklabels()] for axis in (ax.yaxis, ax.xaxis))
    values = pd.DataFrame(np.asarray(ax.images[0].get_array()), index=rows, columns=genes)
    dots = {(rows[int(y)], genes[int(x)]) for x, y in ax.collections[0].get_offsets()}
    return values, dots


def test_perturbations_and_genes_are_those_with_sure_effects(effects):
    values, dots = drawn(pl.direct_effects(effects))
    assert sorted(values.index) == ["A", "B", "D"]
    assert sorted(values.columns) == ["a", "b", "c", "d"]
    expected = effects.mean.loc[values.index, values.columns]
    np.testing.assert_array_equal(values.to_numpy(), expected.to_numpy())
    assert dots == {("A", "a"), ("A", "d"), ("B", "b"), ("B", "d"), ("D", "a"), ("D", "c")}


def test_the_strongest_are_kept(effects):
    values, _ = drawn(pl.direct_effects(effects, n_perturbations=2, n_genes=3))
    assert sorted(values.index) == ["A", "D"]
    assert sorted(values.columns) == ["a", "c", "d"]
    values, _ = drawn(pl.direct_effects(effects, n_genes=2))
    assert sorted(values.columns) == ["a", "c"]


def test_genes_follow_the_perturbations_that_change_them_most(effects):
    values, _ = drawn(pl.direct_effects(effects))
    strongest = [values.index.get_loc(row) for row in values.abs().idxmax()]
    assert strongest == sorted(strongest)


def test_the_border_of_sure_is_asked_for(effects):
    _, dots = drawn(pl.direct_effects(effects, max_lfsr=0.02))
    assert dots == {("A", "a"), ("A", "d"), ("B", "b"), ("D", "c")}
    values, dots = drawn(pl.direct_effects(effects, max_lfsr=0.25))
    assert ("C", "b") in dots
    assert values.loc["C", "b"] == 0.2


def test_colours_are_centred_on_zero(effects):
    image = pl.direct_effects(effects).images[0]
    assert image.get_clim() == (-3, 3)


def test_nothing_to_see_is_an_error(effects):
    unsure = effects._replace(lfsr=effects.lfsr * 0 + 0.5)
    with pytest.raises(SAMSError, match=r"below 0\.05"):
        pl.direct_effects(unsure)
    with pytest.raises(InvalidArgumentError, match=r"get_direct_effects\(\).*DataFrame"):
        pl.direct_effects(effects.mean)
