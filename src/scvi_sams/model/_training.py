"""Training: splits, defaults and data modules, and what is refused before it starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scvi.model.base import UnsupervisedTrainingMixin

from scvi_sams._checks import check_integer, check_number
from scvi_sams._compat import FIELD_REGISTRIES_KEY, STATE_REGISTRY_KEY
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.counts._block_reader import is_on_disk
from scvi_sams.data._covariates import check_genes
from scvi_sams.data._data_modules import ResidentDataModule, StreamingDataModule
from scvi_sams.data._field import registered_labels
from scvi_sams.data._splitting import complete_split, training_split
from scvi_sams.exceptions import InvalidArgumentError, InvalidSplitError, RegistrationError
from scvi_sams.model._registration import logger
from scvi_sams.train._divergence import weights_kept_on_error

if TYPE_CHECKING:
    from lightning import LightningDataModule
    from scvi.data import AnnDataManager


class TrainingMixin(UnsupervisedTrainingMixin):
    """Adds :meth:`train`."""

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
        data_on_device: bool = False,
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
        data_on_device
            Send all cells to the device once, as sparse as they are, and cut mini-batches out of
            them there (:class:`~scvi_sams.data.ResidentDataModule`): for GPUs that have the memory.
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
        _validate_training(
            max_epochs, train_size, validation_size, batch_size, plan_kwargs, datasplitter_kwargs
        )
        if datamodule is None:
            datasplitter_kwargs = dict(datasplitter_kwargs or {})
            split = datasplitter_kwargs.get("external_indexing")
            if split is None:
                split = training_split(
                    self.adata_manager, train_size, validation_size, shuffle=shuffle_set_split
                )
            split = datasplitter_kwargs["external_indexing"] = complete_split(
                split, self.adata_manager.adata.n_obs
            )
            if data_on_device:
                datamodule = ResidentDataModule(
                    self.adata_manager, batch_size=batch_size, **datasplitter_kwargs
                )
            elif is_on_disk(self.adata_manager.get_from_registry(REGISTRY_KEYS.X)):
                datamodule = StreamingDataModule(
                    self.adata_manager,
                    batch_size=batch_size,
                    load_sparse_tensor=load_sparse_tensor,
                    **datasplitter_kwargs,
                )
        else:
            if data_on_device:
                raise InvalidArgumentError(
                    "`data_on_device` and `datamodule` are two ways to load cells: pass one of "
                    "them, or a scvi_sams.data.ResidentDataModule as `datamodule`."
                )
            if not hasattr(datamodule, "adata_manager"):
                raise InvalidArgumentError(
                    f"`datamodule` is {datamodule!r}, which has no `adata_manager`. Pass a "
                    "scvi_sams.data.StreamingDataModule, or leave it out."
                )
            self._check_same_registration(datamodule.adata_manager)
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
            plan_kwargs = dict(plan_kwargs or {}) | {"checkpoint_path": _as_path(checkpoint_path)}
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

    def _check_same_registration(self, manager: AnnDataManager) -> None:
        """Raise an error if a data module numbers perturbations, genes or categories otherwise."""
        if manager is self.adata_manager:
            return
        check_genes(manager.adata, self.get_var_names())
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
        codes = registered_labels(self.adata_manager).codes
        trained = np.unique(codes[train_indices])
        untrained = np.setdiff1d(np.arange(len(self.perturbations)), trained)
        if len(untrained):
            names = [self.perturbations[code] for code in untrained[:5]]
            logger.warning(
                f"{len(untrained)} perturbations have no training cells, such as {names}: nothing "
                "can be learned about them, their masks and effects stay where they start."
            )


def _validate_training(
    max_epochs: int | None,
    train_size: float | None,
    validation_size: float | None,
    batch_size: int,
    plan_kwargs: object,
    datasplitter_kwargs: object,
) -> None:
    for name, options in (
        ("plan_kwargs", plan_kwargs),
        ("datasplitter_kwargs", datasplitter_kwargs),
    ):
        if options is not None and not isinstance(options, Mapping):
            raise InvalidArgumentError(f"`{name}` must be a dict, not {options!r}.")
    if max_epochs is not None:
        check_integer(max_epochs=max_epochs)
    check_integer(batch_size=batch_size)
    for name, share in (("train_size", train_size), ("validation_size", validation_size)):
        if share is not None:
            check_number(**{name: share})


def _as_path(checkpoint_path: object) -> str | os.PathLike[str]:
    if not isinstance(checkpoint_path, str | os.PathLike):
        raise InvalidArgumentError(
            f"`checkpoint_path` must be the path of a file, not {checkpoint_path!r}."
        )
    return checkpoint_path


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
