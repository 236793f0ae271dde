"""Columns of doses: each dose goes to the perturbation that stood at its place in the label."""

import numpy as np
import pandas as pd
import pytest

from scvi_sams.exceptions import InvalidDosageError
from scvi_sams.labels._parsing import encode_labels
from scvi_sams.labels._spelling import Spelling


def encode(labels, dosages, *, control=("ctrl",), delimiter="+", vocabulary=None):
    return encode_labels(
        labels, dosages, spelling=Spelling.of(control, delimiter), vocabulary=vocabulary
    )


def test_doses_follow_the_label_as_written(cells):
    labels = cells(["B+A", "A+B", "C+A+B", "ctrl", "C"])
    encoded = encode(labels, cells(["0.5+1", "0.5+1", "3+1+2", "1", "0.25"]))
    np.testing.assert_array_equal(
        encoded.codes, [[0, 1, -1], [0, 1, -1], [0, 1, 2], [-1, -1, -1], [2, -1, -1]]
    )
    np.testing.assert_array_equal(
        encoded.doses, [[1, 0.5, 0], [0.5, 1, 0], [1, 2, 3], [0, 0, 0], [0.25, 0, 0]]
    )


def test_cells_of_one_label_may_have_different_doses(cells):
    encoded = encode(cells(["B+A"] * 3 + ["ctrl"]), cells(["1+2", "3+4", "5", "0"]))
    np.testing.assert_array_equal(encoded.doses, [[2, 1], [4, 3], [5, 5], [0, 0]])


@pytest.mark.parametrize("delimiter", ["_", " & ", "::", "|", ";"])
def test_doses_are_joined_by_the_delimiter_of_the_labels(cells, delimiter):
    labels = cells([f"B{delimiter}A", "ctrl"])
    encoded = encode(labels, cells([f"0.5{delimiter}1", "1"]), delimiter=delimiter)
    np.testing.assert_array_equal(encoded.doses, [[1, 0.5], [0, 0]])


def test_spaces_and_exponents_in_doses_are_read(cells):
    encoded = encode(cells(["B+A", "A", "ctrl"]), cells([" 0.5 + 1e-1", "1E2", "1"]))
    np.testing.assert_allclose(encoded.doses, [[0.1, 0.5], [100, 0], [0, 0]])


@pytest.mark.parametrize("dtype", [float, "float32", "Float64", object, "str", "string"])
def test_one_number_is_the_dose_of_every_name(cells, dtype):
    encoded = encode(cells(["A", "ctrl", "B+A"]), cells([0.5, 1.0, 2.0]).astype(dtype))
    np.testing.assert_array_equal(encoded.doses, [[0.5, 0], [0, 0], [2, 2]])


def test_whole_numbers_are_doses(cells):
    encoded = encode(cells(["A", "ctrl", "B+A"]), cells([5, 0, 10]))
    np.testing.assert_array_equal(encoded.doses, [[5, 0], [0, 0], [10, 10]])


def test_a_category_of_doses_is_read_by_value(cells):
    dosages = cells(["1+2", "9", "3"]).astype("category").cat.set_categories(["3", "x", "9", "1+2"])
    encoded = encode(cells(["B+A", "ctrl", "A"]), dosages)
    np.testing.assert_array_equal(encoded.doses, [[2, 1], [0, 0], [3, 0]])


def test_the_dose_beside_a_control_is_left_out(cells):
    labels = cells(["A+ctrl", "ctrl+A", "ctrl+A+B", "ctrl+ctrl"])
    encoded = encode(labels, cells(["0.5+9", "9+0.5", "9+1+2", "3+4"]))
    np.testing.assert_array_equal(encoded.codes, [[0, -1], [0, -1], [0, 1], [-1, -1]])
    np.testing.assert_array_equal(encoded.doses, [[0.5, 0], [0.5, 0], [1, 2], [0, 0]])


def test_one_number_for_a_name_beside_a_control(cells):
    encoded = encode(cells(["A+ctrl", "ctrl"]), cells(["0.5", "1"]))
    np.testing.assert_array_equal(encoded.doses, [[0.5], [0]])


def test_doses_refer_to_the_given_vocabulary_by_name(cells):
    encoded = encode(cells(["A+B", "C+A"]), cells(["1+2", "3+4"]), vocabulary=["C", "B", "A"])
    np.testing.assert_array_equal(encoded.codes, [[1, 2], [0, 2]])
    np.testing.assert_array_equal(encoded.doses, [[2, 1], [3, 4]])


# A dose of zero


