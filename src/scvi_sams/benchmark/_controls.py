"""The positive control: one half of the test cells predicts the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams.baselines._simple import split_half
from scvi_sams.benchmark._predictions import Key, Predictions, stack_predictions
from scvi_sams.benchmark._screen import Fold

_SINGLE_CELL = "A single test cell has no half."


def half_of_test_cells(fold: Fold, seed: int, *, keep_cells: bool) -> tuple[Predictions, Fold]:
    """Predict by :func:`split_half`, level by level; return the fold to score it on as well."""
    observed = fold.observed
    labels, levels = fold.labels_of(observed), fold.levels_of(observed)
    group = np.zeros(observed.n_obs) if levels is None else levels
    rows: dict[Key, np.ndarray] = {}
    cells: dict[Key, sparse.csr_matrix] = {}
    messages: dict[Key, str] = {}
    scored = [np.flatnonzero(labels == fold.control)]
    for name in pd.unique(group):
        level = None if levels is None else name
        positions = np.flatnonzero(group == name)
        n_cells = pd.Series(labels[positions]).value_counts()
        alone = set(n_cells.index[n_cells == 1]) - {fold.control}
        messages |= {(level, label): _SINGLE_CELL for label in alone}
        is_alone = np.isin(labels[positions], list(alone))
        scored.append(positions[is_alone])
        positions = positions[~is_alone]
        if set(labels[positions]) <= {fold.control}:
            continue
        prediction, kept = split_half(
            observed[positions],
            seed=seed,
            perturbation_key=fold.columns.perturbation_key,
            control=fold.control,
            delimiter=fold.columns.delimiter,
        )
        scored.append(positions[kept])
        half = np.delete(positions, kept)
        for label, profile in zip(prediction.obs_names, np.asarray(prediction.X), strict=True):
            rows[level, label] = profile[None]
            if keep_cells:
                cells[level, label] = observed.X[half[labels[half] == label]]
    predictions = Predictions(
        stack_predictions(rows, fold), stack_predictions(cells, fold) if cells else None, messages
    )
    return predictions, replace(fold, observed=observed[np.unique(np.concatenate(scored))])
