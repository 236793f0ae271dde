"""Heatmap of perturbations in contexts: sizes, marks, the order of rows, groups, errors."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from plotting.drawings import pairs_in_contexts
from scvi_sams import pl
from scvi_sams.exceptions import InvalidArgumentError, MissingKeyError, SAMSError


@pytest.fixture
def table():
    return pairs_in_contexts()


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def rows_of(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def test_pairs_that_act_are_coloured_by_their_size(table):
    ax = pl.context_effects(table)
    shown = ax.images[0].get_array()
    names, contexts = rows_of(ax), [label.get_text() for label in ax.get_xticklabels()]
    assert contexts == ["K562", "RPE1", "T", "monocyte"]
    for _, pair in table[table["perturbation"].isin(names)].iterrows():
        place = names.index(pair["perturbation"]), contexts.index(pair["context"])
        if pair["is_measured"]:
            assert shown[place] == (pair["effect"] if pair["acts"] else 0)
        else:
            assert np.ma.getmaskarray(shown)[place]
    assert np.ma.getmaskarray(shown).sum() == 1


def test_rows_are_by_pattern_then_contexts_then_size(table):
    ax = pl.context_effects(table)
    largest = table[table["acts"]].groupby("perturbation")["effect"].max()
    # Of the shared ones P2 was not measured in the second context.
    shared = largest[["P0", "P7"]].sort_values(ascending=False).index.tolist()
    only = largest[["P1", "P6"]].sort_values(ascending=False).index.tolist()
    assert rows_of(ax) == [*shared, "P2", "P3", *only, "P5"]
    assert [text.get_text() for text in ax.texts] == ["shared", "differ", "in some only", "unclear"]
    assert [line.get_ydata()[0] for line in ax.lines] == [2.5, 3.5, 5.5]
    assert ax.get_title(loc="left") == "7 of 8 perturbations"


def test_dots_are_where_contexts_differ_and_hollow_where_nothing_is_left(table):
    ax = pl.context_effects(table)
    names = rows_of(ax)
    (dots,) = ax.collections
    marked = {tuple(place) for place in dots.get_offsets().astype(int).tolist()}
    assert marked == {(2, names.index("P3")), (3, names.index("P3"))} | {
        (0, names.index(name)) for name in ("P1", "P6")
    }
    hollow = [
        tuple(place)
        for place, face in zip(
            dots.get_offsets().astype(int).tolist(), dots.get_facecolors(), strict=True
        )
        if face[3] == 0
    ]
    assert hollow == [(3, names.index("P3"))]


def test_what_is_named_is_drawn_whatever_it_does(table):
    ax = pl.context_effects(table, perturbations=["P4", "P0"], order=False)
    assert rows_of(ax) == ["P4", "P0"]
    assert (ax.images[0].get_array()[0] == 0).all()
    assert not ax.texts
    assert rows_of(pl.context_effects(table, perturbations=["P4", "P0"])) == ["P0", "P4"]
    assert rows_of(pl.context_effects(table, order=False)) == [
        f"P{n}" for n in (*range(4), 5, 6, 7)
    ]


def test_errors_say_what_to_do(table):
    with pytest.raises(MissingKeyError, match="'Q'"):
        pl.context_effects(table, perturbations=["Q"])
    with pytest.raises(InvalidArgumentError, match="`perturbations` is empty"):
        pl.context_effects(table, perturbations=[])
    with pytest.raises(MissingKeyError, match="'acts'"):
        pl.context_effects(table.drop(columns="acts"))
    with pytest.raises(InvalidArgumentError, match="not dict"):
        pl.context_effects({})
    with pytest.raises(SAMSError, match="larger `fdr`"):
        pl.context_effects(table.assign(acts=False, differs=False, pattern="none"))
