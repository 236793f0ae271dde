"""Registration of a screen: checks before it, and warnings after it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
from anndata import AnnData
from pandas.api.types import is_any_real_numeric_dtype
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
from scvi_sams._compat import FIELD_REGISTRIES_KEY, SETUP_ARGUMENTS_KEY, STATE_REGISTRY_KEY
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams._plurals import counted
from scvi_sams.counts._validation import sums_of_some_cells, validate_expression
from scvi_sams.data._contexts import ContextField
from scvi_sams.data._covariates import check_genes, validate_size_factor
from scvi_sams.data._field import PerturbationField, registered_labels
from scvi_sams.data._guides import GuideField
from scvi_sams.data._manager import ScreenManager
from scvi_sams.exceptions import InvalidArgumentError, RegistrationError
from scvi_sams.labels._control import marks_cells, named_control
from scvi_sams.labels._names import check_has
from scvi_sams.labels._presets import PRESETS, with_preset
from scvi_sams.labels._spelling import control_names
from scvi_sams.model._label_warnings import warn_of_labels, warn_of_unused_controls

logger = logging.getLogger("scvi.sams")

_TOTAL_COUNTS = ("total_counts", "n_counts", "ncount_rna", "n_umi", "numi", "umi_count")
"""Usual names of total counts in lower case: of scanpy, Seurat and others."""
_RATIO_OF_PANEL = 10.0
"""Total counts relative to the sum of the registered genes from which these seem to be a panel."""


def check_setup(further: dict[str, Any], **keys: object) -> None:
    """Raise if ``setup_anndata`` was given unknown arguments, or invalid keys.

    ``further`` are arguments beyond its signature, which only scvi-tools passes, with a source.
    """
    if further and "source_registry" not in further:
        raise InvalidArgumentError(
            f"setup_anndata has no arguments {sorted(further)}. Labels are `perturbation_key`; "
            "other columns are `batch_key`, `categorical_covariate_keys` and "
            "`continuous_covariate_keys`."
        )
    check_key(**keys)


def setup_arguments(adata: object, given: dict[str, Any], *, is_new: bool) -> dict[str, Any]:
    """Return the arguments of ``setup_anndata`` as stored with the model.

    Presets and marks of control cells are replaced by their values, and lists are copied, because
    the caller may change them later. ``is_new`` is false if a model is loaded: its arguments are
    already in this form.
    """
    check_anndata(RegistrationError, adata=adata)
    preset = given["preset"]
    arguments = with_preset(preset, {name: v for name, v in given.items() if name != "preset"})
    for name in ("categorical_covariate_keys", "continuous_covariate_keys"):
        arguments[name] = as_keys(name, arguments[name])
    if is_new:
        if preset is not None:
            _check_preset(adata, preset, arguments)
        arguments["control"] = _control_of(adata, arguments)
    return deepcopy(arguments)


def _check_preset(adata: AnnData, preset: str, arguments: dict[str, Any]) -> None:
    key = arguments["perturbation_key"]
    if arguments["dosage_obsm_key"] is None and key == PRESETS[preset].perturbation_key:
        check_has(
            f"preset={preset!r} reads labels from a column that adata.obs lacks:",
            [key],
            adata.obs.columns,
            " Pass the column as `perturbation_key`, or another preset.",
        )


def _control_of(adata: AnnData, arguments: dict[str, Any]) -> Any:
    """Return the control labels, unchanged if they are one label or a list."""
    control, key = arguments["control"], arguments["perturbation_key"]
    if arguments["dosage_obsm_key"] is not None:
        if marks_cells(control, adata.n_obs):
            raise InvalidArgumentError(
                "`control` marks cells, but `dosage_obsm_key` already defines controls as rows of "
                "zeros. Omit `control`, or name columns of controls."
            )
    elif isinstance(key, str) and (adata.obs.columns == key).sum() == 1:
        control = named_control(control, adata.obs[key], adata.obs)
    return control if isinstance(control, str | int) else list(control_names(control))


def register(
    adata: AnnData,
    setup_method_args: dict[str, Any],
    additive: bool,
    has_contexts: bool,
    **source: Any,
) -> ScreenManager:
    """Register a screen by the arguments of ``setup_anndata``, and log a summary.

    Whether combinations are sums (``additive``) and effects may differ between contexts
    (``has_contexts``) depends on the model.
    """
    is_new = "source_registry" not in source
    given = setup_arguments(adata, setup_method_args[SETUP_ARGUMENTS_KEY], is_new=is_new)
    setup_method_args = setup_method_args | {SETUP_ARGUMENTS_KEY: given}
    check_key(perturbation_key=given["perturbation_key"])
    if given["context_key"] is not None:
        _check_contexts(given, has_contexts)
    labels = ("control", "delimiter", "dosage_key", "dosage_obsm_key", "perturbation_names")
    perturbations = PerturbationField(
        perturbation_key=None if given["dosage_obsm_key"] else given["perturbation_key"],
        additive=additive,
        **{name: given[name] for name in labels},
    )
    fields = [
        perturbations,
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
    if given["guide_key"] is not None:
        fields.append(GuideField(given["guide_key"], perturbations))
    if given["context_key"] is not None:
        fields.append(ContextField(given["context_key"], perturbations))
    manager = ScreenManager(fields=fields, setup_method_args=setup_method_args)
    manager.register_fields(adata, **source)
    logger.info(_registration_summary(manager))
    if is_new:
        _warn_of_shared_memory(manager)
        _warn_of_panel(adata, given)
        registered = registered_labels(manager)
        warn_of_labels(registered)
        if given["dosage_obsm_key"] is None:
            columns = (given["perturbation_key"], given["guide_key"])
            texts = (adata.obs[key].dropna().unique() if key else () for key in columns)
            warn_of_unused_controls(registered.spelling, *(list(map(str, some)) for some in texts))
    return manager


def _check_contexts(given: Mapping[str, Any], has_contexts: bool) -> None:
    """Raise if the model has no contexts, or the column is that of perturbations."""
    key = given["context_key"]
    check_key(context_key=key)
    if not has_contexts:
        raise InvalidArgumentError(
            "`context_key` is for models in which effects may differ between contexts "
            f"(SAMSVAE). Use that, or register {key!r} in `categorical_covariate_keys`, "
            "which encoder and decoder condition on."
        )
    of_labels = [] if given["dosage_obsm_key"] else ["perturbation_key", "dosage_key"]
    for argument in (*of_labels, "guide_key"):
        if given[argument] == key:
            raise InvalidArgumentError(
                f"`context_key` and `{argument}` are the same column, {key!r}. A context is where "
                "cells were perturbed (cell type, donor, line), not the perturbation. Pass another "
                "column, or omit `context_key`."
            )


def release_other_data(managers: dict[str, Any], own: AnnDataManager | None) -> None:
    """Keep only a model's own data alive; drop the managers of data that no longer exist."""
    for uuid, manager in list(managers.items()):
        if manager is not own:
            manager.release_adata()
        if manager.adata is None:
            del managers[uuid]


