"""Records of the scale of a table, so that tables on different scales are not compared."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from scvi_sams.exceptions import ScaleMismatchError

logger = logging.getLogger("scvi.sams")

NO_SIZE_FACTOR = "none"
"""Stands for the sum of the counts in a record; not every anndata version writes ``None``."""
_KEYS = ("method", "target_sum", "size_factor_key")


def size_factor_record(size_factor_key: str | None) -> dict[str, str]:
    """Record of the sizes by which counts were divided."""
    return {"size_factor_key": size_factor_key or NO_SIZE_FACTOR}


def levels_record(cells: pd.DataFrame, keys: Sequence[str]) -> dict[str, np.ndarray]:
    """Record of the batches and covariates in which effects were measured.

    ``cells`` are rows of obs, and ``keys`` the registered columns; empty if there are none.
    """
    known = [key for key in keys if key in cells]
    levels = [f"{key}={level}" for key in known for level in sorted(set(cells[key].astype(str)))]
    return {"levels": np.array(levels, dtype=str)} if levels else {}


def warn_of_other_levels(**records: Mapping[str, Any]) -> None:
    """Log a warning if two records, by the names of their tables, have different levels.

    This is not an error, because such comparisons can be intended, for example of cell types.
    """
    (first, one), (second, other) = records.items()
    if "levels" not in one or "levels" not in other:
        return
    sides = [set(map(str, record["levels"])) for record in (one, other)]
    columns = {name.split("=")[0] for name in sides[0]} & {n.split("=")[0] for n in sides[1]}
    told = []
    for table, own, others in ((first, sides[0], sides[1]), (second, sides[1], sides[0])):
        only = sorted(name for name in own - others if name.split("=")[0] in columns)
        if only:
            told.append(f"only the {table} effects are from {', '.join(only[:5])}")
    if told:
        logger.warning(
            f"The tables are from different batches or covariates: {' and '.join(told)}. "
            "Differences between them include differences between these cells."
        )


def check_same_scale(**records: Mapping[str, Any]) -> None:
    """Raise if two records, by the names of their tables, are on different scales.

    Entries missing in one of them, such as a table of an earlier version, are ignored.
    """
    (first, one), (second, other) = records.items()
    for key in _KEYS:
        if key in one and key in other and one[key] != other[key]:
            raise ScaleMismatchError(
                f"The tables cannot be compared: {key} is {_shown(one[key])} in the {first} and "
                f"{_shown(other[key])} in the {second} one. Compute both in the same way."
            )
    warn_of_other_levels(**records)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else f"{value:g}"
