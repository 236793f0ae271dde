"""Checks of arguments that are not data: numbers, choices, names. One place, one wording."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

import numpy as np

from scvi_sams.exceptions import InvalidArgumentError


def refuse_other_than_whole(at_least: int | None = 1, **arguments: object) -> None:
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


def refuse_other_than_number(
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


def refuse_other_choices(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise an error that names the choices if ``value`` is none of them."""
    if not isinstance(value, str) or value not in choices:
        raise InvalidArgumentError(f"`{name}` must be one of {list(choices)}, not {value!r}.")


def refuse_other_than_flag(**arguments: object) -> None:
    """Raise an error if an argument is neither True nor False."""
    for name, value in arguments.items():
        if not isinstance(value, bool | np.bool_):
            raise InvalidArgumentError(f"`{name}` must be True or False, not {value!r}.")


def refuse_other_than_key(**arguments: object) -> None:
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
