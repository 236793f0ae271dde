"""Convert labels and doses, or a dosage matrix, to padded codes and doses: pure functions.

A screen of a million cells has few distinct labels, so each label is parsed once and the result is
copied to the cells; no cells x perturbations matrix is made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams._checks import as_labels
from scvi_sams._constants import LARGEST_INPUT
from scvi_sams._plurals import counted, plural
from scvi_sams.exceptions import InvalidDosageError, InvalidPerturbationLabelError
from scvi_sams.labels._control import named_control
from scvi_sams.labels._labels import NO_PERTURBATION, Labels
from scvi_sams.labels._names import check_known, factorize, listing, numbers_in, shown
from scvi_sams.labels._spelling import DEFAULT_SPELLING, Spelling


def read_labels(
    labels: Labels | pd.Series | Sequence[str] | np.ndarray,
    control: str | Sequence[str],
    delimiter: str | None,
    *,
    argument: str = "labels",
) -> Labels:
    """Parse labels passed to a public function; parsed labels are returned unchanged.

    ``control`` and ``delimiter`` are as users write them; ``argument`` is the name of the labels
    in messages.
    """
    if isinstance(labels, Labels):
        return labels
    column = as_labels(argument, labels)
    spelling = Spelling.of(named_control(control, column), delimiter)
    return encode_labels(column, spelling=spelling)


def encode_labels(
    labels: pd.Series,
    dosages: pd.Series | None = None,
    *,
    spelling: Spelling,
    vocabulary: Sequence[str] | None = None,
) -> Labels:
    """Encode a label per cell, of any dtype whose text is the label, and its dosage.

    A dosage is a number (the dose of every perturbation of the label) or text such as
    ``"0.5+1.0"``, aligned with the label as written and joined by the same delimiter. Text that
    is a number, such as ``"1e-3"``, is one number whatever the delimiter. Dosages of control
    cells are ignored; without dosages all are 1. Codes refer to ``vocabulary``, the known
    perturbations; ``None``: those of the labels, sorted.
    """
    missing = labels.isna().to_numpy()
    if missing.any():
        raise InvalidPerturbationLabelError(
            f"{missing.sum()} of {counted(len(labels), 'cell')} "
            f"{plural(missing.sum(), 'has', 'have')} no perturbation label (NaN), for example "
            f"{listing(labels.index[missing])}. Drop cells whose perturbation is unknown, or "
            "label them as controls if they are."
        )
    label_of_cell, distinct = factorize(labels, InvalidPerturbationLabelError)
    names_of_label = [spelling.split(label) for label in distinct]
    # In the order of the labels, so that results do not depend on hashing.
    names = dict.fromkeys(name for names in names_of_label for name in names)
    perturbations = [name for name in names if not spelling.is_control(name)]
    if vocabulary is None:
        vocabulary = sorted(perturbations)
    positions = {name: code for code, name in enumerate(vocabulary)}
    check_known(perturbations, positions, spelling.control_label, labels.name)
    n_names = np.array([len(names) for names in names_of_label], dtype=np.intp)
    label_of_name = np.repeat(np.arange(len(n_names)), n_names)
    # Position of each name in its label as written; controls have no code.
    places = np.arange(len(label_of_name)) - np.repeat(np.cumsum(n_names) - n_names, n_names)
    found = [positions.get(name, NO_PERTURBATION) for names in names_of_label for name in names]
    found_codes = np.array(found, dtype=np.int32)
    has_code = found_codes != NO_PERTURBATION
    n_found = np.bincount(label_of_name[has_code], minlength=len(n_names))
    label_codes, label_places = _padded(n_found, found_codes[has_code], places[has_code])
    codes = label_codes[label_of_cell]
    if dosages is None:
        doses = (codes != NO_PERTURBATION).astype(np.float32)
    else:
        doses = _align_dosages(
            dosages,
            codes,
            label_places[label_of_cell],
            n_names[label_of_cell],
            labels,
            spelling.delimiter,
        )
        # Dose zero means not given.
        codes[doses == 0] = NO_PERTURBATION
    return Labels(codes, doses, tuple(vocabulary), spelling)


def encode_dosage_matrix(
    matrix: np.ndarray | sparse.spmatrix | pd.DataFrame,
    names: Sequence[str],
    *,
    spelling: Spelling = DEFAULT_SPELLING,
    vocabulary: Sequence[str] | None = None,
) -> Labels:
    """Encode a cells x perturbations dosage matrix; an all-zero row is a control cell.

    ``names`` are the perturbations of its columns; columns named like controls are ignored. Codes
    refer to ``vocabulary``, the known perturbations, by name, whatever the order of the columns;
    ``None``: the columns with a non-zero entry, in their order. Other columns may be unknown.
    """
    # A copy, so that the user's matrix is not modified.
    table = sparse.csr_matrix(_numeric(matrix), dtype=np.float64, copy=True)
    table.sum_duplicates()
    names = [str(name).strip() for name in names]
    if len(names) != table.shape[1]:
        raise InvalidDosageError(
            f"{counted(len(names), 'perturbation name was', 'perturbation names were')} given for "
            f"a dosage matrix with {counted(table.shape[1], 'column')}. Give one name per column."
        )
    repeated = pd.Index(names)[pd.Index(names).duplicated()]
    if len(repeated):
        raise InvalidDosageError(f"Columns of the dosage matrix share a name: {listing(repeated)}.")
    bad = np.unique(table.data[~((table.data >= 0) & (table.data <= LARGEST_INPUT))])
    if len(bad):
        raise InvalidDosageError(
            f"Dosages must be finite, not negative and at most {LARGEST_INPUT:g}; the dosage "
            f"matrix contains {', '.join(f'{dose:g}' for dose in bad[:5])}. Write 0 where a "
            "perturbation was not given."
        )
    # In the precision of stored doses: what is 0 there was not given either.
    table = table.astype(np.float32)
    table.eliminate_zeros()
    kept = [column for column, name in enumerate(names) if not spelling.is_control(name)]
    if len(kept) < len(names):
        table, names = table[:, kept], [names[column] for column in kept]
    used = np.unique(table.indices)
    if vocabulary is None:
        vocabulary = [names[column] for column in used]
    positions = {name: code for code, name in enumerate(vocabulary)}
    check_known((names[column] for column in used), positions, spelling.control_label)
    column_codes = np.array([positions.get(name, NO_PERTURBATION) for name in names], np.int32)
    codes, doses = _padded(np.diff(table.indptr), column_codes[table.indices], table.data)
    return Labels(codes, doses, tuple(vocabulary), spelling)


def _padded(
    n_of_row: np.ndarray, codes: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Arrange codes, and a value of each, in rows of one width, ascending by code.

    ``n_of_row`` is the number in each row. Returns two arrays, ``(n_rows, n_slots)``.
    """
    n_slots = max(1, int(n_of_row.max(initial=1)))
    filled = np.arange(n_slots) < n_of_row[:, None]
    padded_codes = np.full(filled.shape, NO_PERTURBATION, dtype=np.int32)
    padded_values = np.zeros(filled.shape, dtype=values.dtype)
    padded_codes[filled] = codes
    padded_values[filled] = values
    order = np.argsort(
        np.where(filled, padded_codes, np.iinfo(np.int32).max), axis=1, kind="stable"
    )
    return (
        np.take_along_axis(padded_codes, order, axis=1),
        np.take_along_axis(padded_values, order, axis=1),
    )


