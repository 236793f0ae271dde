"""Perturbation labels, with or without doses, to padded codes and doses: pure functions.

A screen of a million cells has few distinct labels, so labels are parsed once each and then spread
over the cells; no cells x perturbations matrix is ever made.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from scvi_sams._checks import as_labels
from scvi_sams.exceptions import InvalidPerturbationLabelError
from scvi_sams.labels._dosages import align_dosages
from scvi_sams.labels._labels import NO_PERTURBATION, Labels
from scvi_sams.labels._names import check_known, factorize, listing
from scvi_sams.labels._spelling import Spelling


def read_labels(
    labels: Labels | pd.Series | Sequence[str] | np.ndarray,
    control: str | Sequence[str],
    delimiter: str | None,
    *,
    argument: str = "labels",
) -> Labels:
    """Read the labels that a public function was given; what was read already is returned.

    Parameters
    ----------
    labels
        One label per cell, such as a column of obs.
    control, delimiter
        As users write them; not looked at where ``labels`` was read already.
    argument
        Name that the user knows the labels by.

    Raises
    ------
    InvalidArgumentError
        If these are no labels.
    InvalidPerturbationLabelError
        If a label is missing or malformed.
    """
    if isinstance(labels, Labels):
        return labels
    return encode_labels(as_labels(argument, labels), spelling=Spelling.of(control, delimiter))


def encode_labels(
    labels: pd.Series,
    dosages: pd.Series | None = None,
    *,
    spelling: Spelling,
    vocabulary: Sequence[str] | None = None,
) -> Labels:
    """Encode a label per cell, and optionally its dosage.

    Parameters
    ----------
    labels
        One label per cell; any dtype whose values print as the label.
    dosages
        One value per cell: a number (the dose of every perturbation of the label) or text such as
        ``"0.5+1.0"``, aligned with the label as written. Text that reads as a number, such as
        ``"1e-3"``, is one number whatever the delimiter. Ignored for control cells. ``None``: 1.
    spelling
        How labels are written; its delimiter also joins the numbers of a dosage.
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
    _check_no_missing_labels(labels)
    label_of_cell, distinct = factorize(labels, InvalidPerturbationLabelError)
    names_of_label = [spelling.split(label) for label in distinct]
    # In the order of the labels, so that what is made of it does not depend on hashing.
    perturbations = list(
        dict.fromkeys(
            name for names in names_of_label for name in names if name not in spelling.control
        )
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
            dosages,
            codes,
            label_places[label_of_cell],
            n_names[label_of_cell],
            labels,
            spelling.delimiter,
        )
        # A perturbation given at dose zero was not given.
        codes[doses == 0] = NO_PERTURBATION
    return Labels(codes, doses, tuple(vocabulary), spelling)


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


def _check_no_missing_labels(labels: pd.Series) -> None:
    missing = labels.isna().to_numpy()
    if missing.any():
        raise InvalidPerturbationLabelError(
            f"{missing.sum()} of {len(labels)} cells have no perturbation label (NaN), for example "
            f"{listing(labels.index[missing])}. Drop cells whose perturbation is unknown, or "
            "label them as controls if they are."
        )
