"""Perturbations and doses of each cell, as one value."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd

from scvi_sams._plurals import plural
from scvi_sams.exceptions import (
    InvalidDosageError,
    MissingControlError,
    SAMSError,
    UnknownPerturbationError,
)
from scvi_sams.labels._conventions import looks_like_control
from scvi_sams.labels._names import check_known, close_names, listing
from scvi_sams.labels._spelling import Spelling

NO_PERTURBATION = -1
"""Padding code for cells with fewer perturbations than the largest combination."""


@dataclass(frozen=True, eq=False)
class Labels:
    """Perturbations and doses of each cell.

    Text is parsed once, in public functions (:func:`~scvi_sams.labels._parsing.encode_labels`,
    :func:`~scvi_sams.labels._parsing.encode_dosage_matrix`); all internal functions take this
    value. It is immutable: its arrays are read-only.

    Attributes
    ----------
    codes
        Integers of shape ``(n_cells, n_slots)``: positions in ``vocabulary``, unique and ascending
        in each row, or :data:`NO_PERTURBATION` where a slot is empty. ``n_slots`` is the size of
        the largest combination (at least 1).
    doses
        Doses of shape ``(n_cells, n_slots)`` in the user's units; 0 where a slot is empty.
    vocabulary
        Names of the perturbations, without controls.
    spelling
        Spelling of labels.
    """

    codes: np.ndarray
    doses: np.ndarray
    vocabulary: tuple[str, ...]
    spelling: Spelling

    def __post_init__(self) -> None:
        for name in ("codes", "doses"):
            # A view, so that the caller's array stays writable.
            array = getattr(self, name).view()
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.codes)

    def __getitem__(self, cells: np.ndarray | Sequence[int] | slice) -> Labels:
        """Labels of some cells, by positions, booleans or a slice, with the same vocabulary."""
        return replace(self, codes=self.codes[cells], doses=self.doses[cells])

    @cached_property
    def is_control(self) -> np.ndarray:
        """Boolean of shape ``(n_cells,)``: cells without a perturbation."""
        return (self.codes == NO_PERTURBATION).all(axis=1)

    @property
    def control(self) -> str:
        """Canonical label of the control cells."""
        return self.spelling.control_label

    @property
    def names(self) -> list[str]:
        """Canonical labels of the cells, sorted, including that of the control cells."""
        return self._distinct[0]

    @property
    def perturbed_names(self) -> list[str]:
        """Canonical labels of perturbed cells, sorted."""
        return [name for name in self.names if name != self.control]

    @property
    def carried(self) -> list[str]:
        """Perturbations of the cells, sorted; ``vocabulary`` may contain more."""
        return sorted(self.vocabulary[code] for code in np.unique(self.codes) if code >= 0)

    @property
    def name_of_cell(self) -> np.ndarray:
        """Position of each cell's label in ``names``, shape ``(n_cells,)``."""
        return self._distinct[1]

    @cached_property
    def canonical(self) -> np.ndarray:
        """Canonical label of every cell, an array of text of shape ``(n_cells,)``."""
        canonical = np.array(self.names, dtype=object)[self.name_of_cell]
        canonical.flags.writeable = False
        return canonical

    @cached_property
    def _distinct(self) -> tuple[list[str], np.ndarray]:
        parts_of_row, row_of_cell = distinct_combinations(self.codes, self.vocabulary)
        written = [self.spelling.join(parts) for parts in parts_of_row]
        names, name_of_row = np.unique(np.array(written, dtype=str), return_inverse=True)
        return names.tolist(), name_of_row[row_of_cell]