def _align_dosages(
    dosages: pd.Series,
    codes: np.ndarray,
    places: np.ndarray,
    n_names: np.ndarray,
    labels: pd.Series,
    delimiter: str | None,
) -> np.ndarray:
    """Assign to every code the dose at the same position of the label as written.

    ``places`` is the position of each perturbation, ``n_names`` the number of names of each label,
    with controls. Doses of cells without codes are ignored. Returns float32 of the shape of
    ``codes``.
    """
    if len(dosages) != len(labels):
        raise InvalidDosageError(
            f"{counted(len(dosages), 'dosage was', 'dosages were')} given for "
            f"{counted(len(labels), 'label')}. Give one per label."
        )
    perturbed = np.flatnonzero((codes != NO_PERTURBATION).any(axis=1))
    dosages, labels, n_names = dosages.iloc[perturbed], labels.iloc[perturbed], n_names[perturbed]
    given, places = codes[perturbed] != NO_PERTURBATION, places[perturbed]

    def check_cells(bad: Any, says: Callable[[int], str], advice: str = "") -> None:
        if bad.any():
            cell = int(np.flatnonzero(bad)[0])
            raise InvalidDosageError(
                f"The dosage {shown(dosages.iloc[cell])} of cell {shown(labels.index[cell])} "
                f"({shown(labels.iloc[cell])}) {says(cell)} "
                f"({counted(bad.sum(), 'such cell')}).{advice}"
            )

    value_of_cell, values = factorize(dosages, InvalidDosageError)
    numbers = [read_numbers(value, delimiter) for value in values]
    n_numbers = np.array([len(row) for row in numbers], dtype=np.intp)[value_of_cell]
    check_cells(n_numbers == 0, lambda _: f"is not a number, nor numbers joined by {delimiter!r}")
    check_cells(
        (n_numbers != 1) & (n_numbers != n_names),
        lambda cell: (
            f"has {counted(n_numbers[cell], 'value')} for the {counted(n_names[cell], 'name')} of "
            "its label"
        ),
        " Give one value for all names, or one per name in the order of the label.",
    )
    table = np.full((len(numbers), max(map(len, numbers), default=1)), np.nan)
    for row, parsed in enumerate(numbers):
        table[row, : len(parsed)] = parsed
    places = np.where((n_numbers[:, None] > 1) & given, places, 0)
    aligned = np.where(given, table[value_of_cell[:, None], places], 0)
    check_cells(
        ~((aligned >= 0) & (aligned <= LARGEST_INPUT)).all(axis=1),
        lambda _: f"is not finite, is negative, or is larger than {LARGEST_INPUT:g}",
    )
    doses = np.zeros(codes.shape, dtype=np.float32)
    doses[perturbed] = aligned
    return doses