def test_dose_zero_equals_not_given(cells):
    encoded = encode(cells(["A", "A+B", "B", "ctrl"]), cells(["0", "0+2", "1", "1"]))
    np.testing.assert_array_equal(encoded.is_control, [True, False, False, True])
    np.testing.assert_array_equal(encoded.codes, [[-1, -1], [-1, 1], [1, -1], [-1, -1]])
    np.testing.assert_array_equal(encoded.doses, [[0, 0], [0, 2], [1, 0], [0, 0]])


# Control cells need no dose


@pytest.mark.parametrize(
    "dosages",
    [
        pd.Series([np.nan, 0.5, np.nan]),
        pd.Series([np.inf, 0.5, -1.0]),
        pd.Series([pd.NA, 0.5, pd.NA], dtype="Float64"),
        pd.Series([None, "0.5", np.nan], dtype=object),
        pd.Series([None, "0.5", None], dtype="str"),
        pd.Series([pd.NA, "0.5", pd.NA], dtype="string"),
        pd.Series([None, "0.5", None], dtype="category"),
        pd.Series(["vehicle", "0.5", ""], dtype=object),
        pd.Series(["1+2+3", "0.5", "4+5+6"], dtype=object),
    ],
    ids=[
        "NaN",
        "inf and negative",
        "Float64 NA",
        "None",
        "str NaN",
        "string NA",
        "category NaN",
        "words",
        "misaligned",
    ],
)
def test_the_dose_of_control_cells_is_not_read(dosages):
    encoded = encode(pd.Series(["ctrl", "A", "ctrl+ctrl"]), dosages)
    np.testing.assert_array_equal(encoded.codes, [[-1], [0], [-1]])
    np.testing.assert_array_equal(encoded.doses, [[0], [0.5], [0]])


# Doses that cannot be read: the cell and the value are named


@pytest.mark.parametrize("value", [np.nan, -0.5, np.inf, -np.inf])
def test_numbers_that_are_no_dose_are_refused(cells, value):
    with pytest.raises(InvalidDosageError, match="'c2'") as error:
        encode(cells(["ctrl", "A", "B+A"]), cells([1.0, 1.0, value]))
    assert str(value) in str(error.value)
    assert "'B+A'" in str(error.value)


@pytest.mark.parametrize("value", ["nan", "-0.5", "inf", "1+-2", "nan+1", "1+inf"])
def test_text_that_is_no_dose_is_refused(cells, value):
    with pytest.raises(InvalidDosageError, match="'c2'") as error:
        encode(cells(["ctrl", "A", "B+A"]), cells(["1", "1", value]))
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", ["high", "", "1+", "1+high", "1,5", "1_2", "1 2"])
def test_text_that_is_no_number_is_refused(cells, value):
    with pytest.raises(InvalidDosageError, match="not a number") as error:
        encode(cells(["ctrl", "A", "B+A"]), cells(["1", "1", value]))
    assert repr(value) in str(error.value)
    assert "'+'" in str(error.value)


def test_the_cell_of_text_that_is_no_number_is_named(cells):
    with pytest.raises(InvalidDosageError, match="'c2'"):
        encode(cells(["ctrl", "A", "B+A"]), cells(["1", "1", "high"]))


@pytest.mark.parametrize("dtype", ["Float64", "string", object])
def test_a_missing_dose_of_a_perturbed_cell_is_refused(cells, dtype):
    dosages = cells(["1", "1", pd.NA], dtype=object).astype(dtype)
    with pytest.raises(InvalidDosageError):
        encode(cells(["ctrl", "A", "B+A"]), dosages)


@pytest.mark.parametrize(
    ("label", "value", "counts"),
    [
        ("B+A", "1+2+3", "3 values for the 2 names"),
        ("A", "1+2", "2 values for the 1 name of"),
        ("C+B+A", "1+2", "2 values for the 3 names"),
        ("A+ctrl", "1+2+3", "3 values for the 2 names"),
    ],
)
def test_doses_that_do_not_line_up_with_the_label_are_refused(cells, label, value, counts):
    with pytest.raises(InvalidDosageError, match=counts) as error:
        encode(cells(["ctrl", "A", label, label]), cells(["1", "1", value, value]))
    message = str(error.value)
    assert "'c2'" in message
    assert repr(value) in message
    assert repr(label) in message
    assert "2 such cells" in message


def test_a_number_that_holds_the_delimiter_is_one_dose(cells):
    encoded = encode(cells(["A-B", "C", "ctrl"]), cells(["1e-3", "2e-1", "1"]), delimiter="-")
    np.testing.assert_allclose(encoded.doses, [[0.001, 0.001], [0.2, 0], [0, 0]])
