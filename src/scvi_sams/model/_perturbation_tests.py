"""Whether the cells of each perturbation differ from control cells, told without the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse
from scvi.data import AnnDataManager

from scvi_sams._checks import check_integer, check_key
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams._group_tests import group_tests, normal_scores, q_values
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
    strata = _strata(manager)
    cells = _LoggedCells(manager, strata, counts=model.module.likelihood.is_count_likelihood)
    features = _without(cells.principal_features(n_components), _continuous(manager))
    features = normal_scores(features)
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


class _LoggedCells:
    """Log-normalised expression less the mean of its stratum, read in blocks of cells."""

    def __init__(self, manager: AnnDataManager, strata: np.ndarray, *, counts: bool) -> None:
        self.manager = manager
        self.strata = strata
        self.counts = counts
        n = np.bincount(strata).astype(float)[:, None]
        self.typical_size = 1.0
        if counts:
            sizes = [size for _, size in chunks_of_cells(manager, np.arange(len(strata)))]
            self.typical_size = float(np.median(np.concatenate(sizes)))
        total = np.zeros((len(n), manager.adata.n_vars))
        squares = np.zeros(manager.adata.n_vars)
        for rows, logged in self._blocks(np.arange(len(strata))):
            of_stratum = sparse.csr_array(
                (np.ones(len(rows)), (strata[rows], np.arange(len(rows)))), (len(n), len(rows))
            )
            total += (of_stratum @ logged).toarray()
            squares += np.asarray(logged.multiply(logged).sum(axis=0)).ravel()
        mean = total / np.maximum(n, 1)
        variance = (squares - (n * np.square(mean)).sum(axis=0)) / len(strata)
        most_variable = np.argsort(-variance, kind="stable")[:_MOST_GENES]
        self.genes = np.sort(most_variable[variance[most_variable] > 1e-8])
        self.mean, self.sd = mean[:, self.genes], np.sqrt(variance[self.genes])

    def principal_features(self, n_components: int) -> np.ndarray:
        """Projections of all cells on the axes in which they vary most, ``(n_cells, k)``."""
        n_cells, n_genes = len(self.strata), len(self.genes)
        chosen = np.arange(n_cells)
        if n_cells > _MOST_CELLS:
            rng = np.random.default_rng(_SEED)
            chosen = np.sort(rng.choice(n_cells, _MOST_CELLS, replace=False))
        products = np.zeros((n_genes, n_genes))
        for values in self._standardised(chosen):
            products += values.T @ values
        _, axes = np.linalg.eigh(products)
        axes = axes[:, ::-1][:, :n_components]
        blocks = [values @ axes for values in self._standardised(np.arange(n_cells))]
        return np.concatenate(blocks)

    def _standardised(self, cells: np.ndarray) -> Iterator[np.ndarray]:
        for rows, logged in self._blocks(cells):
            yield (logged[:, self.genes].toarray() - self.mean[self.strata[rows]]) / self.sd

    def _blocks(self, cells: np.ndarray) -> Iterator[tuple[np.ndarray, sparse.csr_array]]:
        start = 0
        for x, size in chunks_of_cells(self.manager, cells):
            rows = cells[start : start + x.shape[0]]
            start += len(rows)
            scaled = sparse.csr_array(x)
            if self.counts:
                scaled = (sparse.diags_array(self.typical_size / size) @ scaled).log1p()
            yield rows, sparse.csr_array(scaled)


def _strata(manager: AnnDataManager) -> np.ndarray:
    """Number of each cell's combination of batch and categories."""
    columns = [np.asarray(manager.get_from_registry(REGISTRY_KEYS.BATCH)).reshape(-1, 1)]
    if REGISTRY_KEYS.CATEGORICAL_COVARIATES in manager.data_registry:
        columns.append(np.asarray(manager.get_from_registry(REGISTRY_KEYS.CATEGORICAL_COVARIATES)))
    table = np.concatenate(columns, axis=1).astype(np.int64)
    return np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)


def _continuous(manager: AnnDataManager) -> np.ndarray | None:
    if REGISTRY_KEYS.CONTINUOUS_COVARIATES not in manager.data_registry:
        return None
    return np.asarray(manager.get_from_registry(REGISTRY_KEYS.CONTINUOUS_COVARIATES), dtype=float)


def _without(features: np.ndarray, covariates: np.ndarray | None) -> np.ndarray:
    """What is left of features after a linear regression on covariates."""
    if covariates is None:
        return features
    design = np.column_stack([np.ones(len(features)), covariates])
    return features - design @ np.linalg.lstsq(design, features, rcond=None)[0]
