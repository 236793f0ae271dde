"""Values of a column and names of perturbations: distinct, unknown, and listed in messages."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Iterable

import numpy as np
import pandas as pd

from scvi_sams._plurals import counted, plural
from scvi_sams.exceptions import MissingKeyError, SAMSError, UnknownPerturbationError


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
            f"{values.name or 'A column'} contains {bad!r}, which is neither text nor a number. "
            "(Write names or doses of a combination as one text, joined by `delimiter`.)"
        ) from None
    return numbers, list(distinct)


def texts_of(column: pd.Series, error: type[SAMSError]) -> tuple[np.ndarray, list[str]]:
    """Number of each cell's text, shape ``(n_cells,)``, and the distinct texts.

    Surrounding blanks are removed, and the text of a missing value is empty. Values that cannot
    be compared, such as lists, raise ``error``.
    """
    number_of_cell, distinct = factorize(column, error)
    number_of_value, texts = pd.factorize(np.array([_text(v) for v in distinct], dtype=object))
    return number_of_value[number_of_cell], list(texts)


def _text(value: object) -> str:
    if pd.api.types.is_scalar(value) and pd.isna(value):  # type: ignore[call-overload]
        return ""
    # Missing values turn integers into floats.
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return str(value).strip()


def numbers_in(values: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Values as floats, NaN where missing or not a number, and which are not numbers."""
    numbers = pd.to_numeric(values, errors="coerce")
    # pandas would convert dates to nanoseconds.
    is_other = (numbers.isna() & values.notna()).to_numpy() | (values.dtype.kind in "mMc")
    if numbers.dtype.kind == "c":
        is_other |= values.map(lambda value: isinstance(value, complex)).to_numpy(dtype=bool)
        numbers = pd.Series(np.real(numbers))
    floats = numbers.astype("Float64").to_numpy(dtype=float, na_value=np.nan)
    return np.where(is_other, np.nan, floats), is_other


def check_known(
    names: Iterable[str], known: Iterable[str], control: str = "control", column: object = None
) -> None:
    """Raise an error that names unknown perturbations, and similar known ones.

    ``control`` is the label of control cells, and ``column`` the column of ``obs`` with the names,
    if they are labels of cells.
    """
    known_names = known if isinstance(known, dict) else dict.fromkeys(known)
    unknown = sorted({str(name) for name in names if name not in known_names})
    if not unknown:
        return
    parts = [part for part in re.split(r"[\W_]+", unknown[0]) if part in known_names]
    if len(parts) > 1:
        joined = " and ".join(map(shown, parts))
        advice = f" If it is the combination of {joined}, join them by the registered `delimiter`."
    else:
        advice = " If it is a combination, check `delimiter`."
    hints = [] if len(parts) > 1 else close_names(unknown[0], known_names)
    raise UnknownPerturbationError(
        f"Unknown {plural(len(unknown), 'perturbation')}: {listing(unknown)}. "
        f"{counted(len(known_names), 'perturbation is', 'perturbations are')} known"
        + (f"; did you mean {listing(hints)}?" if hints else f", such as {listing(known_names)}.")
        + " Only perturbations in the training data, alone or in a combination, or in"
        " `perturbation_features` of SAMSVAE can be predicted. The label of control cells is"
        f" {shown(control)} (`control`)"
        + (
            f": if {shown(unknown[0])} are control cells, rename them, adata.obs[{column!r}] = "
            f"adata.obs[{column!r}].astype(str).replace({unknown[0]!r}, {control!r})."
            if isinstance(column, str)
            else "."
        )
        + advice
    )


def check_has(
    lacks: str, wanted: Iterable[object], present: Iterable[object], advice: str = ""
) -> None:
    """Raise an error that names the missing entries, and those that exist.

    ``lacks`` is the beginning of the message, such as "adata.obs has no column".
    """
    there = list(present)
    missing = [name for name in wanted if name not in there]
    if missing:
        raise MissingKeyError(
            f"{lacks} {listing(missing)}. There are {listing(there, limit=50) or 'none'}." + advice
        )


def close_names(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """The most similar of known names; differences of case do not count."""
    folded: defaultdict[str, list[str]] = defaultdict(list)
    for one in known:
        folded[one.casefold()].append(one)
    close = difflib.get_close_matches(name.casefold(), list(folded), n=n)
    return [one for match in close for one in folded[match]][:n]


def similar_names(names: Iterable[str]) -> list[list[str]]:
    """Groups of names that differ only by case or by the encoding of letters."""
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
