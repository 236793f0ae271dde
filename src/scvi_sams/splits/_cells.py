"""Which combinations are held out and which cells train: seeded, pure functions of the labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from scvi_sams._checks import as_names, check_bool, check_integer, check_text
from scvi_sams.exceptions import InvalidSplitError
from scvi_sams.labels._parsing import read_labels
from scvi_sams.labels._spelling import control_names
from scvi_sams.labels._stratified import stratified_split


def canonical_labels(
    labels: Sequence[str] | np.ndarray | pd.Series,
    *,
    control: str | Sequence[str] = "control",
    delimiter: str | None = "+",
) -> np.ndarray:
    """Spell the label of every cell in one way, so that ``"B+A"`` and ``"A+B"`` are one group.

    Parameters
    ----------
    labels
        One label per cell.
    control
        Label or labels of the control cells.
    delimiter
        What joins the perturbations of a combination; ``None`` if labels are never split.

    Returns
    -------
    Strings of shape ``(n_cells,)``; control cells carry the first control label.

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
    labels: Sequence[str] | np.ndarray | pd.Series,
    n_held_out: int,
    *,
    seed: int = 0,
    control: str | Sequence[str] = "control",
    delimiter: str = "+",
    require_singles: bool = True,
) -> list[str]:
    """Choose combinations to hold out of training.

    The choice depends on the set of labels and the seed only: not on the order of the cells, nor
    on how a combination is spelled. With the same seed, fewer held-out combinations are a subset
    of more.

    Parameters
    ----------
    labels
        One label per cell.
    n_held_out
        Number of combinations to hold out.
    seed
        Seed of the choice.
    control
        Label or labels of the control cells.
    delimiter
        What joins the perturbations of a combination.
    require_singles
        Choose only among combinations each of whose perturbations has cells that carry it alone,
        so that its effect can be learned whichever other combinations are held out.

    Returns
    -------
    Canonical labels of the held-out combinations, sorted.

    Raises
    ------
    InvalidSplitError
        If fewer combinations are available than were asked for.

    Examples
    --------
    >>> labels = ["control", "A", "B", "C", "A+B", "B+C", "C+D"]
    >>> scvi_sams.evaluation.hold_out_combinations(labels, 2)  # D was not measured alone
    ['A+B', 'B+C']
    """
    check_integer(at_least=None, n_held_out=n_held_out)
    check_integer(at_least=0, seed=seed)
    check_text(delimiter=delimiter)
    check_bool(require_singles=require_singles)
    combinations = shuffled_combinations(
        canonical_labels(labels, control=control, delimiter=delimiter),
        seed,
        control=control,
        delimiter=delimiter,
        require_singles=require_singles,
    )
    if not 0 <= n_held_out <= len(combinations):
        condition = " whose perturbations all occur alone as well" if require_singles else ""
        raise InvalidSplitError(
            f"{n_held_out} combinations cannot be held out: the labels have {len(combinations)} "
            f"combinations{condition}. Ask for fewer, or check `delimiter`"
            + (" or `require_singles`." if require_singles else ".")
        )
    return sorted(combinations[:n_held_out])


def shuffled_combinations(
    label_of_cell: np.ndarray,
    seed: int,
    *,
    control: str | Sequence[str],
    delimiter: str,
    require_singles: bool = False,
) -> list[str]:
    """Return the combinations among canonical labels, sorted and then shuffled by the seed.

    With ``require_singles`` only those each of whose perturbations has cells of its own.
    """
    present = set(label_of_cell) - set(control_names(control))
    combinations = sorted(label for label in present if delimiter in label)
    if require_singles:
        combinations = [c for c in combinations if present.issuperset(c.split(delimiter))]
    order = np.random.default_rng(seed).permutation(len(combinations))
    return [combinations[position] for position in order]


def split_cells(
    labels: Sequence[str] | np.ndarray | pd.Series,
    held_out: Sequence[str],
    *,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    control: str | Sequence[str] = "control",
    delimiter: str | None = "+",
) -> dict[str, np.ndarray]:
    """Split cells into training, validation, test and held-out cells, stratified by label.

    Within each label the counts are its share of the fractions, rounded up or down at random so
    that the fractions also hold over many small labels. Every label that is not held out keeps at
    least one training cell.

    Parameters
    ----------
    labels
        One label per cell.
    held_out
        Labels, in any spelling, whose cells are all held out, for example those of
        :func:`hold_out_combinations`.
    fractions
        Shares of training, validation and test cells among the cells that are not held out.
    seed
        Seed of the split.
    control
        Label or labels of the control cells.
    delimiter
        What joins the perturbations of a combination; ``None`` if labels are never split.

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
    check_integer(at_least=0, seed=seed)
    held_out = as_names("held_out", held_out)
    label_of_cell = canonical_labels(labels, control=control, delimiter=delimiter)
    held_out_labels = set(canonical_labels(held_out, control=control, delimiter=delimiter))
    _validate_held_out(held_out_labels, label_of_cell, control_names(control))
    is_held_out = np.isin(label_of_cell, list(held_out_labels))
    known = np.flatnonzero(~is_held_out)
    parts = stratified_split(label_of_cell[known].astype(str), fractions, seed=seed)
    split = {
        name: known[part] for name, part in zip(("train", "validation", "test"), parts, strict=True)
    }
    return split | {"held_out": np.flatnonzero(is_held_out)}


def _validate_held_out(
    held_out: set[str], label_of_cell: np.ndarray, control: tuple[str, ...]
) -> None:
    absent = sorted(held_out - set(label_of_cell))
    if absent:
        raise InvalidSplitError(
            f"No cell carries the held-out label {', '.join(map(repr, absent))}, so there would be "
            "nothing to test on. Choose labels that occur in the data."
        )
    if control[0] in held_out:
        raise InvalidSplitError(
            f"The control ({control[0]!r}) cannot be held out: without control cells in training "
            "no effect is defined. Remove it from `held_out`."
        )
