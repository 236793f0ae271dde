"""Checks of arguments, one helper per kind: numbers, choices, names, tables.

``check_*`` take arguments by their public names and raise an
:class:`~scvi_sams.exceptions.InvalidArgumentError` that names the first invalid one, its allowed
values, and its value. ``as_*`` also return the argument in the form used for computing.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Number, Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scvi_sams._plurals import counted
from scvi_sams.exceptions import InvalidArgumentError, SAMSError


def check_integer(at_least: int | None = 1, **arguments: object) -> None:
    """Check for integers of at least ``at_least``, unless that is ``None``."""

    def is_right(value: Any) -> bool:
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        return is_whole and (at_least is None or value >= at_least)

    wanted = "" if at_least is None else f" of at least {at_least}"
    _check(arguments, is_right, f"a whole number{wanted}")


def check_number(
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    **arguments: object,
) -> None:
    """Check for finite numbers within bounds; a bound of ``None`` does not apply."""
    all_bounds = (
        ("above", above, operator.gt),
        ("of at least", at_least, operator.ge),
        ("below", below, operator.lt),
        ("of at most", at_most, operator.le),
    )
    bounds = [(word, bound, holds) for word, bound, holds in all_bounds if bound is not None]

    def is_right(value: Any) -> bool:
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        return is_number and math.isfinite(value) and all(h(value, b) for _, b, h in bounds)

    wanted = " and ".join(f"{word} {bound:g}" for word, bound, _ in bounds)
    _check(arguments, is_right, f"a number {wanted or 'that is finite'}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check for one of several words."""
    is_right = isinstance(value, str) and value in choices
    _check({name: value}, lambda _: is_right, f"one of {list(choices)}")


def check_bool(**arguments: object) -> None:
    """Check for True or False."""
    _check(arguments, lambda value: isinstance(value, bool | np.bool_), "True or False")


def check_text(**arguments: object) -> None:
    """Check for text."""
    _check(arguments, lambda value: isinstance(value, str), "a name (text)")


def check_key(**arguments: object) -> None:
    """Check for the name of a column, layer or matrix, or ``None``."""
    _check(
        arguments, lambda value: value is None or isinstance(value, str), "one name (text) or None"
    )


def as_plain(value: Any) -> Any:
    """Convert a numpy number to a Python one, as scvi-tools and torch require."""
    return value.item() if isinstance(value, np.generic) else value


def as_path(argument: str, path: object) -> Path:
    """Return the name of a file or folder as a path."""
    is_name = isinstance(path, os.PathLike) or (isinstance(path, str) and path.strip() != "")
    _check({argument: path}, lambda _: is_name, "the path of a file or folder")
    return Path(path)  # type: ignore[arg-type]


def as_list(argument: str, values: object, wanted: str) -> list[Any]:
    """Return several values as a list; text and zero-dimensional arrays are one value."""
    is_one = isinstance(values, str) or getattr(values, "ndim", 1) == 0
    _check({argument: values}, lambda _: isinstance(values, Iterable) and not is_one, wanted)
    return list(values)  # type: ignore[call-overload]


def as_names(argument: str, names: object) -> list[str]:
    """Return one or several names as a list of text."""
    name = names.item() if isinstance(names, np.ndarray) and not names.ndim else names
    return [name] if isinstance(name, str) else [str(n) for n in as_list(argument, name, "names")]


def as_cells(argument: str, cells: object, n_cells: int) -> np.ndarray:
    """Return positions of cells as passed, or those for which a boolean is true.

    Positions are not compared with ``n_cells``. Nullable columns of pandas and columns of objects
    are converted by their values; a missing value is an error.
    """
    array = np.asarray(cells)
    if array.dtype == object and array.ndim == 1:
        array = np.asarray(pd.Series(array).infer_objects())
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise InvalidArgumentError(
            f"`{argument}` must be positions of cells (whole numbers) or a boolean for every cell, "
            f"not {_shown(cells)}. For names of cells: adata.obs_names.get_indexer(names)."
        )
    if array.dtype != bool:
        return array.astype(np.int64)
    if len(array) != n_cells:
        raise InvalidArgumentError(
            f"`{argument}` has {counted(len(array), 'boolean')} for {counted(n_cells, 'cell')}. "
            "Pass one per cell."
        )
    return np.flatnonzero(array)


def as_positions(argument: str, cells: object, n_cells: int) -> np.ndarray:
    """Return non-negative positions, in the given order, of some of ``n_cells`` cells.

    Negative positions count from the end; a boolean for every cell is allowed too.
    """
    positions = as_cells(argument, cells, n_cells)
    outside = positions[(positions < -n_cells) | (positions >= n_cells)]
    if len(outside):
        raise InvalidArgumentError(
            f"`{argument}` names position {outside[0]}, but there are {n_cells} cells (positions 0 "
            f"to {n_cells - 1})."
        )
    return np.arange(n_cells)[positions]


