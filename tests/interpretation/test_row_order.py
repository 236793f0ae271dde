"""Orders of rows in which similar ones are neighbours: few rows, many, and in every call alike."""

import numpy as np
import pandas as pd
import pytest
from scipy.cluster.hierarchy import leaves_list, linkage

from scvi_sams import tl
from scvi_sams.interpretation._row_order import order_of_rows


def blocks(n_rows, n_blocks=12, noise=0.05, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.eye(n_blocks) * 3
    block = rng.integers(n_blocks, size=n_rows)
    return block, centres[block] + noise * rng.normal(size=(n_rows, n_blocks))


def step(rows, order):
    """Mean distance of neighbours."""
    return np.linalg.norm(np.diff(rows[order], axis=0), axis=1).mean()


@pytest.mark.parametrize("n_rows", [40, 1200], ids=["linkage", "groups"])
@pytest.mark.parametrize("kind", ["rows", "similarity"])
def test_blocks_are_kept_together(n_rows, kind):
    block, rows = blocks(n_rows)
    if kind == "rows":
        order = order_of_rows(rows)
    else:
        order = tl.hierarchical_order(
            tl.perturbation_similarity(
                pd.DataFrame(rows, index=[str(row) for row in range(n_rows)]), order=False
            ).to_numpy()
        )
    assert sorted(order) == list(range(n_rows))
    assert (np.diff(block[order]) != 0).sum() == len(set(block)) - 1


def test_many_rows_are_nearly_as_well_ordered_as_by_linkage():
    rng = np.random.default_rng(1)
    rows = (rng.random((30, 20)) < 0.2)[rng.integers(30, size=700)] * rng.normal(
        1, 0.2, size=(700, 20)
    )
    by_linkage = leaves_list(linkage(rows, method="average", optimal_ordering=True))
    found = step(rows, order_of_rows(rows))
    assert found < 1.3 * step(rows, by_linkage)
    assert found < 0.5 * step(rows, np.arange(700))


def test_the_order_of_many_rows_is_the_same_in_every_call():
    _, rows = blocks(600, noise=1.0)
    np.random.seed(1)  # noqa: NPY002 - which must play no part
    first = order_of_rows(rows)
    np.random.seed(2)  # noqa: NPY002
    np.testing.assert_array_equal(order_of_rows(rows), first)


@pytest.mark.filterwarnings("error")
def test_rows_that_are_all_alike_and_rows_of_zeros():
    rows = np.zeros((700, 5))
    assert sorted(order_of_rows(rows)) == list(range(700))
    assert sorted(tl.hierarchical_order(rows @ rows.T)) == list(range(700))
    rows[::2, 1] = 1
    order = order_of_rows(rows)
    assert (np.diff(rows[order, 1]) != 0).sum() == 1
