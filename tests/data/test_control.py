"""Which cells are controls: labels, patterns of labels, marks of cells."""

import numpy as np
import pandas as pd
import pytest

from scvi_sams.data import canonical_label
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidPerturbationLabelError,
    MissingControlError,
)
from scvi_sams.labels._control import named_control
from scvi_sams.labels._parsing import read_labels
from scvi_sams.labels._spelling import Spelling, control_names

LABELS = ["NT_1", "A", "NT_2", "B+A", "NT_1"]
MARKS = [True, False, True, False, True]


def test_a_pattern_stands_for_any_text_without_the_delimiter():
    labels = read_labels(["NT_1", "NT+A", "A+NT_2", "NTS", "ANT", "B"], "NT*", "+")
    assert labels.is_control.tolist() == [True, False, False, True, False, False]
    assert labels.vocabulary == ("A", "ANT", "B")
    assert labels.canonical.tolist() == ["NT*", "A", "A", "NT*", "ANT", "B"]
    strict = read_labels(["NT_1", "NTS"], "NT_*", "+")
    assert strict.is_control.tolist() == [True, False]


def test_the_canonical_label_of_a_pattern_is_read_as_control():
    assert canonical_label("NT*", control="NT*") == "NT*"
    assert canonical_label("A+NT_7", control=["NT_*"]) == "A"


def test_a_pattern_may_hold_the_delimiter():
    spelling = Spelling.of("NT_*", "_")
    assert spelling.split("KLF1_NT_12") == ["KLF1", "NT_12"]
    assert spelling.perturbations("NT_3_KLF1") == ["KLF1"]
    assert spelling.is_control("NT_12")
    assert not spelling.is_control("NT_1_2")


def test_other_special_characters_are_text():
    spelling = Spelling.of("N.T[*", "+")
    assert spelling.is_control("N.T[1]")
    assert not spelling.is_control("NxT[1]")


@pytest.mark.parametrize(
    "marks",
    [np.array(MARKS), MARKS, tuple(MARKS), pd.Series(MARKS), pd.array(MARKS, dtype="boolean")],
)
def test_marked_cells_name_the_controls(marks):
    assert named_control(marks, pd.Series(LABELS)) == ["NT_1", "NT_2"]
    labels = read_labels(LABELS, marks, "+")
    assert labels.is_control.tolist() == MARKS
    assert labels.vocabulary == ("A", "B")


def test_a_column_of_booleans_marks_cells_unless_it_is_a_label():
    obs = pd.DataFrame({"is_control": MARKS, "A": MARKS, "text": list("abcde")})
    assert named_control("is_control", pd.Series(LABELS), obs) == ["NT_1", "NT_2"]
    for control in ("A", "text", "other", 0, ["NT_1"]):
        assert named_control(control, pd.Series(LABELS), obs) == control


def test_marks_that_labels_contradict_are_refused():
    with pytest.raises(InvalidPerturbationLabelError, match=r"'NT_1'.*`dosage_key`"):
        named_control([True, False, True, False, False], pd.Series(LABELS))
    with pytest.raises(MissingControlError, match="marks no cell"):
        named_control(np.zeros(5, dtype=bool), pd.Series(LABELS))
    with pytest.raises(InvalidArgumentError, match="`control` has 2 booleans for 5 cells"):
        named_control(np.array([True, False]), pd.Series(LABELS))


@pytest.mark.parametrize(
    "control", [np.array("NT"), ("NT" for _ in range(1)), pd.Series(["NT"]), {"NT": 1}, " NT "]
)
def test_labels_of_controls_in_any_form(control):
    assert control_names(control) == ("NT",)


@pytest.mark.parametrize("control", [None, np.nan, pd.NA, pd.NaT, ["NT", pd.NA], [["NT"]]])
def test_missing_labels_of_controls_are_refused(control):
    with pytest.raises(InvalidArgumentError, match="`control` is"):
        control_names(control)
