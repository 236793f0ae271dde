"""Hold out combinations and split cells: seeded, pure functions of the labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import pandas as pd

from scvi_sams._checks import as_names, check_bool, check_integer
from scvi_sams._plurals import counted
from scvi_sams.exceptions import InvalidSplitError
from scvi_sams.labels._labels import Labels
from scvi_sams.labels._parsing import read_labels
from scvi_sams.labels._stratified import stratified_split

CellLabels: TypeAlias = Labels | Sequence[str] | np.ndarray | pd.Series
"""One label per cell, as text or already parsed."""

Shares: TypeAlias = tuple[float, float, float]
"""Fractions of training, validation and test cells."""


def canonical_labels(
    labels: CellLabels,
    *,
    control: str | Sequence[str] = "control",
    delimiter: str | None = "+",
) -> np.ndarray:
    """Bring labels to one spelling, so that ``"B+A"`` and ``"A+B"`` are the same group.

    Parameters
    ----------
    labels
        One label per cell.
    control
        Label or labels of the control cells.
    delimiter
        Separator between the perturbations of a combination; ``None`` to never split labels.

    Returns
    -------
    Strings of shape ``(n_cells,)``; control cells get the first control label.

    Raises
    ------
    InvalidPerturbationLabelError
        If a label is missing (NaN) or malformed.

    Examples
    --------
    >>> scvi_sams.evaluation.canonical_labels(["B+A", "A+B", "A+control"]).tolist()
    ['A+B', 'A+B', 'A']
    """
    return read_labels(labels, control, delimiter).canonical


def hold_out_combinations(
    labels: CellLabels,
    n_held_out: int,
    *,
    seed: int = 0,
    control: str | Sequence[str] = "control",
    delimiter: str = "+",
    require_singles: bool = True,
) -> list[str]:
    """Choose combinations to hold out of training.

    The choice depends only on the set of labels and the seed, not on the order of the cells or the
    spelling of combinations. With the same seed, a smaller set of held-out combinations is a subset
    of a larger one.

    Parameters
    ----------
    labels, control, delimiter
        As for :func:`canonical_labels`.
    n_held_out
        Number of combinations to hold out.
    seed
        Seed of the choice.
    require_singles
        Choose only combinations all of whose perturbations also have cells with that perturbation
        alone, so that each effect can be learned whichever other combinations are held out.

    Returns
    -------
    Canonical labels of the held-out combinations, sorted.

    Raises
    ------
    InvalidSplitError
        If fewer combinations are available than requested.

    Examples
    --------
    >>> labels = ["control", "A", "B", "C", "A+B", "B+C", "C+D"]
    >>> scvi_sams.evaluation.hold_out_combinations(labels, 2)  # D was not measured alone
    ['A+B', 'B+C']
    """
    check_integer(at_least=None, n_held_out=n_held_out)
    check_bool(require_singles=require_singles)
    labels = read_seeded(labels, control, delimiter, seed)
    combinations = shuffled_combinations(labels, seed, require_singles=require_singles)
    if not 0 <= n_held_out <= len(combinations):
        condition = " whose perturbations all occur alone as well" if require_singles else ""
        raise InvalidSplitError(
            f"{counted(n_held_out, 'combination')} cannot be held out: the labels have "
            f"{counted(len(combinations), 'combination')}{condition}. Hold out fewer, or check "
            "`delimiter` and `require_singles`."
        )
    return sorted(combinations[:n_held_out])


def read_seeded(
    labels: CellLabels, control: str | Sequence[str], delimiter: str | None, seed: int
) -> Labels:
    """Check the seed and parse the labels."""
    check_integer(at_least=0, seed=seed)
    return read_labels(labels, control, delimiter)


def check_held_out(labels: Labels, held_out: Iterable[str], absent: Iterable[str]) -> None:
    """Raise if the control is held out, or a label without cells (named in the message)."""
    if labels.control in held_out:
        raise InvalidSplitError(
            f"The control ({labels.control!r}) cannot be held out: effects are undefined without "
            "control cells in training. Remove it from `held_out`."
        )
    shown = ", ".join(sorted(absent))
    if shown:
        raise InvalidSplitError(
            f"No cell has the held-out {shown}, so there would be nothing to test on. Hold out "
            "labels that occur in the data."
        )


def parts_of_combinations(labels: Labels) -> dict[str, list[str]]:
    """Perturbations of every combination in the data; combinations are sorted."""
    parts = {name: labels.spelling.perturbations(name) for name in labels.perturbed_names}
    return {name: names for name, names in parts.items() if len(names) > 1}


def labels_with(labels: Labels, perturbations: Iterable[str]) -> dict[str, set[str]]:
    """Canonical labels that contain some of the perturbations, and which of them."""
    wanted = set(perturbations)
    carried = {
        name: wanted.intersection(labels.spelling.perturbations(name))
        for name in labels.perturbed_names
    }
    return {name: found for name, found in carried.items() if found}


def shuffled_combinations(labels: Labels, seed: int, *, require_singles: bool = False) -> list[str]:
    """Return the combinations in the data, sorted and then shuffled by the seed.

    With ``require_singles`` only those all of whose perturbations have cells of their own.
    """
    parts = parts_of_combinations(labels)
    combinations = list(parts)
    if require_singles:
        present = set(labels.names)
        combinations = [name for name in combinations if present.issuperset(parts[name])]
    order = np.random.default_rng(seed).permutation(len(combinations))
    return [combinations[position] for position in order]


def cells_of(labels: Labels, names: Sequence[str]) -> np.ndarray:
    """Which cells have one of some canonical labels: boolean, shape ``(n_cells,)``."""
    return np.isin(labels.names, list(names))[labels.name_of_cell]


def split_within_labels(
    labels: Labels, cells: np.ndarray, fractions: Shares, *, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split cells, given by position, at random within labels; see :func:`stratified_split`."""
    parts = stratified_split(labels.name_of_cell[cells], fractions, seed=seed)
    return cells[parts[0]], cells[parts[1]], cells[parts[2]]


