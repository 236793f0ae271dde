"""Labels as a value: what cells carry, worked out by hand from labels and dosage matrices."""

import numpy as np
import pandas as pd
import pytest

from scvi_sams.labels._labels import (
    Labels,
    combinations_as_perturbations,
    distinct_combinations,
    distinct_rows,
)
from scvi_sams.labels._parsing import encode_dosage_matrix, encode_labels, read_labels
from scvi_sams.labels._spelling import Spelling

WRITTEN = ["B+A", "NT", "A + ctrl", "C", "ctrl", "A+B", "NT+ctrl", "C + A + B"]
CANONICAL = ["A+B", "ctrl", "A", "C", "ctrl", "A+B", "ctrl", "A+B+C"]


@pytest.fixture
def labels():
    return read_labels(WRITTEN, ["ctrl", "NT"], "+")


def test_labels_are_canonical_whatever_their_spelling(labels):
    assert len(labels) == 8
    assert labels.control == "ctrl"
    assert labels.canonical.tolist() == CANONICAL
    assert labels.names == ["A", "A+B", "A+B+C", "C", "ctrl"]
    assert labels.perturbed_names == ["A", "A+B", "A+B+C", "C"]
    assert labels.name_of_cell.tolist() == [1, 4, 0, 3, 4, 1, 4, 2]
    assert labels.is_control.tolist() == [False, True, False, False, True, False, True, False]


def test_the_control_label_is_a_name_only_where_cells_carry_it():
    labels = read_labels(["B", "A"], "ctrl", "+")
    assert labels.names == labels.perturbed_names == ["A", "B"]


@pytest.mark.parametrize(
    ("cells", "kept"),
    [
        ([7, 1, 1], [7, 1, 1]),
        (np.array([True, False, True] + 5 * [False]), [0, 2]),
        (slice(2, 5), [2, 3, 4]),
        (np.array([], dtype=int), []),
    ],
)
def test_some_cells_keep_the_vocabulary(labels, cells, kept):
    some = labels[cells]
    assert some.canonical.tolist() == [CANONICAL[cell] for cell in kept]
    assert some.names == sorted({CANONICAL[cell] for cell in kept})
    assert some.vocabulary == labels.vocabulary == ("A", "B", "C")
    np.testing.assert_array_equal(some.codes, labels.codes[kept])
    np.testing.assert_array_equal(some.doses, labels.doses[kept])
    np.testing.assert_array_equal(some.is_control, labels.is_control[kept])


def test_labels_cannot_be_changed(labels):
    for array in (labels.codes, labels.doses, labels[:2].codes, labels.canonical):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(AttributeError):
        labels.codes = np.zeros((8, 2))


def test_arrays_of_the_caller_stay_writable():
    codes, doses = np.array([[0], [-1]]), np.array([[1.0], [0.0]])
    Labels(codes, doses, ("A",), Spelling.of("ctrl", "+"))
    codes[0], doses[0] = -1, 0


def test_labels_that_were_read_are_not_read_again(labels):
    assert read_labels(labels, "another control", None) is labels


def test_perturbations_at_dose_zero_were_not_given():
    labels = encode_labels(
        pd.Series(["A+B", "B+A", "A", "ctrl", "A+B"]),
        pd.Series(["0+2", "0+0.5", "0", "5", "0+0"]),
        spelling=Spelling.of("ctrl", "+"),
    )
    assert labels.canonical.tolist() == ["B", "A", "ctrl", "ctrl", "ctrl"]
    assert labels.is_control.tolist() == [False, False, True, True, True]
    assert labels.doses.sum(axis=1).tolist() == [2, 0.5, 0, 0, 0]


def test_labels_of_a_dosage_matrix():
    matrix = np.array([[0.5, 0, 0], [0, 0, 2], [1, 0, 3], [0, 0, 0], [0, 4, 0], [0, 4, 1]])
    names = ["B", "ctrl", "A"]
    for delimiter, joined in (("_", "A_B"), (None, "A+B")):
        labels = encode_dosage_matrix(matrix, names, spelling=Spelling(("ctrl",), delimiter))
        assert labels.canonical.tolist() == ["B", "A", joined, "ctrl", "ctrl", "A"]


def test_combinations_that_are_perturbations_of_their_own_keep_their_labels(labels):
    combined = combinations_as_perturbations(labels)
    assert combined.vocabulary == ("A", "A+B", "A+B+C", "C")
    assert combined.codes.ravel().tolist() == [1, -1, 0, 3, -1, 1, -1, 2]
    for part in ("names", "perturbed_names", "control"):
        assert getattr(combined, part) == getattr(labels, part)
    for part in ("canonical", "name_of_cell", "is_control"):
        np.testing.assert_array_equal(getattr(combined, part), getattr(labels, part))


def test_no_cells_have_no_names():
    labels = read_labels([], "ctrl", "+")
    assert (len(labels), labels.names, labels.canonical.tolist()) == (0, [], [])


@pytest.mark.parametrize("shape", [(0, 1), (1, 3), (500, 1), (500, 3), (500, 30)])
def test_distinct_rows_are_those_of_numpy(shape):
    """In 30 slots, numbers of 1,000 names have more than 64 bits together."""
    rng = np.random.default_rng(0)
    codes = rng.integers(-1, 1000, size=shape).astype(np.int32)
    codes = codes[rng.integers(40, size=len(codes))] if len(codes) > 40 else codes
    rows, row_of_cell = distinct_rows(codes)
    expected, expected_row = np.unique(codes, axis=0, return_inverse=True)
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(row_of_cell, expected_row.ravel())


def test_parts_of_distinct_rows_are_sorted_by_name():
    parts, row_of_cell = distinct_combinations(
        np.array([[0, 1], [-1, -1], [1, -1], [0, 1]]), ("Z", "A")
    )
    assert [parts[row] for row in row_of_cell] == [["A", "Z"], [], ["A"], ["A", "Z"]]
