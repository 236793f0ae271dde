"""Registration of a screen: what is checked before it, and what is said once after it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
from anndata import AnnData
from scipy.sparse import issparse
from scvi.data import AnnDataManager
from scvi.data.fields import (
    CategoricalJointObsField,
    CategoricalObsField,
    LayerField,
    NumericalJointObsField,
    NumericalObsField,
)
from scvi.model.base import BaseModelClass

from scvi_sams._checks import as_list, check_anndata, check_key
from scvi_sams._compat import SETUP_ARGUMENTS_KEY
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.counts._validation import validate_expression
from scvi_sams.data._covariates import validate_size_factor
from scvi_sams.data._field import PerturbationField, registered_labels
from scvi_sams.data._manager import ScreenManager
from scvi_sams.exceptions import InvalidArgumentError, RegistrationError
from scvi_sams.labels._labels import inseparable_perturbations
from scvi_sams.labels._names import similar_names

logger = logging.getLogger("scvi.sams")

_LARGE_DOSE = 100.0
_WORDS_FOR_MISSING = frozenset({"nan", "none", "na", "n/a", "<na>", "null", "unknown"})


def check_setup(further: dict[str, Any], **keys: object) -> None:
    """Raise an error if ``setup_anndata`` was given arguments that it has not, or keys of no kind.

    ``further`` are those beyond its signature, which only scvi-tools passes, with a source.
    """
    if further and "source_registry" not in further:
        raise InvalidArgumentError(
            f"setup_anndata has no arguments {sorted(further)}. Labels are `perturbation_key`; "
            "other columns are `batch_key`, `categorical_covariate_keys` and "
            "`continuous_covariate_keys`."
        )
    check_key(**keys)


def register(
    adata: AnnData, setup_method_args: dict[str, Any], additive: bool, **source: Any
) -> ScreenManager:
    """Register a screen by the arguments of ``setup_anndata``, and say what it holds."""
    given = setup_method_args[SETUP_ARGUMENTS_KEY]
    check_key(perturbation_key=given["perturbation_key"])
    labels = ("control", "delimiter", "dosage_key", "dosage_obsm_key", "perturbation_names")
    fields = [
        PerturbationField(
            perturbation_key=None if given["dosage_obsm_key"] else given["perturbation_key"],
            additive=additive,
            **{name: given[name] for name in labels},
        ),
        LayerField(REGISTRY_KEYS.X, given["layer"], is_count_data=False),
        CategoricalObsField(REGISTRY_KEYS.BATCH, given["batch_key"]),
        NumericalObsField(REGISTRY_KEYS.SIZE_FACTOR, given["size_factor_key"], required=False),
        CategoricalJointObsField(
            REGISTRY_KEYS.CATEGORICAL_COVARIATES, given["categorical_covariate_keys"]
        ),
        NumericalJointObsField(
            REGISTRY_KEYS.CONTINUOUS_COVARIATES, given["continuous_covariate_keys"]
        ),
    ]
    manager = ScreenManager(fields=fields, setup_method_args=setup_method_args)
    manager.register_fields(adata, **source)
    logger.info(_registration_summary(manager))
    if "source_registry" not in source:
        _warn_of_what_is_unusual(manager)
    return manager


def check_registered(
    model_class: type[BaseModelClass], adata: object, registry: dict[str, Any] | None
) -> None:
    """Raise an error if a model is made neither of a registered AnnData nor of a registry."""
    if adata is None and registry:
        return
    check_anndata(RegistrationError, adata=adata)
    if model_class._get_most_recent_anndata_manager(adata) is None:
        raise RegistrationError(
            f"`adata` is not registered. Say what its labels are first: {model_class.__name__}."
            "setup_anndata(adata, perturbation_key=..., control=...)."
        )


def validate_values(adata: AnnData, given: dict[str, Any], *, counts: bool) -> None:
    """Raise an error if expression or size factors cannot be what they are registered as."""
    values, location = registered_values(adata, given)
    validate_expression(values, counts=counts, location=location)
    if given["size_factor_key"] is not None:
        validate_size_factor(adata.obs[given["size_factor_key"]])


def registered_values(adata: AnnData, given: dict[str, Any]) -> tuple[Any, str]:
    """Return the expression that is registered, as it stands, and where that is."""
    layer = given["layer"]
    if layer is None:
        return adata.X, "adata.X"
    return adata.layers.get(layer), f"adata.layers[{layer!r}]"


def as_keys(argument: str, keys: object) -> list[str] | None:
    """Return keys as scvi-tools compares them, one key or several."""
    if keys is None:
        return None
    name = keys.item() if isinstance(keys, np.ndarray) and not keys.ndim else keys
    listed = [name] if isinstance(name, str) else as_list(argument, keys, "names of columns")
    for key in listed:
        check_key(**{argument: key})
    if len(set(listed)) < len(listed):
        raise InvalidArgumentError(f"`{argument}` names a column twice: {listed}.")
    return listed


def _registration_summary(manager: AnnDataManager) -> str:
    state = manager.get_state_registry(REGISTRY_KEYS.PERTURBATIONS)
    counts = state[PerturbationField.CELLS_PER_PERTURBATION_KEY]
    return (
        f"Registered {manager.summary_stats.n_cells:,} cells x {manager.summary_stats.n_vars:,} "
        f"genes: {len(counts):,} perturbations ({counts.min()} / {int(np.median(counts))} / "
        f"{counts.max()} cells min / median / max), "
        f"{state[PerturbationField.N_COMBINATIONS_KEY]:,} combinations, "
        f"{state[PerturbationField.N_CONTROL_KEY]:,} control cells."
    )


def _warn_of_what_is_unusual(manager: AnnDataManager) -> None:
    """Log a warning for each thing in the training data that is often a mistake.

    Counts that share memory with ``X``, large doses, names that differ only by case, names that are
    words for a missing value, and perturbations that occur only together.
    """
    layer = manager.registry[SETUP_ARGUMENTS_KEY]["layer"]
    if layer is not None and _share_memory(manager.adata.X, manager.adata.layers[layer]):
        logger.warning(
            f"adata.layers[{layer!r}] and adata.X are one array: what normalises one in place "
            f"changes the other. Make it a copy: adata.layers[{layer!r}] = adata.X.copy()."
        )
    labels = registered_labels(manager)
    if labels.doses.max() > _LARGE_DOSE:
        logger.warning(
            f"Doses reach {labels.doses.max():g}. Effects are linear in the dose, in units of the "
            "spread of basal states: give doses on a scale on which that is plausible, of order "
            "one (such as the logarithm, or a share of the highest dose)."
        )
    similar = similar_names([*labels.spelling.control, *labels.vocabulary])
    if similar:
        logger.warning(
            f"{len(similar)} names differ only by case or encoding and count as different: "
            f"{_listed(similar)}. If they are the same perturbation, or control, give them one "
            "name."
        )
    missing = [name for name in labels.vocabulary if name.casefold() in _WORDS_FOR_MISSING]
    if missing:
        logger.warning(
            f"Cells are labelled {', '.join(map(repr, missing))}, which counts as a perturbation. "
            "If it stands for a missing label, drop these cells."
        )
    together = inseparable_perturbations(labels.codes, labels.vocabulary)
    if together:
        logger.warning(
            f"{len(together)} groups of perturbations occur only together, and no cell tells their "
            f"effects apart: {_listed(together)}. If such a group is one name that contains the "
            "delimiter, pass another `delimiter`, or None to never split."
        )


def _share_memory(first: Any, second: Any) -> bool:
    """Whether two matrices in memory are the same numbers in the same place."""
    first, second = (values.data if issparse(values) else values for values in (first, second))
    are_arrays = isinstance(first, np.ndarray) and isinstance(second, np.ndarray)
    return are_arrays and np.may_share_memory(first, second)


def _listed(groups: Iterable[list[str]]) -> str:
    shown = list(groups)
    return "; ".join(" and ".join(map(repr, group)) for group in shown[:5]) + (
        "; ..." if len(shown) > 5 else ""
    )
