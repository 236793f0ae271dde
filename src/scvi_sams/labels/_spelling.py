"""How labels are written: what control cells are called, and what joins a combination."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from scvi_sams._checks import check_key
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidPerturbationLabelError,
    MissingControlError,
)


@dataclass(frozen=True)
class Spelling:
    """What a label is read by, made once where a user gives ``control`` and ``delimiter``.

    Attributes
    ----------
    control
        Labels of control cells. Inside a combination they stand for "nothing".
    delimiter
        What joins the perturbations of a combination; ``None`` if labels are never split.
    """

    control: tuple[str, ...]
    delimiter: str | None

    @classmethod
    def of(cls, control: object, delimiter: str | None) -> Self:
        """Read the two arguments of a public function; an error if no control is named."""
        check_key(delimiter=delimiter)
        return cls(control_names(control), delimiter)

    @property
    def control_label(self) -> str:
        """Canonical label of a control cell: the first of ``control``."""
        return self.control[0]

    def split(self, label: object) -> list[str]:
        """Names of a label as written, controls included.

        Control labels may hold the delimiter, on their own and inside a combination.
        """
        text = str(label).strip()
        if text in self.control or not self.delimiter:
            names = [text]
        else:
            parts = [name.strip() for name in text.split(self.delimiter)]
            names = _rejoin_controls(parts, self.delimiter, self.control)
        if not all(names):
            raise InvalidPerturbationLabelError(
                f"The perturbation label {str(label)!r} has an empty name"
                + (f" beside the delimiter {self.delimiter!r}" if self.delimiter else "")
                + ". Fix the label, or pass the delimiter that your labels use (None to never "
                "split)."
            )
        perturbations = [name for name in names if name not in self.control]
        if len(set(perturbations)) < len(perturbations):
            repeated = sorted({name for name in perturbations if perturbations.count(name) > 1})
            raise InvalidPerturbationLabelError(
                f"The perturbation label {str(label)!r} names {', '.join(repeated)} twice. Write "
                "each perturbation once and give its amount as a dosage."
            )
        return names

    def perturbations(self, label: object) -> list[str]:
        """Sorted names of the perturbations of a label; none for a control label."""
        return sorted(name for name in self.split(label) if name not in self.control)

    def join(self, perturbations: Iterable[str]) -> str:
        """Canonical label of sorted names; that of a control cell if there are none.

        Combinations in a dosage matrix have no delimiter of their own and get ``"+"``.
        """
        return (self.delimiter or "+").join(perturbations) or self.control_label

    def canonical(self, label: object) -> str:
        """Spell a label in the one way that does not depend on who wrote it."""
        return self.join(self.perturbations(label))


DEFAULT_SPELLING = Spelling(("control",), "+")


def control_names(control: object) -> tuple[str, ...]:
    """Return the control labels as text, whether one or several, text or numbers were given."""
    several = isinstance(control, Iterable) and not isinstance(control, str)
    labels = list(control) if several else [control]  # type: ignore[call-overload]
    if any(label is None or label != label for label in labels):
        raise InvalidArgumentError(
            f"`control` is {control!r}. Pass the label, or a list of labels, of control cells."
        )
    if not labels:
        raise MissingControlError(
            "`control` is an empty list. Name the label of the control cells, such as "
            "control='control'."
        )
    return tuple(str(label).strip() for label in labels)


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
    return Spelling.of(control, delimiter).canonical(label)


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
