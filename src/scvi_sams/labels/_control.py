"""Control cells as users specify them: by labels, by a pattern, or by marking the cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from scvi_sams._checks import as_cells
from scvi_sams.exceptions import InvalidPerturbationLabelError, MissingControlError
from scvi_sams.labels._names import listing


def named_control(control: Any, labels: pd.Series, obs: pd.DataFrame | None = None) -> Any:
    """Return ``control``, with labels instead of marks if it marks the control cells.

    Cells are marked by a boolean per cell, or by the name of a boolean column of ``obs`` (unless
    there is a label of that name). Anything else is returned unchanged.
    """
    if isinstance(control, str) and obs is not None and control in obs:
        marks = obs[control]
        is_label = (labels.astype(str).str.strip() == control.strip()).any()
        if is_label or not pd.api.types.is_bool_dtype(marks):
            return control
        told = f"adata.obs[{control!r}]"
    elif marks_cells(control, len(labels)):
        marks, told = control, "`control`"
    else:
        return control
    marked = np.zeros(len(labels), dtype=bool)
    marked[as_cells("control", marks, len(labels))] = True
    if not marked.any():
        raise MissingControlError(f"{told} marks no cell as a control cell.")
    text = labels.astype(str).str.strip()
    names = text[marked & labels.notna().to_numpy()].unique().tolist()
    others = text[~marked]
    shared = others[others.isin(names)].unique().tolist()
    if shared:
        raise InvalidPerturbationLabelError(
            f"{told} marks some cells labelled {listing(shared)} as controls and others not. Give "
            "control cells labels of their own; if control cells have a dose of zero, register "
            "doses (`dosage_key`)."
        )
    return names


def marks_cells(control: Any, n_cells: int) -> bool:
    """Whether ``control`` has a boolean for every cell, and no labels."""
    if isinstance(control, list | tuple):
        is_bool = all(isinstance(mark, bool | np.bool_) for mark in control)
        return is_bool and len(control) == n_cells
    return getattr(control, "ndim", 0) == 1 and pd.api.types.is_bool_dtype(control)
