"""Perturbation labels and dosage matrices to padded codes and doses: pure functions.

A screen of a million cells has few distinct labels, so labels are parsed once each and then spread
over the cells; no cells x perturbations matrix is ever made.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams.exceptions import (
    InvalidDosageError,
    InvalidPerturbationLabelError,
    MissingControlError,
    UnknownPerturbationError,
)

NO_PERTURBATION = -1
"""Code that pads the rows of cells with fewer perturbations than the widest combination."""


@dataclass(frozen=True)
class PerturbationCodes:
    """Which perturbations each cell received, and how much of each.

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
    """

    codes: np.ndarray
    doses: np.ndarray
    vocabulary: tuple[str, ...]

    @property
    def is_control(self) -> np.ndarray:
        """Boolean of shape ``(n_cells,)``: cells that carry no perturbation."""
        return (self.codes == NO_PERTURBATION).all(axis=1)


def control_names(control: str | Sequence[str]) -> tuple[str, ...]:
    """Return the control labels as a tuple, whether one or several were given."""
    return (control,) if isinstance(control, str) else tuple(control)


def split_label(label: str, *, delimiter: str | None, control: Sequence[str]) -> list[str]:
    """Split a label into perturbation names as written, controls included.

    A label that is itself a control label is never split, so control labels may hold the delimiter.
    """
    text = label.strip()
    if text in control or not delimiter:
        names = [text]
    else:
        names = [name.strip() for name in text.split(delimiter)]
    if not all(names):
        raise InvalidPerturbationLabelError(
            f"The perturbation label {label!r} has an empty name"
            + (f" beside the delimiter {delimiter!r}" if delimiter else "")
            + ". Fix the label, or pass the delimiter that your labels use (None to never split)."
        )
    perturbations = [name for name in names if name not in control]
    repeated = sorted({name for name in perturbations if perturbations.count(name) > 1})
    if repeated:
        raise InvalidPerturbationLabelError(
            f"The perturbation label {label!r} names {', '.join(repeated)} twice. Write each "
            "perturbation once and give its amount as a dosage."
        )
    return names


def canonical_label(
    label: str, *, delimiter: str | None = "+", control: Sequence[str] = ("control",)
) -> str:
    """Spell a label in the one way that does not depend on who wrote it.

    Parameters
    ----------
    label
        For example ``"B+A"``, ``"A + control"`` or a control label.
    delimiter
        What joins the perturbations of a combination; ``None`` if labels are never split.
    control
        Labels of control cells. Inside a combination they stand for "nothing".

    Returns
    -------
    Names sorted and joined by the delimiter; ``control[0]`` for a control label.

    Raises
    ------
    InvalidPerturbationLabelError
        If the label has an empty or a repeated name.
    """
    names = split_label(str(label), delimiter=delimiter, control=control)
    perturbations = sorted(name for name in names if name not in control)
    return (delimiter or "").join(perturbations) if perturbations else control[0]


def encode_labels(
    labels: pd.Series,
    dosages: pd.Series | None = None,
    *,
    control: Sequence[str],
    delimiter: str | None,
    vocabulary: Sequence[str] | None = None,
) -> PerturbationCodes:
    """Encode a label per cell, and optionally its dosage.

    Parameters
    ----------
    labels
        One label per cell; any dtype whose values print as the label.
    dosages
        One value per cell: a number (the dose of every perturbation of the label) or text such as
        ``"0.5+1.0"``, aligned with the label as written. Ignored for control cells. ``None``: 1.
    control
        Labels of control cells.
    delimiter
        What joins names in a label (and numbers in a dosage).
    vocabulary
        Known perturbations; codes refer to it. ``None`` makes it from the labels, sorted.

    Raises
    ------
    InvalidPerturbationLabelError
        If labels are missing or malformed.
    InvalidDosageError
        If dosages are missing, negative, infinite or do not line up with their label.
    UnknownPerturbationError
        If a label names a perturbation that ``vocabulary`` lacks.
    """
    _refuse_missing_labels(labels)
    label_of_cell, distinct = pd.factorize(labels)
    parsed = [split_label(str(label), delimiter=delimiter, control=control) for label in distinct]
    control_names = set(control)
    if vocabulary is None:
        vocabulary = sorted({name for names in parsed for name in names} - control_names)
    positions = {name: code for code, name in enumerate(vocabulary)}
    refuse_unknown((n for names in parsed for n in names if n not in control_names), positions)

    # For each distinct label: sorted codes, and where each stood in the label as it was written.
    slots = [
        sorted((positions[name], place) for place, name in enumerate(names) if name in positions)
        for names in parsed
    ]
    n_slots = max(1, max((len(slot) for slot in slots), default=1))
    label_codes = np.full((len(slots), n_slots), NO_PERTURBATION, dtype=np.int32)
    label_places = np.zeros((len(slots), n_slots), dtype=np.intp)
    for row, slot in enumerate(slots):
        for column, (code, place) in enumerate(slot):
            label_codes[row, column] = code
            label_places[row, column] = place

    codes = label_codes[label_of_cell]
    if dosages is None:
        doses = (codes != NO_PERTURBATION).astype(np.float32)
    else:
        n_names = np.array([len(names) for names in parsed], dtype=np.intp)
        doses = _align_dosages(
            dosages, codes, label_places[label_of_cell], n_names[label_of_cell], labels, delimiter
        )
    # A perturbation given at dose zero was not given.
    codes[doses == 0] = NO_PERTURBATION
    return PerturbationCodes(codes, doses, tuple(vocabulary))


def encode_dosage_matrix(
    matrix: np.ndarray | sparse.spmatrix | pd.DataFrame,
    names: Sequence[str],
    *,
    vocabulary: Sequence[str] | None = None,
) -> PerturbationCodes:
    """Encode a cells x perturbations dosage matrix; an all-zero row is a control cell.

    Parameters
    ----------
    matrix
        Dosages of shape ``(n_cells, n_names)``.
    names
        Perturbation of each column.
    vocabulary
        Known perturbations; codes refer to it by name, whatever the order of the columns. ``None``
        takes the columns that have a non-zero entry, in their order.

    Raises
    ------
    InvalidDosageError
        If the matrix has negative, missing or infinite entries, or names do not fit its columns.
    UnknownPerturbationError
        If a column with non-zero entries is not in ``vocabulary``.
    """
    values = matrix.to_numpy() if isinstance(matrix, pd.DataFrame) else matrix
    table = sparse.csr_matrix(values, dtype=np.float32)
    names = [str(name) for name in names]
    if len(names) != table.shape[1]:
        raise InvalidDosageError(
            f"{len(names)} perturbation names were given for a dosage matrix with "
            f"{table.shape[1]} columns. Give one name per column."
        )
    index = pd.Index(names)
    if index.has_duplicates:
        raise InvalidDosageError(
            f"Columns of the dosage matrix share a name: {_listing(index[index.duplicated()])}."
        )
    if not np.isfinite(table.data).all() or (table.data < 0).any():
        bad = table.data[~np.isfinite(table.data) | (table.data < 0)]
        raise InvalidDosageError(
            "Dosages must be finite and not negative; the dosage matrix holds "
            f"{_listing(np.unique(bad).tolist())}. Write 0 where a perturbation was not given."
        )
    table.eliminate_zeros()
    table.sort_indices()
    used = np.unique(table.indices)
    if vocabulary is None:
        vocabulary = [names[column] for column in used]
    positions = {name: code for code, name in enumerate(vocabulary)}
    refuse_unknown((names[column] for column in used), positions)
    column_codes = np.array([positions.get(name, NO_PERTURBATION) for name in names], np.int32)

    n_given = np.diff(table.indptr)
    n_slots = max(1, int(n_given.max(initial=0)))
    codes = np.full((table.shape[0], n_slots), NO_PERTURBATION, dtype=np.int32)
    doses = np.zeros((table.shape[0], n_slots), dtype=np.float32)
    filled = np.arange(n_slots) < n_given[:, None]
    codes[filled] = column_codes[table.indices]
    doses[filled] = table.data
    # Columns may stand in another order than the vocabulary: sort each row, empty slots last.
    order = np.argsort(np.where(filled, codes, np.iinfo(np.int32).max), axis=1, kind="stable")
    return PerturbationCodes(
        np.take_along_axis(codes, order, axis=1),
        np.take_along_axis(doses, order, axis=1),
        tuple(vocabulary),
    )


def refuse_unknown(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise an error that names the perturbations which are not known, and similar known ones."""
    known_names = known if isinstance(known, dict) else dict.fromkeys(known)
    unknown = sorted({name for name in names if name not in known_names})
    if not unknown:
        return
    hints = difflib.get_close_matches(unknown[0], list(known_names), n=3)
    raise UnknownPerturbationError(
        f"Unknown perturbation{'s' if len(unknown) > 1 else ''}: {_listing(unknown)}. "
        f"{len(known_names)} perturbations are known"
        + (f"; did you mean {_listing(hints)}?" if hints else f", such as {_listing(known_names)}.")
        + " A model can only speak of perturbations that occur in its training data, alone or in a"
        " combination. If this is a control label, pass it as `control`; if it is a combination,"
        " check `delimiter`."
    )


