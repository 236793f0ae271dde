"""Whether the cells of each perturbation differ from control cells, told without the model."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse
from scvi.data import AnnDataManager

from scvi_sams._checks import check_integer, check_key
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams._group_tests import group_tests, normal_scores, q_values, without_linear
from scvi_sams.data._contexts import registered_contexts
from scvi_sams.data._field import registered_labels
from scvi_sams.labels._labels import NO_PERTURBATION, Labels
from scvi_sams.train._statistics import chunks_of_cells

if TYPE_CHECKING:
    from scvi_sams.model._screen_model import ScreenModel

logger = logging.getLogger("scvi.sams")

_MOST_GENES = 2000
"""The most variable; axes of more cost time, and hold no more of what cells share."""
_MOST_CELLS = 20_000
"""From which axes are found; all cells are tested."""
_ROWS_AT_ONCE = 4096
"""That are made dense."""
_SEED = 9173
_MOST_CONTROL_LABELS = 200
_CONTROLS_DIFFER = 0.01
"""q-value below which a label of control cells is warned of."""


def perturbation_tests(
    model: ScreenModel, n_components: int, key_added: str | None
) -> pd.DataFrame:
    """Test each perturbation on the cells that the model was made with, and write the table."""
    check_integer(n_components=n_components)
    check_key(key_added=key_added)
    model._validate_anndata()
    manager = model.adata_manager
    labels = registered_labels(manager)
    features, strata = _features_to_test(model, n_components)
    tests = group_tests(features, labels, strata)
    table = pd.DataFrame(
        {
            "n_cells": tests.n_cells,
            "n_compared": tests.n_compared,
            "statistic": tests.statistic,
            "p_value": tests.p_value,
            "q_value": q_values(tests.p_value),
        },
        index=pd.Index(labels.vocabulary, name="perturbation"),
    )
    key = model._setup_arguments["perturbation_key"]
    if key is not None and model._setup_arguments["dosage_obsm_key"] is None:
        table.attrs["controls"] = _tests_of_controls(
            features, labels, strata, manager.adata.obs[key]
        )
    if key_added is not None and model.adata is not None:
        model.adata.uns[key_added] = table.copy()
        model.keep_provenance(model.adata, key_added)
    return table


def q_values_of_pairs(model: ScreenModel, n_components: int) -> np.ndarray:
    """Test each perturbation in each context, on the cells there; q-values over all, ``(T, C)``.

    NaN where a context has no cells of the perturbation, or none to compare them with.
    """
    model._validate_anndata()
    labels = registered_labels(model.adata_manager)
    contexts = registered_contexts(model.adata_manager)
    if contexts is None:
        return np.empty((len(labels.vocabulary), 0))
    n_contexts = len(contexts.levels)
    of_cell = contexts.codes[:, None]
    is_pair = (labels.codes != NO_PERTURBATION) & (of_cell < n_contexts)
    in_contexts = replace(
        labels,
        codes=np.where(is_pair, labels.codes * n_contexts + of_cell, NO_PERTURBATION),
        vocabulary=tuple(
            f"{name} in {level}" for name in labels.vocabulary for level in contexts.levels
        ),
    )
    features, strata = _features_to_test(model, n_components)
    tests = group_tests(features, in_contexts, strata)
    return q_values(tests.p_value).reshape(-1, n_contexts)


def _features_to_test(model: ScreenModel, n_components: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of all cells, and strata in which they are compared."""
    manager = model.adata_manager
    strata = strata_of_cells(manager)
    counts = model.module.likelihood.is_count_likelihood
    features = principal_features(manager, strata, n_components, counts=counts)
    return normal_scores(without_linear(features, continuous_covariates(manager))), strata


def _tests_of_controls(
    features: np.ndarray, labels: Labels, strata: np.ndarray, written: pd.Series
) -> pd.Series:
    """q-values of each label of control cells against all others, where there are several.

    A warning names those that differ: effects are differences from all of them together.
    """
    cells = np.flatnonzero(labels.is_control)
    kinds, names = pd.factorize(written.astype(str).to_numpy()[cells], sort=True)
    q = np.full(len(names), np.nan)
    if 2 <= len(names) <= _MOST_CONTROL_LABELS:
        for kind in range(len(names)):
            is_kind = (kinds == kind)[:, None]
            of_kind = replace(
                labels[cells],
                codes=np.where(is_kind, 0, NO_PERTURBATION),
                doses=is_kind.astype(float),
                vocabulary=(str(names[kind]),),
            )
            q[kind] = group_tests(features[cells], of_kind, strata[cells]).p_value[0]
        q = q_values(q)
    tests = pd.Series(q, index=pd.Index(names, name="control"), name="q_value")
    different = tests.index[tests < _CONTROLS_DIFFER]
    if len(different):
        logger.warning(
            f"Control labels {', '.join(map(repr, different[:5]))} differ from the other control "
            "cells (lanes, donors, or a guide that does something): effects are differences from "
            "all control cells together. Leave those out that are no controls, or register what "
            "they differ by as `batch_key`."
        )
    return tests


