"""Matrices of perturbations x perturbations: every value in its place, legible names."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from scvi_sams import pl
from scvi_sams.exceptions import MissingKeyError, SAMSError
from scvi_sams.interpretation import perturbation_similarity


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def effects(n: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 20))[np.arange(n) % 5]
    return pd.DataFrame(
        centres + 0.3 * rng.normal(size=centres.shape), index=[f"GENE{i}" for i in range(n)]
    )


def shown(ax) -> np.ndarray:
    return np.ma.filled(ax.images[0].get_array().astype(float), np.nan)


def assert_legible(ax):
    ax.figure.draw_without_rendering()
    for labels in (ax.get_yticklabels(), ax.get_xticklabels()):
        boxes = [label.get_window_extent() for label in labels]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize("n", [2, 10, 700])
def test_every_similarity_is_shown_and_names_are_legible(n: int):
    table = perturbation_similarity(effects(n), order=False)
    ax = pl.similarity(table)
    values = shown(ax)
    assert values.shape == (n, n)
    np.testing.assert_allclose(np.sort(values, axis=None), np.sort(table, axis=None))
    np.testing.assert_allclose(values, values.T)
    np.testing.assert_allclose(np.diag(values), 1)
    assert_legible(ax)


def test_similar_perturbations_are_neighbours():
    ax = pl.similarity(perturbation_similarity(effects(20), order=False))
    groups = [int(label.get_text().removeprefix("GENE")) % 5 for label in ax.get_yticklabels()]
    assert sum(a != b for a, b in itertools.pairwise(groups)) == 4
    plain = pl.similarity(perturbation_similarity(effects(20), order=False), order=False)
    assert plain.get_yticklabels()[1].get_text() == "GENE1"


def test_colours_are_centred_only_where_there_are_signs():
    signed = pl.similarity(perturbation_similarity(effects(10)))
    assert signed.images[0].get_clim() == (-1, 1)
    unsigned = pl.similarity(perturbation_similarity(effects(10)).abs())
    assert unsigned.images[0].get_clim() == (0, 1)


def test_rows_and_columns_must_be_the_same():
    with pytest.raises(SAMSError, match="differ"):
        pl.similarity(perturbation_similarity(effects(4)).iloc[:, ::-1])


PAIRS = pd.DataFrame(
    {"score": [1.0, -2.0, 7.0], "other": [5.0, 6.0, 7.0]}, index=["B+A", "B+C", "A+B+C"]
)


def test_interactions_stand_at_their_pair_and_the_rest_is_unknown():
    ax = pl.interaction_matrix(PAIRS, order=False)
    np.testing.assert_array_equal(
        shown(ax), [[np.nan, 1, np.nan], [1, np.nan, -2], [np.nan, -2, np.nan]]
    )
    assert [label.get_text() for label in ax.get_yticklabels()] == ["A", "B", "C"]
    assert ax.images[0].get_clim() == (-2, 2)


def test_another_column_stands_below_the_diagonal():
    ax = pl.interaction_matrix(PAIRS, lower="other", order=False)
    np.testing.assert_array_equal(
        shown(ax), [[np.nan, 1, np.nan], [5, np.nan, -2], [np.nan, 6, np.nan]]
    )


def test_a_column_of_combinations_is_as_good_as_an_index():
    table = PAIRS.rename_axis("combination").reset_index()
    np.testing.assert_array_equal(
        shown(pl.interaction_matrix(table)), shown(pl.interaction_matrix(PAIRS))
    )


@pytest.mark.parametrize("n", [10, 700])
def test_many_interactions_are_legible_and_alike_ones_neighbours(n: int):
    group = np.arange(n) % 2
    first, second = np.triu_indices(n, 1)
    same = group[first] == group[second]
    table = pd.DataFrame(
        {
            "combination": [f"GENE{a}+GENE{b}" for a, b in zip(first, second, strict=True)],
            "score": np.where(same, 1.0, -1.0),
        }
    )
    ax = pl.interaction_matrix(table)
    values = shown(ax)
    np.fill_diagonal(values, 1)
    changes = (np.diff(values, axis=0) != 0).any(axis=1).sum()
    assert changes == 1  # two blocks
    assert_legible(ax)


def test_one_extreme_pair_does_not_make_the_others_pale():
    rng = np.random.default_rng(0)
    first, second = np.triu_indices(40, 1)
    table = pd.DataFrame(
        {"score": rng.uniform(-1, 1, size=len(first))},
        index=[f"G{a}+G{b}" for a, b in zip(first, second, strict=True)],
    )
    table.iloc[0] = 100.0
    assert pl.interaction_matrix(table).images[0].get_clim()[1] <= 1


def test_wrong_tables_are_refused():
    with pytest.raises(MissingKeyError, match="'predicted'"):
        pl.interaction_matrix(PAIRS, "predicted")
    with pytest.raises(SAMSError, match="no pair"):
        pl.interaction_matrix(PAIRS.iloc[2:])
