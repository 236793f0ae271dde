"""Common conventions for names: controls, no assignment, guides, combinations."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

_CONTROL = (
    r"ctrl|ctl|control|negative|neg[-_ .]?(ctrl|ctl|control)|ntc?|non[-_ .]?targeting"
    r"|safe([-_ .]?(targeting|harbou?r))?|aavs1|rosa26|lacz|e?gfp|luciferase|scrambled?|mock"
    r"|pbs|dmso|vehicle|untreated|unperturbed|intergenic"
)
_UNASSIGNED = (
    r"unassigned|unknown|undetermined|ambiguous|multiple|multiplet|multi|doublet|nan|none|na|n/a"
    r"|<na>|null|missing|no[-_ .]?(guide|sgrna|grna|assignment)"
)
_NUMBERED = r"([-_ .:|#/]+.*|(g|sg|guide|grna)?\d+)?"
"""Possible endings: anything after a separator, or the number of a guide."""
_IS_CONTROL = re.compile(f"({_CONTROL}){_NUMBERED}", re.IGNORECASE)
_IS_UNASSIGNED = re.compile(f"({_UNASSIGNED})", re.IGNORECASE)
_SURE_GUIDE = re.compile(
    r"(?:sg[-_]?)?(?P<gene>[A-Z][A-Z0-9-]*?)[-_.]?(?:g|sg|guide|sgRNA|gRNA)[-_]?\d+"
    r"|sg[-_]?(?P<named>[A-Z][A-Z0-9-]*?)[-_.]\d+"
    r"|(?P<other>[A-Za-z][A-Za-z0-9-]*?)_(?:g|sg|guide|sgRNA|gRNA)[-_]?\d+"
)
_NUMBERED_GENE = re.compile(r"(?P<gene>[A-Za-z][A-Za-z0-9-]*)_\d{1,3}")
_DELIMITERS = (" + ", " & ", " | ", "__", "::", "||", *"+_|&,;:/-.~")
_FEWEST_BUILT = 2
_SHARE_OF_GUIDES = 0.25
"""Proportion of names above which numbers alone indicate guides."""


def looks_like_control(name: str) -> bool:
    """Whether a name is a common one for control cells, alone or with a number: ``"NT_1"``."""
    return _IS_CONTROL.fullmatch(name) is not None


def looks_unassigned(name: str) -> bool:
    """Whether a name is a common word for cells whose perturbation is unknown."""
    return _IS_UNASSIGNED.fullmatch(name) is not None


def likely_delimiter(names: Iterable[str], control: Iterable[str]) -> tuple[str, list[str]] | None:
    """Find a likely delimiter and the names that contain it; ``None`` if there is none.

    All parts of such a name must be names themselves, or common names for controls.
    """
    names = list(names)
    built = {mark: _built_with(mark, names, set(control)) for mark in _DELIMITERS}
    mark = max(_DELIMITERS, key=lambda one: len(built[one]))
    return (mark, built[mark]) if len(built[mark]) >= _FEWEST_BUILT else None


def _built_with(mark: str, names: list[str], control: set[str]) -> list[str]:
    parts_of = {name: [part.strip() for part in name.split(mark)] for name in names if mark in name}

    def is_nothing(part: str) -> bool:
        return part in control or looks_like_control(part)

    known = set(names)
    # Some files write "KLF1" as "KLF1_ctrl".
    for parts in parts_of.values():
        named = [part for part in parts if not is_nothing(part)]
        if len(parts) == 2 and len(named) == 1:
            known.update(named)
    return [
        name
        for name, parts in parts_of.items()
        if all(parts) and all(part in known or is_nothing(part) for part in parts)
        and not all(is_nothing(part) for part in parts)
    ]  # fmt: skip


def gene_of_guide(name: str) -> str | None:
    """Gene of a name that looks like that of a guide, such as ``"STAT1g1"`` or ``"STAT1_1"``."""
    found = _SURE_GUIDE.fullmatch(name) or _NUMBERED_GENE.fullmatch(name)
    return None if found is None else next(filter(None, found.groups()))


def guides_of_genes(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that look like several guides of one gene, such as ``"STAT1g1"``, by that gene.

    A number alone (``"STAT1_1"``) counts only if enough of the names have this form.
    """
    names = [name for name in names if not looks_like_control(name)]
    sure: defaultdict[str, list[str]] = defaultdict(list)
    likely: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        found = _SURE_GUIDE.fullmatch(name)
        if found is not None:
            sure[next(filter(None, found.groups()))].append(name)
        elif (found := _NUMBERED_GENE.fullmatch(name)) is not None:
            likely[found["gene"]].append(name)
    groups = {gene: guides for gene, guides in sure.items() if len(guides) > 1}
    numbered = {gene: guides for gene, guides in likely.items() if len(guides) > 1}
    if sum(map(len, numbered.values())) >= _SHARE_OF_GUIDES * len(names):
        groups |= numbered
    return groups
