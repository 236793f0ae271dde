"""Checks of the expression values, and a guard that undoes half-done registrations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from anndata import AnnData
from scipy import sparse

from scvi_sams.data._block_reader import BlockReader
from scvi_sams.exceptions import InvalidCountsError, MissingKeyError

_ROWS_PER_CHUNK = 16_384


@contextmanager
def unchanged_on_error(adata: AnnData) -> Iterator[None]:
    """Give the AnnData back as it was if registration fails half-way.

    scvi-tools registers field by field and writes as it goes; only the slots that it writes
    (``_scvi_*`` columns, matrices and identifiers) are restored, nothing is copied. A view that is
    still a view was not written to.
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


def refuse_invalid_expression(
    values: np.ndarray | sparse.spmatrix | None, *, counts: bool, location: str
) -> None:
    """Raise an error if the values cannot be what the likelihood assumes.

    Parameters
    ----------
    values
        Expression of shape ``(n_cells, n_genes)``; dense or sparse, in memory or on disk.
        Read in chunks of rows.
    counts
        Whether the likelihood is one of counts: whole, non-negative, and no cell without any.
    location
        Where the values stand, for the message.

    Raises
    ------
    InvalidCountsError
        Naming the first offending values and what to do.
    MissingKeyError
        If there are no values.
    UnreadableDataError
        If values on disk cannot be read.
    """
    if values is None:
        raise MissingKeyError(f"{location} is empty. Name the layer with the values as `layer`.")
    reader = BlockReader(values, location)
    for start in range(0, reader.n_rows, _ROWS_PER_CHUNK):
        chunk = reader.read(start, min(start + _ROWS_PER_CHUNK, reader.n_rows))
        entries = np.asarray(chunk.data if sparse.issparse(chunk) else chunk)
        _refuse_non_finite(entries, location)
        if counts:
            _refuse_non_counts(entries, location)
            _refuse_empty_cells(chunk, start, location)


def _refuse_non_finite(entries: np.ndarray, location: str) -> None:
    if np.issubdtype(entries.dtype, np.floating) and not np.isfinite(entries).all():
        n_bad = entries.size - int(np.isfinite(entries).sum())
        raise InvalidCountsError(
            f"{location} holds {n_bad} values that are NaN or infinite. Remove or fill them."
        )


def _refuse_non_counts(entries: np.ndarray, location: str) -> None:
    if entries.size and entries.min() < 0:
        raise InvalidCountsError(
            f"{location} holds negative values (such as {entries.min():g}), which are no counts. "
            "Pass the layer with raw counts as `layer`, or, for values that are already "
            "normalised, use gene_likelihood='normal'."
        )
    fractional = entries[entries != np.rint(entries)]
    if fractional.size:
        raise InvalidCountsError(
            f"{location} holds fractional values (such as {fractional.flat[0]:g}), which are no "
            "counts. Pass the layer with raw counts as `layer`, or, for values that are already "
            "normalised, use gene_likelihood='normal'."
        )


def _refuse_empty_cells(chunk: np.ndarray | sparse.spmatrix, start: int, location: str) -> None:
    empty = np.flatnonzero(np.asarray(chunk.sum(axis=1)).ravel() == 0)
    if empty.size:
        raise InvalidCountsError(
            f"{empty.size} cells have no counts in {location}, the first at position "
            f"{start + int(empty[0])}. Remove them: scanpy.pp.filter_cells(adata, min_counts=1)."
        )
