"""Guides of cells, and the perturbation of each guide: pure functions."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from scvi_sams._plurals import counted, plural
from scvi_sams.exceptions import InvalidPerturbationLabelError
from scvi_sams.labels._labels import NO_PERTURBATION, Labels, distinct_rows
from scvi_sams.labels._names import listing, texts_of

NO_GUIDE = -1
"""Padding code for cells with fewer guides than the maximum."""
GUIDE_SEPARATOR = "|"
_OTHER_SEPARATORS = (";", ",")
_HOW_TO_WRITE = (
    f" Guides of one cell are separated by {GUIDE_SEPARATOR!r}, and cells without a known guide "
    "have NaN or an empty text."
)


class Carriers(NamedTuple):
    """Cells with one label of guides and one set of perturbations."""

    text: str
    """Label of guides, empty if missing."""
    perturbations: tuple[str, ...]
    """Sorted names; none for control cells."""
    n_cells: int
    first_cell: str


class GuideList(NamedTuple):
    """Guides learned from the training data."""

    names: tuple[str, ...]
    """Sorted by perturbation, then by name."""
    owners: tuple[str, ...]
    """Name of the perturbation of each guide."""
    separator: str | None


def carriers_of_guides(column: pd.Series, labels: Labels) -> tuple[list[Carriers], np.ndarray]:
    """Group cells by guides and perturbations; returns the groups, and the group of every cell."""
    text_of_cell, texts = texts_of(column, InvalidPerturbationLabelError)
    rows, row_of_cell = distinct_rows(np.sort(labels.codes, axis=1))
    names_of_row = [
        tuple(sorted(labels.vocabulary[code] for code in row if code != NO_PERTURBATION))
        for row in rows
    ]
    found, first, group_of_cell, n_cells = np.unique(
        text_of_cell.astype(np.int64) * len(rows) + row_of_cell,
        return_index=True,
        return_inverse=True,
        return_counts=True,
    )
    groups = [
        Carriers(texts[key // len(rows)], names_of_row[key % len(rows)], n, str(column.index[cell]))
        for key, n, cell in zip(found.tolist(), n_cells.tolist(), first.tolist(), strict=True)
    ]
    return groups, group_of_cell.ravel()


def learn_guides(groups: Sequence[Carriers], labels: Labels) -> tuple[GuideList, list[list[str]]]:
    """Find the guides, and the one perturbation of each.

    Also returned are the guides of each group. Guides that occur only in control cells, or are
    named in ``control``, are excluded.
    """
    separator = _separator(groups, labels)
    parts = [_split(group.text, separator) for group in groups]
    guides = [[name for name in names if not labels.spelling.is_control(name)] for names in parts]
    carried: defaultdict[str, list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        for name in guides[number] if group.perturbations else []:
            carried[name].append(number)
    if not carried:
        raise InvalidPerturbationLabelError(
            "No perturbed cell has a guide: all have NaN, an empty text, or a name of control "
            "cells in the column of `guide_key`. Pass another column, or omit `guide_key`."
        )
    _check_not_of_controls(groups, guides, carried, labels.spelling.control)
    owners = _owners(groups, guides, carried)
    position = {name: code for code, name in enumerate(labels.vocabulary)}
    names = sorted(owners, key=lambda name: (position[owners[name]], name))
    learned = GuideList(tuple(names), tuple(owners[name] for name in names), separator)
    return learned, [guides[i] if group.perturbations else [] for i, group in enumerate(groups)]


def find_guides(
    groups: Sequence[Carriers], known: GuideList, labels: Labels
) -> tuple[list[list[str]], list[str]]:
    """Return the known guides of each group of new cells, and sorted unknown names.

    A label that is a known name is not split. Guides of control cells are ignored.
    """
    owners = dict(zip(known.names, known.owners, strict=True))
    is_control = labels.spelling.is_control
    found: list[list[str]] = []
    unknown: set[str] = set()
    for group in groups:
        names: list[str] = []
        if group.perturbations:
            names = _split_known(group.text, owners, known.separator, labels)
        unknown.update(name for name in names if name not in owners and not is_control(name))
        found.append([name for name in names if name in owners])
        for name in found[-1]:
            _check_owner(name, owners[name], group)
    return found, sorted(unknown)


def guide_codes(
    guides: Sequence[Iterable[str]], group_of_cell: np.ndarray, names: Sequence[str]
) -> np.ndarray:
    """Codes of the guides of every cell, ascending, ``(n_cells, n_slots)``, at least one slot."""
    position = {name: code for code, name in enumerate(names)}
    codes_of_group = [sorted({position[name] for name in group}) for group in guides]
    n_slots = max(1, max(map(len, codes_of_group), default=1))
    padded = np.full((len(codes_of_group), n_slots), NO_GUIDE, dtype=np.int64)
    for row, codes in enumerate(codes_of_group):
        padded[row, : len(codes)] = codes
    return padded[group_of_cell]


def _split(text: str, separator: str | None) -> list[str]:
    """Names in a label, each once."""
    parts = text.split(separator) if separator else [text]
    return list(dict.fromkeys(part.strip() for part in parts if part.strip()))


def _separator(groups: Sequence[Carriers], labels: Labels) -> str | None:
    """Return the separator of guides in a column; ``None`` if each label is one guide."""
    texts = {group.text for group in groups}
    for mark in (GUIDE_SEPARATOR, labels.spelling.delimiter, *_OTHER_SEPARATORS):
        if not mark or not any(mark in text for text in texts):
            continue
        if mark == GUIDE_SEPARATOR or _separates(mark, groups, texts, labels):
            return mark
    return None


def _separates(mark: str, groups: Sequence[Carriers], texts: set[str], labels: Labels) -> bool:
    """Whether a mark separates guides: in ``"STAT1_1"``, ``"_"`` is part of a name.

    Guides are names that begin with a perturbation of the cell, occur alone elsewhere or are
    controls; or as many names as the cell has perturbations, if there are several.
    """
    for group in groups:
        if not group.perturbations or mark not in group.text:
            continue
        parts = [part.strip() for part in group.text.split(mark)]
        if not all(parts):
            return False
        are_guides = all(
            part in texts
            or part.startswith(group.perturbations)
            or labels.spelling.is_control(part)
            for part in parts
        )
        if not are_guides and not len(parts) == len(group.perturbations) > 1:
            return False
    return True


def _split_known(
    text: str, known: Mapping[str, str], separator: str | None, labels: Labels
) -> list[str]:
    """Names in a label of new cells, split so that most of them are known."""
    if text in known:
        return [text]
    marks = (separator, GUIDE_SEPARATOR, labels.spelling.delimiter, *_OTHER_SEPARATORS)
    ways = [_split(text, separator), *(_split(text, mark) for mark in marks if mark)]
    return max(ways, key=lambda names: sum(name in known for name in names))


def _check_not_of_controls(
    groups: Sequence[Carriers],
    guides: Sequence[list[str]],
    carried: Mapping[str, list[int]],
    control: Sequence[str],
) -> None:
    of_controls: Counter[str] = Counter()
    for group, names in zip(groups, guides, strict=True):
        if not group.perturbations:
            of_controls.update(dict.fromkeys(names, group.n_cells))
    shared = sorted(name for name in carried if name in of_controls)
    if shared:
        name = shared[0]
        cells = _told([groups[i] for i in carried[name]])
        raise InvalidPerturbationLabelError(
            f"The guide {name!r} is in {counted(of_controls[name], 'control cell')} and in "
            f"{cells}{_others(shared)}. A guide must belong to one perturbation. Correct the guide "
            "or the label of these cells, or set the guide of control cells (including those of "
            f"dose 0) to NaN; name guides of controls in `control`: control={[*control, name]}."
        )


def _owners(
    groups: Sequence[Carriers], guides: Sequence[list[str]], carried: Mapping[str, list[int]]
) -> dict[str, str]:
    """Name of the perturbation of each guide; an error if a guide has none, or several."""
    common = {
        name: set.intersection(*(set(groups[i].perturbations) for i in numbers))
        for name, numbers in carried.items()
    }
    of_none = sorted(name for name, shared in common.items() if not shared)
    if of_none:
        cells = _told([groups[i] for i in carried[of_none[0]]])
        raise InvalidPerturbationLabelError(
            f"The guide {of_none[0]!r} is in {cells}{_others(of_none)}: they have no perturbation "
            "in common, but a guide must belong to one. Correct the guide or the label of the "
            "cells that are wrong, or drop them." + _HOW_TO_WRITE
        )
    owners = {}
    for name, shared in common.items():
        owner = shared if len(shared) == 1 else _named_in(name, shared)
        if len(owner) == 1:
            owners[name] = next(iter(owner))
    _settle_by_the_others(owners, common, guides, carried)
    unclear = sorted(name for name in common if name not in owners)
    if unclear:
        name = unclear[0]
        raise InvalidPerturbationLabelError(
            f"The guide {name!r} is in {_told([groups[i] for i in carried[name]])}"
            f"{_others(unclear)}: it could belong to any of {listing(sorted(common[name]))}, which "
            "all of these cells have. Begin its name with that of its perturbation, such as "
            f"{sorted(common[name])[0] + '_' + name!r}, or add cells that have it without the "
            "others." + _HOW_TO_WRITE
        )
    return owners


def _named_in(guide: str, perturbations: set[str]) -> set[str]:
    """The longest name with which the guide's name begins; none if it contains another too."""
    begins = [name for name in perturbations if guide.startswith(name)]
    if not begins:
        return set()
    owner = max(begins, key=len)
    rest = guide[len(owner) :]
    others = [name for name in perturbations if not owner.startswith(name)]
    if any(re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}", rest) for name in others):
        return set()
    return {owner}


