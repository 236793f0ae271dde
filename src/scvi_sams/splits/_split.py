"""A split as a value: checked for leaks, saved and loaded, valid only for the data it came from."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Self, TypeAlias
from zipfile import BadZipFile

import numpy as np
import pandas as pd

from scvi_sams._checks import as_cells, as_labels, as_names, as_path, check_integer, check_text
from scvi_sams._files import write_whole
from scvi_sams._plurals import counted
from scvi_sams.exceptions import InvalidArgumentError, InvalidCovariateError, InvalidSplitError
from scvi_sams.labels._labels import Labels
from scvi_sams.labels._names import listing
from scvi_sams.labels._parsing import read_labels
from scvi_sams.splits._combinations import CellLabels, check_held_out, labels_with

Levels: TypeAlias = Sequence[str] | np.ndarray | pd.Series
"""Level of a covariate, such as the cell type, of every cell."""

Cells: TypeAlias = Sequence[int] | Sequence[bool] | np.ndarray | pd.Series
"""Positions of cells, or a boolean for every cell."""

PARTS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Split:
    """Training, validation and test cells, and what was held out of training.

    A cell may be in none of the three. Make a split with a function of this package or with
    :func:`make_split`; both check it.

    Attributes
    ----------
    train, validation, test
        Positions of cells.
    held_out
        Canonical labels of which there is no training cell.
    held_out_levels
        Level of the covariate in which each label of ``held_out`` is held out; training cells may
        have it in other levels. ``None`` if labels are held out everywhere.
    held_out_perturbations
        Perturbations without any training or validation cell, alone or in a combination.
    name
        Kind of split.
    seed
        Seed it was made with; ``None`` if it was not sampled.
    settings
        Other arguments it was made with.
    control
        Labels of the control cells.
    delimiter
        Separator between the perturbations of a combination; ``None`` if labels are never split.
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
    held_out_perturbations: tuple[str, ...] = ()

    def save(self, path: str | Path) -> None:
        """Write the split to a file, without pickle.

        Parameters
        ----------
        path
            File ending in ``.json``, or in ``.npz`` for many cells.

        Raises
        ------
        InvalidSplitError
            If the path has another ending.
        SavingError
            If it cannot be written; an existing file is then unchanged.
        """
        path = _checked_path(path)
        record = {key: value for key, value in vars(self).items() if key not in PARTS}
        record["settings"] = dict(self.settings)
        positions = {part: getattr(self, part) for part in PARTS}
        if path.suffix == ".npz":
            arrays = {"record": np.array(json.dumps(record)), **positions}
            write_whole(path, lambda partial: np.savez_compressed(partial, **arrays))
        else:
            lists = {part: cells.tolist() for part, cells in positions.items()}
            text = json.dumps(record | lists)
            write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))

    @classmethod
    def load(
        cls,
        path: str | Path,
        labels: CellLabels | None = None,
        *,
        covariate: Levels | None = None,
    ) -> Self:
        """Read a split that :meth:`save` wrote.

        Parameters
        ----------
        path
            File ending in ``.json`` or ``.npz``.
        labels, covariate
            Labels and levels of the cells on which the split will be used. With labels the split
            is checked by :func:`check_split`.

        Returns
        -------
        The split.

        Raises
        ------
        InvalidSplitError
            If the file does not contain a split, or the split does not fit the labels.
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
            # Files of earlier versions do not have held-out perturbations.
            fields.setdefault("held_out_perturbations", ())
            for key in ("held_out", "held_out_levels", "held_out_perturbations", "control"):
                fields[key] = fields[key] if fields[key] is None else tuple(fields[key])
            split = cls(**fields)
        except (KeyError, TypeError, ValueError, EOFError, BadZipFile, zlib.error) as error:
            raise InvalidSplitError(
                f"{str(path)!r} is not a split ({error}). Load a file that Split.save wrote."
            ) from error
        if labels is not None:
            check_split(split, labels, covariate=covariate)
        return split


def make_split(
    labels: CellLabels,
    train: Cells,
    validation: Cells,
    test: Cells,
    *,
    name: str,
    held_out: Sequence[str] = (),
    held_out_levels: Sequence[str] | None = None,
    held_out_perturbations: Sequence[str] = (),
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    covariate: Levels | None = None,
    control: str | Sequence[str] = "control",
    delimiter: str | None = "+",
) -> Split:
    """Make a split from given cells, for example those that :func:`split_cells` returns.

    Parameters
    ----------
    labels, control, delimiter
        As for :func:`canonical_labels`.
    train, validation, test
        Positions of cells, or a boolean for every cell, such as ``adata.obs["split"] == "train"``.
    name, seed, settings
        Description of the split; ``settings`` may contain anything that JSON can store.
    held_out
        Labels, in any spelling, of which there must be no training cell.
    held_out_levels
        Level in which each of them is held out, if not in all.
    held_out_perturbations
        Perturbations of which there must be no training or validation cell, alone or in a
        combination.
    covariate
        One level per cell, needed with ``held_out_levels``.

    Returns
    -------
    The split; positions are ascending.

    Raises
    ------
    InvalidSplitError
        If it leaks or is otherwise invalid (:func:`check_split`).

    Examples
    --------
    >>> labels = ["control", "control", "A", "A", "B", "B"]
    >>> split = scvi_sams.evaluation.make_split(
    ...     labels, train=[0, 2, 3], validation=[], test=[1, 4, 5], name="B is new", held_out=["B"]
    ... )
    >>> split.held_out
    ('B',)
    """
    check_text(name=name)
    if seed is not None:
        check_integer(at_least=0, seed=seed)
    if held_out_levels is not None:
        held_out_levels = as_names("held_out_levels", held_out_levels)
    labels = read_labels(labels, control, delimiter)
    canonical = labels.spelling.canonical
    split = Split(
        train=np.sort(as_cells("train", train, len(labels))),
        validation=np.sort(as_cells("validation", validation, len(labels))),
        test=np.sort(as_cells("test", test, len(labels))),
        held_out=tuple(canonical(name) for name in as_names("held_out", held_out)),
        held_out_levels=None if held_out_levels is None else tuple(map(str, held_out_levels)),
        held_out_perturbations=tuple(as_names("held_out_perturbations", held_out_perturbations)),
        name=name,
        seed=None if seed is None else int(seed),
        settings=_as_json(settings or {}),
        control=labels.spelling.control,
        delimiter=labels.spelling.delimiter,
        fingerprint=_fingerprint(
            labels, None if held_out_levels is None else levels_of_cells(covariate, len(labels))
        ),
    )
    check_split(split, labels, covariate=covariate)
    return split


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from a file: NumPy numbers and arrays become plain values."""

    def plain(value: Any) -> Any:
        if hasattr(value, "tolist"):
            return value.tolist()
        raise TypeError(f"{value!r} is none of these")

    try:
        return json.loads(json.dumps(dict(settings), default=plain))
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(
            "`settings` must be a dict of text, numbers, booleans, lists and dicts, which JSON can "
            f"store: {error}."
        ) from error


