"""The rows of docs/bad_input.md, which are the tests of test_bad_input.py too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anndata import AnnData

from bad_input.situation import Situation, screen, trains


@dataclass(frozen=True)
class Case:
    """One row: what is given, and what comes of it.

    Attributes
    ----------
    what
        What is wrong or unusual, in words.
    act
        Does it; whatever it returns is checked if no error is expected.
    error
        Type that is raised; ``None`` if the input is legal.
    names
        What the error names, or the warning that is logged.
    result
        What happens to legal input, in words.
    check
        Asserts that, given the situation and what ``act`` returned.
    data
        Makes the AnnData.
    """

    what: str
    act: Callable[[Situation], Any]
    error: type[Exception] | None = None
    names: tuple[str, ...] = ()
    result: str = ""
    check: Callable[[Situation, Any], None] = trains
    data: Callable[[], AnnData] = screen


def refused(
    what: str,
    act: Callable[[Situation], Any],
    error: type[Exception],
    *names: str,
    data: Callable[[], AnnData] = screen,
) -> Case:
    return Case(what, act, error, names, data=data)


def legal(
    what: str,
    act: Callable[[Situation], Any],
    result: str,
    check: Callable[[Situation, Any], None] = trains,
    *,
    warns: tuple[str, ...] = (),
    data: Callable[[], AnnData] = screen,
) -> Case:
    return Case(what, act, None, warns, result, check, data)


def registered(**setup: Any) -> Callable[[Situation], Any]:
    """Register, build and train; errors come before the last."""
    return lambda situation: situation.train(setup)


def labelled(labels: Any, **obs: Any) -> Callable[[], AnnData]:
    return lambda: screen(labels, **obs)
