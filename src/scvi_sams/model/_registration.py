"""Registration of training data and of other data, with everything checked first."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, ClassVar

import numpy as np
from anndata import AnnData
from scvi.data import AnnDataManager
from scvi.data.fields import (
    CategoricalJointObsField,
    CategoricalObsField,
    LayerField,
    NumericalJointObsField,
    NumericalObsField,
)
from scvi.model.base import BaseModelClass

from scvi_sams._checks import check_anndata, check_key
from scvi_sams._compat import SETUP_ARGUMENTS_KEY
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.counts._validation import unchanged_on_error, validate_expression
from scvi_sams.data._covariates import check_genes, validate_size_factor
from scvi_sams.data._field import PerturbationField
from scvi_sams.data._manager import ScreenManager
from scvi_sams.exceptions import InvalidArgumentError, RegistrationError
from scvi_sams.model._registration_warnings import warn_of_what_is_unusual

logger = logging.getLogger("scvi.sams")


class RegistrationMixin(BaseModelClass):
    """Adds ``setup_anndata``, and checks of data that is passed to a trained model."""

    _additive: ClassVar[bool] = True
    """Whether a combination is the sum of its perturbations, or a perturbation of its own."""
    gene_likelihood: str
    _checked: set[str]
    """Managers of data whose values were checked already."""

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        perturbation_key: str | None = "perturbation",
        control: str | int | Sequence[str | int] = "control",
        *,
        delimiter: str | None = "+",
        dosage_key: str | None = None,
        dosage_obsm_key: str | None = None,
        perturbation_names: Sequence[str] | str | None = None,
        layer: str | None = None,
        batch_key: str | None = None,
        categorical_covariate_keys: Sequence[str] | None = None,
        continuous_covariate_keys: Sequence[str] | None = None,
        size_factor_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Register a screen.

        Parameters
        ----------
        adata
            Cells x genes. Nothing in it is changed but slots that begin with ``_scvi``.
        perturbation_key
            Column of obs that names the perturbations of each cell, such as ``"KLF1"`` or
            ``"KLF1+MAP2K6"``; the order of names plays no part.
        control
            Label, or labels, of control cells. Inside a combination they stand for "nothing".
        delimiter
            What joins the names of a combination; ``None`` if labels must not be split. (Where a
            model takes combinations for perturbations of their own, as ``SVAEPlus`` does, this says
            that ``"A+B"`` is the same one as ``"B+A"``.)
        dosage_key
            Column of obs with the dose of each cell: a number, or text such as ``"0.5+1.0"``
            aligned with the label as written. Without it every dose is 1. Effects are linear in the
            dose, so give doses on the scale on which that is plausible (often the logarithm).
        dosage_obsm_key
            Instead of labels: key of obsm with a cells x perturbations matrix of doses (ndarray,
            sparse matrix or DataFrame). A row of zeros is a control cell.
        perturbation_names
            Names of that matrix' columns, or the key of uns that holds them. A DataFrame has its
            own.
        layer
            Layer with raw counts; ``None`` for ``X``.
        batch_key, categorical_covariate_keys, continuous_covariate_keys
            Columns of obs that encoder and decoder condition on.
        size_factor_key
            Column of obs with a size factor, for example the whole-transcriptome library size where
            ``adata`` holds a panel of genes. Without it the size is the sum of the counts.
        **kwargs
            ``source_registry`` and other arguments that scvi-tools passes when it loads a model.

        Raises
        ------
        MissingKeyError
            If a named column, layer or matrix does not exist.
        MissingControlError
            If no cell is a control cell.
        InvalidPerturbationLabelError, InvalidDosageError
            If labels or doses are missing or malformed.
        InvalidCovariateError
            If a batch or covariate is missing, or no number where it must be one.
        RegistrationError
            If ``adata`` is a view, is empty, or has two genes of one name.
        InvalidArgumentError
            If an argument is of the wrong type.

        After an error ``adata`` is as it was before.

        Examples
        --------
        >>> adata = scvi_sams.datasets.simulate_screen(n_genes=50)
        >>> adata.layers["counts"] = adata.X
        >>> scvi_sams.SAMSVAE.setup_anndata(
        ...     adata, perturbation_key="perturbation", control="control", layer="counts"
        ... )

        A wrong label of the controls is found at once:

        >>> scvi_sams.SAMSVAE.setup_anndata(adata, control="NT")
        Traceback (most recent call last):
        ...
        scvi_sams.exceptions.MissingControlError: No control cell was found: no label equals 'NT'...
        """
        if kwargs and "source_registry" not in kwargs:
            raise InvalidArgumentError(
                f"setup_anndata has no arguments {sorted(kwargs)}. Labels are `perturbation_key`; "
                "other columns are `batch_key`, `categorical_covariate_keys` and "
                "`continuous_covariate_keys`."
            )
        check_key(layer=layer, batch_key=batch_key, size_factor_key=size_factor_key)
        categorical_covariate_keys = _as_keys(
            "categorical_covariate_keys", categorical_covariate_keys
        )
        continuous_covariate_keys = _as_keys("continuous_covariate_keys", continuous_covariate_keys)
        # Copied, so that lists which the caller changes later stay as they were in the model.
        setup_method_args = deepcopy(cls._get_setup_method_args(**locals()))
        fields = [
            PerturbationField(
                perturbation_key=None if dosage_obsm_key else perturbation_key,
                control=control,
                delimiter=delimiter,
                dosage_key=dosage_key,
                dosage_obsm_key=dosage_obsm_key,
                perturbation_names=perturbation_names,
                additive=cls._additive,
            ),
            LayerField(REGISTRY_KEYS.X, layer, is_count_data=False),
            CategoricalObsField(REGISTRY_KEYS.BATCH, batch_key),
            NumericalObsField(REGISTRY_KEYS.SIZE_FACTOR, size_factor_key, required=False),
            CategoricalJointObsField(
                REGISTRY_KEYS.CATEGORICAL_COVARIATES, categorical_covariate_keys
            ),
            NumericalJointObsField(REGISTRY_KEYS.CONTINUOUS_COVARIATES, continuous_covariate_keys),
        ]
        manager = ScreenManager(fields=fields, setup_method_args=setup_method_args)
        manager.register_fields(adata, **kwargs)
        cls.register_manager(manager)
        logger.info(_registration_summary(manager))
        if "source_registry" not in kwargs:
            warn_of_what_is_unusual(manager)

    @classmethod
    def _check_registered(cls, adata: object, registry: dict[str, Any] | None) -> None:
        if adata is None and registry:
            return
        check_anndata(RegistrationError, adata=adata)
        if cls._get_most_recent_anndata_manager(adata) is None:
            raise RegistrationError(
                f"`adata` is not registered. Say what its labels are first: {cls.__name__}."
                "setup_anndata(adata, perturbation_key=..., control=...)."
            )

    def _validate_anndata(self, adata: AnnData | None = None, copy_if_view: bool = True) -> AnnData:
        """Register other data by name where needed, and check its values once."""
        target = self.adata if adata is None else adata
        if target is None:
            raise RegistrationError(
                "The model was loaded without cells. Pass `adata`: cells with the same genes."
            )
        check_anndata(RegistrationError, adata=target)
        if target is not self.adata:
            check_genes(target, self.get_var_names())
        if target.is_view:
            self._validate_view(target)
        with unchanged_on_error(target):
            validated = super()._validate_anndata(adata, copy_if_view=copy_if_view)
            self._validate_cells(self.get_anndata_manager(validated, required=True))
        return validated

    def _validate_view(self, view: AnnData) -> None:
        # scvi-tools makes data of its own out of a view before it reads anything.
        if self.adata_manager is not None:
            self.adata_manager.check_fields(view, self.adata_manager.registry)
            self._validate_values(view)

    def _validate_cells(self, manager: AnnDataManager) -> None:
        if manager.id not in self._checked:
            self._validate_values(manager.adata)
            self._checked.add(manager.id)

    def _validate_values(self, adata: AnnData) -> None:
        arguments = self.registry_[SETUP_ARGUMENTS_KEY]
        layer, size_factor_key = arguments["layer"], arguments["size_factor_key"]
        validate_expression(
            adata.X if layer is None else adata.layers[layer],
            counts=self.gene_likelihood != "normal",
            location="adata.X" if layer is None else f"adata.layers[{layer!r}]",
        )
        if size_factor_key is not None:
            validate_size_factor(adata.obs[size_factor_key])


def _as_keys(argument: str, keys: object) -> list[str] | None:
    """Return keys as scvi-tools compares them, one key or several."""
    if keys is None:
        return None
    if isinstance(keys, str):
        return [keys]
    if not isinstance(keys, Iterable):
        raise InvalidArgumentError(f"`{argument}` must be names of columns, not {keys!r}.")
    listed = list(keys)
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
