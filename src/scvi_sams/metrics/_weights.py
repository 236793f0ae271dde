"""Weights of cells in means over cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from scvi_sams._checks import as_numbers
from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.labels._names import listing, numbers_in

Weights = str | Sequence[float] | np.ndarray | pd.Series
"""One weight per cell, or the name of a column of obs with weights."""


def weights_of_cells(
    weights: Weights | None, column: pd.Series | None, cells: pd.Index
) -> np.ndarray:
    """Weights of the cells with these names, 1 where missing, ``(n_cells,)``.

    ``column`` contains the weights if ``weights`` is a name.
    """
    if weights is None:
        return np.ones(len(cells))
    if column is not None:
        name = f"obs[{weights!r}]"
        values, is_text = numbers_in(column)
        if is_text.any():
            raise InvalidArgumentError(
                f"{name} contains {column[is_text].iloc[0]!r}, which is not a weight of a cell. "
                "Convert the column, or name another one in `weights`."
            )
    else:
        name = "`weights`"
        values = _in_order_of(cells, weights)
    bad = np.isinf(values) | (values < 0)
    if bad.any():
        raise InvalidArgumentError(
            f"{name} contains {values[bad][0]:g}, for cell {cells[bad][0]!r} and {bad.sum() - 1} "
            "more. Weights of cells must be finite and not negative; NaN counts as 1."
        )
    return np.where(np.isnan(values), 1.0, values)


def _in_order_of(cells: pd.Index, weights: Any) -> np.ndarray:
    """Weights passed as values, checked to be one per cell."""
    if isinstance(weights, pd.Series):
        is_numbered = weights.index.equals(pd.RangeIndex(len(cells)))
        if not weights.index.equals(cells) and not is_numbered:
            raise InvalidArgumentError(
                "The index of `weights` is not `adata.obs_names`. Pass "
                "`weights.reindex(adata.obs_names)`, or an array in the order of the cells."
            )
        weights = weights.to_numpy(dtype=float, na_value=np.nan)
    values = as_numbers("weights", weights)
    if values.shape != (len(cells),):
        raise InvalidArgumentError(
            f"`weights` must be one for each of the {len(cells)} cells of `adata`, including those "
            f"that `indices` leaves out, not of shape {values.shape}."
        )
    return values


def effective_cells(
    weight_of_cell: np.ndarray, group_of_cell: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of weights and effective number of cells (Kish) of controls and groups, ``(1 + G,)``.

    ``group_of_cell`` is 0 for controls, 1 + the row of ``names``, or -1 for neither.
    """
    used, n_groups = group_of_cell >= 0, 1 + len(names)
    group, weight = group_of_cell[used], weight_of_cell[used]
    total = np.bincount(group, weight, n_groups)
    empty = np.flatnonzero(total == 0)
    if len(empty):
        without = [["control cells", *names][place] for place in empty]
        raise InvalidArgumentError(
            f"All weights of {listing(without)} are 0: there is no mean over no cells. Exclude "
            "these labels (`perturbations`), or check `weights`."
        )
    return total, total**2 / np.bincount(group, weight**2, n_groups)


def weights_record(weights: Weights | None) -> dict[str, str]:
    """Describe the weights, for ``uns``; empty if all cells count alike."""
    if weights is None:
        return {}
    return {"weights": weights if isinstance(weights, str) else "given"}
