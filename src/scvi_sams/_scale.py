"""What the numbers of a table are, kept with it, so that two scales are not taken for one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scvi_sams.exceptions import ScaleMismatchError

NO_SIZE_FACTOR = "none"
"""Stands for the sum of the counts in a record; not every anndata writes ``None``."""
_KEYS = ("method", "target_sum", "size_factor_key")


def size_factor_record(size_factor_key: str | None) -> dict[str, str]:
    """What a table keeps of the sizes that counts were divided by."""
    return {"size_factor_key": size_factor_key or NO_SIZE_FACTOR}


def check_same_scale(**records: Mapping[str, Any]) -> None:
    """Raise an error if two records, by the names of their tables, speak of two scales.

    What one of them does not say, such as that of an older table, is passed over.
    """
    (first, one), (second, other) = records.items()
    for key in _KEYS:
        if key in one and key in other and one[key] != other[key]:
            raise ScaleMismatchError(
                f"The tables cannot be compared: {key} is {_shown(one[key])} in the {first} and "
                f"{_shown(other[key])} in the {second} one. Compute both in the same way."
            )


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else f"{value:g}"
