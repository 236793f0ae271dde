"""A split as a value: checked, saved beside the result, loaded for the same data only."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from scvi_sams._argument_types import as_labels, as_numbers, refuse_other_than_text
from scvi_sams._arguments import as_names, refuse_other_than_whole
from scvi_sams.data import control_names
from scvi_sams.evaluation.splits._cells import canonical_labels
from scvi_sams.evaluation.splits._check import (
    PARTS,
    Labels,
    check_split,
    labels_fingerprint,
    levels_of_cells,
)
from scvi_sams.exceptions import InvalidArgumentError, InvalidSplitError


@dataclass(frozen=True, eq=False)
class Split:
    """Which cells train, validate and test, and what was held out of training.

    A cell may be in none of the three. Make one with a function of this package or with
    :func:`make_split`, which check it.

    Attributes
    ----------
    train, validation, test
        Positions of cells.
    held_out
        Canonical labels that no training cell carries.
    held_out_levels
        Level of the covariate in which each label of ``held_out`` is held out; training cells may
        carry it in other levels. ``None`` if labels are held out everywhere.
    name
        Of the kind of split.
    seed
        It was made with; ``None`` if it was not drawn.
    settings
        Other arguments it was made with.
    control
        Labels of the control cells.
    delimiter
        What joins the perturbations of a combination; ``None`` if labels are never split.
    fingerprint
        SHA-256 of the canonical labels (and levels) of all cells in their order.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    held_out: tuple[str, ...]
    name: str
    seed: int | None
    settings: Mapping[str, Any]
    control: tuple[str, ...]
    delimiter: str | None
    fingerprint: str
    held_out_levels: tuple[str, ...] | None = None

    def save(self, path: str | Path) -> None:
        """Write the split to a file that is read without pickle.

        Parameters
        ----------
        path
            Ends in ``.json``, or in ``.npz`` where cells are many.

        Raises
        ------
        InvalidSplitError
            If the path ends otherwise.
        """
        path = _checked_path(path)
        record = {key: value for key, value in vars(self).items() if key not in PARTS}
        record["settings"] = dict(self.settings)
        positions = {part: getattr(self, part) for part in PARTS}
        if path.suffix == ".npz":
            np.savez_compressed(path, record=np.array(json.dumps(record)), **positions)
        else:
            lists = {part: cells.tolist() for part, cells in positions.items()}
            path.write_text(json.dumps(record | lists), encoding="utf-8")

    @classmethod
    def load(
        cls, path: str | Path, labels: Labels | None = None, *, covariate: Labels | None = None
    ) -> Self:
        """Read a split that :meth:`save` wrote.

        Parameters
        ----------
        path
            Of the file, ending in ``.json`` or ``.npz``.
        labels
            One label per cell of the data that the split is to be used on. If given, the split is
            checked against them (:func:`check_split`).
        covariate
            One level per cell, for a split that holds labels out in some levels only.

        Returns
        -------
        The split.

        Raises
        ------
        InvalidSplitError
            If the file holds no split, or the split does not fit the labels.
        """
        path = _checked_path(path)
        try:
            if path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as arrays:
                    fields = json.loads(arrays["record"].item())
                    fields |= {part: arrays[part] for part in PARTS}
            else:
                fields = json.loads(path.read_text(encoding="utf-8"))
            for part in PARTS:
                fields[part] = np.asarray(fields[part], dtype=np.int64)
            for key in ("held_out", "held_out_levels", "control"):
                fields[key] = fields[key] if fields[key] is None else tuple(fields[key])
            split = cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidSplitError(
                f"{str(path)!r} holds no split ({error}). Load a file that Split.save wrote."
            ) from error
        if labels is not None:
            check_split(split, labels, covariate=covariate)
        return split


def make_split(
    labels: Labels,
    train: np.ndarray,
    validation: np.ndarray,
    test: np.ndarray,
    *,
    name: str,
    held_out: Sequence[str] = (),
    held_out_levels: Sequence[str] | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    covariate: Labels | None = None,
    control: str | Sequence[str] = "control",
    delimiter: str | None = "+",
) -> Split:
    """Make a split of given cells, for example of those that :func:`split_cells` returns.

    Parameters
    ----------
    labels
        One label per cell.
    train, validation, test
        Positions of cells.
    name, seed, settings
        How the split came about; ``settings`` holds what JSON can hold.
    held_out
        Labels, in any spelling, that no training cell may carry.
    held_out_levels
        Level in which each of them is held out, if not in all.
    covariate
        One level per cell, needed with ``held_out_levels``.
    control
        Label or labels of the control cells.
    delimiter
        What joins the perturbations of a combination; ``None`` if labels are never split.

    Returns
    -------
    The split; positions are ascending.

    Raises
    ------
    InvalidSplitError
        If it leaks or cannot be used (:func:`check_split`).

    Examples
    --------
    >>> labels = ["control", "control", "A", "A", "B", "B"]
    >>> split = scvi_sams.evaluation.make_split(
    ...     labels, train=[0, 2, 3], validation=[], test=[1, 4, 5], name="B is new", held_out=["B"]
    ... )
    >>> split.held_out
    ('B',)
    """
    refuse_other_than_text(name=name)
    if seed is not None:
        refuse_other_than_whole(at_least=0, seed=seed)
    if settings is not None and not isinstance(settings, Mapping):
        raise InvalidArgumentError(f"`settings` must be a dict, not {settings!r}.")
    if held_out_levels is not None:
        held_out_levels = as_names("held_out_levels", held_out_levels)
    labels = as_labels("labels", labels)
    split = Split(
        train=_positions("train", train),
        validation=_positions("validation", validation),
        test=_positions("test", test),
        held_out=tuple(canonical_labels(held_out, control=control, delimiter=delimiter)),
        held_out_levels=None if held_out_levels is None else tuple(map(str, held_out_levels)),
        name=name,
        seed=None if seed is None else int(seed),
        settings=dict(settings or {}),
        control=control_names(control),
        delimiter=delimiter,
        fingerprint=labels_fingerprint(
            canonical_labels(labels, control=control, delimiter=delimiter),
            None if held_out_levels is None else levels_of_cells(covariate, len(labels)),
        ),
    )
    check_split(split, labels, covariate=covariate)
    return split


def _positions(part: str, cells: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return positions in ascending order; whether there are such cells is checked later."""
    array = as_numbers(part, cells)
    if array.ndim != 1 or (array != np.rint(array)).any():
        raise InvalidArgumentError(f"`{part}` must be a list of positions of cells, not {cells!r}.")
    return np.sort(array.astype(np.int64))


def _checked_path(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix not in (".json", ".npz"):
        raise InvalidSplitError(
            f"A split is saved as .json or .npz, not as {path.name!r}. Choose one of the two."
        )
    return path
