"""Whole perturbations held out: which cells are tested, and which leaks are refused."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from scvi_sams.evaluation import Split, check_split, make_split, perturbation_hold_out
from scvi_sams.exceptions import InvalidArgumentError, InvalidSplitError

CELLS_OF = {
    "control": 50,
    **dict.fromkeys("ABCDE", 20),
    **dict.fromkeys(["A+B", "A+C", "B+C", "D+E", "A+D+E"], 10),
}


@pytest.fixture
def labels() -> np.ndarray:
    rows = np.repeat(list(CELLS_OF), list(CELLS_OF.values()))
    return np.random.default_rng(0).permutation(rows).astype(object)


def counts(split, labels, part):
    return pd.Series(labels[getattr(split, part)]).value_counts().to_dict()


def test_a_perturbation_is_tested_with_all_its_combinations(labels):
    split = perturbation_hold_out(labels, ["A"], seed=3)
    assert split.held_out_perturbations == ("A",)
    assert split.held_out == ("A", "A+B", "A+C", "A+D+E")
    assert counts(split, labels, "test") == {"A": 20, "A+B": 10, "A+C": 10, "A+D+E": 10}
    # The others are split 80/20 within each label.
    others = {label: n for label, n in CELLS_OF.items() if "A" not in label}
    assert counts(split, labels, "train") == {label: 0.8 * n for label, n in others.items()}
    assert counts(split, labels, "validation") == {label: 0.2 * n for label, n in others.items()}


def test_cells_are_tested_at_every_dose_and_in_any_spelling():
    labels = ["control", "B", "x_A", "A_x", "A", "A", "B", "control"]
    split = perturbation_hold_out(labels, ["A"], delimiter="_", validation_fraction=0)
    assert split.test.tolist() == [2, 3, 4, 5]
    assert split.train.tolist() == [0, 1, 6, 7]


def test_fewer_are_a_subset_of_more_and_order_of_cells_plays_no_part(labels):
    few, more = (perturbation_hold_out(labels, fraction=share, seed=7) for share in (0.2, 0.6))
    assert len(few.held_out_perturbations) == 1
    assert len(more.held_out_perturbations) == 3
    assert set(few.held_out_perturbations) < set(more.held_out_perturbations)
    for other in (np.sort(labels), ["+".join(reversed(label.split("+"))) for label in labels]):
        moved = perturbation_hold_out(other, fraction=0.6, seed=7)
        assert moved.held_out_perturbations == more.held_out_perturbations
    drawn = {perturbation_hold_out(labels, seed=seed).held_out_perturbations for seed in range(30)}
    assert drawn == {("A",), ("B",), ("C",), ("D",), ("E",)}


@pytest.mark.parametrize("n_folds", [2, 3, 5])
def test_folds_hold_each_perturbation_out_once(labels, n_folds):
    splits = [perturbation_hold_out(labels, fold=(k, n_folds), seed=1) for k in range(n_folds)]
    held_out = [name for split in splits for name in split.held_out_perturbations]
    assert sorted(held_out) == list("ABCDE")
    sizes = [len(split.held_out_perturbations) for split in splits]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_a_leak_is_found_in_a_split_read_from_a_file(labels, tmp_path, suffix):
    split = perturbation_hold_out(labels, ["A"])
    path = tmp_path / f"split{suffix}"
    split.save(path)
    assert Split.load(path, labels).held_out_perturbations == ("A",)
    # The label is not held out by name, so that only the perturbation tells of the leak.
    cell = split.test[labels[split.test] == "A+D+E"][0]
    without = tuple(label for label in split.held_out if label != "A+D+E")
    for part in ("train", "validation"):
        leaking = dataclasses.replace(
            split,
            held_out=without,
            test=split.test[split.test != cell],
            **{part: np.append(getattr(split, part), cell)},
        )
        leaking.save(path)
        with pytest.raises(InvalidSplitError, match=rf"{part} cells labelled 'A\+D\+E' have 'A'"):
            Split.load(path, labels)


def test_files_without_whole_perturbations_are_read(labels, tmp_path):
    path = tmp_path / "split.json"
    perturbation_hold_out(labels, ["A"]).save(path)
    record = json.loads(path.read_text())
    del record["held_out_perturbations"]
    path.write_text(json.dumps(record))
    assert Split.load(path, labels).held_out_perturbations == ()


def test_a_split_by_hand_is_checked_for_whole_perturbations():
    labels = ["control", "A", "B", "A+B", "B"]
    arguments = {"name": "by hand", "held_out_perturbations": ["B"]}
    split = make_split(labels, [0, 1], [], [2, 3, 4], **arguments)
    check_split(split, labels)
    with pytest.raises(InvalidSplitError, match=r"train cells labelled 'A\+B' have 'B'"):
        make_split(labels, [0, 1, 3], [], [2, 4], **arguments)
    with pytest.raises(InvalidSplitError, match="validation cells labelled 'B'"):
        make_split(labels, [0, 1], [2], [3, 4], **arguments)
    with pytest.raises(InvalidSplitError, match="No cell has the held-out 'Z'"):
        make_split(labels, [0, 1], [], [2], name="by hand", held_out_perturbations=["Z"])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"perturbations": ["A+B"]}, InvalidSplitError, r"'A\+B' is not a single perturbation"),
        ({"perturbations": ["Z"]}, InvalidSplitError, "No cell has the held-out 'Z'"),
        ({"perturbations": ["control"]}, InvalidSplitError, "control .* cannot be held out"),
        ({"perturbations": []}, InvalidSplitError, "`perturbations` is empty"),
        ({"perturbations": list("ABCDE")}, InvalidSplitError, "none would be left to train"),
        ({"fraction": 1.0}, InvalidSplitError, "fraction of 1.0"),
        ({"fraction": 0}, InvalidSplitError, "fraction of 0"),
        ({"fold": (3, 3)}, InvalidSplitError, "no fold 3 of 3"),
        ({"fold": (6, 7)}, InvalidSplitError, "Fold 6 of 7 is empty: there are 5 perturbations"),
        ({"fold": (0, 1)}, InvalidArgumentError, "of at least 2"),
        ({"fold": (0, 1, 2)}, InvalidArgumentError, "two whole numbers"),
        ({"fold": (0, 5), "fraction": 0.2}, InvalidArgumentError, "`fraction` and `fold` both"),
        ({"validation_fraction": 1}, InvalidArgumentError, "`validation_fraction`"),
    ],
)
def test_impossible_requests_raise(labels, arguments, error, message):
    with pytest.raises(error, match=message):
        perturbation_hold_out(labels, **arguments)
