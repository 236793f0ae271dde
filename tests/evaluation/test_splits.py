"""Splits: what is held out, what trains, and what that must not depend on."""

import itertools

import numpy as np
import pandas as pd
import pytest

from scvi_sams.evaluation import (
    Split,
    canonical_labels,
    combination_hold_out,
    hold_out_combinations,
    make_split,
    split_cells,
)
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidPerturbationLabelError,
    InvalidSplitError,
)

SINGLES = ["A", "B", "C", "D", "E"]
LABELS = ["control", *SINGLES, "A+B", "A+C", "C+B", "D+A", "E+X", "A+B+C"] * 3
AVAILABLE = {"A+B", "A+C", "B+C", "A+D", "A+B+C"}
PARTS = ("train", "validation", "test", "held_out")


def respelled(labels):
    return ["+".join(reversed(label.split("+"))) for label in labels]


def test_canonical_labels_by_hand():
    labels = pd.Series(["B+A", "A+B", "NT", "B+NT", "ctrl"], dtype="category")
    assert canonical_labels(labels, control=["ctrl", "NT"]).tolist() == [
        "A+B", "A+B", "ctrl", "B", "ctrl",
    ]  # fmt: skip
    with pytest.raises(InvalidPerturbationLabelError, match="1 of 2 cells"):
        canonical_labels(["A", None])


def test_only_combinations_whose_perturbations_occur_alone_are_held_out():
    assert set(hold_out_combinations(LABELS, 5)) == AVAILABLE
    assert set(hold_out_combinations(LABELS, 6, require_singles=False)) == AVAILABLE | {"E+X"}


def test_held_out_combinations_depend_on_the_seed_only():
    expected = hold_out_combinations(LABELS, 2, seed=3)
    assert expected == sorted(expected)
    shuffled = np.random.default_rng(0).permutation(LABELS)
    assert hold_out_combinations(shuffled, 2, seed=3) == expected
    assert hold_out_combinations(respelled(LABELS), 2, seed=3) == expected
    assert hold_out_combinations(pd.Series(LABELS, dtype="category"), 2, seed=3) == expected
    assert len({tuple(hold_out_combinations(LABELS, 2, seed=seed)) for seed in range(20)}) > 3


def test_fewer_held_out_combinations_are_a_subset_of_more():
    choices = [set(hold_out_combinations(LABELS, n, seed=1)) for n in range(6)]
    assert [len(choice) for choice in choices] == list(range(6))
    assert all(small < large for small, large in itertools.pairwise(choices))


def test_control_parts_and_other_delimiters():
    labels = ["ctrl", "A_ctrl", "ctrl_B", "B_A"]
    assert hold_out_combinations(labels, 1, control="ctrl", delimiter="_") == ["A_B"]


@pytest.mark.parametrize("n_held_out", [6, -1])
def test_impossible_numbers_are_refused(n_held_out):
    with pytest.raises(InvalidSplitError, match="5 combinations"):
        hold_out_combinations(LABELS, n_held_out)


@pytest.fixture
def labels() -> np.ndarray:
    sizes = {"control": 100, "A": 50, "B": 7, "A+B": 20, "B+A": 10, "A+C": 13, "C": 1}
    return np.random.default_rng(0).permutation(np.repeat(list(sizes), list(sizes.values())))


def test_every_cell_is_in_one_part_and_held_out_cells_in_theirs_only(labels):
    split = split_cells(labels, ["B+A"])
    assert tuple(split) == PARTS
    everything = np.concatenate([split[part] for part in PARTS])
    np.testing.assert_array_equal(np.sort(everything), np.arange(len(labels)))
    for part in PARTS:
        np.testing.assert_array_equal(split[part], np.sort(split[part]))
    assert set(np.flatnonzero(np.isin(labels, ["A+B", "B+A"]))) == set(split["held_out"])


def test_parts_are_stratified_by_label(labels):
    split = split_cells(labels, ["A+B"])
    for label, n in [("control", 100), ("A", 50), ("B", 7), ("A+C", 13)]:
        for part, fraction in zip(PARTS, (0.8, 0.1, 0.1), strict=False):
            count = np.sum(labels[split[part]] == label)
            assert abs(count - fraction * n) < 1, (label, part)
    assert np.sum(labels[split["train"]] == "control") == 80