def principal_features(
    manager: AnnDataManager, strata: np.ndarray, n_components: int, *, counts: bool
) -> np.ndarray:
    """Project all cells on the axes in which they vary most within strata, ``(n_cells, k)``.

    Axes are those of log-normalised and standardised expression of the most variable genes. The
    cells that they are found from are read once, and all cells once more.
    """
    everything = np.arange(len(strata))
    chosen = everything
    if len(strata) > _MOST_CELLS:
        rng = np.random.default_rng(_SEED)
        chosen = np.sort(rng.choice(len(strata), _MOST_CELLS, replace=False))
    blocks = list(chunks_of_cells(manager, chosen))
    typical_size = (
        float(np.median(np.concatenate([size for _, size in blocks]))) if counts else None
    )
    logged = sparse.csr_array(sparse.vstack([_logged(x, s, typical_size) for x, s in blocks]))
    del blocks
    genes, sd, axes = _axes(logged, indicators(strata[chosen]), n_components)
    loadings = axes / sd[:, None]
    projected = [
        _logged(x, size, typical_size)[:, genes] @ loadings
        for x, size in chunks_of_cells(manager, everything)
    ]
    return centred(np.concatenate(projected), indicators(strata))


def _logged(x: sparse.csr_matrix, size: np.ndarray, typical_size: float | None) -> sparse.csr_array:
    """``log(1 + typical_size * x / size)``; values that are no counts stay as they are."""
    if typical_size is None:
        return sparse.csr_array(x)
    return sparse.csr_array((sparse.diags_array(typical_size / size) @ x).log1p())


def _axes(
    logged: sparse.csr_array, of_stratum: sparse.csr_array, n_components: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Genes, their standard deviations within strata, and principal axes, ``(n_genes, k)``."""
    n = np.asarray(of_stratum.sum(axis=1))
    mean = (of_stratum @ logged).toarray() / n[:, None]
    squares = np.asarray(logged.multiply(logged).sum(axis=0)).ravel()
    variance = (squares - n @ np.square(mean)) / logged.shape[0]
    most_variable = np.argsort(-variance, kind="stable")[:_MOST_GENES]
    genes = np.sort(most_variable[variance[most_variable] > 1e-8])
    sd = np.sqrt(variance[genes])
    of_genes = sparse.csr_array(logged[:, genes])
    products = np.zeros((len(genes), len(genes)))
    for start in range(0, of_genes.shape[0], _ROWS_AT_ONCE):
        values = of_genes[start : start + _ROWS_AT_ONCE].toarray() / sd
        products += values.T @ values
    centres = mean[:, genes] / sd
    _, axes = np.linalg.eigh(products - centres.T @ (n[:, None] * centres))
    return genes, sd, axes[:, ::-1][:, :n_components]


def indicators(strata: np.ndarray) -> sparse.csr_array:
    """1 where a cell is of a stratum, strata that have cells x cells."""
    number, stratum = np.unique(strata, return_inverse=True)
    cells = np.arange(len(strata))
    return sparse.csr_array((np.ones(len(cells)), (stratum, cells)), (len(number), len(cells)))


def centred(features: np.ndarray, of_stratum: sparse.csr_array) -> np.ndarray:
    """Features less their means within strata."""
    means = (of_stratum @ features) / np.asarray(of_stratum.sum(axis=1))[:, None]
    return features - of_stratum.T @ means


def strata_of_cells(manager: AnnDataManager) -> np.ndarray:
    """Number of each cell's combination of batch, categories and context."""
    columns = [np.asarray(manager.get_from_registry(REGISTRY_KEYS.BATCH)).reshape(-1, 1)]
    for key in (REGISTRY_KEYS.CATEGORICAL_COVARIATES, REGISTRY_KEYS.CONTEXTS):
        if key in manager.data_registry:
            columns.append(np.asarray(manager.get_from_registry(key)))
    table = np.concatenate(columns, axis=1).astype(np.int64)
    return np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)


def continuous_covariates(manager: AnnDataManager) -> np.ndarray | None:
    """Registered ones of every cell, ``(n_cells, n)``; ``None`` where there are none."""
    if REGISTRY_KEYS.CONTINUOUS_COVARIATES not in manager.data_registry:
        return None
    return np.asarray(manager.get_from_registry(REGISTRY_KEYS.CONTINUOUS_COVARIATES), dtype=float)
