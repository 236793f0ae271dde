"""A check of the complete analysis: perturbations without effects, hidden among the others."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scipy.stats import binom

from scvi_sams._checks import check_integer, check_number
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams._fdr import active_at_fdr
from scvi_sams._plurals import counted
from scvi_sams._torch import global_seed
from scvi_sams.counts._block_reader import BlockReader, is_on_disk
from scvi_sams.data._field import registered_labels
from scvi_sams.exceptions import InvalidArgumentError, RegistrationError
from scvi_sams.interpretation._calls import called_masks
from scvi_sams.labels._labels import NO_PERTURBATION, Labels
from scvi_sams.model._expression_axes import strata_of_cells

if TYPE_CHECKING:
    from scvi_sams.model._mechanisms import MaskMixin

logger = logging.getLogger("scvi.sams")

_DOSES = "doses"
_LARGEST_SHARE = 0.5
"""Proportion of control cells that may become decoys; effects are measured against the others."""
_NOT_REPEATED = ("checkpoint_path",)
_ONLY_NAMED = ("callbacks", "logger")
"""Objects, whose names alone are recorded."""
_TOO_MANY = 0.1
"""Warn if the probability of at least as many called decoys is below this."""


def decoy_check(
    model: MaskMixin,
    *,
    n_decoys: int = 8,
    n_cells: int | None = None,
    fdr: float = 0.05,
    seed: int = 0,
    train_kwargs: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Hide perturbations without effects in the screen, train again, and count how many are called.

    Random control cells get the labels of perturbations that do not exist. A model with the same
    settings is trained on all cells, including decoys. Calls of decoys are false, whatever the
    reason: the model, its training, or this screen. The model and its data are unchanged.

    Parameters
    ----------
    model
        Model with masks whose settings, registration and last training are repeated.
    n_decoys
        Number of decoys. They take up to half of the control cells.
    n_cells
        Number of control cells per decoy, from all batches and categorical covariates in
        proportion; ``None``: as many as the median perturbation has, or as half of the control
        cells allow.
    fdr
        False discovery rate of calls.
    seed
        Seed of the choice of cells, and of training.
    train_kwargs
        Arguments of ``train``, instead of those recorded for the last training of the model.
        (Callbacks and loggers are not repeated.)

    Returns
    -------
    One row per decoy: ``n_cells``, ``q_value`` of the test that its cells differ, and the number of
    mask entries called by masks alone (``by_masks``) and by masks and test (``called``,
    :func:`called_masks`). The proportions of decoys with a call are logged.

    Raises
    ------
    InvalidArgumentError
        If there are fewer than two control cells for each decoy, or decoys would take more than
        half of the control cells.
    RegistrationError
        If the model was loaded without its data.

    Examples
    --------
    >>> checked = scvi_sams.tl.decoy_check(model, n_decoys=2, n_cells=20)
    >>> checked.columns.tolist()
    ['n_cells', 'q_value', 'by_masks', 'called']
    """
    check_integer(n_decoys=n_decoys)
    check_integer(at_least=0, seed=seed)
    check_number(fdr=fdr, above=0, below=1)
    if model.adata is None:
        raise RegistrationError("The model was loaded without its data, which decoys are made of.")
    model._validate_anndata()
    labels = registered_labels(model.adata_manager)
    n_cells = _cells_per_decoy(labels, n_decoys, n_cells)
    decoy_of_cell = _choose(labels, strata_of_cells(model.adata_manager), n_decoys, n_cells, seed)
    names = _new_names(labels, n_decoys)
    with global_seed(seed):
        trained = _trained(model, _with_decoys(model, labels, decoy_of_cell, names), train_kwargs)
    masks = trained.get_perturbation_masks(key_added=None)
    tests = trained.test_perturbations(key_added=None)
    called = called_masks(trained, fdr=fdr, masks=masks, tests=tests)
    table = pd.DataFrame(
        {
            "n_cells": n_cells,
            "q_value": tests.loc[names, "q_value"],
            "by_masks": active_at_fdr(masks, fdr).loc[names].sum(axis=1),
            "called": called.loc[names].sum(axis=1),
        },
        index=pd.Index(names, name="decoy"),
    )
    _report(table, fdr)
    return table


def _cells_per_decoy(labels: Labels, n_decoys: int, n_cells: int | None) -> int:
    n_controls = int(labels.is_control.sum())
    most = int(n_controls * _LARGEST_SHARE) // n_decoys
    if n_cells is None:
        carried = labels.codes[labels.codes != NO_PERTURBATION]
        n_cells = min(int(np.median(np.bincount(carried))), most)
    else:
        check_integer(n_cells=n_cells)
    if not 2 <= n_cells <= most:
        raise InvalidArgumentError(
            f"{counted(n_decoys, 'decoy')} of {counted(n_cells, 'cell')} cannot be made from "
            f"{counted(n_controls, 'control cell')}: each needs at least two, and half of the "
            "control cells must remain. Pass smaller `n_decoys` or `n_cells`."
        )
    return n_cells


