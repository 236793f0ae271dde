"""A column of doses to one dose per perturbation of each cell: pure functions."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from scvi_sams._constants import LARGEST_INPUT
from scvi_sams.exceptions import InvalidDosageError
from scvi_sams.labels._labels import NO_PERTURBATION
from scvi_sams.labels._names import factorize, shown


def align_dosages(
    dosages: pd.Series,
    codes: np.ndarray,
    places: np.ndarray,
    n_names: np.ndarray,
    labels: pd.Series,
    delimiter: str | None,
) -> np.ndarray:
    """Give every code the dose that stood at the same place of the label as written.

    Parameters
    ----------
    dosages, labels
        One value per cell. Doses of cells without codes are not read.
    codes, places
        Perturbations of each cell and where each stood in its label, ``(n_cells, n_slots)``.
    n_names
        Names in each cell's label, controls included, shape ``(n_cells,)``.
    delimiter
        What joins the numbers of a dosage.

    Returns
    -------
    Doses of shape ``(n_cells, n_slots)``, float32; 0 where a slot is empty.

    Raises
    ------
    InvalidDosageError
        Naming the first cell whose dose cannot be read, and how many there are.
    """
    if len(dosages) != len(labels):
        raise InvalidDosageError(
            f"{len(dosages)} dosages were given for {len(labels)} labels. Give one per label."
        )
    doses = np.zeros(codes.shape, dtype=np.float32)
    perturbed = np.flatnonzero((codes != NO_PERTURBATION).any(axis=1))
    dosages, labels = dosages.iloc[perturbed], labels.iloc[perturbed]
    given, places = codes[perturbed] != NO_PERTURBATION, places[perturbed]
    value_of_cell, values = factorize(dosages, InvalidDosageError)
    numbers = [_parse(value, delimiter) for value in values]
    n_numbers = np.array([len(row) for row in numbers], dtype=np.intp)[value_of_cell]
    _check_numeric(n_numbers, dosages, labels, delimiter)
    _check_aligned(n_numbers, n_names[perturbed], dosages, labels)

    table = np.full((len(numbers), max(map(len, numbers), default=1)), np.nan)
    for row, parsed in enumerate(numbers):
        table[row, : len(parsed)] = parsed
    places = np.where((n_numbers[:, None] > 1) & given, places, 0)
    aligned = np.where(given, table[value_of_cell[:, None], places], 0)
    _check_doses(aligned, dosages, labels)
    doses[perturbed] = aligned
    return doses


def _parse(value: object, delimiter: str | None) -> list[float]:
    """Read the numbers of a dosage; an empty list means that it holds anything else."""
    parts: list[object] = [value]
    if value is None or value is pd.NA:
        parts = [np.nan]
    elif isinstance(value, str) and delimiter and _number(value) is None:
        # The sign of an exponent, as in "1e-3-2e-1", joins no numbers.
        parts = list(re.split(r"(?<![0-9.][eE])" + re.escape(delimiter), value))
    numbers = [number for number in map(_number, parts) if number is not None]
    return numbers if len(numbers) == len(parts) else []


def _number(value: object) -> float | None:
    # Python reads "1_2" as 12.
    if isinstance(value, str) and "_" in value:
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None


def _check_numeric(
    n_numbers: np.ndarray, dosages: pd.Series, labels: pd.Series, delimiter: str | None
) -> None:
    text = n_numbers == 0
    if text.any():
        cell = int(np.flatnonzero(text)[0])
        raise InvalidDosageError(
            f"The dosage {shown(dosages.iloc[cell])} of cell {shown(labels.index[cell])} "
            f"({shown(labels.iloc[cell])}) is not a number, nor numbers joined by {delimiter!r} "
            f"({text.sum()} such cells)."
        )


def _check_aligned(
    n_numbers: np.ndarray, n_names: np.ndarray, dosages: pd.Series, labels: pd.Series
) -> None:
    misaligned = (n_numbers != 1) & (n_numbers != n_names)
    if misaligned.any():
        cell = int(np.flatnonzero(misaligned)[0])
        raise InvalidDosageError(
            f"The dosage {shown(dosages.iloc[cell])} of cell {shown(labels.index[cell])} has "
            f"{n_numbers[cell]} values for the {n_names[cell]} names of its label "
            f"{shown(labels.iloc[cell])} ({misaligned.sum()} such cells). Give one value for all "
            "names, or one per name in the order of the label."
        )


def _check_doses(doses: np.ndarray, dosages: pd.Series, labels: pd.Series) -> None:
    bad = ~((doses >= 0) & (doses <= LARGEST_INPUT)).all(axis=1)
    if bad.any():
        cell = int(np.flatnonzero(bad)[0])
        raise InvalidDosageError(
            "Dosages of perturbed cells must be finite numbers, not negative, and at most "
            f"{LARGEST_INPUT:g}; cell "
            f"{shown(labels.index[cell])} ({shown(labels.iloc[cell])}) has "
            f"{shown(dosages.iloc[cell])} ({bad.sum()} such cells)."
        )