def as_labels(argument: str, labels: object) -> pd.Series:
    """Return labels of cells, one per cell, as a Series."""
    array = None if isinstance(labels, str | Mapping) else _as_array(labels)
    is_right = array is not None and array.ndim == 1
    wanted = "one label per cell, such as adata.obs['perturbation']"
    _check({argument: labels}, lambda _: is_right, wanted)
    return pd.Series(labels)


def check_anndata(error: type[SAMSError] = InvalidArgumentError, /, **arguments: object) -> None:
    """Check for an AnnData; ``error`` is the type of the error."""
    for name, value in arguments.items():
        modalities = getattr(value, "mod", None)  # a MuData
        if isinstance(modalities, Mapping) and modalities:
            first = next(iter(modalities))
            rna = next((one for one in modalities if one.lower() in ("rna", "gex")), first)
            raise error(
                f"`{name}` is a {type(value).__name__} of {list(modalities)}: pass the modality "
                f"with the counts of genes, such as {name}.mod[{rna!r}], and put labels into its "
                "obs."
            )
        if not isinstance(value, AnnData):
            raise error(
                f"`{name}` must be an AnnData, not {type(value).__name__}. Read a file with "
                "anndata.read_h5ad or scvi_sams.data.open_screen; convert a matrix by "
                "anndata.AnnData(counts)."
            )


def check_ate(**arguments: Any) -> None:
    """Check for a table of average treatment effects, as an AnnData."""
    check_anndata(**arguments)
    for name, value in arguments.items():
        if value.X is None:
            raise InvalidArgumentError(
                f"`{name}` has no effects: X is empty. Pass what predict_ate or observed_ate "
                "returned."
            )


def check_table(**arguments: Any) -> None:
    """Check for a table of numbers, with rows and columns."""
    _check(arguments, lambda value: isinstance(value, pd.DataFrame), "a DataFrame")
    for name, value in arguments.items():
        if not value.size:
            raise InvalidArgumentError(f"`{name}` is a DataFrame without rows or without columns.")
        for column, dtype in value.dtypes.items():
            is_number = pd.api.types.is_any_real_numeric_dtype(dtype)
            if not is_number and not pd.api.types.is_bool_dtype(dtype):
                raise InvalidArgumentError(
                    f"`{name}` must be a table of numbers; its column {column!r} is of type "
                    f"{dtype}."
                )


def check_matrix(**arguments: Any) -> None:
    """Check for a table, array, sparse matrix or nested list of numbers, with rows and columns."""

    def is_right(value: Any) -> bool:
        array = _as_array(value)
        return array is not None and array.ndim == 2 and bool(array.size) and _is_numeric(array)

    for name, value in arguments.items():
        if isinstance(value, pd.DataFrame):
            check_table(**{name: value})
        elif not sparse.issparse(value):
            _check({name: value}, is_right, "a matrix of numbers, with rows and columns")


def check_same_columns(**arguments: Any) -> None:
    """Check for matrices of numbers with the same number of columns."""
    check_matrix(**arguments)
    widths = {name: as_matrix(value).shape[1] for name, value in arguments.items()}
    if len(set(widths.values())) > 1:
        told = " and ".join(f"`{name}` has {width}" for name, width in widths.items())
        raise InvalidArgumentError(f"The columns must be the same genes: {told}.")


def as_matrix(value: Any) -> Any:
    """Return a matrix of numbers as an array; sparse matrices are unchanged."""
    return value if sparse.issparse(value) else np.asarray(value)


def as_numbers(argument: str, value: object) -> np.ndarray:
    """Return numbers, one or several, as an array of floats."""
    array = None if isinstance(value, str) else _as_array(value)
    if array is None or (array.size and not _is_numeric(array)):
        raise InvalidArgumentError(f"`{argument}` must be numbers, not {_shown(value)}.")
    return array.astype(np.float64)


def _check(arguments: Mapping[str, Any], is_right: Callable[[Any], bool], wanted: str) -> None:
    for name, value in arguments.items():
        if not is_right(value):
            raise InvalidArgumentError(f"`{name}` must be {wanted}, not {_shown(value)}.")


def _is_numeric(array: np.ndarray) -> bool:
    return array.dtype.kind in "biuf"


def _as_array(value: object) -> np.ndarray | None:
    try:
        return np.asarray(value)
    except (TypeError, ValueError):  # lists of different lengths
        return None


def _shown(value: object) -> str:
    """Show a value if it is short, otherwise its type; long text is cut."""
    if isinstance(value, str):
        return repr(value)[:60]
    if value is None or isinstance(value, Number | np.generic | np.ndarray | list | tuple | dict):
        text = repr(value)
        if len(text) <= 60 and "\n" not in text:
            return text
    return type(value).__name__
