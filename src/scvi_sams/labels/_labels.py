"""What was done to each cell, as one value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from scvi_sams.exceptions import MissingControlError
from scvi_sams.labels._names import listing
from scvi_sams.labels._spelling import Spelling

NO_PERTURBATION = -1
"""Code that pads the rows of cells with fewer perturbations than the widest combination."""

_WORD_FOR_CONTROL = re.compile(
    r"(?<![a-z])(control|ctrl|ctl|ntc?|neg(ative)?|(non)?targeting|dmso|vehicle|scrambled?|mock"
    r"|untreated|safe)(?![a-z])"
)


@dataclass(frozen=True, eq=False)
class Labels:
    """Which perturbations each cell received, and how much of each.

    Text is read once, where a user hands it over (:func:`~scvi_sams.labels._parsing.encode_labels`,
    :func:`~scvi_sams.labels._dosage_matrix.encode_dosage_matrix`); everything inside the package
    takes this value. It is not changed: arrays are read-only.

    Attributes
    ----------
    codes
        Integers of shape ``(n_cells, n_slots)``: positions in ``vocabulary``, ascending in each
        row, or :data:`NO_PERTURBATION` where a slot is empty. ``n_slots`` is the size of the
        largest combination (at least 1).
    doses
        Dosages of shape ``(n_cells, n_slots)`` in the user's units; 0 where a slot is empty.
    vocabulary
        Names of the perturbations, without controls.
    spelling
        How labels are written.
    """

    codes: np.ndarray
    doses: np.ndarray
    vocabulary: tuple[str, ...]
    spelling: Spelling

    def __post_init__(self) -> None:
        for array in (self.codes, self.doses):
            array.flags.writeable = False

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.codes)

    def __getitem__(self, cells: Any) -> Labels:
        """Labels of some cells, by positions, booleans or a slice."""
        return replace(self, codes=self.codes[cells], doses=self.doses[cells])

    @cached_property
    def is_control(self) -> np.ndarray:
        """Boolean of shape ``(n_cells,)``: cells that carry no perturbation."""
        return (self.codes == NO_PERTURBATION).all(axis=1)

    @property
    def control(self) -> str:
        """Canonical label of the control cells."""
        return self.spelling.control_label

    @property
    def names(self) -> list[str]:
        """Canonical labels that cells carry, sorted; that of the control cells among them."""
        return self._distinct[0]

    @property
    def perturbed_names(self) -> list[str]:
        """Canonical labels that perturbed cells carry, sorted."""
        return [name for name in self.names if name != self.control]

    @property
    def name_of_cell(self) -> np.ndarray:
        """Position of each cell's label in ``names``, shape ``(n_cells,)``."""
        return self._distinct[1]

    @property
    def canonical(self) -> np.ndarray:
        """Canonical label of every cell, an array of text of shape ``(n_cells,)``."""
        return np.array(self.names, dtype=object)[self.name_of_cell]

    @cached_property
    def _distinct(self) -> tuple[list[str], np.ndarray]:
        parts_of_row, row_of_cell = distinct_combinations(self.codes, self.vocabulary)
        written = np.array([self.spelling.join(parts) for parts in parts_of_row], dtype=object)
        names, name_of_row = np.unique(written.astype(str), return_inverse=True)
        return names.tolist(), name_of_row[row_of_cell]


def distinct_combinations(
    codes: np.ndarray, vocabulary: Sequence[str]
) -> tuple[list[list[str]], np.ndarray]:
    """Names of the perturbations of every distinct row of codes, and the row of every cell.

    Names are sorted; control cells have none.
    """
    if codes.shape[1] == 1:  # a tenth of the time of rows
        first, row_of_cell = np.unique(codes, return_inverse=True)
        rows = first[:, None]
    else:
        rows, row_of_cell = np.unique(codes, axis=0, return_inverse=True)
    parts = [sorted(vocabulary[code] for code in row if code != NO_PERTURBATION) for row in rows]
    return parts, row_of_cell.ravel()


def check_control_label(labels: Labels) -> None:
    """Raise an error if no label is a control label; names that look like one are shown first."""
    if labels.is_control.any():
        return
    names = sorted(
        labels.vocabulary, key=lambda name: _WORD_FOR_CONTROL.search(name.lower()) is None
    )
    sought = " or ".join(map(repr, labels.spelling.control)) or "any of an empty list"
    raise MissingControlError(
        f"No control cell was found: no label equals {sought}. "
        f"Labels name {listing(names)}. Pass the label (or a list of labels) of the control cells "
        "as `control`."
    )


def check_control_row(labels: Labels, location: str) -> None:
    """Raise an error if no row of a dosage matrix is that of a control cell."""
    if not labels.is_control.any():
        raise MissingControlError(
            f"No control cell was found: every row of {location} has a non-zero dose. A control "
            "cell is a row of zeros; if controls have a column, name it in `control`."
        )