def _choose(
    labels: Labels, strata: np.ndarray, n_decoys: int, n_cells: int, seed: int
) -> np.ndarray:
    """Number of each cell's decoy, -1 for none, ``(n_cells,)``; in proportion to strata."""
    rng = np.random.default_rng(seed)
    controls = np.flatnonzero(labels.is_control)
    controls = rng.permutation(controls)
    place = pd.Series(strata[controls])
    rank = (place.groupby(place).cumcount() + rng.random(len(place))) / place.map(
        place.value_counts()
    )
    chosen = controls[np.argsort(rank.to_numpy(), kind="stable")[: n_decoys * n_cells]]
    decoy_of_cell = np.full(len(labels), -1)
    decoy_of_cell[chosen] = np.arange(len(chosen)) % n_decoys
    return decoy_of_cell


def _new_names(labels: Labels, n_decoys: int) -> list[str]:
    known = {*labels.vocabulary, *labels.spelling.control}
    names = (f"decoy{number}" for number in count(1))
    return list(islice((name for name in names if name not in known), n_decoys))


def _with_decoys(
    model: MaskMixin, labels: Labels, decoy_of_cell: np.ndarray, names: list[str]
) -> AnnData:
    """Register cells in which decoys are perturbations in addition to all others."""
    cells, slots = np.nonzero(labels.codes != NO_PERTURBATION)
    doses = labels.doses[cells, slots]
    decoys = np.flatnonzero(decoy_of_cell >= 0)
    n_known = len(labels.vocabulary)
    matrix = sparse.csr_matrix(
        (
            np.concatenate([doses, np.full(len(decoys), np.median(doses))]),
            (
                np.concatenate([cells, decoys]),
                np.concatenate([labels.codes[cells, slots], n_known + decoy_of_cell[decoys]]),
            ),
        ),
        shape=(len(labels), n_known + len(names)),
    )
    manager = model.adata_manager
    x = manager.get_from_registry(REGISTRY_KEYS.X)
    adata = AnnData(
        BlockReader(x).read(0, len(labels)) if is_on_disk(x) else x,
        obs=_without_guides(manager.adata.obs, model._setup_arguments.get("guide_key"), decoys),
        var=pd.DataFrame(index=manager.adata.var_names),
        obsm={_DOSES: matrix},
    )
    setup = deepcopy(model._setup_arguments) | {
        "perturbation_key": None,
        "dosage_key": None,
        "dosage_obsm_key": _DOSES,
        "perturbation_names": [*labels.vocabulary, *names],
        "control": list(labels.spelling.control),
        "layer": None,
    }
    if not model._additive:  # combinations are perturbations: their names cannot be parsed again
        setup["delimiter"] = None
    type(model).setup_anndata(adata, **setup)
    return adata


def _trained(model: MaskMixin, adata: AnnData, train_kwargs: Mapping[str, Any] | None) -> MaskMixin:
    """Train a model with the settings of another."""
    given = deepcopy(model.init_params_)
    settings = {name: v for name, v in given["non_kwargs"].items() if name != "registry"}
    for further in given["kwargs"].values():
        settings |= further
    if train_kwargs is None:
        recorded = model.trainings_[-1]["settings"] if model.trainings_ else {}
        train_kwargs = {name: v for name, v in recorded.items() if name not in _ONLY_NAMED}
    arguments = {name: v for name, v in train_kwargs.items() if name not in _NOT_REPEATED}
    again = type(model)(adata, **settings)
    again.train(**{"enable_progress_bar": False} | arguments)
    return again


def _report(table: pd.DataFrame, fdr: float) -> None:
    by_masks, called = (int((table[name] > 0).sum()) for name in ("by_masks", "called"))
    text = (
        f"Of {counted(len(table), 'decoy')} of {table['n_cells'].iloc[0]} control cells each, "
        f"{counted(by_masks, 'is', 'are')} called by masks alone and {called} by masks and test, "
        f"at an FDR of {fdr:g}."
    )
    if binom.sf(called - 1, len(table), fdr) < _TOO_MANY:
        logger.warning(
            f"{text} Error rates on this screen are not controlled: control cells may differ among "
            "themselves (register the cause as `batch_key`), or are too few."
        )
    elif binom.sf(by_masks - 1, len(table), fdr) < _TOO_MANY:
        logger.warning(f"{text} Do not use masks without the test (scvi_sams.tl.called_masks).")
    else:
        logger.info(text)


def _without_guides(obs: pd.DataFrame, guide_key: str | None, decoys: np.ndarray) -> pd.DataFrame:
    """Copy of obs in which decoys have no guide: their guides are those of control cells."""
    obs = obs.copy()
    if guide_key in obs:
        guides = obs[guide_key].astype(object)
        guides.iloc[decoys] = np.nan
        obs[guide_key] = guides
    return obs
