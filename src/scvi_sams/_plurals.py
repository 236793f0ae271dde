"""Numbers of things in messages: "1 cell has", "2 cells have"."""

from __future__ import annotations


def plural(number: int, one: str, several: str | None = None) -> str:
    """Return the words for one thing, or for several (``None``: those for one and an "s")."""
    if number == 1:
        return one
    return f"{one}s" if several is None else several


def counted(number: int, one: str, several: str | None = None) -> str:
    """Return a number with its words, which are as for :func:`plural`."""
    return f"{number:,} {plural(number, one, several)}"
