"""Predictions of a fitted method, one perturbation at a time: what fails is kept as such."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams.baselines._simple import mean_of_halves
from scvi_sams.benchmark._model import Fitted
from scvi_sams.benchmark._screen import Fold
from scvi_sams.exceptions import MissingControlError, MissingKeyError, UnknownPerturbationError

Key = tuple[str | None, str]
"""Level of the covariate (``None`` without one) and label."""
_SINGLE_CELL = "A single test cell has no half."


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of one method on one fold."""

    profiles: ad.AnnData
    """Mean profiles: a row per predicted perturbation (and level of the covariate)."""
    cells: ad.AnnData | None
    """Predicted cells; ``None`` unless they are to be scored and the method predicts cells."""
    messages: dict[Key, str]
    """Why the others have no prediction."""

    @classmethod
    def of(
        cls,
        fold: Fold,
        profiles: dict[Key, np.ndarray],
        cells: dict[Key, sparse.csr_matrix],
        messages: dict[Key, str],
    ) -> Self:
        """Put profiles, and cells if there are any, below each other."""
        stacked = _stack({key: profile[None] for key, profile in profiles.items()}, fold)
        return cls(stacked, _stack(cells, fold) if cells else None, messages)


def predict_all(fitted: Fitted, fold: Fold, *, keep_cells: bool) -> Predictions:
    """Ask for every tested perturbation; a failure of one does not stop the others."""
    profiles: dict[Key, np.ndarray] = {}
    cells: dict[Key, sparse.csr_matrix] = {}
    messages: dict[Key, str] = {}
    shifts = _level_shifts(fold)
    for level, label in fold.perturbations:
        try:
            rows = _rows(fitted.predict(label, level), fold, level, label, shifts)
            profiles[level, label] = np.asarray(rows.mean(axis=0, dtype=np.float64)).ravel()
            if keep_cells and fitted.predict_cells is not None:
                rows = fitted.predict_cells(level)
            if keep_cells and rows.shape[0] > 1:
                cells[level, label] = sparse.csr_matrix(rows)
        except Exception as error:  # noqa: BLE001 - whatever a method raises is a row of the table
            messages[level, label] = describe_error(error)
    return Predictions.of(fold, profiles, cells, messages)


def half_of_test_cells(fold: Fold, seed: int, *, keep_cells: bool) -> tuple[Predictions, Fold]:
    """Predict by halves of cells, level by level; return the fold to score it on as well.

    This is the positive control, as :func:`split_half` makes it.
    """
    observed, labels = fold.observed, fold.observed_labels
    levels, name_of = fold.columns.levels(observed), labels.canonical
    group = np.zeros(observed.n_obs) if levels is None else levels
    profiles: dict[Key, np.ndarray] = {}
    cells: dict[Key, sparse.csr_matrix] = {}
    messages: dict[Key, str] = {}
    scored = [np.flatnonzero(labels.is_control)]
    for name in pd.unique(group):
        level = None if levels is None else name
        positions = np.flatnonzero(group == name)
        n_cells = pd.Series(name_of[positions]).value_counts()
        alone = set(n_cells.index[n_cells == 1]) - {labels.control}
        messages |= {(level, label): _SINGLE_CELL for label in alone}
        is_alone = np.isin(name_of[positions], list(alone))
        scored.append(positions[is_alone])
        positions = positions[~is_alone]
        if labels.is_control[positions].all():
            continue
        genes = observed.var_names
        means, places = mean_of_halves(observed.X[positions], labels[positions], genes, seed)
        half = positions[places]
        scored.append(np.delete(positions, places))
        for label, profile in zip(means.obs_names, np.asarray(means.X), strict=True):
            profiles[level, label] = profile
            if keep_cells:
                cells[level, label] = observed.X[half[name_of[half] == label]]
    kept = np.unique(np.concatenate(scored))
    scored_on = replace(fold, observed=observed[kept], observed_labels=labels[kept])
    return Predictions.of(fold, profiles, cells, messages), scored_on


def _stack(rows: dict[Key, np.ndarray] | dict[Key, sparse.csr_matrix], fold: Fold) -> ad.AnnData:
    """Put predictions below each other, with label and level in ``obs``."""
    keys = [key for key, matrix in rows.items() for _ in range(matrix.shape[0])]
    obs = pd.DataFrame(
        {fold.columns.perturbation_key: pd.Series([label for _, label in keys], dtype=object)}
    )
    if fold.columns.covariate_key is not None:
        obs[fold.columns.covariate_key] = pd.Series([level for level, _ in keys], dtype=object)
    obs.index = obs.index.astype(str)
    matrices = list(rows.values())
    genes = fold.train.var_names
    if not matrices:
        expression = np.empty((0, len(genes)))
    elif sparse.issparse(matrices[0]):
        expression = sparse.csr_matrix(sparse.vstack(matrices))
    else:
        expression = np.concatenate(matrices)
    return ad.AnnData(expression, obs=obs, var=pd.DataFrame(index=genes.copy()))


def describe_error(error: BaseException) -> str:
    """Name and message of an error."""
    return f"{type(error).__name__}: {error}"


def _rows(
    prediction: ad.AnnData,
    fold: Fold,
    level: str | None,
    label: str,
    shifts: dict[str | None, np.ndarray],
) -> np.ndarray | sparse.csr_matrix:
    """Predicted rows of one perturbation and level, genes as in the data."""
    covariate_key = fold.columns.covariate_key
    knows_level = level is None or covariate_key in prediction.obs
    if level is not None and knows_level:
        prediction = prediction[(prediction.obs[covariate_key].astype(str) == level).to_numpy()]
    if prediction.n_obs == 0:
        at = "" if level is None else f" in {level!r}"
        raise UnknownPerturbationError(f"There is no predicted row for {label!r}{at}.")
    genes = fold.train.var_names
    absent = genes.difference(prediction.var_names)
    if len(absent):
        raise MissingKeyError(
            f"{len(absent)} genes have no prediction, for example {absent[0]!r}. Predict all genes "
            "of train_adata."
        )
    if not prediction.var_names.equals(genes):
        prediction = prediction[:, genes]
    rows = prediction.X
    if knows_level:
        return rows if sparse.issparse(rows) else np.asarray(rows)
    if level not in shifts:
        raise MissingControlError(f"No training control cell is of level {level!r}.")
    dense = rows.toarray() if sparse.issparse(rows) else np.asarray(rows)
    return np.maximum(dense + shifts[level], 0)


def _level_shifts(fold: Fold) -> dict[str | None, np.ndarray]:
    """By how much the training control cells of each level differ from all of them."""
    levels = fold.columns.levels(fold.train)
    if levels is None:
        return {}
    is_control = fold.train_labels.is_control

    def mean(cells: np.ndarray) -> np.ndarray:
        return np.asarray(fold.train.X[cells].mean(axis=0)).ravel()

    overall = mean(is_control)
    present = sorted(set(levels[is_control]))
    return {level: mean(is_control & (levels == level)) - overall for level in present}
