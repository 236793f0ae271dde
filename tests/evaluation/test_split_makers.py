"""Splits made, checked, saved and loaded: what they hold out, and which leaks are refused."""

import dataclasses
import itertools
import json

import numpy as np
import pandas as pd
import pytest

from scvi_sams.evaluation import hold_out_combinations, split_cells
from scvi_sams.exceptions import InvalidCovariateError, InvalidSplitError
from scvi_sams.splits._makers import norman_data_efficiency, norman_ood, random_cells
from scvi_sams.splits._perturbations import perturbation_hold_out
from scvi_sams.splits._perturbench import (
    combination_hold_out,
    covariate_transfer,
    single_hold_out,
)
from scvi_sams.splits._split import Split, check_split, make_split

PARTS = ("train", "validation", "test")
COMBINATIONS = ["A+B", "A+C", "A+D", "A+E", "B+C", "B+D", "B+E", "C+D", "C+E", "D+E"]
SINGLES = ["A", "B", "C", "D", "E", "X"]
CELLS_OF = {"control": 100, **dict.fromkeys(SINGLES, 20), **dict.fromkeys(COMBINATIONS, 50)}
MAKERS = {
    "norman_ood": lambda labels, **k: norman_ood(labels, 0.5, **k),
    "norman_data_efficiency": lambda labels, **k: norman_data_efficiency(labels, 0.5, **k),
    "random_cells": random_cells,
    "unstratified": lambda labels, **k: random_cells(labels, stratified=False, **k),
    "combination_hold_out": combination_hold_out,
    "single_hold_out": single_hold_out,
    "perturbation_hold_out": perturbation_hold_out,
}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@pytest.fixture
def labels() -> np.ndarray:
    rows = np.repeat(list(CELLS_OF), list(CELLS_OF.values()))
    return np.random.default_rng(0).permutation(rows).astype(object)


def counts(split, labels, part):
    return pd.Series(labels[getattr(split, part)]).value_counts().to_dict()


def respelled(labels):
    return ["+".join(reversed(label.split("+"))) for label in labels]


