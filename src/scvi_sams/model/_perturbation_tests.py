"""Test whether the cells of each perturbation differ from control cells, without the model."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_sams._checks import check_integer, check_key
from scvi_sams._group_tests import group_tests, normal_scores, q_values, without_linear
from scvi_sams.data._contexts import registered_contexts
from scvi_sams.data._field import registered_labels
from scvi_sams.labels._labels import NO_PERTURBATION, Labels
from scvi_sams.model._expression_axes import (
    continuous_covariates,
    principal_features,
    strata_of_cells,
)

if TYPE_CHECKING:
    from scvi_sams.model._screen_model import ScreenModel

logger = logging.getLogger("scvi.sams")

_MOST_CONTROL_LABELS = 200
_CONTROLS_DIFFER = 0.01
"""q-value below which a label of control cells raises a warning."""


def perturbation_tests(
    model: ScreenModel, n_components: int, key_added: str | None
) -> pd.DataFrame:
    """Test each perturbation on the cells of the model, and write the table."""
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
    """Test each perturbation in each context; q-values over all pairs, ``(T, C)``.

    NaN if a context has no cells of the perturbation, or none to compare them with.
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
    """q-values of each label of control cells against all others, if there are several.

    A warning names those that differ, because effects are differences from all of them together.
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
            "cells (lanes, donors, or a guide with an effect): effects are differences from "
            "all control cells together. Remove labels that are not controls, or register the "
            "cause as `batch_key`."
        )
    return tests
