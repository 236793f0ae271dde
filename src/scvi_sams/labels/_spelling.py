"""Spelling of labels: names of control cells, and the delimiter of combinations."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import pandas as pd

from scvi_sams._checks import check_key
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidPerturbationLabelError,
    MissingControlError,
)

Control: TypeAlias = (
    str | int | Sequence[str] | Sequence[int] | Sequence[bool] | np.ndarray | pd.Series
)
"""Labels of control cells, patterns of them, or marks of the cells."""


@dataclass(frozen=True)
class Spelling:
    """How labels are parsed, made once from the user's ``control`` and ``delimiter``.

    Attributes
    ----------
    control
        Labels of control cells, or patterns of them, in which ``*`` matches any text without the
        delimiter. Inside a combination they are ignored.
    delimiter
        Separator between the perturbations of a combination; ``None`` if labels are never split.
    """

    control: tuple[str, ...]
    delimiter: str | None

    @classmethod
    def of(cls, control: object, delimiter: str | None) -> Self:
        """Parse the two arguments of a public function; an error if no control is named."""
        check_key(delimiter=delimiter)
        return cls(control_names(control), delimiter)

    @property
    def control_label(self) -> str:
        """Canonical label of a control cell: the first of ``control``."""
        return self.control[0]

    def is_control(self, name: str) -> bool:
        """Whether a name is a control label, alone or inside a combination."""
        labels, patterns = _labels_and_patterns(self.control, self.delimiter)
        return name in labels or any(pattern.fullmatch(name) for pattern in patterns)

    def split(self, label: object) -> list[str]:
        """Names of a label as written, controls included.

        Control labels may contain the delimiter, alone and inside a combination.
        """
        text = str(label).strip()
        if self.is_control(text) or not self.delimiter:
            names = [text]
        else:
            names = self._rejoined([name.strip() for name in text.split(self.delimiter)])
        if not all(names):
            raise InvalidPerturbationLabelError(
                f"The perturbation label {str(label)!r} has an empty name"
                + (f" next to the delimiter {self.delimiter!r}" if self.delimiter else "")
                + ". Fix the label, or pass the delimiter that your labels use (None to never "
                "split)."
            )
        perturbations = [name for name in names if not self.is_control(name)]
        if len(set(perturbations)) < len(perturbations):
            repeated = sorted({name for name in perturbations if perturbations.count(name) > 1})
            raise InvalidPerturbationLabelError(
                f"The perturbation label {str(label)!r} names {', '.join(repeated)} twice. Write "
                "each perturbation once and give its amount as a dosage."
            )
        return names

    def perturbations(self, label: object) -> list[str]:
        """Sorted names of the perturbations of a label; none for a control label."""
        return sorted(name for name in self.split(label) if not self.is_control(name))

    def join(self, perturbations: Iterable[str]) -> str:
        """Canonical label of sorted names; that of a control cell if there are none.

        Combinations in a dosage matrix have no delimiter and are joined by ``"+"``.
        """
        return (self.delimiter or "+").join(perturbations) or self.control_label

    def canonical(self, label: object) -> str:
        """Bring a label to its canonical spelling."""
        return self.join(self.perturbations(label))

    def _rejoined(self, parts: list[str]) -> list[str]:
        """Join the parts of control labels that contain the delimiter, the longest first."""
        delimiter = self.delimiter or ""
        lengths = _parts_of_controls(self.control, delimiter)
        names = []
        while parts:
            joined = {n: delimiter.join(parts[:n]) for n in lengths if n <= len(parts)}
            n = next((n for n, name in joined.items() if self.is_control(name)), 1)
            names.append(delimiter.join(parts[:n]))
            parts = parts[n:]
        return names


DEFAULT_SPELLING = Spelling(("control",), "+")


def control_names(control: object) -> tuple[str, ...]:
    """Return the control labels as text, for one or several, text or numbers."""
    if isinstance(control, np.ndarray) and not control.ndim:
        control = control.item()
    several = isinstance(control, Iterable) and not isinstance(control, str)
    labels: list[Any] = list(control) if several else [control]  # type: ignore[call-overload]
    if any(not pd.api.types.is_scalar(label) or pd.isna(label) for label in labels):
        raise InvalidArgumentError(
            f"`control` is {labels if several else control!r}. Pass the label, or a list of "
            "labels, of control cells."
        )
    if not labels:
        raise MissingControlError(
            "`control` is an empty list. Name the label of the control cells, such as "
            "control='control'."
        )
    return tuple(str(label).strip() for label in labels)


@functools.lru_cache(maxsize=64)
def _parts_of_controls(control: tuple[str, ...], delimiter: str) -> list[int]:
    """Numbers of parts into which the delimiter splits control labels, the largest first."""
    return sorted({label.count(delimiter) + 1 for label in control}, reverse=True)


@functools.lru_cache(maxsize=64)
def _labels_and_patterns(
    control: tuple[str, ...], delimiter: str | None
) -> tuple[frozenset[str], list[re.Pattern[str]]]:
    """Control labels, and compiled patterns for those that are patterns."""
    anything = f"(?:(?!{re.escape(delimiter)}).)*" if delimiter else ".*"
    patterns = [
        anything.join(map(re.escape, label.split("*"))) for label in control if "*" in label
    ]
    return frozenset(control), [re.compile(pattern, re.DOTALL) for pattern in patterns]


def canonical_label(
    label: str, *, delimiter: str | None = "+", control: str | Sequence[str] = ("control",)
) -> str:
    """Bring a label to its canonical spelling.

    Parameters
    ----------
    label
        For example ``"B+A"``, ``"A + control"`` or a control label.
    delimiter
        Separator between the perturbations of a combination; ``None`` if labels are never split.
    control
        Label, or labels, of control cells; ``*`` matches any text, as in ``"NT*"``. Inside a
        combination they are ignored.

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
    return Spelling.of(control, delimiter).canonical(label)
