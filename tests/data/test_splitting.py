"""Random splits within groups: shares, determinism, and nobody left out."""

import numpy as np
import pandas as pd
import pytest

from scvi_sams.data._splitting import stratified_split
from scvi_sams.exceptions import InvalidSplitError


def sizes_by_group(groups, part):
    return np.bincount(groups[part], minlength=groups.max() + 1)


@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.1), (0.9, 0.1, 0), (0.5, 0, 0.5), (1, 0, 0)])
def test_groups_that_divide_evenly_get_their_exact_shares(fractions):
    groups = np.repeat(np.arange(4), [10, 20, 50, 100])
    parts = stratified_split(groups, fractions, seed=0)
    for part, share in zip(parts, fractions, strict=True):
        np.testing.assert_array_equal(
            sizes_by_group(groups, part), np.round(np.array([10, 20, 50, 100]) * share)
        )


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_rounded_up_or_down_in_every_group(seed):
    group_sizes = np.arange(10, 60)
    groups = np.repeat(np.arange(50), group_sizes)
    fractions = (0.7, 0.2, 0.1)
    for part, share in zip(stratified_split(groups, fractions, seed=seed), fractions, strict=True):
        off = sizes_by_group(groups, part) - group_sizes * share
        assert np.abs(off).max() < 1


def test_shares_hold_over_many_small_groups():
    # 3 cells a group: 0.3 validation cells each. Binomial sd over 4,000 groups is 29.
    groups = np.repeat(np.arange(4000), 3)
    train, validation, test = stratified_split(groups, (0.8, 0.1, 0.1), seed=0)
    assert abs(len(validation) - 1200) < 5 * 29
    assert abs(len(test) - 1200) < 5 * 29
    assert len(train) + len(validation) + len(test) == 12_000


@pytest.mark.parametrize("seed", range(3))
def test_parts_are_disjoint_complete_and_ascending(seed):
    groups = np.random.default_rng(seed).integers(30, size=500)
    parts = stratified_split(groups, (0.6, 0.25, 0.15), seed=seed)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(500))
    for part in parts:
        assert (np.diff(part) > 0).all()


@pytest.mark.parametrize("fractions", [(0.01, 0.99, 0), (0.1, 0.1, 0.8), (0.5, 0.5, 0)])
def test_every_group_keeps_a_training_cell(fractions):
    groups = np.repeat(np.arange(60), np.tile([1, 2, 3], 20))
    train, _, _ = stratified_split(groups, fractions, seed=1)
    np.testing.assert_array_equal(np.unique(groups[train]), np.arange(60))


def test_groups_of_one_cell_are_training_cells():
    train, validation, test = stratified_split(np.arange(20), (0.5, 0.25, 0.25), seed=0)
    np.testing.assert_array_equal(train, np.arange(20))
    assert len(validation) == len(test) == 0


def test_the_seed_decides_and_another_seed_splits_otherwise():
    groups = np.repeat([0, 1], 50)
    first, again, other = (stratified_split(groups, (0.8, 0.1, 0.1), seed=s) for s in (7, 7, 8))
    for part, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(part, same)
        assert not np.array_equal(part, different)


def test_which_cells_train_is_random_within_a_group():
    # Each cell is one of 5 training cells of 10 in half of the seeds: 200 +- 10 of 400.
    drawn = np.zeros(10)
    for seed in range(400):
        drawn[stratified_split(np.zeros(10), (0.5, 0.5, 0), seed=seed)[0]] += 1
    assert np.abs(drawn - 200).max() < 50


def test_the_order_of_cells_within_groups_plays_no_part_in_sizes():
    groups = np.repeat(np.arange(10), 13)
    shuffled = np.random.default_rng(0).permutation(groups)
    for part, other in zip(
        stratified_split(groups, (0.7, 0.2, 0.1), seed=3),
        stratified_split(shuffled, (0.7, 0.2, 0.1), seed=3),
        strict=True,
    ):
        np.testing.assert_array_equal(sizes_by_group(groups, part), sizes_by_group(shuffled, other))


@pytest.mark.parametrize(
    "groups",
    [
        np.array(["A", "B", "A+B"] * 10),
        pd.Series(["A", "B", "A+B"] * 10),
        pd.Categorical(["A", "B", "A+B"] * 10, categories=["Z", "B", "A+B", "A"]),
    ],
    ids=["text", "series", "category"],
)
def test_groups_of_any_type_are_split_by_value(groups):
    train, validation, test = stratified_split(groups, (0.8, 0.1, 0.1), seed=0)
    counted = [pd.Series(groups)[part].value_counts() for part in (train, validation, test)]
    for label in ("A", "B", "A+B"):
        assert [count[label] for count in counted] == [8, 1, 1]


def test_the_global_random_state_is_neither_used_nor_changed():
    groups = np.repeat(np.arange(5), 20)
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()  # noqa: NPY002
    first = stratified_split(groups, (0.8, 0.1, 0.1), seed=0)
    after = np.random.get_state()  # noqa: NPY002
    assert before[2] == after[2]
    np.testing.assert_array_equal(before[1], after[1])
    np.random.seed(2)  # noqa: NPY002
    second = stratified_split(groups, (0.8, 0.1, 0.1), seed=0)
    for part, same in zip(first, second, strict=True):
        np.testing.assert_array_equal(part, same)


@pytest.mark.parametrize(
    "fractions",
    [
        (0.9, 0.1),
        (0.5, 0.25, 0.125, 0.125),
        (1.2, -0.1, -0.1),
        (0.8, 0.1, 0.2),
        (0.8, 0.1, 0.0),
        (0, 0.5, 0.5),
        (0.8, float("nan"), 0.2),
    ],
)
def test_shares_that_are_none_are_named(fractions):
    with pytest.raises(InvalidSplitError, match="sum to 1") as error:
        stratified_split(np.zeros(10), fractions, seed=0)
    assert str(fractions) in str(error.value)


@pytest.mark.parametrize(("train", "validation"), [(0.9, 0.1), (0.8, 0.2), (0.7, 0.3)])
def test_a_share_that_is_zero_but_for_rounding_is_zero(train, validation):
    # 1 - 0.9 - 0.1 is -2.8e-17 in binary floating point.
    groups = np.repeat(np.arange(10), 10)
    parts = stratified_split(groups, (train, validation, 1 - train - validation), seed=0)
    assert [len(part) for part in parts] == [round(100 * train), round(100 * validation), 0]