def check_registered(
    model_class: type[BaseModelClass], adata: object, registry: dict[str, Any] | None
) -> None:
    """Raise if a model is made from neither a registered AnnData nor a registry."""
    if adata is None and registry:
        return
    check_anndata(RegistrationError, adata=adata)
    if model_class._get_most_recent_anndata_manager(adata) is None:
        raise RegistrationError(
            f"`adata` is not registered. Register its labels first: {model_class.__name__}."
            "setup_anndata(adata, perturbation_key=..., control=...)."
        )


def data_to_read(model: BaseModelClass, adata: AnnData | None) -> AnnData:
    """Return the cells to read in a method: those passed, or a model's own.

    The model's own must be unchanged; others must have its genes.
    """
    target = model.adata if adata is None else adata
    if target is None:
        raise RegistrationError(
            "The model was loaded without cells. Pass `adata`: cells with the same genes."
        )
    check_anndata(RegistrationError, adata=target)
    # anndata cannot copy a view of a file.
    target = target.to_memory() if target.is_view and target.isbacked else target
    if target is model.adata:
        model._values.check_unchanged(model.adata_manager)
    else:
        check_genes(target, model.get_var_names())
        own_managers = model._per_instance_manager_store.get(model.id, {})
        model._values.forget_if_changed(own_managers, target)
    if target.is_view and model.adata_manager is not None:
        # scvi-tools copies a view before it reads anything.
        model.adata_manager.check_fields(target, model.adata_manager.registry)
        model._values.validate(target)
    return target


def validate_values(adata: AnnData, given: dict[str, Any], *, counts: bool) -> None:
    """Raise if expression or size factors do not fit their registration."""
    values, location = registered_values(adata, given)
    others = [name for name in adata.layers if name != given["layer"]]
    validate_expression(values, counts=counts, location=location, layers=others)
    if given["size_factor_key"] is not None:
        validate_size_factor(adata.obs[given["size_factor_key"]])


