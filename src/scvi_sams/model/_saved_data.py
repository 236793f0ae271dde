"""Data saved with a model: checks that a file can store them, and whose data a file contains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import write_elem
from scipy import sparse

from scvi_sams.data._field import PerturbationField
from scvi_sams.data._open_screen import open_screen
from scvi_sams.exceptions import SavingError, UnreadableDataError

_CELLS_COMPARED = 256
_SLOTS = ("obsm", "varm", "obsp", "varp", "uns")


def check_writable(adata: AnnData) -> None:
    """Raise an error that names the parts of an AnnData that an h5ad file cannot store.

    Everything except numeric matrices is written to a file in memory.
    """
    with h5py.File("in_memory", "w", driver="core", backing_store=False) as file:
        for slot in ("obs", "var"):
            _check_table(file, f"adata.{slot}", getattr(adata, slot))
        for slot in _SLOTS:
            _check_mapping(file, f"adata.{slot}", getattr(adata, slot))


def _check_table(file: h5py.File, name: str, table: pd.DataFrame) -> None:
    columns = [table.iloc[:, [place]] for place in range(table.shape[1])]
    for column in columns:
        _check(file, f"{name}[{column.columns[0]!r}]", column)
    _check(file, name, table)


def _check_mapping(file: h5py.File, name: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, pd.DataFrame):
            _check_table(file, f"{name}[{key!r}]", value)
        elif isinstance(value, Mapping):
            _check_mapping(file, f"{name}[{key!r}]", value)
        elif not _is_matrix_of_numbers(value):
            _check(file, f"{name}[{key!r}]", value)


def _is_matrix_of_numbers(value: object) -> bool:
    return sparse.issparse(value) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc")


def _check(file: h5py.File, name: str, value: Any) -> None:
    try:
        write_elem(file, "value", value)
    except Exception as error:
        # The errors of h5py and anndata depend on the type of value and the version.
        raise SavingError(
            f"{name} cannot be written to an h5ad file ({error}). Drop it, or make it text "
            "(.astype(str)) or numbers; or save the model without the data."
        ) from error


@contextmanager
def columns_kept(adata: AnnData) -> Iterator[None]:
    """Restore text columns that anndata converts to categories when writing."""
    tables = (adata.obs, adata.var)
    before = [dict(table.items()) for table in tables]
    try:
        yield
    finally:
        for table, columns in zip(tables, before, strict=True):
            for name, column in columns.items():
                if table[name].dtype != column.dtype:
                    table[name] = column


def is_data_of(adata: AnnData | None, layer: str | None, path: Path) -> bool:
    """Whether a file contains the cells, genes and registered labels of an AnnData.

    Expression, of ``layer`` or ``X``, is compared for some of the cells only.
    """
    if adata is None:
        return False
    labels = PerturbationField.attr_key
    some = np.unique(np.linspace(0, adata.n_obs - 1, _CELLS_COMPARED).astype(int))
    try:
        stored = open_screen(path)
        return (
            stored.obs_names.equals(adata.obs_names)
            and stored.var_names.equals(adata.var_names)
            and np.array_equal(stored.obsm[labels], adata.obsm[labels])
            and np.array_equal(_rows(stored, layer, some), _rows(adata, layer, some))
        )
    except (UnreadableDataError, LookupError):  # damaged, or never registered
        return False


def _rows(adata: AnnData, layer: str | None, cells: np.ndarray) -> np.ndarray:
    values = adata.X if layer is None else adata.layers[layer]
    rows = values[cells]
    return rows.toarray() if sparse.issparse(rows) else np.asarray(rows)
