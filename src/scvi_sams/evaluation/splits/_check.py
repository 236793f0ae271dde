"""Whether a split leaks, or was made for other data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from scvi_sams._argument_types import as_labels
from scvi_sams.evaluation.splits._cells import canonical_labels
from scvi_sams.exceptions import InvalidArgumentError, InvalidCovariateError, InvalidSplitError

if TYPE_CHECKING:
    from scvi_sams.evaluation.splits._saved import Split

Labels = Sequence[str] | np.ndarray | pd.Series

PARTS = ("train", "validation", "test")


def check_split(split: Split, labels: Labels, *, covariate: Labels | None = None) -> None:
    """Refuse a split that leaks, or that was made for other data.

    Parameters
    ----------
    split
        To check.
    labels
        One label per cell of the data.
    covariate
        One level per cell, needed if the split holds labels out in some levels only.

    Raises
    ------
    InvalidSplitError
        If the split was made for other labels (or for another order of the cells); a cell is in
        two parts, or twice in one; no control cell trains, or no cell is tested; a held-out label
        is the control, has no cells, is carried by training cells, or by both validation and test
        cells. Messages name the labels.
    InvalidCovariateError
        If levels are needed but missing.

    Examples
    --------
    >>> from scvi_sams import evaluation
    >>> labels = adata.obs["perturbation"]
    >>> split = evaluation.combination_hold_out(labels)
    >>> evaluation.check_split(split, labels)

    The same split for cells in another order is refused:

    >>> evaluation.check_split(split, labels.iloc[::-1])
    Traceback (most recent call last):
    ...
    scvi_sams.exceptions.InvalidSplitError: ...
    """
    if not hasattr(split, "fingerprint"):
        raise InvalidArgumentError(
            f"`split` must be a Split (make_split, Split.load), not {type(split).__name__}."
        )
    label_of_cell = canonical_labels(labels, control=split.control, delimiter=split.delimiter)
    levels = None
    if split.held_out_levels is not None:
        levels = levels_of_cells(covariate, len(label_of_cell))
    if labels_fingerprint(label_of_cell, levels) != split.fingerprint:
        raise InvalidSplitError(
            f"The split {split.name!r} was made for other labels, or for these in another order of "
            "the cells. Use it on the data it was made for, or make a new one."
        )
    _refuse_bad_positions(split, len(label_of_cell))
    control = split.control[0]
    if control not in label_of_cell[split.train]:
        raise InvalidSplitError(
            f"No training cell is labelled {control!r}: without control cells in training no "
            "effect is defined. Put control cells into training, or pass their label as `control`."
        )
    if len(split.test) == 0:
        raise InvalidSplitError("No cell is tested. Hold out more, or ask for a larger test share.")
    _refuse_leaks(split, label_of_cell, levels)


def levels_of_cells(covariate: Labels | None, n_cells: int) -> np.ndarray:
    """Return the level of every cell as text, refusing missing ones."""
    levels = pd.Series([] if covariate is None else as_labels("covariate", covariate), dtype=object)
    if len(levels) != n_cells or levels.isna().any():
        raise InvalidCovariateError(
            "The split holds labels out in some levels of a covariate only: pass the level of each "
            f"of the {n_cells} cells, none missing, as `covariate`."
        )
    return levels.map(str).to_numpy(dtype=object)


def labels_fingerprint(label_of_cell: np.ndarray, levels: np.ndarray | None) -> str:
    """Return the SHA-256 of the canonical labels of all cells, and of their levels if given."""
    content = [label_of_cell.tolist(), None if levels is None else levels.tolist()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _refuse_bad_positions(split: Split, n_cells: int) -> None:
    for part in PARTS:
        cells = getattr(split, part)
        if len(cells) and (cells.min() < 0 or cells.max() >= n_cells):
            raise InvalidSplitError(
                f"{part} has position {cells.max() if cells.min() >= 0 else cells.min()}, but "
                f"there are {n_cells} cells. Positions run from 0 to {n_cells - 1}."
            )
        if len(np.unique(cells)) < len(cells):
            raise InvalidSplitError(f"{part} has a cell more than once. Name each cell once.")
    for first, second in combinations(PARTS, 2):
        shared = np.intersect1d(getattr(split, first), getattr(split, second))
        if len(shared):
            raise InvalidSplitError(
                f"{len(shared)} cells are in both {first} and {second}, for example the cell at "
                f"position {shared[0]}. Every cell is in at most one part."
            )


def _refuse_leaks(split: Split, label_of_cell: np.ndarray, levels: np.ndarray | None) -> None:
    held_out: set[Any] = set(split.held_out)
    group_of_cell = label_of_cell
    if levels is not None and split.held_out_levels is not None:
        if len(split.held_out) != len(split.held_out_levels):
            raise InvalidSplitError(
                f"{len(split.held_out)} labels are held out in {len(split.held_out_levels)} levels"
                ". Give one level for each."
            )
        held_out = set(zip(split.held_out, split.held_out_levels, strict=True))
        group_of_cell = np.empty(len(label_of_cell), dtype=object)
        group_of_cell[:] = list(zip(label_of_cell, levels, strict=True))
    if split.control[0] in split.held_out:
        raise InvalidSplitError(
            f"The control ({split.control[0]!r}) cannot be held out. Remove it from `held_out`."
        )
    groups = {part: held_out.intersection(group_of_cell[getattr(split, part)]) for part in PARTS}
    absent = held_out.difference(group_of_cell)
    if absent:
        raise InvalidSplitError(
            f"No cell carries the held-out {_listed(absent)}. Hold out labels that occur."
        )
    if groups["train"]:
        raise InvalidSplitError(
            f"The split leaks: training cells carry the held-out {_listed(groups['train'])}. "
            "Remove these cells from training."
        )
    both = groups["validation"] & groups["test"]
    if both:
        raise InvalidSplitError(
            f"The split leaks: validation and test cells both carry the held-out {_listed(both)}, "
            "so that what is tested also chooses the model. Leave it in one of the two."
        )


def _listed(groups: set[Any]) -> str:
    return ", ".join(
        repr(group) if isinstance(group, str) else f"{group[0]!r} in {group[1]!r}"
        for group in sorted(groups)
    )
