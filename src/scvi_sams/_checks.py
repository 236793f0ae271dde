"""Checks of arguments, one helper per kind: numbers, choices, names, tables, models, axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from scipy import sparse

from scvi_sams.exceptions import InvalidArgumentError, SAMSError


def check_integer(at_least: int | None = 1, **arguments: object) -> None:
    """Raise an error if an argument is no whole number, or too small a one.

    Parameters
    ----------
    at_least
        Smallest number that is accepted; ``None`` for any.
    **arguments
        Values by the names that the user knows them by.

    Raises
    ------
    InvalidArgumentError
        Naming the first such argument.
    """
    for name, value in arguments.items():
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_whole or (at_least is not None and value < at_least):  # type: ignore[operator]
            wanted = "" if at_least is None else f" of at least {at_least}"
            raise InvalidArgumentError(f"`{name}` must be a whole number{wanted}, not {value!r}.")


def check_number(
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    **arguments: object,
) -> None:
    """Raise an error if an argument is no finite number, or outside of the given bounds.

    Parameters
    ----------
    above, at_least, below, at_most
        Bounds; ``None`` for none.
    **arguments
        Values by the names that the user knows them by.

    Raises
    ------
    InvalidArgumentError
        Naming the first such argument and the bounds.
    """
    bounds = {"above": above, "of at least": at_least, "below": below, "of at most": at_most}
    wanted = " and ".join(
        f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None
    )
    for name, value in arguments.items():
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if (
            not is_number
            or not math.isfinite(value)  # type: ignore[arg-type]
            or (above is not None and not value > above)  # type: ignore[operator]
            or (at_least is not None and not value >= at_least)  # type: ignore[operator]
            or (below is not None and not value < below)  # type: ignore[operator]
            or (at_most is not None and not value <= at_most)  # type: ignore[operator]
        ):
            raise InvalidArgumentError(
                f"`{name}` must be a number {wanted or 'that is finite'}, not {value!r}."
            )


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise an error that names the choices if ``value`` is none of them."""
    if not isinstance(value, str) or value not in choices:
        raise InvalidArgumentError(f"`{name}` must be one of {list(choices)}, not {value!r}.")


def check_bool(**arguments: object) -> None:
    """Raise an error if an argument is neither True nor False."""
    for name, value in arguments.items():
        if not isinstance(value, bool | np.bool_):
            raise InvalidArgumentError(f"`{name}` must be True or False, not {value!r}.")


def check_key(**arguments: object) -> None:
    """Raise an error if the name of a column, layer or matrix cannot be one: a list, a number.

    ``None`` names nothing and is accepted.
    """
    for name, value in arguments.items():
        if value is not None and not isinstance(value, str):
            raise InvalidArgumentError(f"`{name}` must be one name (text) or None, not {value!r}.")


def as_names(argument: str, names: object) -> list[str]:
    """Return names as a list of text, whether one or several were given.

    Raises
    ------
    InvalidArgumentError
        If ``names`` is neither text nor a collection.
    """
    if isinstance(names, str):
        return [names]
    if not isinstance(names, Iterable):
        raise InvalidArgumentError(f"`{argument}` must be names, not {names!r}.")
    return [str(name) for name in names]


def as_positions(argument: str, cells: object, n_cells: int) -> np.ndarray:
    """Return the positions of cells that are given by position or by a boolean mask.

    Parameters
    ----------
    argument
        Name that the user knows the cells by.
    cells
        Positions, negative ones counted from the end, or a boolean for every cell.
    n_cells
        Number of cells to choose from.

    Returns
    -------
    Positions from 0 up, in the given order.

    Raises
    ------
    InvalidArgumentError
        If a mask is of another length, or a position is none of a cell.
    """
    array = np.asarray(cells)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iub"):
        raise InvalidArgumentError(
            f"`{argument}` must be positions of cells (whole numbers) or a boolean for every cell, "
            f"not {cells!r}. For names of cells: adata.obs_names.get_indexer(names)."
        )
    if array.dtype == bool:
        if len(array) != n_cells:
            raise InvalidArgumentError(
                f"`{argument}` has {len(array)} booleans for {n_cells} cells. Give one per cell."
            )
        return np.flatnonzero(array)
    outside = array[(array < -n_cells) | (array >= n_cells)]
    if len(outside):
        raise InvalidArgumentError(
            f"`{argument}` names position {outside[0]}, but there are {n_cells} cells (positions 0 "
            f"to {n_cells - 1})."
        )
    return np.arange(n_cells)[array.astype(int)]


def check_anndata(error: type[SAMSError] = InvalidArgumentError, /, **arguments: object) -> None:
    """Raise an error, of the given type, if an argument is no AnnData."""
    for name, value in arguments.items():
        if not isinstance(value, AnnData):
            raise error(
                f"`{name}` must be an AnnData, not {type(value).__name__}. Read a file with "
                "anndata.read_h5ad or scvi_sams.data.open_screen; a matrix goes into "
                "anndata.AnnData(counts)."
            )


def check_ate(**arguments: object) -> None:
    """Raise an error if an argument is no ATE table, or has no effects."""
    check_anndata(**arguments)
    for name, value in arguments.items():
        if value.X is None:  # type: ignore[attr-defined]
            raise InvalidArgumentError(
                f"`{name}` has no effects: X is empty. Pass what predict_ate or observed_ate "
                "returned."
            )


