"""Bring tables of masks or latents to the same perturbations."""

from __future__ import annotations

import numpy as np
import pandas as pd

from scvi_sams.exceptions import SAMSError, UnknownPerturbationError


def check_same_rows(first: pd.Index, second: pd.Index, sides: str, what: str) -> None:
    """Raise an error if a name is in one index only.

    Parameters
    ----------
    first, second
        Names of the rows, in any order.
    sides
        What the two are, for the message: ``"run 0 and run 1"``.
    what
        What a row is, for the message: ``"perturbations"``.
    """
    unshared = first.symmetric_difference(second)
    if len(unshared):
        raise UnknownPerturbationError(
            f"{', '.join(map(repr, unshared[:5]))} ({len(unshared)} in all) is in only one of "
            f"{sides}. Subset both to the same {what}."
        )


def aligned_rows(
    estimated: pd.DataFrame | np.ndarray,
    true: pd.DataFrame | np.ndarray,
    *,
    table: str = "masks",
    what: str = "perturbations",
) -> tuple[np.ndarray, np.ndarray]:
    """Bring an estimated table to the rows of the true one: by name if both have names.

    Raises
    ------
    UnknownPerturbationError
        If a row is in one DataFrame only.
    SAMSError
        If the numbers of rows differ.
    """
    if isinstance(estimated, pd.DataFrame) and isinstance(true, pd.DataFrame):
        sides = f"the estimated and the true {table}"
        check_same_rows(estimated.index, true.index, sides, what)
        estimated = estimated.loc[true.index]
    estimate, truth = np.asarray(estimated), np.asarray(true)
    if len(estimate) != len(truth):
        raise SAMSError(
            f"There are {len(estimate)} {what} in the estimated {table} and {len(truth)} in the "
            "true ones. Give both the same rows."
        )
    return estimate, truth
