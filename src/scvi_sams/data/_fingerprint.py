"""Detect changes of registered data since they were read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scvi_sams.counts._block_reader import BlockReader, is_on_disk
from scvi_sams.exceptions import RegistrationError
from scvi_sams.labels._names import factorize

_VALUES_SAMPLED = 2**18
"""Number of values read. Of larger matrices evenly spaced rows are read, which takes some
milliseconds: normalising, scaling, sorting or replacing the matrix changes them."""
_FEWEST_ROWS = 64
_ROWS_ON_DISK = 8
"""Number of these rows on disk, each of which is a disk access."""
_COLUMNS = (
    "perturbation_key",
    "dosage_key",
    "batch_key",
    "size_factor_key",
    "guide_key",
    "context_key",
)
_LISTS_OF_COLUMNS = ("categorical_covariate_keys", "continuous_covariate_keys")


def registered_parts(adata: AnnData, arguments: Mapping[str, Any]) -> dict[str, str]:
    """Digest what was registered, except the expression, by its slot in the AnnData.

    ``arguments`` are those of ``setup_anndata``. Genes, labels, doses and covariates are read in
    full; missing slots are omitted.
    """
    parts = {
        "the number of cells": str(adata.n_obs),
        "adata.var_names": _digest_of_text(adata.var_names),
    }
    columns = [arguments[key] for key in _COLUMNS]
    columns += [key for keys in _LISTS_OF_COLUMNS for key in arguments[keys] or []]
    for key in columns:
        if key is not None and key in adata.obs:
            parts[f"adata.obs[{key!r}]"] = column_digest(adata.obs[key])
        elif key is not None and key in (arguments["guide_key"], arguments["context_key"]):
            # Other cells do not require it: a column added later is a change.
            parts[f"adata.obs[{key!r}]"] = "no column"
    key = arguments["dosage_obsm_key"]
    if key is not None and key in adata.obsm:
        parts[f"adata.obsm[{key!r}]"] = _table_digest(adata.obsm[key], key)
    names = arguments["perturbation_names"]
    if isinstance(names, str) and names in adata.uns:
        parts[f"adata.uns[{names!r}]"] = _digest_of_text(adata.uns[names])
    return parts


def changed_parts(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of changed parts."""
    return [name for name, digest in before.items() if now.get(name) != digest]


def column_digest(column: pd.Series) -> str:
    """Digest a column by its values: text and categories of the same values are the same."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        kind = column.cat.categories.dtype
        column = column.astype(kind) if pd.api.types.is_any_real_numeric_dtype(kind) else column
    if pd.api.types.is_any_real_numeric_dtype(column.dtype):
        return _digest(column.to_numpy(dtype=np.float64, na_value=np.nan))
    numbers, distinct = factorize(column, RegistrationError)
    return _digest(numbers.astype(np.int64)) + _digest_of_text(distinct)


def values_digest(values: Any, location: str) -> str:
    """Digest a matrix by its values in some rows: dense and sparse ones can be the same.

    Values are compared in single precision, as models read them. ``location`` names the slot.
    """
    if values is None or getattr(values, "ndim", 2) != 2:
        return "no matrix"
    n_rows, n_columns = values.shape
    on_disk = is_on_disk(values)
    n_read = _ROWS_ON_DISK if on_disk else max(_FEWEST_ROWS, _VALUES_SAMPLED // max(n_columns, 1))
    rows = np.linspace(0, n_rows - 1, min(n_rows, n_read)).astype(np.int64)
    if not len(rows):
        return str(values.shape)
    sample = BlockReader(values, location).read_rows(rows, 1) if on_disk else values[rows]
    with np.errstate(over="ignore"):
        read = sparse.csr_matrix(sample, dtype=np.float32, copy=True)
    read.sum_duplicates()
    read.eliminate_zeros()
    places = (np.array(values.shape), read.indptr, read.indices)
    return _digest(*(part.astype(np.int64) for part in places), read.data)


def _table_digest(table: Any, key: str) -> str:
    if not isinstance(table, pd.DataFrame):
        return values_digest(table, f"adata.obsm[{key!r}]")
    values = table.to_numpy()
    if values.dtype.kind in "biuf":
        return _digest_of_text(table.columns) + values_digest(values, f"adata.obsm[{key!r}]")
    columns = "".join(column_digest(column) for _, column in table.items())
    return _digest_of_text(table.columns) + columns


def _digest_of_text(values: Any) -> str:
    return _digest("\n".join(map(str, np.asarray(values, dtype=object).tolist())).encode())


def _digest(*parts: np.ndarray | bytes) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part if isinstance(part, bytes) else part.tobytes())
    return found.hexdigest()
