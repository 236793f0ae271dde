"""Codes and doses of cells, and what their encoders share: pure functions."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from scvi_sams.exceptions import MissingControlError, SAMSError, UnknownPerturbationError

NO_PERTURBATION = -1
"""Code that pads the rows of cells with fewer perturbations than the widest combination."""

_WORD_FOR_CONTROL = re.compile(
    r"(?<![a-z])(control|ctrl|ctl|ntc?|neg(ative)?|(non)?targeting|dmso|vehicle|scrambled?|mock"
    r"|untreated|safe)(?![a-z])"
)


@dataclass(frozen=True)
class PerturbationCodes:
    """Which perturbations each cell received, and how much of each.

    Attributes
    ----------
    codes
        Integers of shape ``(n_cells, n_slots)``: positions in ``vocabulary``, ascending in each
        row, or :data:`NO_PERTURBATION` where a slot is empty. ``n_slots`` is the size of the
        largest combination (at least 1).
    doses
        Dosages of shape ``(n_cells, n_slots)`` in the user's units; 0 where a slot is empty.
    vocabulary
        Names of the perturbations, without controls.
    """

    codes: np.ndarray
    doses: np.ndarray
    vocabulary: tuple[str, ...]

    @property
    def is_control(self) -> np.ndarray:
        """Boolean of shape ``(n_cells,)``: cells that carry no perturbation."""
        return (self.codes == NO_PERTURBATION).all(axis=1)


def factorize(values: pd.Series, error: type[SAMSError]) -> tuple[np.ndarray, list]:
    """Number the distinct values in their order; missing values count as one.

    Returns the number of each cell's value, shape ``(n_cells,)``, and the distinct values. Values
    that cannot be compared, such as lists, raise ``error``.
    """
    try:
        numbers, distinct = pd.factorize(values, use_na_sentinel=False)
    except TypeError:
        bad = next((value for value in values if not isinstance(value, Hashable)), values.iloc[0])
        raise error(
            f"{values.name or 'A column'} holds {bad!r}, which is neither text nor a number. "
            "(Names or doses of a combination are written as one text, joined by `delimiter`.)"
        ) from None
    return numbers, list(distinct)


def check_known(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise an error that names the perturbations which are not known, and similar known ones."""
    known_names = known if isinstance(known, dict) else dict.fromkeys(known)
    unknown = sorted({str(name) for name in names if name not in known_names})
    if not unknown:
        return
    hints = difflib.get_close_matches(unknown[0], list(known_names), n=3)
    raise UnknownPerturbationError(
        f"Unknown perturbation{'s' if len(unknown) > 1 else ''}: {listing(unknown)}. "
        f"{len(known_names)} perturbations are known"
        + (f"; did you mean {listing(hints)}?" if hints else f", such as {listing(known_names)}.")
        + " A model can only speak of perturbations that occur in its training data, alone or in a"
        " combination. If this is a control label, pass it as `control`; if it is a combination,"
        " check `delimiter`."
    )


def check_control_label(encoded: PerturbationCodes, control: Iterable[str]) -> None:
    """Raise an error if no label is a control label; names that look like one are shown first."""
    if encoded.is_control.any():
        return
    names = sorted(
        encoded.vocabulary, key=lambda name: _WORD_FOR_CONTROL.search(name.lower()) is None
    )
    sought = " or ".join(map(repr, control)) or "any of an empty list"
    raise MissingControlError(
        f"No control cell was found: no label equals {sought}. "
        f"Labels name {listing(names)}. Pass the label (or a list of labels) of the control cells "
        "as `control`."
    )


def check_control_row(encoded: PerturbationCodes, location: str) -> None:
    """Raise an error if no row of a dosage matrix is that of a control cell."""
    if not encoded.is_control.any():
        raise MissingControlError(
            f"No control cell was found: every row of {location} has a non-zero dose. A control "
            "cell is a row of zeros; if controls have a column, name it in `control`."
        )


def similar_names(names: Iterable[str]) -> list[list[str]]:
    """Groups of names that differ only by case or by the way that letters are encoded."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys(names):
        groups[unicodedata.normalize("NFKC", name).casefold()].append(name)
    return [group for group in groups.values() if len(group) > 1]


def shown(value: object) -> str:
    """Show a value in an error message: text in quotes, numbers without their numpy type."""
    return repr(str(value)) if isinstance(value, str) else str(value)


def listing(values: Iterable[object], limit: int = 5) -> str:
    """List the first few values in an error message."""
    items = [shown(value) for value in values]
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
