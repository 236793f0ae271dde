"""Checks of expression values, and a guard that reverts incomplete registrations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from anndata import AnnData
from scipy import sparse

from scvi_sams._constants import LARGEST_COUNT, LARGEST_INPUT
from scvi_sams._plurals import counted
from scvi_sams.counts._block_reader import BlockReader, is_on_disk
from scvi_sams.exceptions import (
    InvalidCountsError,
    MissingKeyError,
    SAMSError,
    UnreadableDataError,
)

_ROWS_PER_CHUNK = 16_384
_CELLS_SAMPLED = 256
"""Cells whose sums represent all: if log sizes have an SD of 0.5, their median has an SE of 4 %."""
_FOR_NORMALISED_VALUES = (
    ", or, for values that are already normalised, use gene_likelihood='normal'"
)


@contextmanager
def unchanged_on_error(adata: AnnData) -> Iterator[None]:
    """Restore the AnnData if registration fails.

    scvi-tools registers field by field and writes immediately; only the slots that it writes
    (``_scvi_*`` columns, matrices and identifiers) are restored, nothing is copied. An AnnData that
    is still a view was not written to.
    """
    slots = (adata.obs, adata.obsm, adata.uns)
    before = [{key: slot[key] for key in _keys(slot)} for slot in slots]
    try:
        yield
    except BaseException:
        if adata.is_view:
            raise
        for slot, kept in zip((adata.obs, adata.obsm, adata.uns), before, strict=True):
            for key in _keys(slot):
                if key not in kept:
                    del slot[key]
            for key, value in kept.items():
                slot[key] = value
        raise


def _keys(slot: object) -> list[str]:
    return [key for key in slot if str(key).startswith("_scvi_")]  # type: ignore[attr-defined]


def validate_expression(
    values: np.ndarray | sparse.spmatrix | None,
    *,
    counts: bool,
    location: str,
    layers: Sequence[str] = (),
) -> None:
    """Raise if expression, in memory or on disk, does not fit the likelihood.

    It must exist, be readable, numeric and finite. Counts must also be non-negative integers that
    are exact in single precision, and every cell must have some. Read in chunks of rows;
    ``location`` names the slot of the values, and ``layers`` those that the message suggests.
    """
    if values is None:
        raise MissingKeyError(f"{location} is empty. Name the layer with the values as `layer`.")
    _check_numeric(values, location)
    _check_matrix_intact(values, location)
    reader = BlockReader(values, location)
    for start in range(0, reader.n_rows, _ROWS_PER_CHUNK):
        chunk = reader.read(start, min(start + _ROWS_PER_CHUNK, reader.n_rows))
        entries = np.asarray(chunk.data if sparse.issparse(chunk) else chunk)
        n_bad = int(entries.size - np.count_nonzero(np.isfinite(entries)))
        if n_bad:
            raise InvalidCountsError(
                f"{location} contains {counted(n_bad, 'value that is', 'values that are')} NaN or "
                "infinite. Remove or fill them."
            )
        if counts:
            check_counts(entries, location, layers=layers)
            _check_no_empty_cells(chunk, start, location)
        else:
            _check_not_huge(entries, LARGEST_INPUT, location)


def sums_of_some_cells(values: Any, location: str) -> np.ndarray | None:
    """Sums of the counts of evenly spaced cells; ``None`` unless these have valid counts.

    Few are read, because each of them on disk is a disk access; ``location`` names the slot.
    """
    try:
        _check_numeric(values, location)
        _check_matrix_intact(values, location)
        n_cells = values.shape[0]
        rows = np.unique(np.linspace(0, n_cells - 1, min(n_cells, _CELLS_SAMPLED)).astype(np.int64))
        sample = sparse.csr_matrix(BlockReader(values, location).read_rows(rows, 1))
        check_counts(sample.data, location)
    except SAMSError:
        return None
    return np.asarray(sample.sum(axis=1, dtype=np.float64)).ravel()


def _check_numeric(values: Any, location: str) -> None:
    if np.ma.isMaskedArray(values):
        raise InvalidCountsError(f"{location} is a masked array. Fill it: adata.X.filled(0).")
    in_memory = isinstance(values, np.ndarray) or getattr(values, "format", "") in ("csr", "csc")
    if not in_memory and not is_on_disk(values):
        raise InvalidCountsError(
            f"{location} is a {type(values).__module__}.{type(values).__name__}, which cannot be "
            "read. Make it a numpy array or a csr matrix (adata.to_memory() loads lazy data)."
        )
    if values.dtype.kind not in "biuf":
        raise InvalidCountsError(
            f"{location} is of type {values.dtype}, but expression must be numbers. Convert it: "
            "adata.X = adata.X.astype('float32')."
        )


def _check_matrix_intact(values: Any, location: str) -> None:
    """Raise if indices of a sparse matrix in memory are out of range.

    scipy does not check them and would read memory outside of the matrix.
    """
    if not sparse.issparse(values):
        return
    n_rows, n_columns = values.shape if values.format == "csr" else values.shape[::-1]
    pointers, indices = values.indptr, values.indices
    is_damaged = (
        len(pointers) != n_rows + 1
        or pointers[0] != 0
        or (np.diff(pointers) < 0).any()
        or pointers[-1] > min(len(indices), len(values.data))
        or (len(indices) and (indices.min() < 0 or indices.max() >= n_columns))
    )
    if is_damaged:
        raise UnreadableDataError(
            f"The sparse matrix in {location} has indices outside of its {values.shape[0]} "
            f"cells x {values.shape[1]} genes. It is damaged: read or make it again."
        )


def check_counts(
    entries: np.ndarray,
    location: str,
    *,
    normalised: str = _FOR_NORMALISED_VALUES,
    layers: Sequence[str] = (),
) -> None:
    """Raise if values are negative, fractional or too large.

    ``location`` names them, ``normalised`` is advice for values that are not counts, and
    ``layers`` are those of the AnnData.
    """
    there = f" (layers: {', '.join(map(repr, layers[:5]))})" if layers else ""
    negative, fractional = entries[entries < 0], entries[entries != np.rint(entries)]
    for kind, bad in (("negative", negative[:1]), ("fractional", fractional[:1])):
        if bad.size:
            raise InvalidCountsError(
                f"{location} contains {kind} values (such as {bad[0]:g}), which are not counts. "
                f"Pass the layer with raw counts as `layer`{there}{normalised}."
            )
    _check_not_huge(entries, LARGEST_COUNT, location)


def _check_not_huge(entries: np.ndarray, largest: float, location: str) -> None:
    if not entries.size:
        return
    # As Python numbers: unsigned ones cannot be negated.
    worst = max(float(entries.max()), float(entries.min()), key=abs)
    if abs(worst) > largest:
        raise InvalidCountsError(
            f"{location} contains values as large as {worst:g}; the largest supported value is "
            f"{largest:g}. Check what the values are, and scale or remove them."
        )


def _check_no_empty_cells(chunk: np.ndarray | sparse.spmatrix, start: int, location: str) -> None:
    empty = np.flatnonzero(np.asarray(chunk.sum(axis=1)).ravel() == 0)
    if empty.size:
        raise InvalidCountsError(
            f"{counted(empty.size, 'cell has', 'cells have')} no counts in {location}, the first "
            f"at position {start + int(empty[0])}. Remove them: scanpy.pp.filter_cells(adata, "
            "min_counts=1)."
        )