def split_cells(
    labels: CellLabels,
    held_out: Sequence[str],
    *,
    fractions: Shares = (0.8, 0.1, 0.1),
    seed: int = 0,
    control: str | Sequence[str] = "control",
    delimiter: str | None = "+",
) -> dict[str, np.ndarray]:
    """Split cells into training, validation, test and held-out cells, stratified by label.

    Within each label the fractions are rounded up or down at random, so that they also hold over
    many small labels. Every label that is not held out keeps at least one training cell.

    Parameters
    ----------
    labels, control, delimiter
        As for :func:`canonical_labels`.
    held_out
        Labels, in any spelling, whose cells are all held out, for example those of
        :func:`hold_out_combinations`.
    fractions
        Fractions of training, validation and test cells among the cells that are not held out.
    seed
        Seed of the split.

    Returns
    -------
    Ascending positions of the cells under ``"train"``, ``"validation"``, ``"test"`` and
    ``"held_out"``. Every cell is in exactly one of them.

    Raises
    ------
    InvalidSplitError
        If a held-out label has no cells or is the control, or if the fractions are not three
        non-negative numbers that sum to one.

    Examples
    --------
    >>> labels = ["control"] * 10 + ["A"] * 10 + ["B"] * 10 + ["A+B"] * 5
    >>> split = scvi_sams.evaluation.split_cells(labels, held_out=["A+B"])
    >>> {part: len(cells) for part, cells in split.items()}
    {'train': 24, 'validation': 3, 'test': 3, 'held_out': 5}
    """
    labels = read_seeded(labels, control, delimiter, seed)
    names = {labels.spelling.canonical(name) for name in as_names("held_out", held_out)}
    check_held_out(labels, names, map(repr, names.difference(labels.names)))
    is_held_out = cells_of(labels, list(names))
    parts = split_within_labels(labels, np.flatnonzero(~is_held_out), fractions, seed=seed)
    return {
        **dict(zip(("train", "validation", "test"), parts, strict=True)),
        "held_out": np.flatnonzero(is_held_out),
    }