def refuse_missing_control(encoded: PerturbationCodes, control: Sequence[str]) -> None:
    """Raise an error if no cell is a control cell."""
    if encoded.is_control.any():
        return
    hints = [
        name
        for name in encoded.vocabulary
        if any(word in name.lower() for word in ("control", "ctrl", "nt", "neg", "dmso", "vehicle"))
    ]
    raise MissingControlError(
        f"No control cell was found: no label equals {' or '.join(map(repr, control))}. "
        f"Labels name {_listing(hints or encoded.vocabulary)}. Pass the label (or a list of labels)"
        " of the control cells as `control`."
    )


def _refuse_missing_labels(labels: pd.Series) -> None:
    missing = labels.isna().to_numpy()
    if missing.any():
        raise InvalidPerturbationLabelError(
            f"{missing.sum()} of {len(labels)} cells have no perturbation label (NaN), for example "
            f"{_listing(labels.index[missing])}. Drop cells whose perturbation is unknown, or "
            "label them as controls if they are."
        )


def _align_dosages(
    dosages: pd.Series,
    codes: np.ndarray,
    places: np.ndarray,
    n_names: np.ndarray,
    labels: pd.Series,
    delimiter: str | None,
) -> np.ndarray:
    """Give every code the dose that stood at the same place of the label as written."""
    given = codes != NO_PERTURBATION
    dose_of_cell, distinct = pd.factorize(dosages, use_na_sentinel=False)
    parsed = [_parse_dosage(value, delimiter) for value in distinct]
    n_doses = np.array([len(values) for values in parsed], dtype=np.intp)[dose_of_cell]
    table = np.full((len(parsed), max(map(len, parsed), default=1)), np.nan, dtype=np.float32)
    for row, values in enumerate(parsed):
        table[row, : len(values)] = values

    perturbed = given.any(axis=1)
    misaligned = perturbed & (n_doses != 1) & (n_doses != n_names)
    if misaligned.any():
        cell = int(np.flatnonzero(misaligned)[0])
        raise InvalidDosageError(
            f"The dosage {dosages.iloc[cell]!r} of cell {labels.index[cell]!r} has "
            f"{n_doses[cell]} values for the {n_names[cell]} names of its label "
            f"{labels.iloc[cell]!r} ({misaligned.sum()} such cells). Give one value for all names, "
            "or one per name in the order of the label."
        )
    places = np.where((n_doses == 1)[:, None], 0, places)
    doses = np.where(given, table[dose_of_cell[:, None], np.where(given, places, 0)], 0)
    bad = given & (~np.isfinite(doses) | (doses < 0))
    if bad.any():
        cell = int(np.flatnonzero(bad.any(axis=1))[0])
        raise InvalidDosageError(
            f"Dosages of perturbed cells must be finite numbers, not negative; cell "
            f"{labels.index[cell]!r} ({labels.iloc[cell]!r}) has {dosages.iloc[cell]!r} "
            f"({bad.any(axis=1).sum()} such cells)."
        )
    return doses.astype(np.float32)


def _parse_dosage(value: object, delimiter: str | None) -> list[float]:
    parts = str(value).split(delimiter) if isinstance(value, str) and delimiter else [value]
    try:
        return [float(part) for part in parts]  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise InvalidDosageError(
            f"The dosage {value!r} is not a number, nor numbers joined by {delimiter!r}."
        ) from error


def _listing(values: Iterable[object], limit: int = 5) -> str:
    """List the first few values in an error message."""
    items = [repr(value) if not isinstance(value, str) else f"'{value}'" for value in values]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
