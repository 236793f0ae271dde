"""Test whether basal states contain information about perturbations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler

from scvi_sams._checks import as_positions, check_integer
from scvi_sams._plurals import counted
from scvi_sams._torch import fixed_seed
from scvi_sams.data._field import registered_labels
from scvi_sams.exceptions import MissingControlError

if TYPE_CHECKING:
    from scvi_sams.model._cell_model import CellModel

logger = logging.getLogger("scvi.sams")

_MIN_CELLS = 10
_N_FOLDS = 5


def basal_leakage(
    model: CellModel,
    adata: AnnData | None = None,
    indices: Sequence[int] | Sequence[bool] | None = None,
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure how well basal states separate perturbed cells from control cells.

    In the model, basal states are states without perturbations, with the same distribution for all
    cells. If a classifier can identify perturbed cells from basal states, these explain a part of
    the effect, which is then missing in masks, effects and predictions for other cells. The score
    is the area under the ROC curve (AUC) of a logistic regression on standardised states, on cells
    that it was not fitted to (mean over five stratified folds). 0.5: no leakage; 1: basal states
    identify perturbed cells.

    Compare it with the AUC of the full state (basal plus effects), an upper limit: without an
    effect, both are 0.5. The AUC of few cells is noisy; single values somewhat above or below 0.5
    are expected. A high AUC does not indicate leakage if perturbed and control cells differ in
    basal states, for example by unregistered donors or batches.

    Parameters
    ----------
    model
        Trained model.
    adata
        Registered data, or other data with the same genes; ``None`` for the training data.
    indices
        Cells (positions or a boolean mask). ``None``: for the training data the model's validation
        and test cells, if these include at least 10 control cells, and 10 cells of at least half of
        the perturbations with 10 or more cells; otherwise, and for other data, all cells.
    seed
        Seed of the samples and of the folds; the global random state is not used.

    Returns
    -------
    One row per label (perturbation or combination, each cell in one row; doses are pooled), sorted,
    and last the row ``"all"``, any perturbation against control:

    - ``auc_basal``: of basal states, sampled from the posterior of each cell under its own
      perturbations, ``encoder(x, shift)`` if the encoder depends on the shift.
    - ``auc_total``: of the same states with the shift added.
    - ``n_cells``: perturbed cells scored. With fewer than 10 there is no AUC (NaN).

    Raises
    ------
    MissingControlError
        If fewer than 10 of the cells are control cells.

    Notes
    -----
    Shifts are at their posterior mean, so that uncertainty of an effect does not count as leakage.
    Basal states are sampled, because samples are what is decoded. Posterior means would exaggerate:
    in a dimension that the decoder hardly uses, traces of the shift in the mean are small relative
    to the noise of a sample, but not relative to the variation of other means.

    Examples
    --------
    >>> leakage = scvi_sams.evaluation.basal_leakage(model)
    >>> leakage.columns.tolist(), leakage.index[-1]
    (['auc_basal', 'auc_total', 'n_cells'], 'all')
    """
    check_integer(at_least=0, seed=seed)
    # scvi-tools makes an AnnData of a view, which is the registered one.
    adata = model._validate_anndata(adata)
    registered = registered_labels(model.get_anndata_manager(adata, required=True))
    control, labels = registered.control, registered.canonical
    if indices is None:
        positions = _default_cells(model, adata, labels, control)
    else:
        positions = as_positions("indices", indices, adata.n_obs)
    scored = labels[positions]
    is_control = scored == control
    if is_control.sum() < _MIN_CELLS:
        raise MissingControlError(
            f"{is_control.sum()} of the {counted(len(scored), 'cell')} are control cells; at least "
            f"{_MIN_CELLS} are needed to compare with. Pass more cells as `indices`."
        )
    basal, total = _states(model, adata, positions, seed)
    groups = {label: scored == label for label in registered.perturbed_names}
    groups["all"] = ~is_control
    return pd.DataFrame(
        {
            "auc_basal": [_auc(basal, g, is_control, seed) for g in groups.values()],
            "auc_total": [_auc(total, g, is_control, seed) for g in groups.values()],
            "n_cells": [group.sum() for group in groups.values()],
        },
        index=pd.Index(list(groups), name="perturbation"),
    )


def _states(
    model: CellModel, adata: AnnData, positions: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sample basal states, and add the mean shifts; both of shape ``(n_cells, n_latent)``."""
    states = []
    for representation in ("basal", "perturbed"):
        # The same seed, so that both have the same samples.
        with fixed_seed(seed):
            states.append(
                model.get_latent_representation(
                    adata,
                    positions.tolist(),
                    representation=representation,
                    give_mean=False,
                    mean_shifts=True,
                    key_added=None,
                )
            )
    return states[0], states[1]


def _default_cells(
    model: CellModel, adata: AnnData, labels: np.ndarray, control: str
) -> np.ndarray:
    everything = np.arange(len(labels))
    if adata is not model.adata:
        return everything
    parts = [part for part in (model.validation_indices, model.test_indices) if part is not None]
    held_out = np.sort(np.concatenate([np.empty(0, dtype=int), *parts]))
    n_all = pd.Series(labels).value_counts()
    n_held_out = pd.Series(labels[held_out]).value_counts().reindex(n_all.index, fill_value=0)
    enough = (n_held_out >= _MIN_CELLS)[n_all >= _MIN_CELLS]
    if enough.get(control, False) and enough.drop(control).mean() >= 0.5:
        return held_out
    logger.info(
        "Too few control or perturbed cells were held out of training to score only their basal "
        "states; all cells are scored."
    )
    return everything


def _auc(states: np.ndarray, is_perturbed: np.ndarray, is_control: np.ndarray, seed: int) -> float:
    """Area under the ROC curve on held-out cells.

    It is averaged over folds: scores of different folds have different scales, and ranking them
    together would put the AUC of uninformative states below 0.5.
    """
    if is_perturbed.sum() < _MIN_CELLS:
        return float("nan")
    cells = is_perturbed | is_control
    # Few coefficients, many cells; each fold starts from the solution of the previous one.
    classifier = LogisticRegression(solver="newton-cholesky", max_iter=1000, warm_start=True)
    folds = StratifiedKFold(_N_FOLDS, shuffle=True, random_state=seed)
    x, y = states[cells].astype(np.float64), is_perturbed[cells]
    found = []
    for train, test in folds.split(x, y):
        scaled = StandardScaler().fit(x[train]).transform(x)
        classifier.fit(scaled[train], y[train])
        found.append(roc_auc_score(y[test], scaled[test] @ classifier.coef_[0]))
    return float(np.mean(found))
