"""A cells x perturbations dosage matrix to padded codes and doses: pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams._constants import LARGEST_INPUT
from scvi_sams.exceptions import InvalidDosageError
from scvi_sams.labels._labels import NO_PERTURBATION, Labels
from scvi_sams.labels._names import check_known, listing
from scvi_sams.labels._spelling import DEFAULT_SPELLING, Spelling


def encode_dosage_matrix(
    matrix: np.ndarray | sparse.spmatrix | pd.DataFrame,
    names: Sequence[str],
    *,
    spelling: Spelling = DEFAULT_SPELLING,
    vocabulary: Sequence[str] | None = None,
) -> Labels:
    """Encode a cells x perturbations dosage matrix; an all-zero row is a control cell.

    Parameters
    ----------
    matrix
        Dosages of shape ``(n_cells, n_names)``; left as it is.
    names
        Perturbation of each column.
    spelling
        How labels are written: columns of its control names stand for "nothing" and are left out.
    vocabulary
        Known perturbations; codes refer to it by name, whatever the order of the columns. ``None``
        takes the columns that have a non-zero entry, in their order.

    Raises
    ------
    InvalidDosageError
        If the matrix has negative, missing, infinite or huge entries, or names do not fit its
        columns.
    UnknownPerturbationError
        If a column with non-zero entries is not in ``vocabulary``.
    """
    # A copy, because what is tidied here is the user's.
    table = sparse.csr_matrix(_numeric(matrix), dtype=np.float64, copy=True)
    table.sum_duplicates()
    names = [str(name).strip() for name in names]
    _check_names(names, table.shape[1])
    _check_doses(table.data)
    # As doses are kept: what is too small for that was not given either.
    table = table.astype(np.float32)
    table.eliminate_zeros()
    kept = [column for column, name in enumerate(names) if name not in spelling.control]
    if len(kept) < len(names):
        table, names = table[:, kept], [names[column] for column in kept]
    used = np.unique(table.indices)
    if vocabulary is None:
        vocabulary = [names[column] for column in used]
    positions = {name: code for code, name in enumerate(vocabulary)}
    check_known((names[column] for column in used), positions)
    column_codes = np.array([positions.get(name, NO_PERTURBATION) for name in names], np.int32)
    return Labels(*_pad_rows(table, column_codes), tuple(vocabulary), spelling)


def _pad_rows(table: sparse.csr_matrix, column_codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes, ascending in each row, and their doses, ``(n_cells, n_slots)`` each."""
    n_given = np.diff(table.indptr)
    n_slots = max(1, int(n_given.max(initial=0)))
    codes = np.full((table.shape[0], n_slots), NO_PERTURBATION, dtype=np.int32)
    doses = np.zeros((table.shape[0], n_slots), dtype=np.float32)
    filled = np.arange(n_slots) < n_given[:, None]
    codes[filled] = column_codes[table.indices]
    doses[filled] = table.data
    # Columns may stand in another order than the vocabulary: sort each row, empty slots last.
    order = np.argsort(np.where(filled, codes, np.iinfo(np.int32).max), axis=1, kind="stable")
    return np.take_along_axis(codes, order, axis=1), np.take_along_axis(doses, order, axis=1)


def _numeric(
    matrix: np.ndarray | sparse.spmatrix | pd.DataFrame,
) -> np.ndarray | sparse.spmatrix:
    """Return the values of a table as numbers; text and missing values are named."""
    values = matrix.to_numpy() if isinstance(matrix, pd.DataFrame) else matrix
    if values.ndim != 2:
        raise InvalidDosageError(
            f"The dosage matrix has {values.ndim} dimensions. Give one row per cell and one column "
            "per perturbation."
        )
    if values.dtype.kind in "biuf":
        return values
    # pandas counts dates in nanoseconds, which no one means.
    if sparse.issparse(values) or values.dtype.kind in "mMc":
        raise InvalidDosageError(
            f"The dosage matrix is of type {values.dtype}: dosages are numbers. Convert it."
        )
    numbers = pd.to_numeric(pd.Series(values.ravel()), errors="coerce")
    cells = pd.Series(values.ravel())
    is_complex = cells.map(lambda value: isinstance(value, complex)).to_numpy(dtype=bool)
    bad = cells[numbers.isna().to_numpy() | is_complex]
    if len(bad):
        raise InvalidDosageError(
            f"The dosage matrix holds {listing(bad.unique())}: dosages are numbers. Write 0 where "
            "a perturbation was not given."
        )
    return numbers.to_numpy(dtype=np.float64).reshape(values.shape)


def _check_names(names: list[str], n_columns: int) -> None:
    if len(names) != n_columns:
        raise InvalidDosageError(
            f"{len(names)} perturbation names were given for a dosage matrix with "
            f"{n_columns} columns. Give one name per column."
        )
    index = pd.Index(names)
    if index.has_duplicates:
        raise InvalidDosageError(
            f"Columns of the dosage matrix share a name: {listing(index[index.duplicated()])}."
        )


def _check_doses(doses: np.ndarray) -> None:
    bad = np.unique(doses[~((doses >= 0) & (doses <= LARGEST_INPUT))])
    if len(bad):
        raise InvalidDosageError(
            f"Dosages must be finite, not negative and at most {LARGEST_INPUT:g}; the dosage "
            f"matrix holds {', '.join(f'{dose:g}' for dose in bad[:5])}. Write 0 where a "
            "perturbation was not given."
        )
