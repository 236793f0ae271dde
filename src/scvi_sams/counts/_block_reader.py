"""Read rows of a matrix in blocks, from memory or disk."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np
import zarr
from anndata.abc import CSCDataset, CSRDataset
from scipy import sparse

from scvi_sams.exceptions import UnreadableDataError

_READING_ERRORS = (OSError, ValueError, RuntimeError, LookupError)
"""Errors that h5py, zarr, its codecs and scipy raise for damaged data."""


def is_on_disk(values: object) -> bool:
    """Whether a matrix is on disk: sparse or dense, in HDF5 or zarr."""
    return isinstance(values, CSRDataset | CSCDataset | h5py.Dataset | zarr.Array)


class BlockReader:
    """Reads rows of a matrix with one disk access per block.

    A sparse matrix on disk is read from its three arrays: slices of anndata's
    :class:`~anndata.abc.CSRDataset` copy the pointers of all rows each time, which took 15 times as
    long for 256 of 200,000 rows and grows with the file. A matrix that is stored by columns (csc)
    or damaged raises UnreadableDataError; ``location`` is its slot in the AnnData.
    """

    def __init__(self, values: Any, location: str = "adata.X") -> None:
        self.location = location
        self.n_rows, self.n_columns = map(int, values.shape)
        self._values = values
        if isinstance(values, CSCDataset):
            raise UnreadableDataError(
                f"{location} is stored by genes (csc), so reading a few cells would read all. "
                "Write the file again by cells (adata.X = adata.X.tocsr(), then adata.write_h5ad), "
                "or read all of it into memory (anndata.read_h5ad)."
            )
        self._pointers = self._row_pointers() if isinstance(values, CSRDataset) else None

    @property
    def n_stored(self) -> int | None:
        """Number of stored values of a sparse matrix, duplicates included; ``None`` if dense."""
        if self._pointers is not None:
            return int(self._pointers[-1])
        return int(self._values.nnz) if sparse.issparse(self._values) else None

    def read(self, start: int, stop: int) -> np.ndarray | sparse.csr_matrix:
        """Return rows ``start`` to ``stop - 1``; an error if the file is damaged there."""
        if not is_on_disk(self._values):
            return self._values[start:stop]
        try:
            if self._pointers is not None:
                return self._read_sparse(start, stop, self._pointers[start : stop + 1])
            return np.asarray(self._values[start:stop])
        except _READING_ERRORS as error:
            raise UnreadableDataError(
                f"Rows {start} to {stop - 1} of {self.location} cannot be read ({self._file()}): "
                f"{error or type(error).__name__}. The file is damaged or incomplete there: copy "
                "or write it again."
            ) from error

    def read_rows(self, rows: np.ndarray, rows_per_read: int) -> np.ndarray | sparse.csr_matrix:
        """Return one row, dense or csr, for each of some ascending positions, which may repeat.

        Rows are read in blocks, each from its first to its last requested row.
        """
        blocks = []
        # Split at the beginning of the next block.
        for part in np.split(rows, np.flatnonzero(np.diff(rows // rows_per_read)) + 1):
            block = self.read(part[0], part[-1] + 1)
            is_whole = (np.diff(part) == 1).all()
            blocks.append(block if is_whole else block[part - part[0]])
        if sparse.issparse(blocks[0]):
            return sparse.vstack(blocks, format="csr")
        return np.concatenate(blocks)

    def _read_sparse(self, start: int, stop: int, pointers: np.ndarray) -> sparse.csr_matrix:
        entries = slice(int(pointers[0]), int(pointers[-1]))
        group = self._values.group
        rows = sparse.csr_matrix(
            (
                group["data"][entries],
                group["indices"][entries],
                (pointers - pointers[0]).astype(np.int32),
            ),
            shape=(stop - start, self.n_columns),
        )
        check_rows(rows)
        return rows

    def _row_pointers(self) -> np.ndarray:
        group = self._values.group
        try:
            pointers = np.asarray(group["indptr"][:], dtype=np.int64)
            n_entries = (group["data"].shape[0], group["indices"].shape[0])
            if (
                pointers.shape != (self.n_rows + 1,)
                or pointers[0] != 0
                or (pointers[1:] < pointers[:-1]).any()
                or n_entries != (pointers[-1], pointers[-1])
            ):
                raise ValueError("row pointers out of order")
        except _READING_ERRORS as error:
            raise UnreadableDataError(
                f"The row pointers (indptr) of {self.location} do not fit its {self.n_rows} rows "
                f"({self._file()}). The file is damaged or incomplete: copy or write it again."
            ) from error
        return pointers

    def _file(self) -> str:
        stored = self._values.group if isinstance(self._values, CSRDataset) else self._values
        return str(stored.file.filename if hasattr(stored, "file") else stored.store)


def check_rows(rows: sparse.csr_matrix) -> None:
    """Raise ValueError for invalid rows read from disk; sort their genes."""
    # Column numbers out of range would later make scipy write outside of its arrays.
    rows.check_format(full_check=True)
    if not rows.has_sorted_indices:
        rows.sort_indices()
    # A missing chunk of a zarr array reads as zeros, without an error.
    if not rows.has_canonical_format:
        raise ValueError("a gene occurs twice in a cell")
