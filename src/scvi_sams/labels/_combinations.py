"""Combinations as perturbations of their own, for models in which perturbations do not add up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from scvi_sams.exceptions import InvalidDosageError, SAMSError, UnknownPerturbationError
from scvi_sams.labels._labels import NO_PERTURBATION, Labels, distinct_combinations
from scvi_sams.labels._names import check_known, listing


def combinations_as_perturbations(
    encoded: Labels, *, vocabulary: Sequence[str] | None = None
) -> Labels:
    """Give every combination a code of its own, whatever the order that it was written in.

    Parameters
    ----------
    encoded
        Cells, encoded by the single perturbations that they carry.
    vocabulary
        Known perturbations and combinations; codes refer to it. ``None`` makes it from the cells,
        sorted.

    Returns
    -------
    Codes and doses of shape ``(n_cells, 1)``.

    Raises
    ------
    InvalidDosageError
        If a dose is neither 0 nor 1.
    UnknownPerturbationError
        If ``vocabulary`` lacks a perturbation or a combination.
    """
    _check_unit_doses(encoded.doses)
    parts_of_row, row_of_cell = distinct_combinations(encoded.codes, encoded.vocabulary)
    name_of_row = [encoded.spelling.join(parts) if parts else "" for parts in parts_of_row]
    if vocabulary is None:
        vocabulary = sorted({name for name in name_of_row if name})
    positions = {name: code for code, name in enumerate(vocabulary)}
    named = [(name, len(parts)) for name, parts in zip(name_of_row, parts_of_row, strict=True)]
    _check_known_combinations([name for name, n_parts in named if n_parts > 1], positions)
    check_known((name for name, n_parts in named if n_parts == 1), positions)
    code_of_row = np.array([positions.get(name, NO_PERTURBATION) for name in name_of_row], np.int32)
    codes = code_of_row[row_of_cell][:, None]
    return replace(
        encoded,
        codes=codes,
        doses=(codes != NO_PERTURBATION).astype(np.float32),
        vocabulary=tuple(vocabulary),
    )


def inseparable_perturbations(codes: np.ndarray, vocabulary: Sequence[str]) -> list[list[str]]:
    """Groups of perturbations that cells carry only together, so that nothing tells them apart."""
    rows = np.unique(codes, axis=0)
    numbers, slots = np.nonzero(rows != NO_PERTURBATION)
    rows_of_code: defaultdict[int, list[int]] = defaultdict(list)
    for number, code in zip(numbers.tolist(), rows[numbers, slots].tolist(), strict=True):
        rows_of_code[code].append(number)
    groups: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
    for code, found in sorted(rows_of_code.items()):
        groups[tuple(found)].append(vocabulary[code])
    return [group for group in groups.values() if len(group) > 1]


def parts_of_combination(label: str, delimiter: str | None) -> list[str]:
    """Split a canonical label; an error if it does not name at least two perturbations."""
    parts = label.split(delimiter) if delimiter else [label]
    if len(parts) < 2:
        raise SAMSError(
            f"{label!r} is no combination: interactions are those of at least two perturbations"
            + (f", joined by {delimiter!r}." if delimiter else " (`delimiter` is None).")
        )
    return parts


def _check_unit_doses(doses: np.ndarray) -> None:
    other = np.unique(doses[(doses != 0) & (doses != 1)])
    if len(other):
        raise InvalidDosageError(
            f"Doses other than 1 were given ({', '.join(f'{dose:g}' for dose in other[:5])}), "
            "which mean nothing where every perturbation and combination is a state of its own. "
            "Register each dose as a label of its own, such as 'drug@0.5', or use a model that is "
            "linear in the dose (SAMSVAE, CPAVAE)."
        )


def _check_known_combinations(combinations: list[str], known: dict[str, int]) -> None:
    unknown = sorted(name for name in set(combinations) if name not in known)
    if unknown:
        raise UnknownPerturbationError(
            f"Unknown combination{'s' if len(unknown) > 1 else ''}: {listing(unknown)}. This model "
            "takes each combination for a perturbation of its own and cannot predict combinations "
            "that it has not seen in training. SAMSVAE and CPAVAE can: they add up the effects of "
            "the perturbations."
        )