def read_numbers(value: object, delimiter: str | None) -> list[float]:
    """Parse the numbers of a dosage; an empty list if it is anything else."""
    parts: list[object] = [value]
    if value is None or value is pd.NA:
        parts = [np.nan]
    elif isinstance(value, str) and delimiter and _number(value) is None:
        # The sign of an exponent, as in "1e-3-2e-1", is not a delimiter.
        parts = list(re.split(r"(?<![0-9.][eE])" + re.escape(delimiter), value))
    numbers = [number for number in map(_number, parts) if number is not None]
    return numbers if len(numbers) == len(parts) else []


def _number(value: object) -> float | None:
    # Python parses "1_2" as 12.
    if isinstance(value, str) and "_" in value:
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None


def _numeric(
    matrix: np.ndarray | sparse.spmatrix | pd.DataFrame,
) -> np.ndarray | sparse.spmatrix:
    """Return the values of a table as numbers; an error shows text and missing values."""
    values = matrix.to_numpy() if isinstance(matrix, pd.DataFrame) else matrix
    if values.ndim != 2:
        raise InvalidDosageError(
            f"The dosage matrix has {values.ndim} dimensions. Give one row per cell and one column "
            "per perturbation."
        )
    if values.dtype.kind in "biuf":
        return values
    if sparse.issparse(values) or values.dtype.kind in "mMc":
        raise InvalidDosageError(
            f"The dosage matrix is of type {values.dtype}, but dosages must be numbers. Convert it."
        )
    entries = pd.Series(values.ravel())
    numbers, _ = numbers_in(entries)
    bad = entries[np.isnan(numbers)]
    if len(bad):
        raise InvalidDosageError(
            f"The dosage matrix contains {listing(bad.unique())}, but dosages must be numbers. "
            "Write 0 where a perturbation was not given."
        )
    return numbers.reshape(values.shape)
