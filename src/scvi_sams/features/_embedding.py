"""Embeddings of genes or drugs from files in common formats."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from scvi_sams._checks import as_names, as_path, check_key
from scvi_sams._files import UNREADABLE
from scvi_sams.exceptions import (
    InvalidArgumentError,
    MissingPackageError,
    SAMSError,
    UnknownPerturbationError,
    UnreadableDataError,
)
from scvi_sams.features._table import FeatureTable, as_feature_table
from scvi_sams.labels._names import check_has, listing

_PICKLES = (".pkl", ".pickle", ".p", ".joblib", ".pt", ".pth")
_UNPICKLED = (
    "Loading a pickle can run arbitrary code. Convert it once, in an environment where that is "
    "safe: pd.DataFrame(matrix, index=names).to_csv('embedding.csv'), "
    "or np.savez('embedding.npz', names=np.array(names, dtype=str), matrix=matrix)."
)


def from_embedding(
    path: str | os.PathLike[str], *, genes: Iterable[str] | None = None, key: str | None = None
) -> pd.DataFrame:
    """Read an embedding: a vector of numbers for each gene or drug.

    Parameters
    ----------
    path
        One of:

        - ``.csv`` or ``.tsv`` (also ``.gz``): names in the first column, a header in the first
          line;
        - ``.npz``: an array of names (text) and a matrix, or one array per name;
        - ``.h5ad``: ``obs_names``, and ``X`` or a matrix in ``obsm``;
        - ``.parquet``: names in the index, or in the only column of text. Requires pyarrow.
    genes
        Names to keep, in this order; names without a vector are omitted. Default: all.
    key
        Matrix of ``obsm`` of an ``.h5ad`` (``X`` by default), or array of an ``.npz`` with several.

    Returns
    -------
    Names x dimensions, float32; sparse columns if the matrix of an ``.h5ad`` is sparse.

    Raises
    ------
    UnreadableDataError
        If the file is missing, damaged, or does not match its ending.
    InvalidArgumentError
        If it has another format, such as a pickle, or names occur twice, or a value is missing or
        not a number.
    MissingKeyError
        If the file does not contain ``key``.
    MissingPackageError
        If pyarrow is required and not installed.
    UnknownPerturbationError
        If it contains none of ``genes``.

    Examples
    --------
    >>> vectors = pd.DataFrame([[0.5, 1.0], [2.0, 0.0]], index=["KLF1", "CEBPA"])
    >>> vectors.to_csv("embedding.csv")
    >>> scvi_sams.features.from_embedding("embedding.csv", genes=["CEBPA"]).to_numpy().tolist()
    [[2.0, 0.0]]
    """
    path = as_path("path", path)
    check_key(key=key)
    wanted = None if genes is None else list(dict.fromkeys(as_names("genes", genes)))
    read = _reader_of(path, key)
    if not path.is_file():
        raise UnreadableDataError(f"There is no file {str(path)!r}.")
    try:
        table = as_feature_table(read(path, key), argument=path.name)
    except SAMSError:
        raise
    except UNREADABLE as error:
        raise UnreadableDataError(
            f"{str(path)!r} cannot be read as {path.suffix}: {error}. The ending must match the "
            "format; check it, or copy the file again."
        ) from error
    if wanted is not None:
        kept = [name for name in wanted if name in table]
        if not kept:
            raise UnknownPerturbationError(
                f"{path.name} has none of {listing(wanted)}, but {listing(table.names)}. Are they "
                "named in the same way (symbols or identifiers)?" + table.transposed_hint(wanted)
            )
        table = FeatureTable(tuple(kept), table.columns, table.rows(kept))
    return table.to_frame(np.float32)


def _reader_of(path: Path, key: str | None) -> Callable[[Path, str | None], Any]:
    endings = [ending.lower() for ending in path.suffixes]
    kind = endings[-2] if endings[-1:] == [".gz"] and len(endings) > 1 else "".join(endings[-1:])
    if kind in _PICKLES:
        raise InvalidArgumentError(f"{path.name} is not read. {_UNPICKLED}")
    if kind not in _READERS:
        raise InvalidArgumentError(
            f"`path` must end in one of {listing(_READERS, limit=9)}, not {kind or path.name!r}."
        )
    if key is not None and kind not in (".npz", ".h5ad"):
        raise InvalidArgumentError(f"`key` is for .npz and .h5ad files; {kind} has one table.")
    return _READERS[kind]


def _read_text(path: Path, key: None) -> pd.DataFrame:
    separator = "," if ".csv" in (suffix.lower() for suffix in path.suffixes) else "\t"
    # Names are not converted: a gene called NA is not a missing value.
    table = pd.read_csv(
        path, sep=separator, converters={0: str}, keep_default_na=False, na_values=[""]
    )
    if isinstance(table.index, pd.RangeIndex):  # otherwise the header had no field for the names
        table = table.set_index(table.columns[0])
    header = pd.to_numeric(pd.Series(table.columns, dtype=object), errors="coerce")
    if (header.dropna() % 1 != 0).any():
        raise UnreadableDataError(
            f"{path.name} has no header: its first line is {listing(table.columns)}. Add one, "
            "with a name for each column."
        )
    return table


def _read_npz(path: Path, key: str | None) -> FeatureTable | dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except ValueError as error:
        if "Object arrays" not in str(error):
            raise
        raise InvalidArgumentError(
            f"{path.name} has arrays of Python objects, which are pickles. {_UNPICKLED}"
        ) from error
    matrices = [name for name, array in arrays.items() if array.ndim == 2]
    if key is not None:
        check_has(f"{path.name} has no matrix", [key], matrices)
        matrices = [key]
    if not matrices and all(array.ndim == 1 for array in arrays.values()):
        return arrays
    if len(matrices) > 1:
        raise InvalidArgumentError(
            f"{path.name} has several matrices: {listing(matrices)}. Choose one by `key`."
        )
    n_rows = len(arrays[matrices[0]]) if matrices else -1
    texts = [
        name
        for name, array in arrays.items()
        if array.shape == (n_rows,) and array.dtype.kind in "US"
    ]
    if len(texts) != 1:
        raise UnreadableDataError(
            f"{path.name} needs a matrix and one array with the names of its rows, as text, or a "
            f"vector for each name. It contains {_described(arrays)}."
        )
    names = arrays[texts[0]]
    names = np.char.decode(names, "utf-8") if names.dtype.kind == "S" else names
    return _numbered(names.tolist(), arrays[matrices[0]], "dim", path)


def _described(arrays: dict[str, np.ndarray]) -> str:
    return ", ".join(
        f"{name!r} of shape {array.shape} and type {array.dtype}"
        for name, array in list(arrays.items())[:5]
    )


def _read_h5ad(path: Path, key: str | None) -> Any:
    adata = ad.read_h5ad(path)
    if key is None and adata.X is None:
        raise InvalidArgumentError(
            f"{path.name} has no X. Choose a matrix of obsm by `key`: {listing(adata.obsm)}."
        )
    if key is None:
        return adata
    check_has(f"{path.name} has no matrix in obsm that is called", [key], adata.obsm)
    matrix = adata.obsm[key]
    if isinstance(matrix, pd.DataFrame):
        return matrix
    return _numbered(list(adata.obs_names), matrix, key, path)


def _numbered(names: list[str], matrix: Any, prefix: str, path: Path) -> FeatureTable:
    columns = tuple(f"{prefix}_{i}" for i in range(matrix.shape[1]))
    return FeatureTable(tuple(names), columns, matrix, path.name)


def _read_parquet(path: Path, key: None) -> pd.DataFrame:
    try:
        table = pd.read_parquet(path)
    except ImportError as error:
        raise MissingPackageError(
            f"Reading {path.name} requires pyarrow, which is not installed: pip install pyarrow."
        ) from error
    if not isinstance(table.index, pd.RangeIndex):
        return table
    texts = [name for name, dtype in table.dtypes.items() if _is_text(dtype)]
    if len(texts) != 1:
        raise UnreadableDataError(
            f"{path.name} needs names as its index, or as its only column of text; columns of text "
            f"are {listing(texts) or 'none'}."
        )
    return table.set_index(texts[0])


def _is_text(dtype: Any) -> bool:
    return pd.api.types.is_string_dtype(dtype) or pd.api.types.is_object_dtype(dtype)


_READERS: dict[str, Callable[[Path, Any], Any]] = {
    ".csv": _read_text,
    ".tsv": _read_text,
    ".npz": _read_npz,
    ".h5ad": _read_h5ad,
    ".parquet": _read_parquet,
}