def registered_values(adata: AnnData, given: Mapping[str, Any]) -> tuple[Any, str]:
    """Return the registered expression, unchanged, and its slot."""
    layer = given["layer"]
    if layer is None:
        return adata.X, "adata.X"
    return adata.layers.get(layer), f"adata.layers[{layer!r}]"


def learned_state(registry: dict[str, Any], key: str) -> dict[str, Any]:
    """State of a field from registration; empty if it was not registered."""
    return registry[FIELD_REGISTRIES_KEY].get(key, {}).get(STATE_REGISTRY_KEY, {})


def sizes_for_module(registry: dict[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of the registered data, as arguments of the module."""
    categorical = learned_state(registry, REGISTRY_KEYS.CATEGORICAL_COVARIATES)
    guides = learned_state(registry, REGISTRY_KEYS.GUIDES)
    contexts = learned_state(registry, REGISTRY_KEYS.CONTEXTS)
    # Modules of models without contexts do not have these arguments.
    of_contexts: dict[str, Any] = {}
    if contexts:
        of_contexts["n_contexts"] = len(contexts[ContextField.LEVELS_KEY])
        of_contexts["pairs_of_contexts"] = np.asarray(contexts[ContextField.PAIRS_KEY]).tolist()
    return {
        "n_genes": summary["n_vars"],
        "n_perturbations": summary["n_perturbations"],
        "n_batch": summary["n_batch"],
        "n_categories": list(categorical.get("n_cats_per_key", [])),
        "n_continuous": summary.get("n_extra_continuous_covs", 0),
        "uses_size_factor": registry[SETUP_ARGUMENTS_KEY]["size_factor_key"] is not None,
        "perturbation_of_guides": list(guides.get(GuideField.PERTURBATION_KEY, ())),
        **of_contexts,
    }


def as_keys(argument: str, keys: object) -> list[str] | None:
    """Return one or several keys as a list, as scvi-tools compares them."""
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
        f"Registered {counted(manager.summary_stats.n_cells, 'cell')} x "
        f"{counted(manager.summary_stats.n_vars, 'gene')}: {counted(len(counts), 'perturbation')} "
        f"({counts.min()} / {int(np.median(counts))} / {counts.max()} cells min / median / max), "
        f"{counted(state[PerturbationField.N_COMBINATIONS_KEY], 'combination')}, "
        f"{counted(state[PerturbationField.N_CONTROL_KEY], 'control cell')}."
    )


def _warn_of_shared_memory(manager: AnnDataManager) -> None:
    """Log a warning if the layer that is registered changes with ``X``."""
    layer = manager.registry[SETUP_ARGUMENTS_KEY]["layer"]
    if layer is not None and _share_memory(manager.adata.X, manager.adata.layers[layer]):
        logger.warning(
            f"adata.layers[{layer!r}] and adata.X are the same array: normalising one in place "
            f"changes the other. Make it a copy: adata.layers[{layer!r}] = adata.X.copy()."
        )


def _warn_of_panel(adata: AnnData, given: Mapping[str, Any]) -> None:
    """Log a warning if a column has total counts that the registered genes are a small part of."""
    if given["size_factor_key"] is not None:
        return
    columns = {
        str(name): adata.obs.iloc[:, place]
        for place, name in enumerate(adata.obs.columns)
        if str(name).lower() in _TOTAL_COUNTS
        and is_any_real_numeric_dtype(adata.obs.dtypes.iloc[place])
    }
    sums = sums_of_some_cells(*registered_values(adata, given)) if columns else None
    if sums is None:  # usual, or values that are not counts: for the normal likelihood, or invalid
        return
    of_genes = float(np.median(sums))
    for name, column in columns.items():
        total = float(column.median()) if column.notna().any() else 0.0
        if total >= _RATIO_OF_PANEL * of_genes:
            logger.warning(
                f"The registered genes seem to be a panel: the median of adata.obs[{name!r}] is "
                f"{total:,.0f}, and that of the sums over {counted(adata.n_vars, 'gene')} about "
                f"{of_genes:,.0f}. Without a size factor that sum is the size of a cell, so that "
                "changes of some genes look like opposite changes of all others. Register the "
                f"total counts: size_factor_key={name!r}."
            )
            return


def _share_memory(first: Any, second: Any) -> bool:
    """Whether two matrices share memory."""
    first, second = (values.data if issparse(values) else values for values in (first, second))
    are_arrays = isinstance(first, np.ndarray) and isinstance(second, np.ndarray)
    return are_arrays and np.may_share_memory(first, second)
