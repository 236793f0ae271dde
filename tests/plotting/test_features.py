"""The heatmap of features: which are chosen, how they are ordered, and what is marked."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from scvi_sams import pl
from scvi_sams.exceptions import InvalidArgumentError, MissingKeyError, SAMSError

ROWS = [  # feature, latent, part, weight, lfsr
    ("a", "latent_2", "effect", 0.5, 0.0005),
    ("a", "latent_10", "effect", -0.4, 0.002),
    ("b", "latent_2", "effect", 9.0, 0.4),  # large, but nobody knows its sign
    ("b", "latent_10", "effect", -1.5, 0.0),
    ("c", "latent_2", "effect", 0.3, 0.3),
    ("c", "latent_10", "effect", 0.2, 0.3),
    ("a", "latent_2", "mask", 0.1, 0.5),
    ("c", "latent_10", "mask", 2.0, 0.0),
]


@pytest.fixture
def importance():
    return pd.DataFrame(ROWS, columns=["feature", "latent", "part", "weight", "lfsr"])


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def drawn(ax):
    """The picture as a table, and the entries that have a dot."""
    rows, columns = ([t.get_text() for t in axis.get_ticklabels()] for axis in (ax.yaxis, ax.xaxis))
    values = pd.DataFrame(np.asarray(ax.images[0].get_array()), index=rows, columns=columns)
    dots = {(rows[int(y)], columns[int(x)]) for x, y in ax.collections[0].get_offsets()}
    return values, dots


def test_features_are_those_with_sure_weights_the_strongest_first(importance):
    values, dots = drawn(pl.feature_importance(importance))
    assert values.index.tolist() == ["b", "a"]
    assert values.columns.tolist() == ["latent_2", "latent_10"]
    assert values.to_numpy().tolist() == [[9.0, -1.5], [0.5, -0.4]]
    assert dots == {("b", "latent_10"), ("a", "latent_2")}


def test_the_strongest_are_kept_and_their_dimensions(importance):
    values, _ = drawn(pl.feature_importance(importance, n_features=1))
    assert values.index.tolist() == ["b"]
    assert values.columns.tolist() == ["latent_10"]


def test_masks_have_units_of_their_own(importance):
    ax = pl.feature_importance(importance, part="mask")
    values, dots = drawn(ax)
    assert values.to_numpy().tolist() == [[2.0]]
    assert dots == {("c", "latent_10")}
    assert "log-odds" in ax.figure.axes[1].get_ylabel()


def test_the_table_is_not_changed(importance):
    before = importance.copy()
    pl.feature_importance(importance)
    pd.testing.assert_frame_equal(importance, before)


def test_where_nothing_is_sure_an_error_says_so(importance):
    with pytest.raises(SAMSError, match=r"No weight of masks has a .* rate below 0\.2"):
        pl.feature_importance(importance.iloc[:7], part="mask", max_lfsr=0.2)
    with pytest.raises(SAMSError, match="No weight of effects"):
        pl.feature_importance(importance.iloc[:0])


def test_what_is_no_such_table_is_an_error(importance):
    with pytest.raises(InvalidArgumentError, match=r"table of scvi_sams\.tl\.feature_importance"):
        pl.feature_importance([1])
    with pytest.raises(MissingKeyError, match="no column 'lfsr'"):
        pl.feature_importance(importance.drop(columns="lfsr"))
    with pytest.raises(InvalidArgumentError, match="`part` must be one of"):
        pl.feature_importance(importance, part="masks")
