"""Dosage matrices: the same codes as labels with doses, whatever the form of the matrix."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scvi_sams.exceptions import InvalidDosageError, UnknownPerturbationError
from scvi_sams.labels._parsing import encode_dosage_matrix, encode_labels
from scvi_sams.labels._spelling import Spelling

LABELS = ["ctrl", "A", "B", "C+A", "C+B+A"]
DOSAGES = ["0", "0.5", "2", "0.25+1", "3+2+1"]
NAMES = ["A", "B", "C"]
MATRIX = np.array([[0, 0, 0], [0.5, 0, 0], [0, 2, 0], [1, 0, 0.25], [1, 2, 3]])
FORMS = {
    "ndarray": np.asarray,
    "float32": np.float32,
    "csr": sparse.csr_matrix,
    "csr array": sparse.csr_array,
    "csc": sparse.csc_matrix,
    "DataFrame": lambda values: pd.DataFrame(values, columns=[f"x{i}" for i in range(3)]),
}


def doses_by_name(encoded):
    """Each cell's perturbations and doses; a perturbation that stands twice shows as a list."""
    cells = [{} for _ in encoded.codes]
    for cell, slot in np.argwhere(encoded.codes >= 0):
        name = encoded.vocabulary[encoded.codes[cell, slot]]
        cells[cell].setdefault(name, []).append(float(encoded.doses[cell, slot]))
    return cells


@pytest.fixture
def from_labels(cells):
    return encode_labels(cells(LABELS), cells(DOSAGES), spelling=Spelling(("ctrl",), "+"))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_codes_of_the_labels(from_labels, form):
    encoded = encode_dosage_matrix(FORMS[form](MATRIX), NAMES)
    assert encoded.vocabulary == from_labels.vocabulary
    np.testing.assert_array_equal(encoded.codes, from_labels.codes)
    np.testing.assert_array_equal(encoded.doses, from_labels.doses)
    np.testing.assert_array_equal(encoded.is_control, [True, False, False, False, False])


def test_codes_and_doses_written_out():
    encoded = encode_dosage_matrix(MATRIX, NAMES)
    np.testing.assert_array_equal(
        encoded.codes, [[-1, -1, -1], [0, -1, -1], [1, -1, -1], [0, 2, -1], [0, 1, 2]]
    )
    np.testing.assert_array_equal(
        encoded.doses, [[0, 0, 0], [0.5, 0, 0], [2, 0, 0], [1, 0.25, 0], [1, 2, 3]]
    )


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int64, np.float16])
def test_indicators_of_any_type_are_doses_of_one(dtype):
    encoded = encode_dosage_matrix(np.array([[0, 0], [1, 0], [1, 1]], dtype=dtype), ["A", "B"])
    np.testing.assert_array_equal(encoded.codes, [[-1, -1], [0, -1], [0, 1]])
    np.testing.assert_array_equal(encoded.doses, [[0, 0], [1, 0], [1, 1]])


@pytest.mark.parametrize("order", [[2, 1, 0], [1, 2, 0], [2, 0, 1]])
def test_columns_in_another_order_mean_the_same_perturbations(from_labels, order):
    encoded = encode_dosage_matrix(MATRIX[:, order], [NAMES[column] for column in order])
    assert doses_by_name(encoded) == doses_by_name(from_labels)
    assert (np.diff(np.where(encoded.codes < 0, 9, encoded.codes), axis=1) >= 0).all()


def test_columns_that_nobody_received_are_no_perturbations():
    values = np.insert(MATRIX, 1, 0, axis=1)
    encoded = encode_dosage_matrix(values, ["A", "unused", "B", "C"])
    assert encoded.vocabulary == ("A", "B", "C")
    np.testing.assert_array_equal(encoded.codes[4], [0, 1, 2])