@pytest.mark.parametrize(("fraction", "n_trained"), [(0, 0), (0.25, 2), (0.5, 5), (0.75, 7)])
def test_norman_ood(labels, fraction, n_trained):
    split = norman_ood(labels, fraction, seed=1)
    train, validation, test = (counts(split, labels, part) for part in PARTS)
    tested = set(split.held_out)
    # The last ceil(0.25 * 10) = 3 are tested, with all their cells and nothing else.
    assert test == dict.fromkeys(tested, 50)
    assert len(tested) == 3
    trained = set(COMBINATIONS).intersection(train)
    assert len(trained) == n_trained
    assert not trained & tested
    expected = {"control": 80, **dict.fromkeys(SINGLES, 16), **dict.fromkeys(trained, 40)}
    assert train == expected
    assert validation == {label: n // 4 for label, n in expected.items()}


def test_norman_ood_shuffles_the_sorted_combinations(labels):
    order = np.random.default_rng(4).permutation(COMBINATIONS).tolist()
    split = norman_ood(labels, 0.25, seed=4)
    assert split.held_out == tuple(sorted(order[-3:]))
    assert set(labels[split.train]) & set(COMBINATIONS) == set(order[:2])


def test_norman_fractions_are_nested_and_test_the_same_cells(labels):
    for make, fractions in [
        (norman_ood, (0, 0.25, 0.5, 0.75)),
        (norman_data_efficiency, (0, 0.2, 0.6, 1)),
    ]:
        splits = [make(labels, fraction, seed=2) for fraction in fractions]
        for small, large in itertools.pairwise(splits):
            np.testing.assert_array_equal(small.test, large.test)
            small_labels, large_labels = (set(labels[s.train]) for s in (small, large))
            assert small_labels <= large_labels
            assert len(small.train) < len(large.train)
        if make is norman_data_efficiency:
            assert all(
                set(small.train) < set(large.train) for small, large in itertools.pairwise(splits)
            )


@pytest.mark.parametrize("fraction", [0, 0.5, 1])
def test_norman_data_efficiency(labels, fraction):
    split = norman_data_efficiency(labels, fraction)
    train, validation, test = (counts(split, labels, part) for part in PARTS)
    assert test == dict.fromkeys(COMBINATIONS, 10)
    of_all = {"control": 80, **dict.fromkeys(SINGLES, 16)}
    kept = dict.fromkeys(COMBINATIONS, 32 * fraction) if fraction else {}
    assert train == of_all | kept
    kept_for_validation = dict.fromkeys(COMBINATIONS, 8 * fraction) if fraction else {}
    assert validation == {label: n // 4 for label, n in of_all.items()} | kept_for_validation
    assert split.held_out == (() if fraction else tuple(COMBINATIONS))


def test_random_cells(labels):
    split = random_cells(labels)
    assert counts(split, labels, "train") == pytest.approx(
        {label: 0.64 * n for label, n in CELLS_OF.items()}, abs=1
    )
    assert [len(getattr(split, part)) for part in PARTS] == pytest.approx(
        [0.64 * 720, 0.16 * 720, 0.2 * 720], abs=8
    )
    free = random_cells(labels, stratified=False)
    assert [len(getattr(free, part)) for part in PARTS] == pytest.approx(
        [0.64 * 720, 0.16 * 720, 0.2 * 720], abs=1
    )
    spread = [counts(free, labels, "train")[label] / 50 for label in COMBINATIONS]
    assert np.ptp(spread) > 0.05


def test_combination_hold_out(labels):
    split = combination_hold_out(labels)
    train, validation, test = (counts(split, labels, part) for part in PARTS)
    held_out = set(split.held_out)
    assert len(held_out) == 7
    assert test.pop("control") == validation.pop("control") == 25
    assert len(test) == 4
    assert len(validation) == 3
    assert test | validation == dict.fromkeys(held_out, 50)
    trained = {label: n for label, n in CELLS_OF.items() if label not in held_out}
    assert train == trained | {"control": 50}


def test_single_hold_out(labels):
    split = single_hold_out(labels, fraction=0.4)
    # All five singles share a combination with each other, X with none of them.
    assert len(split.held_out) == 1
    assert split.held_out[0] in set("ABCDE")
    pairs = np.repeat(["control", "A", "B", "C", "D", "A+B", "C+D", "E+F", "X"], 10)
    held_out = {single_hold_out(pairs, fraction=1, seed=seed).held_out for seed in range(30)}
    assert held_out == {("A", "C"), ("A", "D"), ("B", "C"), ("B", "D")}
    split = single_hold_out(pairs, fraction=1)
    assert set(pairs[split.test]) | set(pairs[split.validation]) == {"control", *split.held_out}
    assert set(pairs[split.test]) & set(pairs[split.validation]) == {"control"}
    assert {"A+B", "C+D", "X"} <= set(pairs[split.train])


@pytest.fixture
def levels(labels) -> np.ndarray:
    return np.random.default_rng(1).choice(["T", "U", "V"], len(labels))


@pytest.mark.parametrize("most_levels", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_covariate_transfer(labels, levels, seed, most_levels):
    split = covariate_transfer(labels, levels, seed=seed, most_levels=most_levels)
    pairs = pd.DataFrame({"label": labels, "level": levels})
    held_out = set(zip(split.held_out, split.held_out_levels, strict=True))
    perturbed = {
        part: set(
            pairs.iloc[getattr(split, part)].query("label != 'control'").itertuples(index=False,
                                                                                    name=None)
        )
        for part in PARTS
    }  # fmt: skip
    assert perturbed["train"].isdisjoint(held_out)
    assert perturbed["test"] | perturbed["validation"] == held_out
    assert perturbed["test"].isdisjoint(perturbed["validation"])
    # Of the 16 perturbations of a level, int(0.3 * 16) = 4 may be held out; there are enough.
    per_level = pd.Series(split.held_out_levels).value_counts()
    assert per_level.to_dict() == {"T": 4, "U": 4, "V": 4}
    for level in "TUV":
        assert sum(pair[1] == level for pair in perturbed["test"]) == 2
        for part in PARTS:
            cells = getattr(split, part)
            assert ((labels[cells] == "control") & (levels[cells] == level)).any()
    # Whatever is held out somewhere trains somewhere else.
    assert set(split.held_out) <= {label for label, _ in perturbed["train"]}
    assert pd.Series(split.held_out).value_counts().max() <= most_levels
    everything = np.concatenate([getattr(split, part) for part in PARTS])
    np.testing.assert_array_equal(np.sort(everything), np.arange(len(labels)))


def test_covariate_transfer_keeps_a_level_for_training():
    labels = ["control", "A", "B"] * 4
    levels = ["T", "T", "T", "U", "U", "T"] * 2
    split = covariate_transfer(labels, levels, fraction=1, most_levels=5)
    assert split.held_out == ("A",)
    with pytest.raises(InvalidSplitError, match="Nothing would be held out"):
        covariate_transfer(labels, ["T"] * 12)
    with pytest.raises(InvalidCovariateError, match="12 cells"):
        covariate_transfer(labels, [*levels[:-1], np.nan])


@each_maker
def test_splits_depend_on_labels_and_seed_only(make, labels):
    np.random.seed(0)  # noqa: NPY002 - to show that it is neither used nor changed
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    series = pd.Series(respelled(labels), dtype="category")
    before = series.copy()
    expected, other = make(labels, seed=5), make(series, seed=5)
    pd.testing.assert_series_equal(series, before)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    for part in PARTS:
        np.testing.assert_array_equal(getattr(expected, part), getattr(other, part))
        np.testing.assert_array_equal(getattr(expected, part), np.unique(getattr(expected, part)))
    assert other.held_out == expected.held_out
    assert other.fingerprint == expected.fingerprint
    assert expected.seed == 5
    reseeded = [make(labels, seed=seed) for seed in range(6)]
    assert len({tuple(split.train) for split in reseeded}) == 6


@pytest.mark.parametrize(
    "name", ["norman_ood", "combination_hold_out", "single_hold_out", "perturbation_hold_out"]
)
def test_what_is_held_out_does_not_depend_on_the_order_of_cells(name, labels):
    assert MAKERS[name](np.sort(labels)).held_out == MAKERS[name](labels).held_out


@each_maker
def test_made_splits_pass_their_own_check_with_other_names(make, labels):
    renamed = [label.replace("+", "_").replace("control", "NT") for label in labels]
    split = make(renamed, control=["NT", "ctrl"], delimiter="_")
    check_split(split, renamed)
    assert split.control == ("NT", "ctrl")
    assert split.delimiter == "_"


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_splits_are_read_as_they_were_saved(labels, levels, tmp_path, suffix):
    for split, covariate in [
        (norman_ood(labels, 0.5, seed=np.int64(3)), None),
        (covariate_transfer(labels, levels), levels),
        (random_cells(labels, delimiter=None), None),
    ]:
        path = tmp_path / f"{split.name}{suffix}"
        split.save(path)
        for loaded in (Split.load(path, labels, covariate=covariate), Split.load(path)):
            for field in dataclasses.fields(Split):
                saved, read = getattr(split, field.name), getattr(loaded, field.name)
                assert type(saved) is type(read), field.name
                np.testing.assert_array_equal(saved, read)


def test_a_split_of_other_data_is_refused(labels, levels, tmp_path):
    path = tmp_path / "split.json"
    norman_ood(labels, 0.5).save(path)
    for other in (labels[:-1], np.sort(labels), np.where(labels == "A", "Q", labels)):
        with pytest.raises(InvalidSplitError, match="'norman_ood' was made for other labels"):
            Split.load(path, other)
    transfer = covariate_transfer(labels, levels)
    with pytest.raises(InvalidSplitError, match="other labels"):
        check_split(transfer, labels, covariate=np.roll(levels, 1))
    with pytest.raises(InvalidCovariateError, match="`covariate`"):
        check_split(transfer, labels)


def test_files_that_hold_no_split_are_refused(labels, tmp_path):
    with pytest.raises(InvalidSplitError, match=r"not as 'split\.pkl'"):
        random_cells(labels).save(tmp_path / "split.pkl")
    random_cells(labels).save(tmp_path / "whole.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    for size in (0, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.npz").write_bytes(whole[:size])
        with pytest.raises(InvalidSplitError, match="is not a split"):
            Split.load(tmp_path / "cut.npz")
    for content in ("{", json.dumps({"train": [0]}), "[]"):
        (tmp_path / "split.json").write_text(content)
        with pytest.raises(InvalidSplitError, match="is not a split"):
            Split.load(tmp_path / "split.json")
    pickled = tmp_path / "split.npz"
    np.savez(pickled, record=np.array([{"name": "x"}], dtype=object))
    with pytest.raises(InvalidSplitError, match="is not a split"):
        Split.load(pickled)


LABELS = ["control", "control", "A", "B", "A+B", "B+A", "A+C", "control"]


@pytest.mark.parametrize(
    ("train", "validation", "test", "held_out", "message"),
    [
        ([0, 2, 5], [1], [4], ["A+B"], r"training cells have the held-out 'A\+B'"),
        ([0, 2, 3], [5], [4], ["A+B"], r"validation and test cells both have.*'A\+B'"),
        ([0, 2, 4, 6], [1], [3], ["B", "C+A", "B+A"], r"held-out 'A\+B', 'A\+C'"),
        ([2, 3], [0], [4, 5], ["A+B"], "No training cell is labelled 'control'"),
        ([0, 2, 3], [2], [4, 5], [], "1 cell is in both train and validation.*position 2"),
        ([0, 2, 2], [1], [4, 5], [], "train has a cell more than once"),
        ([0, 2], [1], [], [], "No cell is tested"),
        ([0, 2], [1], [8], [], "test has position 8, but there are 8 cells"),
        ([0, 2], [-1], [4], [], "validation has position -1"),
        ([0, 2], [1], [4], ["A+Z"], r"No cell has the held-out 'A\+Z'"),
        ([0, 2], [1], [4], ["control"], r"control \('control'\) cannot be held out"),
    ],
)
def test_unusable_splits_are_refused_by_name(train, validation, test, held_out, message):
    with pytest.raises(InvalidSplitError, match=message):
        make_split(LABELS, train, validation, test, name="by hand", held_out=held_out)


def test_a_leak_in_a_level_is_refused_by_name():
    levels = ["T", "U", "T", "T", "T", "U", "U", "U"]
    cells = ([0, 1, 2, 5], [7], [4])
    held_out = {"held_out": ["B+A"], "covariate": levels, "name": "by hand"}
    split = make_split(LABELS, *cells, held_out_levels=["T"], **held_out)
    assert split.held_out_levels == ("T",)
    with pytest.raises(InvalidSplitError, match=r"training cells have.*'A\+B' in 'U'"):
        make_split(LABELS, *cells, held_out_levels=["U"], **held_out)


def test_a_changed_split_is_refused(labels):
    split = norman_ood(labels, 0.5)
    leaking = dataclasses.replace(split, train=np.append(split.train, split.test[0]),
                                  test=split.test[1:])  # fmt: skip
    with pytest.raises(InvalidSplitError, match="leaks"):
        check_split(leaking, labels)


def test_parts_of_split_cells_make_a_split(labels):
    held_out = hold_out_combinations(labels, 3)
    parts = split_cells(labels, held_out, fractions=(0.8, 0.2, 0))
    split = make_split(
        labels, parts["train"], parts["validation"], parts["held_out"], name="ood",
        held_out=held_out,
    )  # fmt: skip
    assert split.held_out == tuple(held_out)
    assert counts(split, labels, "test") == dict.fromkeys(held_out, 50)


def test_impossible_requests_are_refused(labels):
    no_combinations = ["control", "A"] * 5
    for make in (norman_ood, norman_data_efficiency):
        with pytest.raises(InvalidSplitError, match="No label is a combination"):
            make(no_combinations, 0.5)
    for fraction in (-0.1, 0.8):
        with pytest.raises(InvalidSplitError, match="cannot train"):
            norman_ood(labels, fraction)
    with pytest.raises(InvalidSplitError, match="choose from 0 to 1"):
        norman_data_efficiency(labels, 1.5)
    for make in (combination_hold_out, single_hold_out):
        with pytest.raises(InvalidSplitError, match="Nothing would be held out"):
            make(no_combinations)
        with pytest.raises(InvalidSplitError, match="above 0 and at most 1"):
            make(labels, fraction=0)