def _settle_by_the_others(
    owners: dict[str, str],
    common: Mapping[str, set[str]],
    guides: Sequence[list[str]],
    carried: Mapping[str, list[int]],
) -> None:
    """Assign to a guide the only perturbation that no other guide of its cells belongs to.

    Works in rounds, each based on the previous ones, so that the order of guides does not matter.
    """
    while True:
        settled = {}
        for name in common.keys() - owners.keys():
            beside = {other for i in carried[name] for other in guides[i]}
            left = common[name] - {owners[other] for other in beside if other in owners}
            if len(left) == 1:
                settled[name] = left.pop()
        if not settled:
            return
        owners.update(settled)


def _check_owner(name: str, owner: str, group: Carriers) -> None:
    if owner not in group.perturbations:
        raise InvalidPerturbationLabelError(
            f"The guide {name!r} belongs to {owner!r} in the training data, but is in "
            f"{_told([group])}. Correct the guide or the label of these cells, or set their guide "
            "to NaN."
        )


def _told(groups: Sequence[Carriers]) -> str:
    """Cells of a guide by their labels: "12 cells of A (such as 'c3'), 2 cells of B ('c7')"."""
    cells: Counter[str] = Counter()
    first: dict[str, str] = {}
    for group in groups:
        label = " and ".join(map(repr, group.perturbations))
        cells[label] += group.n_cells
        first.setdefault(label, group.first_cell)
    told = [
        f"{counted(n, 'cell')} of {label} (such as {first[label]!r})"
        for label, n in cells.most_common(4)
    ]
    more = f" and cells of {counted(len(cells) - 4, 'other label')}" if len(cells) > 4 else ""
    return ", ".join(told) + more


def _others(names: Sequence[str]) -> str:
    if len(names) == 1:
        return ""
    n_others = len(names) - 1
    are = plural(n_others, "is", "are")
    return f" (as {are} {counted(n_others, 'more guide')}, such as {names[1]!r}, of other cells)"