def check_frame(**arguments: object) -> None:
    """Raise an error if an argument is no table of pandas."""
    for name, value in arguments.items():
        if not isinstance(value, pd.DataFrame):
            raise InvalidArgumentError(f"`{name}` must be a DataFrame, not {_described(value)}.")


def check_table(**arguments: object) -> None:
    """Raise an error if an argument is no table of numbers, or has no rows or no columns."""
    check_frame(**arguments)
    for name, value in arguments.items():
        if not value.size:  # type: ignore[attr-defined]
            raise InvalidArgumentError(f"`{name}` is a DataFrame without rows or without columns.")
        for column, dtype in value.dtypes.items():  # type: ignore[attr-defined]
            is_number = pd.api.types.is_any_real_numeric_dtype(dtype)
            if not is_number and not pd.api.types.is_bool_dtype(dtype):
                raise InvalidArgumentError(
                    f"`{name}` must be a table of numbers; its column {column!r} is of type "
                    f"{dtype}."
                )


def check_matrix(**arguments: object) -> None:
    """Raise an error if an argument is no matrix of numbers, or has no rows or no columns.

    Accepted are tables, arrays, sparse matrices, and nested lists of numbers.
    """
    for name, value in arguments.items():
        if isinstance(value, pd.DataFrame):
            check_table(**{name: value})
            continue
        if sparse.issparse(value):
            continue
        array = _as_array(value)
        if array is None or array.ndim != 2 or not array.size or array.dtype.kind not in "biuf":
            raise InvalidArgumentError(
                f"`{name}` must be a matrix of numbers, with rows and columns, not "
                f"{_described(value)}."
            )


def check_same_columns(**arguments: object) -> None:
    """Raise an error if arguments are no matrices of numbers with the same number of columns."""
    check_matrix(**arguments)
    widths = {name: value.shape[1] for name, value in _as_matrices(arguments).items()}
    if len(set(widths.values())) > 1:
        told = " and ".join(f"`{name}` has {width}" for name, width in widths.items())
        raise InvalidArgumentError(f"The columns must be the same genes: {told}.")


def check_text(**arguments: object) -> None:
    """Raise an error if an argument is no text."""
    for name, value in arguments.items():
        if not isinstance(value, str):
            raise InvalidArgumentError(f"`{name}` must be a name (text), not {_described(value)}.")


def check_axes(**arguments: object) -> None:
    """Raise an error if an argument is neither axes of matplotlib nor ``None``."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Axes):
            raise InvalidArgumentError(
                f"`{name}` must be axes of matplotlib (plt.subplots()[1]) or None, not "
                f"{_described(value)}."
            )


def check_model(*methods: str, **arguments: object) -> None:
    """Raise an error if an argument is no model, that is, lacks one of some methods."""
    for name, value in arguments.items():
        lacking = [method for method in methods if not hasattr(value, method)]
        if lacking:
            raise InvalidArgumentError(
                f"`{name}` must be a trained model with {', '.join(methods)}, not "
                f"{_described(value)}."
            )


def check_models(*methods: str, **arguments: object) -> None:
    """Raise an error if an argument is no list of models; see :func:`check_model`."""
    for name, value in arguments.items():
        if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
            raise InvalidArgumentError(f"`{name}` must be several models, not {_described(value)}.")
        for number, model in enumerate(value):
            check_model(*methods, **{f"{name}[{number}]": model})


def as_labels(argument: str, labels: object) -> pd.Series:
    """Return labels of cells, one per cell, as a Series.

    Raises
    ------
    InvalidArgumentError
        If ``labels`` is no list, column or array of them.
    """
    array = None if isinstance(labels, str | Mapping) else _as_array(labels)
    if array is None or array.ndim != 1:
        raise InvalidArgumentError(
            f"`{argument}` must be one label per cell, such as adata.obs['perturbation'], not "
            f"{_described(labels)}."
        )
    return pd.Series(labels)


def as_matrix(value: Any) -> Any:
    """Return a matrix of numbers as an array, or as it is where it is sparse."""
    return value if sparse.issparse(value) else np.asarray(value)


def as_numbers(argument: str, value: object) -> np.ndarray:
    """Return numbers, one or several, as an array of floats.

    Raises
    ------
    InvalidArgumentError
        If ``value`` is text, or holds anything else than numbers.
    """
    array = None if isinstance(value, str) else _as_array(value)
    if array is None or (array.size and array.dtype.kind not in "biuf"):
        raise InvalidArgumentError(f"`{argument}` must be numbers, not {_described(value)}.")
    return array.astype(np.float64)


def as_axes(argument: str, axes: Sequence[Axes] | np.ndarray) -> list[Axes]:
    """Return several axes as a list.

    Raises
    ------
    InvalidArgumentError
        If one of them is none.
    """
    panels = list(np.ravel(np.asarray(axes, dtype=object)))
    if not all(isinstance(panel, Axes) for panel in panels):
        raise InvalidArgumentError(
            f"`{argument}` must be axes of matplotlib (plt.subplots(...)[1]), not "
            f"{_described(axes)}."
        )
    return panels


def _as_matrices(arguments: Mapping[str, object]) -> dict[str, Any]:
    return {name: as_matrix(value) for name, value in arguments.items()}


def _as_array(value: object) -> np.ndarray | None:
    try:
        return np.asarray(value)
    except (TypeError, ValueError):  # lists of different lengths
        return None


def _described(value: object) -> str:
    """Type of a value, and the value where it is short."""
    if value is None or isinstance(value, bool | int | float | str):
        return f"{value!r:.60}"
    return f"{type(value).__name__}"
