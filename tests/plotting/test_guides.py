"""Dots and intervals of guides: which, in which order, and how flags are shown."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba

from scvi_sams import pl
from scvi_sams.exceptions import InvalidArgumentError, MissingKeyError, SAMSError

RATES = {"A1": 0.9, "A2": 0.8, "B1": 0.1, "B2": 0.7, "C1": np.nan, "C2": np.nan, "D1": 0.3}


@pytest.fixture
def table():
    rate = pd.Series(RATES)
    return pd.DataFrame(
        {
            "perturbation": [name[0] for name in RATES],
            "acts": rate.notna(),
            "response_rate": rate,
            "rate_low": rate - 0.05,
            "rate_high": rate + 0.1,
            "effect_size": rate * 2,
            "effect_low": rate * 2 - 0.3,
            "effect_high": rate * 2 + 0.3,
            "does_nothing": [name == "B1" for name in RATES],
            "differs_from_siblings": [name == "D1" for name in RATES],
        }
    )


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def drawn(ax):
    """Of each guide the value, the interval, the marker, and whether it is hollow."""
    labels = [label.get_text() for label in ax.get_yticklabels()]
    names = dict(zip(ax.get_yticks(), labels, strict=True))
    guides = {}
    lines = [line for line in ax.lines if len(set(line.get_ydata())) == 1]
    for bar, dot in zip(lines[::2], lines[1::2], strict=True):
        hollow = to_rgba(dot.get_markerfacecolor()) == (1, 1, 1, 1)
        value, interval = float(dot.get_xdata()[0]), tuple(np.round(bar.get_xdata(), 6))
        guides[names[dot.get_ydata()[0]]] = (value, interval, dot.get_marker(), hollow)
    return guides


def test_guides_are_dots_and_intervals(table):
    ax = pl.guide_efficacy(table)
    assert drawn(ax) == {
        "A1": (0.9, (0.85, 1.0), "o", False),
        "A2": (0.8, (0.75, 0.9), "o", False),
        "B1": (0.1, (0.05, 0.2), "o", True),
        "B2": (0.7, (0.65, 0.8), "o", False),
        "D1": (0.3, (0.25, 0.4), "D", False),
    }
    assert ax.get_title(loc="left") == "1 without a clear effect are not shown"
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["does nothing", "differs from siblings"]
    assert {"A", "B", "D"} == {text.get_text() for text in ax.texts}


def test_effects_are_drawn_where_there_are_no_rates(table):
    rates = ["response_rate", "rate_low", "rate_high"]
    for ax in (
        pl.guide_efficacy(table, value="effect_size"),
        pl.guide_efficacy(table.assign(**dict.fromkeys(rates, np.nan))),
    ):
        assert drawn(ax)["B2"][:2] == (1.4, (1.1, 1.7))
        assert "effect" in ax.get_xlabel()


def test_named_perturbations_are_drawn_in_their_order_and_unknown_ones_are_grey(table):
    ax = pl.guide_efficacy(table, perturbations=["C", "A"])
    labels = ax.get_yticklabels()
    assert [label.get_text() for label in labels] == ["C1", "C2", "A1", "A2"]
    assert [label.get_color() for label in labels] == ["0.6", "0.6", "black", "black"]
    assert ax.get_title(loc="left") == ""
    assert ax.get_legend() is None
    assert ax.yaxis_inverted()


def test_of_many_those_with_flags_come_first(table):
    more = table.loc[["A1", "A2"]].assign(perturbation="E", response_rate=[0.2, 0.9])
    many = pd.concat([table, more.set_axis(["E1", "E2"])])
    two, three = (pl.guide_efficacy(many, n_perturbations=n) for n in (2, 3))
    assert list(drawn(two)) == ["B1", "B2", "D1"]
    assert list(drawn(three)) == ["B1", "B2", "D1", "E1", "E2"]
    assert two.get_title(loc="left").startswith("2 of 4 perturbations; 1 without")


def test_what_cannot_be_drawn_is_an_error(table):
    with pytest.raises(MissingKeyError, match="'Q'"):
        pl.guide_efficacy(table, perturbations=["Q"])
    with pytest.raises(MissingKeyError, match="'rate_low'"):
        pl.guide_efficacy(table.drop(columns="rate_low"))
    with pytest.raises(InvalidArgumentError, match=r"`guides`.*dict"):
        pl.guide_efficacy({})
    with pytest.raises(InvalidArgumentError, match="`perturbations` is empty"):
        pl.guide_efficacy(table, perturbations=[])
    with pytest.raises(InvalidArgumentError, match="`value`"):
        pl.guide_efficacy(table, value="agreement")
    with pytest.raises(SAMSError, match="responses=False"):
        pl.guide_efficacy(table.assign(response_rate=np.nan), value="response_rate")