# Data encoded by a vocabulary that is already known


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
@pytest.mark.parametrize("form", ["ndarray", "csr", "csc"])
def test_permuted_columns_are_encoded_by_name(form, order):
    expected = encode_dosage_matrix(MATRIX, NAMES)
    permuted = FORMS[form](MATRIX[:, order])
    encoded = encode_dosage_matrix(permuted, [NAMES[i] for i in order], vocabulary=NAMES)
    np.testing.assert_array_equal(encoded.codes, expected.codes)
    np.testing.assert_array_equal(encoded.doses, expected.doses)


def test_a_known_perturbation_may_be_absent_from_the_columns():
    encoded = encode_dosage_matrix(np.array([[2.0], [0]]), ["C"], vocabulary=["A", "B", "C"])
    np.testing.assert_array_equal(encoded.codes, [[2], [-1]])
    np.testing.assert_array_equal(encoded.doses, [[2], [0]])


def test_an_unknown_column_is_harmless_while_nobody_received_it():
    encoded = encode_dosage_matrix(np.array([[0.0, 2], [0, 0]]), ["Q", "B"], vocabulary=["A", "B"])
    np.testing.assert_array_equal(encoded.codes, [[1], [-1]])


@pytest.mark.parametrize("form", ["ndarray", "csr", "DataFrame"])
def test_an_unknown_column_that_somebody_received_is_named(form):
    with pytest.raises(UnknownPerturbationError, match="Unknown perturbation: 'KLF12'") as error:
        encode_dosage_matrix(
            FORMS[form](MATRIX), ["A", "B", "KLF12"], vocabulary=["A", "B", "KLF1"]
        )
    assert "did you mean 'KLF1'" in str(error.value)


# Sparse matrices as they come


def stored(matrix):
    return [matrix.data.copy(), matrix.indices.copy(), matrix.indptr.copy(), matrix.nnz]


def csr_with_explicit_zeros():
    data = np.array([0, 0.5, 0, 2, 1], dtype=np.float32)
    return sparse.csr_matrix((data, [0, 0, 1, 1, 0], [0, 1, 2, 4, 5]), shape=(4, 2))


def test_explicit_zeros_are_not_given():
    encoded = encode_dosage_matrix(csr_with_explicit_zeros(), ["A", "B"])
    np.testing.assert_array_equal(encoded.codes, [[-1], [0], [1], [0]])
    np.testing.assert_array_equal(encoded.doses, [[0], [0.5], [2], [1]])


def test_a_column_of_explicit_zeros_is_no_perturbation():
    matrix = sparse.csr_matrix((np.zeros(1), ([0], [1])), shape=(2, 2)) + sparse.csr_matrix(
        [[0, 0], [1.0, 0]]
    )
    assert encode_dosage_matrix(matrix, ["A", "B"]).vocabulary == ("A",)


def test_unsorted_entries_give_ascending_codes():
    matrix = sparse.csr_matrix((np.float32([3, 1]), [2, 0], [0, 2]), shape=(1, 3))
    encoded = encode_dosage_matrix(matrix, NAMES, vocabulary=NAMES)
    np.testing.assert_array_equal(encoded.codes, [[0, 2]])
    np.testing.assert_array_equal(encoded.doses, [[1, 3]])


def test_entries_stored_twice_are_added_up_as_scipy_does():
    matrix = sparse.csr_matrix((np.float32([0.25, 0.5]), [1, 1], [0, 0, 2]), shape=(2, 2))
    encoded = encode_dosage_matrix(matrix, ["A", "B"])
    assert doses_by_name(encoded) == [{}, {"B": [0.75]}]
    assert encoded.codes.shape == (2, 1)