@pytest.mark.parametrize("seed", range(20))
def test_every_label_keeps_a_training_cell(seed):
    labels = ["control", "A", "B", "B", "A+B"]
    train = split_cells(labels, ["A+B"], fractions=(0.1, 0.5, 0.4), seed=seed)["train"]
    assert {labels[cell] for cell in train} == {"control", "A", "B"}


def test_fractions_hold_over_many_small_labels():
    labels = np.repeat([f"P{i}" for i in range(2000)], 3)
    split = split_cells(labels, [])
    # Parts of a label are rounded at random: the standard deviation of the sum is below 25 cells.
    assert len(split["validation"]) == pytest.approx(600, abs=100)
    assert len(split["test"]) == pytest.approx(600, abs=100)
    assert len(split["held_out"]) == 0


def test_split_depends_on_seed_but_not_on_spelling(labels):
    expected = split_cells(labels, ["A+C"], seed=1)
    for other in (
        split_cells(respelled(labels), ["C+A"], seed=1),
        split_cells(labels, ["A+C"], seed=1),
    ):
        for part in PARTS:
            np.testing.assert_array_equal(other[part], expected[part])
    reseeded = split_cells(labels, ["A+C"], seed=2)
    np.testing.assert_array_equal(reseeded["held_out"], expected["held_out"])
    is_control = labels == "control"
    trained, retrained = (
        set(split["train"][is_control[split["train"]]]) for split in (expected, reseeded)
    )
    assert len(trained) == len(retrained) == 80
    assert trained != retrained


def test_no_test_cells_if_none_are_asked_for(labels):
    split = split_cells(labels, [], fractions=(0.9, 0.1, 0.0))
    assert len(split["test"]) == 0
    assert len(split["validation"]) > 0


def test_inputs_are_not_changed(labels):
    series = pd.Series(labels, dtype="category")
    before, held_out = series.copy(), ["B+A"]
    split_cells(series, held_out)
    hold_out_combinations(series, 1, require_singles=False)
    pd.testing.assert_series_equal(series, before)
    assert held_out == ["B+A"]


@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.2), (1.1, -0.1, 0.0), (0.9, 0.1)])
def test_invalid_fractions_are_refused(labels, fractions):
    with pytest.raises(InvalidSplitError, match="sum to 1"):
        split_cells(labels, [], fractions=fractions)


def test_held_out_labels_that_make_no_sense_are_refused(labels):
    with pytest.raises(InvalidSplitError, match=r"'A\+Z'"):
        split_cells(labels, ["Z+A"])
    with pytest.raises(InvalidSplitError, match="control"):
        split_cells(labels, ["control"])


@pytest.mark.parametrize("form", [np.asarray, list, pd.Series, lambda m: pd.array(m, "boolean")])
def test_parts_may_be_masks(form):
    """As in ``obs["split"] == "train"``; a mask of two cells is no list of positions 0 and 1."""
    labels = ["control", "A", "control", "A", "B"]
    column = np.array(["train", "train", "test", "valid", "test"])
    masks = [form(column == part) for part in ("train", "valid", "test")]
    split = make_split(labels, *masks, name="mine")
    assert [split.train.tolist(), split.validation.tolist(), split.test.tolist()] == [
        [0, 1], [3], [2, 4],
    ]  # fmt: skip
    two = make_split(["control", "control"], [False, True], [], [True, False], name="two")
    assert (two.train.tolist(), two.test.tolist()) == ([1], [0])


def test_a_mask_has_a_value_for_every_cell():
    with pytest.raises(InvalidArgumentError, match="`validation` has 2 booleans for 3 cells"):
        make_split(["control", "A", "A"], [0], [True, False], [1], name="mine")


@pytest.mark.parametrize("ending", ["json", "npz"])
def test_settings_of_numpy_are_saved(tmp_path, ending):
    settings = {"share": np.float32(0.5), "of": np.arange(2), "deep": {"n": np.int64(3)}}
    split = make_split(["control", "A"], [0], [], [1], name="mine", settings=settings)
    split.save(tmp_path / f"split.{ending}")
    expected = {"share": 0.5, "of": [0, 1], "deep": {"n": 3}}
    assert split.settings == Split.load(tmp_path / f"split.{ending}").settings == expected
    by_combination = combination_hold_out(LABELS, fraction=np.float32(0.5))
    by_combination.save(tmp_path / f"other.{ending}")
    with pytest.raises(InvalidArgumentError, match="`settings` must be a dict of text"):
        make_split(["control", "A"], [0], [], [1], name="mine", settings={"by": print})
