"""Columns of ``obs`` that are confounded with perturbations and not registered."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.stats import chi2_contingency

from scvi_sams.labels._labels import Labels

_MOST_LEVELS = 50
_LARGE_DIFFERENCE = 0.5
"""Proportion of a perturbation's cells that would have to change level to match controls."""
_SURE = 1e-6


def confounding_columns(adata: AnnData, labels: Labels, registered: set[str]) -> pd.Series:
    """Find columns whose levels differ between the cells of a perturbation and control cells.

    Effects of such a column (a lane, replicate or donor in which a perturbation, but not the
    controls, was screened) would be attributed to the perturbation.

    Parameters
    ----------
    adata
        Cells.
    labels
        Perturbations of each cell.
    registered
        Columns that the model accounts for, or from which its labels come.

    Returns
    -------
    One entry per perturbation: names of columns, joined by ``", "``. Text and categorical columns
    with 2 to 50 levels are considered, unless levels identify perturbations, as guides do.
    """
    found: list[list[str]] = [[] for _ in labels.vocabulary]
    carriers = [
        np.flatnonzero((labels.codes == code).any(axis=1)) for code in range(len(labels.vocabulary))
    ]
    for name in adata.obs.columns.difference(list(registered), sort=False):
        level = _levels(adata.obs[name])
        if level is None or _tells_perturbations(level, labels):
            continue
        of_controls = _counts(level, labels.is_control)
        for code, cells in enumerate(carriers):
            of_carriers = _counts(level, cells, len(of_controls))
            if _differ(of_carriers, of_controls):
                found[code].append(str(name))
    index = pd.Index(labels.vocabulary, name="perturbation")
    return pd.Series([", ".join(names) for names in found], index=index, dtype=object)


def _levels(column: pd.Series) -> np.ndarray | None:
    if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        return None
    codes, names = pd.factorize(column)
    return codes if 2 <= len(names) <= _MOST_LEVELS else None


def _tells_perturbations(level: np.ndarray, labels: Labels) -> bool:
    """Whether the level identifies the label of most perturbed cells."""
    table = pd.crosstab(level[~labels.is_control], labels.name_of_cell[~labels.is_control])
    n_labels = table.shape[1]
    return n_labels > 1 and table.max(axis=1).sum() > 0.9 * table.to_numpy().sum()


def _counts(level: np.ndarray, cells: np.ndarray, n_levels: int = 0) -> np.ndarray:
    chosen = level[cells]
    return np.bincount(chosen[chosen >= 0], minlength=max(n_levels, int(level.max()) + 1))


def _differ(of_carriers: np.ndarray, of_controls: np.ndarray) -> bool:
    if not of_carriers.sum() or not of_controls.sum():
        return False
    distance = np.abs(of_carriers / of_carriers.sum() - of_controls / of_controls.sum()).sum() / 2
    if distance <= _LARGE_DIFFERENCE:
        return False
    table = np.stack([of_carriers, of_controls])
    return bool(chi2_contingency(table[:, table.sum(axis=0) > 0]).pvalue < _SURE)