@pytest.mark.parametrize(
    "matrix",
    [
        csr_with_explicit_zeros(),
        sparse.csr_matrix((np.float32([3, 1]), [2, 0], [0, 2]), shape=(1, 3)),
        sparse.csr_matrix((np.float32([0.25, 0.5]), [1, 1], [0, 0, 2]), shape=(2, 2)),
    ],
    ids=["explicit zeros", "unsorted", "stored twice"],
)
def test_the_matrix_of_the_user_is_left_as_it_is(matrix):
    before = stored(matrix)
    encode_dosage_matrix(matrix, NAMES[: matrix.shape[1]])
    for now, then in zip(stored(matrix), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_a_refused_matrix_is_left_as_it_is():
    matrix = csr_with_explicit_zeros()
    matrix.data[4] = -1
    before = stored(matrix)
    with pytest.raises(InvalidDosageError):
        encode_dosage_matrix(matrix, ["A", "B"])
    for now, then in zip(stored(matrix), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_a_wide_sparse_matrix_is_encoded_without_becoming_dense():
    # 20,000 cells x 200,000 columns: 16 GB if it were dense.
    n_cells, n_names = 20_000, 200_000
    columns = np.arange(n_cells) * 10
    matrix = sparse.csr_matrix(
        (np.ones(n_cells, np.float32), columns, np.arange(n_cells + 1)), shape=(n_cells, n_names)
    )
    encoded = encode_dosage_matrix(matrix, np.arange(n_names).astype(str))
    assert encoded.vocabulary[:3] == ("0", "10", "20")
    np.testing.assert_array_equal(encoded.codes, np.arange(n_cells)[:, None])


# Matrices that cannot be read


@pytest.mark.parametrize("form", ["ndarray", "csr", "DataFrame"])
@pytest.mark.parametrize("value", [np.nan, -0.25, np.inf, -np.inf])
def test_entries_that_are_no_dose_are_named(form, value):
    values = MATRIX.copy()
    values[1, 0] = value
    with pytest.raises(InvalidDosageError, match="Write 0 where") as error:
        encode_dosage_matrix(FORMS[form](values), NAMES)
    assert str(value) in str(error.value)


def test_entries_are_named_as_the_user_wrote_them():
    with pytest.raises(InvalidDosageError, match=r"-0\.3[^0-9]"):
        encode_dosage_matrix(np.array([[0.0], [-0.3]]), ["A"])


def test_text_in_a_dosage_table_is_refused():
    table = pd.DataFrame({"A": ["0", "high"]})
    with pytest.raises(InvalidDosageError, match="high"):
        encode_dosage_matrix(table, ["A"])


@pytest.mark.parametrize("names", [["A", "B"], ["A", "B", "C", "D"], []])
def test_names_that_do_not_fit_the_columns_are_counted(names):
    with pytest.raises(InvalidDosageError, match=f"{len(names)} perturbation names.* 3 columns"):
        encode_dosage_matrix(MATRIX, names)


@pytest.mark.parametrize("names", [["A", "B", "A"], [1, "1", "B"]])
def test_columns_that_share_a_name_are_refused(names):
    with pytest.raises(InvalidDosageError, match=f"share a name: '{names[0]}'"):
        encode_dosage_matrix(MATRIX, names)


def test_names_need_not_be_text():
    encoded = encode_dosage_matrix(MATRIX, pd.Index([10, 9, 8]))
    assert encoded.vocabulary == ("10", "9", "8")


@pytest.mark.parametrize(
    ("matrix", "named"),
    [
        (np.array([[1, 2]], dtype="datetime64[D]"), "type datetime64"),
        (np.array([[1, 2]], dtype="timedelta64[s]"), "type timedelta64"),
        (np.array([[1 + 0j, 0]]), "type complex128"),
        (sparse.csr_matrix(np.array([[1 + 0j, 0]])), "type complex128"),
        (np.array([[1, 2 + 1j]], dtype=object), r"\(2\+1j\)"),
        (np.array([[1, "much"]], dtype=object), "'much'"),
    ],
    ids=["dates", "times", "complex", "sparse complex", "one complex", "text"],
)
def test_what_is_no_number_is_no_dose(matrix, named):
    with pytest.raises(InvalidDosageError, match=named):
        encode_dosage_matrix(matrix, ["A", "B"], spelling=Spelling(("control",), "+"))
