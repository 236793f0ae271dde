"""Registration that is checked first, and can be repeated without learning anything new."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scvi.data import AnnDataManager

from scvi_sams._checks import check_anndata
from scvi_sams._compat import (
    FIELD_REGISTRIES_KEY,
    MANAGER_UUID_KEY,
    SETUP_ARGUMENTS_KEY,
    STATE_REGISTRY_KEY,
)
from scvi_sams._constants import REGISTERED_LEVELS, REGISTRY_KEYS
from scvi_sams.counts._validation import unchanged_on_error
from scvi_sams.data._contexts import context_field, tell_of_contexts
from scvi_sams.data._covariates import (
    check_genes,
    check_keys_exist,
    numbers_of,
    validate_categories,
    validate_covariate,
    validate_table,
)
from scvi_sams.data._field import perturbation_field
from scvi_sams.data._fingerprint import changed_parts, registered_parts
from scvi_sams.data._guides import guide_field, tell_of_guides
from scvi_sams.exceptions import RegistrationError

ADATA_LOCK = threading.RLock()
"""Held while slots of an AnnData are written, or read: two models in two threads that share an
AnnData could otherwise read what the other has just registered."""


class ScreenManager(AnnDataManager):
    """An :class:`~scvi.data.AnnDataManager` that registers an AnnData for one model.

    Everything to register is checked before anything is written. scvi-tools stores the codes of the
    last registration in the AnnData. If that was another model's, :meth:`validate`, with which
    methods of a model begin, registers this one again, with the categories learned the first time;
    :meth:`get_from_registry` reads as if it were registered, and writes nothing.

    scvi-tools keeps managers until the process ends. Models call :meth:`release_adata` for data
    that was passed to a method.
    """

    _learned: dict | None = None
    _registered: Mapping[str, str]
    """Digests of the data when first read."""
    _adata: Callable[[], AnnData | None] = staticmethod(lambda: None)

    @property
    def adata(self) -> AnnData | None:
        """Registered AnnData; ``None`` before, and once nothing else refers to it."""
        return self._adata()

    @adata.setter
    def adata(self, adata: AnnData | None) -> None:
        self._adata = lambda: adata

    def release_adata(self) -> None:
        """Stop keeping the AnnData alive."""
        if self.adata is not None:
            self._adata = weakref.ref(self.adata)

    def __getstate__(self) -> dict[str, Any]:
        """State with the AnnData itself: in another process nothing else refers to it."""
        return {**vars(self), "_adata": self.adata}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.adata = state["_adata"]

    def register_fields(
        self, adata: AnnData, source_registry: dict | None = None, **transfer_kwargs: Any
    ) -> None:
        """Register all fields, or none: if one cannot be read the AnnData is unchanged.

        ``source_registry`` is that of the training data, whose categories are used; ``None`` learns
        them.
        """
        with ADATA_LOCK:
            self._register_fields(adata, source_registry, **transfer_kwargs)

    def _register_fields(
        self, adata: AnnData, source_registry: dict | None, **transfer_kwargs: Any
    ) -> None:
        source = self._learned or source_registry
        check_anndata(RegistrationError, adata=adata)
        if adata.is_view:
            # A view of a file opened by anndata cannot be copied in memory.
            copy = "adata.to_memory()" if adata.isbacked else "adata.copy()"
            raise RegistrationError(f"A view cannot be registered. Pass a copy: {copy}.")
        if source_registry is not None and self._learned is None:
            genes = _state_of(source_registry, REGISTRY_KEYS.X)["column_names"]
            # Renaming all genes, such as identifiers to symbols, is left to the user.
            if adata.n_vars != len(genes) or adata.var_names.isin(genes).any():
                check_genes(adata, genes)
        self.check_fields(adata, source)
        with unchanged_on_error(adata):
            super().register_fields(adata, source, **transfer_kwargs)
            self._tell_levels(adata)
        if self._learned is None:
            self._learned = deepcopy(self.registry)
            self._registered = self._parts(adata)
            tell_of_guides(self)
            tell_of_contexts(self, learned=source_registry is None)

    def _tell_levels(self, adata: AnnData) -> None:
        """Store covariates of the model, so that observed effects can record their levels."""
        arguments = self.registry[SETUP_ARGUMENTS_KEY]
        keys = [arguments["batch_key"], *(arguments["categorical_covariate_keys"] or [])]
        adata.uns.pop(REGISTERED_LEVELS, None)
        if any(key is not None for key in keys):
            named = [key for key in keys if key is not None]
            adata.uns[REGISTERED_LEVELS] = np.array(named, dtype=str)

    def changes(self) -> list[str]:
        """Name the genes, labels, doses and covariates that changed since registration."""
        return changed_parts(self._registered, self._parts(self.adata))

    def check_as_learned(self) -> None:
        """Raise if genes or fields can no longer be registered as they were."""
        if self._learned is not None:
            genes = _state_of(self._learned, REGISTRY_KEYS.X)["column_names"]
            check_genes(self.adata, genes, advice="")
            self.check_fields(self.adata, self._learned)

    def _parts(self, adata: AnnData) -> dict[str, str]:
        return registered_parts(adata, self.registry[SETUP_ARGUMENTS_KEY])

    def validate(self) -> None:
        """Register again if another model registered the AnnData since."""
        adata = self.adata
        with ADATA_LOCK:
            try:
                if adata is not None:
                    adata.uns.setdefault(MANAGER_UUID_KEY, "")
                super().validate()
            finally:
                # scvi-tools drops the AnnData if it cannot register it again.
                self.adata = adata

    def get_from_registry(self, registry_key: str) -> np.ndarray | pd.DataFrame:
        """Return the data registered under a key, whichever model registered the AnnData last.

        Numeric columns are returned as numbers, whatever their type in the AnnData.
        """
        with ADATA_LOCK:
            values = self._as_registered(registry_key)
        if registry_key == REGISTRY_KEYS.SIZE_FACTOR:
            return numbers_of(pd.Series(values.ravel())).reshape(values.shape)
        if registry_key == REGISTRY_KEYS.CONTINUOUS_COVARIATES:
            return values.apply(numbers_of)
        return values

    def _as_registered(self, registry_key: str) -> Any:
        adata, source = self.adata, self._learned
        field = next(field for field in self.fields if field.registry_key == registry_key)
        is_overwritten = str(field.attr_key).startswith("_scvi_") and (
            adata is not None and adata.uns.get(MANAGER_UUID_KEY) != self.id
        )
        if adata is None or source is None or not is_overwritten:
            return super().get_from_registry(registry_key)
        self.check_fields(adata, source)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Observation names are not unique")
            labels_only = AnnData(obs=adata.obs, obsm=dict(adata.obsm), uns=dict(adata.uns))
        field.transfer_field(_state_of(source, registry_key), labels_only)
        return field.get_field_data(labels_only)

    def check_fields(self, adata: AnnData, source_registry: dict | None) -> None:
        """Raise, naming values, if a field cannot be registered; nothing is written.

        ``adata`` may be a view; ``source_registry`` is as for :meth:`register_fields`.
        """
        arguments = self.registry[SETUP_ARGUMENTS_KEY]
        batch_key, size_factor_key = arguments["batch_key"], arguments["size_factor_key"]
        continuous = arguments["continuous_covariate_keys"] or []
        categorical = arguments["categorical_covariate_keys"] or []
        columns = [batch_key, size_factor_key, *categorical, *continuous]
        check_keys_exist(adata, layers=[arguments["layer"]], obs=columns)
        if source_registry is None:
            of_cells = ("perturbation_key", "dosage_key", "guide_key", "context_key")
            validate_table(adata, [*(arguments[key] for key in of_cells), *columns])
        if batch_key:
            known = _state_of(source_registry, REGISTRY_KEYS.BATCH).get("categorical_mapping")
            validate_categories(adata.obs[batch_key], known, "batch_key")
        mappings = _state_of(source_registry, REGISTRY_KEYS.CATEGORICAL_COVARIATES).get("mappings")
        for key in categorical:
            known = None if mappings is None else mappings.get(key)
            validate_categories(adata.obs[key], known, "categorical_covariate_keys")
        for key in continuous:
            validate_covariate(adata.obs[key])
        if size_factor_key:
            numbers_of(adata.obs[size_factor_key])
        if source_registry is not None:
            state = _state_of(source_registry, REGISTRY_KEYS.PERTURBATIONS)
            perturbation_field(self).encode(adata, state)
            guides = guide_field(self)
            if guides is not None:
                guides.find(adata, _state_of(source_registry, REGISTRY_KEYS.GUIDES))
            contexts = context_field(self)
            if contexts is not None:
                contexts.find(adata, _state_of(source_registry, REGISTRY_KEYS.CONTEXTS))


def _state_of(registry: dict | None, registry_key: str) -> Mapping[str, Any]:
    """Return what a field learned from the training data; empty if nothing was learned yet."""
    if registry is None:
        return {}
    fields = registry[FIELD_REGISTRIES_KEY]
    return fields.get(registry_key, {}).get(STATE_REGISTRY_KEY, {})
