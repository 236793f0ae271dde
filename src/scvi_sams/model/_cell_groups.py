"""Groups of cells, by column or by position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from anndata import AnnData

from scvi_sams._checks import as_names, as_positions, check_key
from scvi_sams.exceptions import (
    InvalidArgumentError,
    MissingKeyError,
    SAMSError,
    UnknownPerturbationError,
)


def groups_of_cells(
    adata: AnnData, groupby: str | None, group1: str | Sequence[str] | None, group2: str | None
) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
    """Return names and boolean masks of the two sides of every comparison.

    Raises
    ------
    MissingKeyError
        If obs has no column ``groupby``.
    UnknownPerturbationError
        If no cell is in a group.
    SAMSError
        If all cells are in one group.
    """
    check_key(groupby=groupby, group2=group2)
    if groupby not in adata.obs:
        raise MissingKeyError(f"obs has no column {groupby!r} to group the cells by.")
    group_of_cell = adata.obs[groupby].astype(str).to_numpy()
    present = np.unique(group_of_cell)
    if len(present) < 2:
        raise SAMSError(f"All cells are in one group, {present[0]!r}: nothing to compare.")
    if group1 is None:
        group1 = [str(name) for name in present if name != group2]
    asked = as_names("group1", group1)
    if not asked:
        raise InvalidArgumentError("`group1` is empty: there is nothing to compare.")
    unknown = [name for name in [*asked, group2] if name is not None and name not in present]
    if unknown:
        raise UnknownPerturbationError(
            f"No cell is in the group {', '.join(map(repr, unknown[:5]))}; there are "
            f"{', '.join(map(repr, present[:5]))}{', ...' if len(present) > 5 else ''}."
        )
    comparisons = []
    for name in asked:
        first = group_of_cell == name
        second = ~first if group2 is None else group_of_cell == group2
        comparisons.append((name, group2 or "Rest", first, second))
    return comparisons


def positions_of_groups(
    n_obs: int, idx1: Sequence[int] | Sequence[bool], idx2: Sequence[int] | Sequence[bool] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Boolean masks of cells that were given by position or mask; an error if one is empty."""
    first = _mask("idx1", n_obs, idx1)
    second = ~first if idx2 is None else _mask("idx2", n_obs, idx2)
    if not first.any() or not second.any():
        raise SAMSError(f"There are no cells in `{'idx2' if first.any() else 'idx1'}`.")
    return first, second


def _mask(argument: str, n_obs: int, cells: Sequence[int] | Sequence[bool]) -> np.ndarray:
    mask = np.zeros(n_obs, dtype=bool)
    mask[as_positions(argument, cells, n_obs)] = True
    return mask