def _checked_path(path: str | Path) -> Path:
    path = as_path("path", path)
    if path.suffix not in (".json", ".npz"):
        raise InvalidSplitError(
            f"A split is saved as .json or .npz, not as {path.name!r}. Choose one of the two."
        )
    return path


def check_split(split: Split, labels: CellLabels, *, covariate: Levels | None = None) -> None:
    """Raise if a split leaks, or was made for other data.

    Parameters
    ----------
    split
        Split to check.
    labels
        One label per cell of the data.
    covariate
        One level per cell, required if the split holds labels out in some levels only.

    Raises
    ------
    InvalidSplitError
        If the split was made for other labels (or for another order of the cells); a cell is in
        two parts, or twice in one; there is no training control cell or no test cell; a held-out
        label is the control, has no cells, has training cells, or has both validation and test
        cells; a perturbation that is held out as a whole has no cells, or has training or
        validation cells, alone or in a combination. Messages name the labels.
    InvalidCovariateError
        If levels are needed but missing.

    Examples
    --------
    >>> from scvi_sams import evaluation
    >>> labels = adata.obs["perturbation"]
    >>> split = evaluation.combination_hold_out(labels)
    >>> evaluation.check_split(split, labels)

    The same split does not fit cells in another order:

    >>> evaluation.check_split(split, labels.iloc[::-1])
    Traceback (most recent call last):
    ...
    scvi_sams.exceptions.InvalidSplitError: ...
    """
    labels = read_labels(labels, split.control, split.delimiter)
    levels = None
    if split.held_out_levels is not None:
        levels = levels_of_cells(covariate, len(labels))
    if _fingerprint(labels, levels) != split.fingerprint:
        raise InvalidSplitError(
            f"The split {split.name!r} was made for other labels, or for these in another order of "
            "the cells. Use it on the data it was made for, or make a new one."
        )
    _check_positions(split, len(labels))
    if not labels.is_control[split.train].any():
        raise InvalidSplitError(
            f"No training cell is labelled {labels.control!r}: effects are undefined without "
            "control cells in training. Put control cells into training, or pass their label as "
            "`control`."
        )
    if len(split.test) == 0:
        raise InvalidSplitError("No cell is tested. Hold out more, or use a larger test fraction.")
    _check_no_leaks(split, labels, levels)
    _check_no_perturbation_leaks(split, labels)


