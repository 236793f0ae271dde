"""Descriptions of tables of predictions, in ``uns``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from scvi_sams._scale import levels_record, size_factor_record
from scvi_sams.data._field import registered_labels
from scvi_sams.model._cell_model import CellModel
from scvi_sams.model._cells import CellReader
from scvi_sams.model._responses import Among
from scvi_sams.module._perturbation_module import PerturbationModule


def control_cells(model: CellModel) -> np.ndarray:
    """Positions of control cells in the training data."""
    return np.flatnonzero(registered_labels(model.adata_manager).is_control)


def levels_of_effects(model: CellModel) -> dict[str, Any]:
    """Levels of the control cells, with whose batches and covariates effects are decoded."""
    if model.adata is None or not model.module.covariates.n_out:
        return {}
    control = control_cells(model)
    cells = model.adata.obs.iloc[control] if len(control) else model.adata.obs
    return _levels(model, cells)


def _levels(model: CellModel, cells: pd.DataFrame) -> dict[str, Any]:
    """Levels of cells, rows of obs, in the registered columns."""
    setup = model._setup_arguments
    keys = [setup["batch_key"], *(setup["categorical_covariate_keys"] or [])]
    return levels_record(cells, [key for key in keys if key is not None])


def parts_of_predictions(module: PerturbationModule) -> dict[str, Any]:
    """Record, for ``uns``, of the parts of predictions of means besides the decoder."""
    direct = module.direct
    estimated = direct is not None and direct.is_estimated
    description: dict[str, Any] = {
        "direct_effects": module.fits_direct_effects and estimated,
        "stacking": "none",
    }
    if direct is not None:
        description["stacking"] = direct.stacking or "none"
        description["combinations_with_own_cells"] = len(direct.combinations)
        if direct.stacking_of_combinations is not None:
            description["stacking_of_combinations"] = direct.stacking_of_combinations
        if direct.stacking_of_contexts is not None:
            description["stacking_of_contexts"] = direct.stacking_of_contexts
        of_unmeasured = None if module.unmeasured is None else module.unmeasured.stacking
        if direct.stacking is not None and of_unmeasured is not None:
            description["stacking_of_unmeasured"] = of_unmeasured
            description |= _change_of_targets(module)
    return description


def _change_of_targets(module: PerturbationModule) -> dict[str, float]:
    """Change of the target genes of unmeasured perturbations; empty if it is not predicted."""
    assert module.unmeasured is not None
    change = module.unmeasured.target_change
    if not len(change):
        return {}
    is_count = module.likelihood.is_count_likelihood
    return {"lfc_of_target_genes": float(change) / (math.log(2) if is_count else 1)}


def description_of_cells(
    model: CellModel, sources: CellReader, output: str, target_sum: float
) -> dict[str, Any]:
    """Record, for ``uns``, of the scale of predicted cells."""
    levels = _levels(model, sources.adata.obs.iloc[sources.positions])
    scale = {"target_sum": target_sum, "log": "natural, log(1 + x)"} if output == "lognorm" else {}
    size_factor = size_factor_record(model._setup_arguments["size_factor_key"])
    parts = parts_of_predictions(model.module)
    return {"output": output, **size_factor, **levels, **parts, **scale}


def cells_with_effects(module: PerturbationModule, among: Among) -> dict[str, Any]:
    """Record, for ``uns``, of the cells with the effects; empty if all respond."""
    return {"among": among} if module.has_branches else {}
