"""Rows of tables with one row per label: canonical names and doses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from scvi_sams.labels._labels import NO_PERTURBATION, Labels
from scvi_sams.labels._parsing import read_numbers
from scvi_sams.labels._spelling import Spelling

Dosage = float | str
"""One number for all perturbations of a label, or text such as ``"0.5+1"`` in canonical order."""


def rows_as_asked(
    labels: Sequence[str], dosages: Sequence[float | str] | None, spelling: Spelling
) -> pd.DataFrame:
    """Rows for requested labels, at doses that were parsed without an error."""
    written = [None] * len(labels) if dosages is None else dosages
    names = [spelling.canonical(label) for label in labels]
    found = [_as_asked(*pair, spelling) for pair in zip(labels, written, strict=True)]
    return label_rows(names, found)


def label_rows(names: Sequence[str], dosages: Sequence[Dosage]) -> pd.DataFrame:
    """``obs`` of a table: ``"perturbation"``, the canonical label, and ``"dosage"``.

    Row names are labels, with the dose if a label has several doses: ``"A@0.5"``. Doses are
    numbers, or all of them text if a combination has more than one.
    """
    texts = [dosage_text(dosage) for dosage in dosages]
    doses_of: dict[str, set[str]] = {}
    for name, text in zip(names, texts, strict=True):
        doses_of.setdefault(name, set()).add(text)
    index = [
        f"{name}@{text}" if len(doses_of[name]) > 1 else name
        for name, text in zip(names, texts, strict=True)
    ]
    are_numbers = not any(isinstance(dosage, str) for dosage in dosages)
    column = np.array(dosages, np.float64) if are_numbers else texts
    columns = {"perturbation": pd.Categorical(list(names)), "dosage": column}
    return pd.DataFrame(columns, index=pd.Index(index))


def dosage_text(dosage: Dosage) -> str:
    """Write a dosage in canonical form, for comparisons.

    With the digits of single precision, in which doses are stored: there 0.2 is 0.200000003.
    """
    return dosage if isinstance(dosage, str) else f"{float(str(np.float32(dosage))):.9g}"


def join_dosages(doses: Iterable[Dosage], spelling: Spelling) -> Dosage:
    """Dosage of a label from the doses of its perturbations; 0 if there are none."""
    texts = [dosage_text(dose) for dose in doses] or ["0"]
    if len(set(texts)) == 1:
        return float(texts[0])
    return (spelling.delimiter or "+").join(texts)


def groups_of_cells(labels: Labels) -> tuple[list[str], list[Dosage], np.ndarray]:
    """Group cells by label and doses.

    Returns canonical labels and dosages of the groups, by name and then ascending, and the group of
    each cell.
    """
    group_of_cell = labels.name_of_cell
    for doses in labels.doses.T:
        number, distinct = pd.factorize(doses)
        group_of_cell, _ = pd.factorize(group_of_cell * len(distinct) + number)
    some_cell = np.empty(group_of_cell.max(initial=-1) + 1, dtype=np.int64)
    some_cell[group_of_cell] = np.arange(len(labels))
    found = [_of_cell(labels, cell) for cell in some_cell]
    order = sorted(range(len(found)), key=found.__getitem__)
    rank = np.argsort(order)
    names = [found[group][0] for group in order]
    dosages = [join_dosages(found[group][1], labels.spelling) for group in order]
    return names, dosages, rank[group_of_cell]


def _of_cell(labels: Labels, cell: int) -> tuple[str, list[float]]:
    """Canonical label of a cell, and its doses in the order of the names."""
    carried = labels.codes[cell] != NO_PERTURBATION
    codes, doses = labels.codes[cell][carried], labels.doses[cell][carried]
    order = np.argsort([labels.vocabulary[code] for code in codes], kind="stable")
    return labels.names[labels.name_of_cell[cell]], doses[order].tolist()


def _as_asked(label: str, dosage: float | str | None, spelling: Spelling) -> Dosage:
    numbers = [1.0] if dosage is None else read_numbers(dosage, spelling.delimiter)
    names = spelling.split(label)
    dose_of = dict(zip(names, numbers * len(names) if len(numbers) == 1 else numbers, strict=True))
    return join_dosages([dose_of[name] for name in spelling.perturbations(label)], spelling)
