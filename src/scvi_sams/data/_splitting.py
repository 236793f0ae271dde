"""Splits of cells for training, with training cells for every perturbation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scvi import settings
from scvi.data import AnnDataManager

from scvi_sams._checks import as_cells
from scvi_sams._plurals import counted
from scvi_sams.data._field import registered_labels
from scvi_sams.exceptions import InvalidSplitError
from scvi_sams.labels._labels import distinct_rows
from scvi_sams.labels._stratified import stratified_split


def training_split(
    manager: AnnDataManager,
    train_size: float | None = None,
    validation_size: float | None = None,
    *,
    shuffle: bool = True,
) -> list[np.ndarray]:
    """Positions of training, validation and test cells of a registered screen.

    The fraction of training cells is 0.9 by default, that of validation cells the remainder; if
    both are set, the remainder is the test set. With ``shuffle`` cells are split at random within
    each perturbation and combination, with the seed ``scvi.settings.seed`` (0 if unset). Otherwise
    they keep their order: validation, training, then test cells, the order of scvi-tools.
    """
    train = 0.9 if train_size is None else float(train_size)
    validation = 1 - train if validation_size is None else float(validation_size)
    # Rounded, so that 0.7 and 0.3 leave nothing, not a small negative number.
    fractions = (train, validation, round(1 - train - validation, 9))
    if not shuffle:
        return _sequential_split(manager.adata.n_obs, fractions)
    _, groups = distinct_rows(np.sort(registered_labels(manager).codes, axis=1))
    return list(stratified_split(groups, fractions, seed=default_seed()))


def default_seed() -> int:
    """Return the seed of scvi-tools, 0 if it is unset: the same in every process."""
    return 0 if settings.seed is None else int(settings.seed)


def complete_split(split: Iterable[object], n_cells: int) -> list[np.ndarray]:
    """Check a user's split, and add the cells that it leaves out to the test part.

    It consists of positions, or booleans, of training, validation and test cells; later parts may
    be omitted. Returns positions of the three parts, together all cells.
    """
    train, validation, test = parts_of_split(split, n_cells)
    left_out = np.setdiff1d(np.arange(n_cells), np.concatenate([train, validation, test]))
    return [train, validation, np.concatenate([test, left_out])]


def parts_of_split(split: Iterable[object], n_cells: int) -> list[np.ndarray]:
    """Check a user's split; positions of training, validation and test cells."""
    if isinstance(split, str) or not isinstance(split, Iterable):
        raise InvalidSplitError(
            "`external_indexing` must be a list of positions of training, validation and test "
            f"cells, not {split!r}."
        )
    given = [[] if part is None else part for part in split]
    if len(given) > 3:
        raise InvalidSplitError(
            f"The split has {len(given)} parts; pass training, validation and test cells."
        )
    parts = [as_cells("external_indexing", part, n_cells) for part in given]
    _check_parts(parts, n_cells)
    return parts + [np.array([], dtype=np.int64)] * (3 - len(parts))


def _check_parts(parts: Sequence[np.ndarray], n_cells: int) -> None:
    """Raise without training cells, or if parts overlap or have invalid positions."""
    if not len(parts) or not len(parts[0]):
        raise InvalidSplitError("The split has no training cells.")
    named = np.concatenate(parts)
    outside = named[(named < 0) | (named >= n_cells)]
    if len(outside):
        raise InvalidSplitError(
            f"The split names position {outside[0]}, but there are {n_cells} cells (positions 0 to "
            f"{n_cells - 1})."
        )
    times = np.bincount(named, minlength=n_cells)
    if times.max() > 1:
        raise InvalidSplitError(
            f"The split names {counted((times > 1).sum(), 'cell')} more than once, such as the "
            f"cell at position {times.argmax()}. Each cell may be in only one part, once."
        )


def _sequential_split(n_cells: int, fractions: tuple[float, ...]) -> list[np.ndarray]:
    n_train = int(np.ceil(round(fractions[0] * n_cells, 6)))
    n_validation = min(int(round(fractions[1] * n_cells, 6)), n_cells - n_train)
    validation, train, test = np.split(np.arange(n_cells), [n_validation, n_validation + n_train])
    return [train, validation, test]
