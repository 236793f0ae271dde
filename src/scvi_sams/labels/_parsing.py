"""Perturbation labels, with or without doses, to padded codes and doses: pure functions.

A screen of a million cells has few distinct labels, so labels are parsed once each and then spread
over the cells; no cells x perturbations matrix is ever made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from scvi_sams._checks import check_key
from scvi_sams.exceptions import InvalidPerturbationLabelError, MissingControlError
from scvi_sams.labels._codes import (
    NO_PERTURBATION,
    PerturbationCodes,
    check_known,
    factorize,
    listing,
)
from scvi_sams.labels._dosages import align_dosages


def control_names(control: object) -> tuple[str, ...]:
    """Return the control labels as text, whether one or several, text or numbers were given."""
    several = isinstance(control, Iterable) and not isinstance(control, str)
    labels: Iterable[object] = control if several else (control,)  # type: ignore[assignment]
    names = tuple(str(label).strip() for label in labels)
    if not names:
        raise MissingControlError(
            "`control` is an empty list. Name the label of the control cells, such as "
            "control='control'."
        )
    return names


def split_label(label: str, *, delimiter: str | None, control: Sequence[str]) -> list[str]:
    """Split a label into perturbation names as written, controls included.

    Control labels may hold the delimiter, on their own and inside a combination.
    """
    text = label.strip()
    if text in control or not delimiter:
        names = [text]
    else:
        parts = [name.strip() for name in text.split(delimiter)]
        names = _rejoin_controls(parts, delimiter, control)
    if not all(names):
        raise InvalidPerturbationLabelError(
            f"The perturbation label {label!r} has an empty name"
            + (f" beside the delimiter {delimiter!r}" if delimiter else "")
            + ". Fix the label, or pass the delimiter that your labels use (None to never split)."
        )
    perturbations = [name for name in names if name not in control]
    if len(set(perturbations)) < len(perturbations):
        repeated = sorted({name for name in perturbations if perturbations.count(name) > 1})
        raise InvalidPerturbationLabelError(
            f"The perturbation label {label!r} names {', '.join(repeated)} twice. Write each "
            "perturbation once and give its amount as a dosage."
        )
    return names


def canonical_label(
    label: str, *, delimiter: str | None = "+", control: str | Sequence[str] = ("control",)
) -> str:
    """Spell a label in the one way that does not depend on who wrote it.

    Parameters
    ----------
    label
        For example ``"B+A"``, ``"A + control"`` or a control label.
    delimiter
        What joins the perturbations of a combination; ``None`` if labels are never split.
    control
        Label, or labels, of control cells. Inside a combination they stand for "nothing".

    Returns
    -------
    Names sorted and joined by the delimiter; the first control label for a control label.

    Raises
    ------
    InvalidPerturbationLabelError
        If the label has an empty or a repeated name.

    Examples
    --------
    >>> from scvi_sams.data import canonical_label
    >>> canonical_label("B+A"), canonical_label("A + control"), canonical_label("control")
    ('A+B', 'A', 'control')
    >>> canonical_label("KLF1_NT", delimiter="_", control="NT")
    'KLF1'
    """
    check_key(delimiter=delimiter)
    control = control_names(control)
    names = split_label(str(label), delimiter=delimiter, control=control)
    perturbations = sorted(name for name in names if name not in control)
    return (delimiter or "").join(perturbations) if perturbations else control[0]


def encode_labels(
    labels: pd.Series,
    dosages: pd.Series | None = None,
    *,
    control: str | Sequence[str],
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
        ``"0.5+1.0"``, aligned with the label as written. Text that reads as a number, such as
        ``"1e-3"``, is one number whatever the delimiter. Ignored for control cells. ``None``: 1.
    control
        Label, or labels, of control cells.
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
    control = control_names(control)
    _check_no_missing_labels(labels)
    label_of_cell, distinct = factorize(labels, InvalidPerturbationLabelError)
    names_of_label = [
        split_label(str(label), delimiter=delimiter, control=control) for label in distinct
    ]
    # In the order of the labels, so that what is made of it does not depend on hashing.
    perturbations = list(
        dict.fromkeys(name for names in names_of_label for name in names if name not in control)
    )
    if vocabulary is None:
        vocabulary = sorted(perturbations)
    positions = {name: code for code, name in enumerate(vocabulary)}
    check_known(perturbations, positions)
    label_codes, label_places = _codes_of_labels(names_of_label, positions)
    codes = label_codes[label_of_cell]
    if dosages is None:
        doses = (codes != NO_PERTURBATION).astype(np.float32)
    else:
        n_names = np.array([len(names) for names in names_of_label], dtype=np.intp)
        doses = align_dosages(
            dosages, codes, label_places[label_of_cell], n_names[label_of_cell], labels, delimiter
        )
        # A perturbation given at dose zero was not given.
        codes[doses == 0] = NO_PERTURBATION
    return PerturbationCodes(codes, doses, tuple(vocabulary))


def _codes_of_labels(
    names_of_label: list[list[str]], positions: dict[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return ascending codes of each label, and where each stood in the label as written.

    Both are of shape ``(n_labels, n_slots)``. Names without a position (controls) are left out.
    """
    n_names = np.fromiter(map(len, names_of_label), dtype=np.intp, count=len(names_of_label))
    found = np.fromiter(
        (positions.get(name, NO_PERTURBATION) for names in names_of_label for name in names),
        dtype=np.int32,
        count=n_names.sum(),
    )
    rows = np.repeat(np.arange(len(n_names)), n_names)
    written = np.arange(len(found)) - np.repeat(np.cumsum(n_names) - n_names, n_names)
    # Those that have a position, ascending within each label.
    order = np.lexsort((found, rows))
    order = order[found[order] != NO_PERTURBATION]
    rows, found, written = rows[order], found[order], written[order]
    n_found = np.bincount(rows, minlength=len(n_names))
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(n_found) - n_found, n_found)
    shape = (len(n_names), max(1, int(n_found.max(initial=1))))
    codes = np.full(shape, NO_PERTURBATION, dtype=np.int32)
    places = np.zeros(shape, dtype=np.int32)
    codes[rows, columns] = found
    places[rows, columns] = written
    return codes, places


def _rejoin_controls(parts: list[str], delimiter: str, control: Sequence[str]) -> list[str]:
    """Put control labels that hold the delimiter together again, the longest first."""
    broken = [name.split(delimiter) for name in control if delimiter in name]
    if not broken:
        return parts
    broken.sort(key=len, reverse=True)
    names = []
    while parts:
        found = next((name for name in broken if parts[: len(name)] == name), parts[:1])
        names.append(delimiter.join(found))
        parts = parts[len(found) :]
    return names


def _check_no_missing_labels(labels: pd.Series) -> None:
    missing = labels.isna().to_numpy()
    if missing.any():
        raise InvalidPerturbationLabelError(
            f"{missing.sum()} of {len(labels)} cells have no perturbation label (NaN), for example "
            f"{listing(labels.index[missing])}. Drop cells whose perturbation is unknown, or "
            "label them as controls if they are."
        )