def distinct_rows(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows in ascending order, and the row of every cell.

    The result of ``np.unique(codes, axis=0, return_inverse=True)``, in a tenth of its time.
    """
    row_of_cell = np.zeros(len(codes), dtype=np.int64)
    for slot in codes.T:
        # Renumbered after each slot, so that the keys of many slots do not overflow.
        keys = row_of_cell * (slot.max(initial=NO_PERTURBATION) + 2) + (slot - NO_PERTURBATION)
        row_of_cell, _ = pd.factorize(keys)
    first_cell = np.empty(row_of_cell.max(initial=-1) + 1, dtype=np.int64)
    first_cell[row_of_cell] = np.arange(len(codes))  # any cell of each row: all are the same
    rows = codes[first_cell]
    order = np.lexsort(rows.T[::-1])
    return rows[order], np.argsort(order)[row_of_cell]


def distinct_combinations(
    codes: np.ndarray, vocabulary: Sequence[str]
) -> tuple[list[list[str]], np.ndarray]:
    """Names of the perturbations of every distinct row of codes, and the row of every cell.

    Names are sorted; control cells have none.
    """
    rows, row_of_cell = distinct_rows(codes)
    parts = [sorted(vocabulary[code] for code in row if code != NO_PERTURBATION) for row in rows]
    return parts, row_of_cell


def combinations_as_perturbations(
    labels: Labels, *, vocabulary: Sequence[str] | None = None
) -> Labels:
    """Give every combination its own code, for models in which effects do not add up.

    Codes, of shape ``(n_cells, 1)``, refer to ``vocabulary``, the known perturbations and
    combinations; ``None`` makes it from the cells, sorted. Doses must be 0 or 1.
    """
    other = np.unique(labels.doses[(labels.doses != 0) & (labels.doses != 1)])
    if len(other):
        raise InvalidDosageError(
            f"Doses other than 1 were given ({', '.join(f'{dose:g}' for dose in other[:5])}), "
            "but in this model every perturbation and combination is a separate state. "
            "Register each dose as its own label, such as 'drug@0.5', or use a model that is "
            "linear in the dose (SAMSVAE, CPAVAE)."
        )
    parts_of_row, row_of_cell = distinct_combinations(labels.codes, labels.vocabulary)
    name_of_row = [labels.spelling.join(parts) if parts else "" for parts in parts_of_row]
    if vocabulary is None:
        vocabulary = sorted({name for name in name_of_row if name})
    positions = {name: code for code, name in enumerate(vocabulary)}
    unknown = {
        name: len(parts)
        for name, parts in zip(name_of_row, parts_of_row, strict=True)
        if name and name not in positions
    }
    combinations = sorted(name for name, n_parts in unknown.items() if n_parts > 1)
    if combinations:
        raise UnknownPerturbationError(
            f"Unknown {plural(len(combinations), 'combination')}: {listing(combinations)}. "
            "This model treats each combination as a separate perturbation and cannot predict "
            "combinations without training cells. SAMSVAE and CPAVAE can: they add up "
            "the effects of the perturbations."
        )
    check_known(unknown, positions, labels.control)
    code_of_row = np.array([positions.get(name, NO_PERTURBATION) for name in name_of_row], np.int32)
    codes = code_of_row[row_of_cell][:, None]
    doses = (codes != NO_PERTURBATION).astype(np.float32)
    return replace(labels, codes=codes, doses=doses, vocabulary=tuple(vocabulary))


def inseparable_perturbations(codes: np.ndarray, vocabulary: Sequence[str]) -> list[list[str]]:
    """Groups of perturbations that occur only together, so that they cannot be distinguished."""
    rows, _ = distinct_rows(codes)
    numbers, slots = np.nonzero(rows != NO_PERTURBATION)
    rows_of_code: defaultdict[int, list[int]] = defaultdict(list)
    for number, code in zip(numbers.tolist(), rows[numbers, slots].tolist(), strict=True):
        rows_of_code[code].append(number)
    groups: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
    for code, found in sorted(rows_of_code.items()):
        groups[tuple(found)].append(vocabulary[code])
    return [group for group in groups.values() if len(group) > 1]


def parts_of_combination(label: str, spelling: Spelling) -> list[str]:
    """Split a canonical label; an error if it does not name at least two perturbations."""
    delimiter = spelling.delimiter
    parts = label.split(delimiter) if delimiter else [label]
    if len(parts) < 2:
        raise SAMSError(
            f"{label!r} is not a combination: an interaction needs at least two perturbations"
            + (f", joined by {delimiter!r}." if delimiter else " (`delimiter` is None).")
        )
    return parts


def check_has_control(labels: Labels, matrix_key: str | None = None) -> None:
    """Raise if no cell is a control cell; the message lists names that look like controls first.

    ``matrix_key`` is the key of obsm, if labels come from a dosage matrix.
    """
    if labels.is_control.any():
        return
    if matrix_key is not None:
        raise MissingControlError(
            f"No control cell was found: every row of adata.obsm[{matrix_key!r}] has a non-zero "
            "dose. A control cell is a row of zeros; if controls have a column, name it in "
            "`control`."
        )
    wanted = labels.spelling.control
    close = close_names(wanted[0], labels.vocabulary, n=1)
    names = sorted(
        labels.vocabulary, key=lambda name: (name not in close, not looks_like_control(name))
    )
    raise MissingControlError(
        f"No control cell was found: no label equals {' or '.join(map(repr, wanted))}. Labels name "
        f"{listing(names)}. Pass the label (or a list of labels) of the control cells as `control`."
    )
