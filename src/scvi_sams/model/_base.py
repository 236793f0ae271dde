"""What all models share: training, reading cells, and writing results."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi import settings
from scvi.model.base import UnsupervisedTrainingMixin

from scvi_sams._arguments import (
    as_positions,
    refuse_other_than_number,
    refuse_other_than_whole,
)
from scvi_sams._compat import FIELD_REGISTRIES_KEY, SETUP_ARGUMENTS_KEY, STATE_REGISTRY_KEY
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams._random import fixed_seed
from scvi_sams.data import (
    BlockLoader,
    PerturbationCodes,
    PerturbationField,
    StreamingDataModule,
    combinations_as_perturbations,
    complete_split,
    control_names,
    encode_labels,
    is_on_disk,
    refuse_other_genes,
    registered_perturbations,
    split_cells,
)
from scvi_sams.exceptions import InvalidArgumentError, InvalidSplitError, RegistrationError
from scvi_sams.model._card import CardMixin
from scvi_sams.model._registration import RegistrationMixin, logger
from scvi_sams.model._saving import SavingMixin
from scvi_sams.model._settings import refuse_invalid_settings
from scvi_sams.module import CellBatch, PerturbationModule
from scvi_sams.train import PerturbationTrainingPlan, weights_kept_on_error

if TYPE_CHECKING:
    from lightning import LightningDataModule
    from scvi.data import AnnDataManager

_MOMENTS_SEED = 11027


class BasePerturbationModel(UnsupervisedTrainingMixin, SavingMixin, CardMixin, RegistrationMixin):
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
        refuse_invalid_settings(gene_likelihood=gene_likelihood, **module_kwargs)
        self._refuse_unregistered(adata, registry)
        super().__init__(adata, registry)
        self.gene_likelihood = gene_likelihood
        self._checked: set[str] = set()
        if adata is not None:
            self._refuse_invalid_cells(self.adata_manager)
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

    # Training ---------------------------------------------------------------------------------

    def train(
        self,
        max_epochs: int | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        load_sparse_tensor: bool = False,
        batch_size: int = 512,
        early_stopping: bool = False,
        datasplitter_kwargs: dict[str, Any] | None = None,
        plan_config: Any = None,
        plan_kwargs: dict[str, Any] | None = None,
        datamodule: LightningDataModule | None = None,
        trainer_config: Any = None,
        checkpoint_path: str | os.PathLike[str] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model; arguments are those of scvi-tools, with defaults measured for this one.

        Where the expression is on disk (:func:`~scvi_sams.data.open_screen`), mini-batches are
        streamed from there, shuffled in blocks.

        Ctrl-C (the stop button of a notebook) ends training after the running step, and the model
        is as after early stopping; pressed again it ends at once, with the weights before training.

        Parameters
        ----------
        max_epochs
            Passes over the training cells. ``None``: 40 at 15,000 cells, fewer for more, between
            10 and 100.
        accelerator, devices
            Hardware, as in Lightning.
        train_size
            Share of training cells; ``None`` means 0.9.
        validation_size
            Share of validation cells; ``None`` means what is left of ``train_size``. What is left
            of both is the test set.
        shuffle_set_split
            Split at random within each perturbation and combination, so that each has training
            cells; the seed is ``scvi.settings.seed`` (0 if unset), on every process the same.
        load_sparse_tensor
            Move sparse mini-batches to the device and densify them there.
        batch_size
            Cells per step.
        early_stopping
            Stop when ``elbo_validation`` no longer falls. It is scored with the same random
            numbers in each epoch and weighs global terms by training counts. Off by default: with
            the default epochs and schedule the last epoch was the best one in all measured runs. A
            dense phase (``dense_fraction``) is always trained to its end; scores count after it.
        datasplitter_kwargs
            For :class:`~scvi.dataloaders.DataSplitter`, or where the expression is on disk for
            :class:`~scvi_sams.data.StreamingDataModule`; ``external_indexing`` (a list of positions
            of training, validation and test cells) replaces the split.
        plan_config, plan_kwargs
            For :class:`~scvi_sams.train.PerturbationTrainingPlan`, such as ``lr``.
        datamodule
            Data module in place of the one made from ``adata``, such as a
            :class:`~scvi_sams.data.StreamingDataModule`; split and ``batch_size`` are then its own.
            It needs the attributes ``adata_manager`` and ``train_idx`` of
            :class:`~scvi.dataloaders.DataSplitter`.
        checkpoint_path
            File that the state of training is written to after each epoch. If it is there already,
            training goes on from it: run the same script again after it was killed. The file is
            removed when training has ended. Then ``history`` has the epochs since the file only.
        trainer_config, **trainer_kwargs
            For :class:`~scvi.train.Trainer`. ``gradient_clip_val`` is 100 unless given (paper).

        Raises
        ------
        InvalidArgumentError
            If an argument is of the wrong type or out of range.
        InvalidSplitError
            If the split leaves no training cells, or names a cell twice or none that is there.
        TrainingDivergedError
            If a term of the objective becomes infinite or NaN. The weights are then those at the
            end of the last good epoch (in a first training, of an epoch after the dense phase;
            otherwise those before it), and the model counts as trained only if it was before.
            After any other error they are those before training.
        UnreadableDataError
            If the expression is on disk and damaged there.

        Examples
        --------
        >>> scvi_sams.SAMSVAE.setup_anndata(adata)
        >>> longer = scvi_sams.SAMSVAE(adata, n_latent=6, n_hidden=16)
        >>> longer.train(max_epochs=4, plan_kwargs={"lr": 1e-3}, enable_progress_bar=False)

        The first half of the epochs had all masks on:

        >>> longer.history["dense_phase"].squeeze().tolist()
        [1.0, 1.0, 0.0, 0.0]
        """
        for name, options in (
            ("plan_kwargs", plan_kwargs),
            ("datasplitter_kwargs", datasplitter_kwargs),
        ):
            if options is not None and not isinstance(options, Mapping):
                raise InvalidArgumentError(f"`{name}` must be a dict, not {options!r}.")
        if max_epochs is not None:
            refuse_other_than_whole(max_epochs=max_epochs)
        refuse_other_than_whole(batch_size=batch_size)
        for name, share in (("train_size", train_size), ("validation_size", validation_size)):
            if share is not None:
                refuse_other_than_number(**{name: share})
        if datamodule is None:
            datasplitter_kwargs = dict(datasplitter_kwargs or {})
            split = datasplitter_kwargs.get("external_indexing")
            if split is None:
                split = split_cells(
                    self.adata_manager, train_size, validation_size, shuffle=shuffle_set_split
                )
            split = datasplitter_kwargs["external_indexing"] = complete_split(
                split, self.adata_manager.adata.n_obs
            )
            if is_on_disk(self.adata_manager.get_from_registry(REGISTRY_KEYS.X)):
                datamodule = StreamingDataModule(
                    self.adata_manager,
                    batch_size=batch_size,
                    load_sparse_tensor=load_sparse_tensor,
                    **datasplitter_kwargs,
                )
        else:
            if not hasattr(datamodule, "adata_manager"):
                raise InvalidArgumentError(
                    f"`datamodule` is {datamodule!r}, which has no `adata_manager`. Pass a "
                    "scvi_sams.data.StreamingDataModule, or leave it out."
                )
            self._refuse_other_registration(datamodule.adata_manager)
            # Data modules of others may split only when training begins.
            split = [getattr(datamodule, name, None) for name in ("train_idx", "val_idx")]
        if split[0] is not None:
            self._report_untrained_perturbations(np.asarray(split[0]))
            if len(split) > 1 and split[1] is not None and len(split[1]):
                _set_default(trainer_kwargs, "check_val_every_n_epoch", 1, trainer_config)
            elif early_stopping and "validation" in trainer_kwargs.get(
                "early_stopping_monitor", "elbo_validation"
            ):
                raise InvalidSplitError(
                    "`early_stopping` needs validation cells, and the split has none. Pass a "
                    "`train_size` below 1, or early_stopping=False."
                )
            max_epochs = max_epochs or _default_max_epochs(len(split[0]))
        _set_default(trainer_kwargs, "gradient_clip_val", 100.0, trainer_config)
        if checkpoint_path is not None:
            if not isinstance(checkpoint_path, str | os.PathLike):
                raise InvalidArgumentError(
                    f"`checkpoint_path` must be the path of a file, not {checkpoint_path!r}."
                )
            plan_kwargs = dict(plan_kwargs or {}) | {"checkpoint_path": checkpoint_path}
            if Path(checkpoint_path).exists():
                trainer_kwargs["ckpt_path"] = str(checkpoint_path)
        with weights_kept_on_error(self.module):
            super().train(
                max_epochs=max_epochs,
                accelerator=accelerator,
                devices=devices,
                train_size=train_size,
                validation_size=validation_size,
                shuffle_set_split=shuffle_set_split,
                load_sparse_tensor=load_sparse_tensor,
                batch_size=batch_size,
                early_stopping=early_stopping,
                datasplitter_kwargs=datasplitter_kwargs,
                plan_config=plan_config,
                plan_kwargs=plan_kwargs,
                datamodule=datamodule,
                trainer_config=trainer_config,
                **trainer_kwargs,
            )
        self._record_training(
            len(self.train_indices),
            max_epochs=max_epochs,
            batch_size=batch_size,
            early_stopping=early_stopping,
            plan_config=plan_config,
            plan_kwargs=plan_kwargs,
            trainer_config=trainer_config,
            **trainer_kwargs,
        )

    def _refuse_other_registration(self, manager: AnnDataManager) -> None:
        """Raise an error if a data module numbers perturbations, genes or categories otherwise."""
        if manager is self.adata_manager:
            return
        refuse_other_genes(manager.adata, self.get_var_names())
        for name, field in self.registry_[FIELD_REGISTRIES_KEY].items():
            theirs = manager.registry[FIELD_REGISTRIES_KEY].get(name, {})
            try:
                np.testing.assert_equal(
                    dict(theirs.get(STATE_REGISTRY_KEY, {})), dict(field[STATE_REGISTRY_KEY])
                )
            except AssertionError as difference:
                raise RegistrationError(
                    "The cells of `datamodule` are registered otherwise than those of the model "
                    f"({name}). Make the data module of `model.adata_manager`, or of "
                    "`other_model.adata_manager` for a model loaded with those cells."
                ) from difference

    def _report_untrained_perturbations(self, train_indices: np.ndarray) -> None:
        codes, _ = registered_perturbations(self.adata_manager)
        trained = np.unique(codes[train_indices])
        untrained = np.setdiff1d(np.arange(len(self.perturbations)), trained)
        if len(untrained):
            names = [self.perturbations[code] for code in untrained[:5]]
            logger.warning(
                f"{len(untrained)} perturbations have no training cells, such as {names}: nothing "
                "can be learned about them, their masks and effects stay where they start."
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
    ) -> PerturbationCodes:
        """Encode labels that a user asks for; where effects add up, unseen combinations too."""
        arguments = self._setup_arguments
        delimiter = arguments["delimiter"]
        singles = encode_labels(
            pd.Series([str(label) for label in labels]),
            None if dosages is None else _as_dosages(dosages),
            control=control_names(arguments["control"]),
            delimiter=delimiter,
            vocabulary=self.perturbations if self._additive else None,
        )
        if self._additive:
            return singles
        return combinations_as_perturbations(
            singles, delimiter=delimiter, vocabulary=self.perturbations
        )

    def _control_cells(self) -> np.ndarray:
        """Positions of control cells in the training data."""
        codes, _ = registered_perturbations(self.adata_manager)
        return np.flatnonzero((codes < 0).all(axis=1))

    def _batches(
        self, adata: AnnData, indices: np.ndarray, batch_size: int | None
    ) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """Yield positions within ``indices``, and the tensors of cells on the module's device.

        Cells are read in ascending order, which needs the fewest accesses where they are on disk;
        the positions say where each result belongs.
        """
        if batch_size is None:
            batch_size = settings.batch_size
        refuse_other_than_whole(batch_size=batch_size)
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
        codes = registered_perturbations(manager)[0][indices]
        return torch.as_tensor(np.unique(codes[codes >= 0]), device=self.module.device)

    def _shift_moments(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean and sd of shifts, ``(n_rows, n_shift)``; the same in each call."""
        with fixed_seed(_MOMENTS_SEED, self.module.device):
            return self.module.shift_moments(rows)

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


def _set_default(arguments: dict[str, Any], name: str, value: Any, configuration: Any) -> None:
    """Set an argument unless it was given, or a configuration object holds it."""
    configured = (
        configuration if isinstance(configuration, Mapping) else vars(configuration or object)
    )
    if configured.get(name) is None:
        arguments.setdefault(name, value)


def _default_max_epochs(n_train: int) -> int:
    """40 epochs at 15,000 cells, by the inverse square root of their number, within 10 and 100.

    On simulated screens the validation ELBO was best after about 80 epochs of 3,000 cells and 40 of
    15,000; twice as many fitted noise.
    """
    return int(np.clip(round(40 * (15_000 / n_train) ** 0.5), 10, 100))