def levels_of_cells(covariate: Levels | None, n_cells: int) -> np.ndarray:
    """Return the level of every cell as text; an error if one is missing."""
    levels = pd.Series([] if covariate is None else as_labels("covariate", covariate), dtype=object)
    if len(levels) != n_cells or levels.isna().any():
        raise InvalidCovariateError(
            "The split holds labels out in some levels of a covariate only: pass the level of each "
            f"of the {n_cells} cells, none missing, as `covariate`."
        )
    return levels.map(str).to_numpy(dtype=object)


def _fingerprint(labels: Labels, levels: np.ndarray | None) -> str:
    """Return the SHA-256 of the canonical labels of all cells, and of their levels if given."""
    content = [labels.canonical.tolist(), None if levels is None else levels.tolist()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _check_positions(split: Split, n_cells: int) -> None:
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
                f"{counted(len(shared), 'cell is', 'cells are')} in both {first} and {second}, for "
                f"example the cell at position {shared[0]}. Every cell is in at most one part."
            )


def _check_no_leaks(split: Split, labels: Labels, levels: np.ndarray | None) -> None:
    """Compare what is held out with the labels of the cells, both as in messages."""
    if split.held_out_levels is not None and len(split.held_out) != len(split.held_out_levels):
        raise InvalidSplitError(
            f"{counted(len(split.held_out), 'label is', 'labels are')} held out in "
            f"{counted(len(split.held_out_levels), 'level')}. Give one level for each."
        )
    held_out = set(_shown(split.held_out, split.held_out_levels))
    group_of_cell = np.array(_shown(labels.canonical, levels), dtype=object)
    check_held_out(labels, split.held_out, held_out.difference(group_of_cell))
    groups = {part: held_out.intersection(group_of_cell[getattr(split, part)]) for part in PARTS}
    if groups["train"]:
        raise InvalidSplitError(
            "The split leaks: training cells have the held-out "
            f"{', '.join(sorted(groups['train']))}. Remove these cells from training."
        )
    both = groups["validation"] & groups["test"]
    if both:
        raise InvalidSplitError(
            "The split leaks: validation and test cells both have the held-out "
            f"{', '.join(sorted(both))}, so that the model would be selected on test labels. Leave "
            "it in one of the two."
        )


def _check_no_perturbation_leaks(split: Split, labels: Labels) -> None:
    """Compare perturbations that are held out as a whole with those of the cells of each part."""
    held_out = set(split.held_out_perturbations)
    carriers = labels_with(labels, held_out)
    check_held_out(labels, held_out, map(repr, held_out.difference(*carriers.values())))
    for part in ("train", "validation"):
        leaking = sorted(carriers.keys() & set(labels[getattr(split, part)].names))
        if leaking:
            found = sorted(set().union(*(carriers[label] for label in leaking)))
            raise InvalidSplitError(
                f"The split leaks: {part} cells labelled {listing(leaking)} have "
                f"{listing(found)}, which is held out as a whole. Remove every cell with it, "
                f"alone or in a combination, from {part}."
            )


def _shown(labels: Iterable[str], levels: Iterable[str] | None) -> list[str]:
    if levels is None:
        return [repr(label) for label in labels]
    return [f"{label!r} in {level!r}" for label, level in zip(labels, levels, strict=True)]
