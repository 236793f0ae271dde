"""Checks that arguments are what functions on tables, AnnData, models and axes can work with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from scipy import sparse

from scvi_sams.exceptions import InvalidArgumentError


def refuse_other_than_anndata(**arguments: object) -> None:
    """Raise an error if an argument is no AnnData."""
    for name, value in arguments.items():
        if not isinstance(value, AnnData):
            raise InvalidArgumentError(f"`{name}` must be an AnnData, not {_described(value)}.")


def refuse_other_than_ate(**arguments: object) -> None:
    """Raise an error if an argument is no ATE table, or has no effects."""
    refuse_other_than_anndata(**arguments)
    for name, value in arguments.items():
        if value.X is None:  # type: ignore[attr-defined]
            raise InvalidArgumentError(
                f"`{name}` has no effects: X is empty. Pass what predict_ate or observed_ate "
                "returned."
            )


def refuse_other_than_frame(**arguments: object) -> None:
    """Raise an error if an argument is no table of pandas."""
    for name, value in arguments.items():
        if not isinstance(value, pd.DataFrame):
            raise InvalidArgumentError(f"`{name}` must be a DataFrame, not {_described(value)}.")


def refuse_other_than_table(**arguments: object) -> None:
    """Raise an error if an argument is no table of numbers, or has no rows or no columns."""
    refuse_other_than_frame(**arguments)
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


def refuse_other_than_matrix(**arguments: object) -> None:
    """Raise an error if an argument is no matrix of numbers, or has no rows or no columns.

    Accepted are tables, arrays, sparse matrices, and nested lists of numbers.
    """
    for name, value in arguments.items():
        if isinstance(value, pd.DataFrame):
            refuse_other_than_table(**{name: value})
            continue
        if sparse.issparse(value):
            continue
        array = _as_array(value)
        if array is None or array.ndim != 2 or not array.size or array.dtype.kind not in "biuf":
            raise InvalidArgumentError(
                f"`{name}` must be a matrix of numbers, with rows and columns, not "
                f"{_described(value)}."
            )


def refuse_other_than_same_columns(**arguments: object) -> None:
    """Raise an error if arguments are no matrices of numbers with the same number of columns."""
    refuse_other_than_matrix(**arguments)
    widths = {name: value.shape[1] for name, value in _as_matrices(arguments).items()}
    if len(set(widths.values())) > 1:
        told = " and ".join(f"`{name}` has {width}" for name, width in widths.items())
        raise InvalidArgumentError(f"The columns must be the same genes: {told}.")


def refuse_other_than_text(**arguments: object) -> None:
    """Raise an error if an argument is no text."""
    for name, value in arguments.items():
        if not isinstance(value, str):
            raise InvalidArgumentError(f"`{name}` must be a name (text), not {_described(value)}.")


def refuse_other_than_axes(**arguments: object) -> None:
    """Raise an error if an argument is neither axes of matplotlib nor ``None``."""
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Axes):
            raise InvalidArgumentError(
                f"`{name}` must be axes of matplotlib (plt.subplots()[1]) or None, not "
                f"{_described(value)}."
            )


def refuse_other_than_model(*methods: str, **arguments: object) -> None:
    """Raise an error if an argument is no model, that is, lacks one of some methods."""
    for name, value in arguments.items():
        lacking = [method for method in methods if not hasattr(value, method)]
        if lacking:
            raise InvalidArgumentError(
                f"`{name}` must be a trained model with {', '.join(methods)}, not "
                f"{_described(value)}."
            )


def refuse_other_than_models(*methods: str, **arguments: object) -> None:
    """Raise an error if an argument is no list of models; see :func:`refuse_other_than_model`."""
    for name, value in arguments.items():
        if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
            raise InvalidArgumentError(f"`{name}` must be several models, not {_described(value)}.")
        for number, model in enumerate(value):
            refuse_other_than_model(*methods, **{f"{name}[{number}]": model})


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
