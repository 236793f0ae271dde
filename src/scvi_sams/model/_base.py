"""What all models share: training, reading cells, and writing results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi import settings

from scvi_sams._checks import as_positions, check_integer
from scvi_sams._compat import FIELD_REGISTRIES_KEY, SETUP_ARGUMENTS_KEY, STATE_REGISTRY_KEY
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.counts._block_reader import is_on_disk
from scvi_sams.data._block_loader import BlockLoader
from scvi_sams.data._field import PerturbationField, registered_labels
from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.labels._labels import Labels, combinations_as_perturbations
from scvi_sams.labels._parsing import encode_labels
from scvi_sams.labels._spelling import Spelling
from scvi_sams.model._card import CardMixin
from scvi_sams.model._registration import RegistrationMixin
from scvi_sams.model._saving import SavingMixin
from scvi_sams.model._settings import validate_settings
from scvi_sams.model._training import TrainingMixin
from scvi_sams.module._perturbation_module import CellBatch, PerturbationModule
from scvi_sams.train._plan import PerturbationTrainingPlan


class BasePerturbationModel(TrainingMixin, SavingMixin, CardMixin, RegistrationMixin):
    """Training and access to cells; subclasses name their module.

    Parameters
    ----------
    adata
        Registered with :meth:`setup_anndata`; ``None`` for a model that is loaded without data.
    gene_likelihood
        ``"nb"``, ``"poisson"`` or ``"normal"``.
    registry
        What was registered, in place of ``adata``.
    **module_kwargs
        Passed to the module.

    Raises
    ------
    InvalidArgumentError
        If a setting is of the wrong type or out of range.
    RegistrationError
        If ``adata`` is not registered.
    """

    _module_cls: ClassVar[type[PerturbationModule]]
    _training_plan_cls = PerturbationTrainingPlan
    module: PerturbationModule

    def __init__(
        self,
        adata: AnnData | None,
        *,
        gene_likelihood: str,
        registry: dict[str, Any] | None = None,
        **module_kwargs: Any,
    ) -> None:
        validate_settings(gene_likelihood=gene_likelihood, **module_kwargs)
        self._check_registered(adata, registry)
        super().__init__(adata, registry)
        self.gene_likelihood = gene_likelihood
        self._checked: set[str] = set()
        if adata is not None:
            self._validate_cells(self.adata_manager)
        summary = self.summary_stats
        self.module = self._module_cls(
            n_genes=summary.n_vars,
            n_perturbations=summary.n_perturbations,
            n_batch=summary.n_batch,
            n_categories=list(
                self._state(REGISTRY_KEYS.CATEGORICAL_COVARIATES).get("n_cats_per_key", [])
            ),
            n_continuous=summary.get("n_extra_continuous_covs", 0),
            uses_size_factor=self._setup_arguments["size_factor_key"] is not None,
            gene_likelihood=gene_likelihood,
            **module_kwargs,
        )
        self._model_summary_string = (
            f"{type(self).__name__}: {summary.n_perturbations} perturbations, {summary.n_vars} "
            f"genes, likelihood {gene_likelihood}."
        )

    # Reading cells, encoding labels, writing results --------------------------------------------

    @property
    def perturbations(self) -> list[str]:
        """Names of the perturbations, in the order of the rows of masks and effects."""
        vocabulary = self._state(REGISTRY_KEYS.PERTURBATIONS)[PerturbationField.VOCABULARY_KEY]
        return [str(name) for name in vocabulary]

    def _state(self, key: str) -> dict[str, Any]:
        """What registration remembered of a field; empty if it was not registered."""
        return self.registry_[FIELD_REGISTRIES_KEY].get(key, {}).get(STATE_REGISTRY_KEY, {})

    @property
    def _setup_arguments(self) -> dict[str, Any]:
        return self.registry_[SETUP_ARGUMENTS_KEY]

    def _encode_requested(
        self, labels: Sequence[str], dosages: Sequence[float | str] | None
    ) -> Labels:
        """Encode labels that a user asks for; where effects add up, unseen combinations too."""
        arguments = self._setup_arguments
        singles = encode_labels(
            pd.Series([str(label) for label in labels]),
            None if dosages is None else _as_dosages(dosages),
            spelling=Spelling.of(arguments["control"], arguments["delimiter"]),
            vocabulary=self.perturbations if self._additive else None,
        )
        if self._additive:
            return singles
        return combinations_as_perturbations(singles, vocabulary=self.perturbations)

    def _control_cells(self) -> np.ndarray:
        """Positions of control cells in the training data."""
        return np.flatnonzero(registered_labels(self.adata_manager).is_control)

    def _batches(
        self, adata: AnnData, indices: np.ndarray, batch_size: int | None
    ) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """Yield positions within ``indices``, and the tensors of cells on the module's device.

        Cells are read in ascending order, which needs the fewest accesses where they are on disk;
        the positions say where each result belongs.
        """
        if batch_size is None:
            batch_size = settings.batch_size
        check_integer(batch_size=batch_size)
        order = np.argsort(indices, kind="stable")
        manager = self.get_anndata_manager(adata, required=True)
        if is_on_disk(manager.get_from_registry(REGISTRY_KEYS.X)):
            loader = BlockLoader(manager, indices[order], batch_size)
        else:
            loader = self._make_data_loader(adata, indices=indices[order], batch_size=batch_size)
        start = 0
        for tensors in loader:
            n_cells = len(tensors[REGISTRY_KEYS.X])
            device = self.module.device
            yield (
                order[start : start + n_cells],
                {key: value.to(device) for key, value in tensors.items()},
            )
            start += n_cells

    def _cells(
        self, adata: AnnData, indices: np.ndarray, batch_size: int | None
    ) -> Iterator[tuple[np.ndarray, CellBatch]]:
        """Yield positions within ``indices``, and the cells as the module reads them."""
        for place, tensors in self._batches(adata, indices, batch_size):
            yield place, self.module.read_batch(tensors)

    def _perturbations_of(self, adata: AnnData, indices: np.ndarray) -> torch.Tensor:
        """Perturbations that some cells carry, ascending, on the module's device."""
        manager = self.get_anndata_manager(adata, required=True)
        codes = registered_labels(manager).codes[indices]
        return torch.as_tensor(np.unique(codes[codes >= 0]), device=self.module.device)

    @staticmethod
    def _indices(adata: AnnData, indices: Sequence[int] | Sequence[bool] | None) -> np.ndarray:
        if indices is None:
            return np.arange(adata.n_obs)
        return as_positions("indices", indices, adata.n_obs)


def _as_dosages(dosages: object) -> pd.Series:
    if isinstance(dosages, str) or not isinstance(dosages, Iterable):
        raise InvalidArgumentError(f"`dosages` must be a list, one per label, not {dosages!r}.")
    return pd.Series(list(dosages), dtype=object)


def rows_of_all_cells(values: np.ndarray, indices: np.ndarray, n_obs: int) -> np.ndarray:
    """Spread results of some cells over all rows of an AnnData, as a copy; other rows are NaN."""
    full = np.full((n_obs, *values.shape[1:]), np.nan, dtype=values.dtype)
    full[indices] = values
    return full
