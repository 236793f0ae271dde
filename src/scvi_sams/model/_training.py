"""Prepare training: split, data module and defaults, and checks before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from scvi import settings
from scvi.data import AnnDataManager
from scvi.model.base import BaseModelClass

from scvi_sams._checks import as_path
from scvi_sams._compat import FIELD_REGISTRIES_KEY, STATE_REGISTRY_KEY, SimpleLogger
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams._plurals import counted
from scvi_sams._torch import check_single_precision
from scvi_sams._versions import installed_versions
from scvi_sams.counts._block_reader import is_on_disk
from scvi_sams.data._covariates import check_genes
from scvi_sams.data._data_modules import ResidentDataModule, StreamingDataModule
from scvi_sams.data._field import registered_labels
from scvi_sams.data._splitting import complete_split, training_split
from scvi_sams.exceptions import InvalidArgumentError, InvalidSplitError, RegistrationError
from scvi_sams.model._record import model_record
from scvi_sams.model._registration import logger
from scvi_sams.model._train_arguments import checked_arguments
from scvi_sams.train._checkpoint import check_checkpoint, check_place_of_checkpoint
from scvi_sams.train._held_out import NO_HELD_OUT_CELLS
from scvi_sams.train._identity import Identity, plain_settings

_PLANS_A_LENGTH = ("lr_schedule", "dense_fraction", "reduce_lr_on_plateau")
"""Settings of the plan that depend on the number of epochs, or on its end."""
_CEILING = 10
"""Factor of the planned epochs. In all measured trainings held-out cells ended training at 1 to 2.2
times the planned epochs."""


def training_arguments(model: BaseModelClass, given: dict[str, Any]) -> dict[str, Any]:
    """Convert the arguments of ``train``, by name, to those of ``train`` in scvi-tools."""
    check_single_precision()
    given = checked_arguments(model, given)
    on_device, checkpoint_path = given.pop("data_on_device"), given.pop("checkpoint_path")
    if given["datamodule"] is None:
        split = _set_data_module(model, given, on_device)
    else:
        split = _split_of(model, given["datamodule"], on_device)
    if split[0] is not None:
        _warn_of_untrained_perturbations(model, np.asarray(split[0]))
        has_validation = len(split) > 1 and split[1] is not None and len(split[1]) > 0
        if has_validation:
            _set_default(given, "check_val_every_n_epoch", 1)
        else:
            _check_that_none_are_needed(given)
        if given["max_epochs"] is None:
            _set_length(given, len(split[0]), has_validation)
    _set_default(given, "gradient_clip_val", 100.0)
    _keep_history(given)
    if checkpoint_path is not None:
        path = as_path("checkpoint_path", checkpoint_path)
        check_place_of_checkpoint(path)
        given["plan_kwargs"] = dict(given["plan_kwargs"] or {}) | {
            "checkpoint_path": str(path),
            "checkpoint_of": _identity(model, given),
        }
        if path.exists():
            check_checkpoint(path)
            given["ckpt_path"] = str(path)
    return given


def _identity(model: BaseModelClass, given: Mapping[str, Any]) -> Identity:
    """What a checkpoint must match to resume this training, except plan and data."""
    record = model_record(model)
    stopping = {k: v for k, v in given.items() if k.startswith("early_stopping")}
    return {
        "model": record["model"],
        "scvi_sams": installed_versions()["scvi_sams"],
        "seed": settings.seed,
        "batch_size": given["batch_size"],
        **plain_settings("settings", record["settings"]),
        **plain_settings("setup", record["setup"]),
        **plain_settings("train", _settings_of(given["trainer_config"]) | stopping),
    }


def _set_data_module(model: BaseModelClass, given: dict[str, Any], on_device: bool) -> Any:
    """Split the cells, choose the data module to load them, and return the split."""
    manager = model.adata_manager
    options = given["datasplitter_kwargs"] = dict(given["datasplitter_kwargs"] or {})
    split = options.get("external_indexing")
    if split is None:
        sizes = (given["train_size"], given["validation_size"])
        split = training_split(manager, *sizes, shuffle=given["shuffle_set_split"])
    options["external_indexing"] = split = complete_split(split, manager.adata.n_obs)
    batch_size = given["batch_size"]
    if on_device:
        given["datamodule"] = ResidentDataModule(manager, batch_size=batch_size, **options)
    elif is_on_disk(manager.get_from_registry(REGISTRY_KEYS.X)):
        sparse = given["load_sparse_tensor"]
        given["datamodule"] = StreamingDataModule(
            manager, batch_size=batch_size, load_sparse_tensor=sparse, **options
        )
    return split


def _split_of(model: BaseModelClass, datamodule: Any, on_device: bool) -> Any:
    """Split of a user's data module, if it is known before training."""
    if on_device:
        raise InvalidArgumentError(
            "`data_on_device` and `datamodule` are two ways to load cells: pass one of "
            "them, or a scvi_sams.data.ResidentDataModule as `datamodule`."
        )
    if not hasattr(datamodule, "adata_manager"):
        raise InvalidArgumentError(
            f"`datamodule` is {datamodule!r}, which has no `adata_manager`. Pass a "
            "scvi_sams.data.StreamingDataModule, or omit it."
        )
    _check_same_registration(model, datamodule.adata_manager)
    # Other data modules may split only when training begins.
    return [getattr(datamodule, name, None) for name in ("train_idx", "val_idx")]


def _check_same_registration(model: BaseModelClass, manager: AnnDataManager) -> None:
    """Raise if a data module numbers perturbations, genes or categories differently."""
    if manager is model.adata_manager:
        return
    check_genes(manager.adata, model.get_var_names())
    for name, field in model.registry_[FIELD_REGISTRIES_KEY].items():
        theirs = manager.registry[FIELD_REGISTRIES_KEY].get(name, {})
        try:
            np.testing.assert_equal(
                dict(theirs.get(STATE_REGISTRY_KEY, {})), dict(field[STATE_REGISTRY_KEY])
            )
        except AssertionError as difference:
            raise RegistrationError(
                "The cells of `datamodule` are registered differently from those of the model "
                f"({name}). Make the data module from `model.adata_manager`, or from "
                "`other_model.adata_manager` for a model loaded with those cells."
            ) from difference


def _warn_of_untrained_perturbations(model: BaseModelClass, train_indices: np.ndarray) -> None:
    codes = registered_labels(model.adata_manager).codes
    names = model.perturbations
    untrained = np.setdiff1d(np.arange(len(names)), np.unique(codes[train_indices]))
    if len(untrained):
        shown = [names[code] for code in untrained[:5]]
        logger.warning(
            f"{counted(len(untrained), 'perturbation has', 'perturbations have')} no training "
            f"cells, such as {shown}: nothing can be learned about their effects, and masks and "
            "effects keep their initial values."
        )


def _set_default(given: dict[str, Any], name: str, value: Any) -> None:
    """Set an argument unless the user passed it, directly or in a configuration object."""
    if _settings_of(given["trainer_config"]).get(name) is None:
        given.setdefault(name, value)


def _keep_history(given: dict[str, Any]) -> None:
    """Put the logger of ``model.history`` before those of the user."""
    loggers = given.get("logger", _settings_of(given["trainer_config"]).get("logger"))
    if loggers is True:
        loggers = _logger_of_lightning(given.get("default_root_dir"))
    own = [loggers] if isinstance(loggers, Logger) else loggers
    if own is None or own is False:
        return
    if not isinstance(own, list | tuple) or not all(isinstance(one, Logger) for one in own):
        raise InvalidArgumentError(
            f"`logger` must be a logger of Lightning, a list of them, True or False, not {own!r}."
        )
    if not any(isinstance(one, SimpleLogger) for one in own):
        given["logger"] = [SimpleLogger(save_dir=given.get("log_save_dir")), *own]


def _logger_of_lightning(folder: Any) -> Logger:
    """Logger that Lightning creates for ``logger=True``; it has no history."""
    folder = settings.logging_dir if folder is None else folder
    try:
        return TensorBoardLogger(folder)
    except ModuleNotFoundError:
        return CSVLogger(folder)


def _settings_of(configuration: Any) -> dict[str, Any]:
    if isinstance(configuration, Mapping):
        return dict(configuration)
    return getattr(configuration, "to_kwargs", dict)()


def _plan_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    return _settings_of(given["plan_config"]) | dict(given["plan_kwargs"] or {})


def _check_that_none_are_needed(given: Mapping[str, Any]) -> None:
    """Raise if a requested option requires validation cells."""
    if given["early_stopping"] and "validation" in given.get(
        "early_stopping_monitor", "elbo_validation"
    ):
        raise InvalidSplitError(
            "`early_stopping` requires validation cells, but the split has none. Pass a "
            "`train_size` below 1, or early_stopping=False."
        )
    every = given.get("check_val_every_n_epoch")
    if every or _settings_of(given["trainer_config"]).get("check_val_every_n_epoch"):
        raise InvalidSplitError(
            "`check_val_every_n_epoch` requires validation cells, but the split has none. Pass a "
            "`train_size` below 1, or omit it."
        )
    if _plan_settings(given).get("lr_schedule") == "held_out":
        raise InvalidSplitError(NO_HELD_OUT_CELLS)


def _set_length(given: dict[str, Any], n_train: int, has_validation: bool) -> None:
    """Let held-out cells end training, unless its length is planned or there are none."""
    given["max_epochs"] = _planned_epochs(n_train)
    plan = _plan_settings(given)
    is_planned = given["early_stopping"] or any(plan.get(name) for name in _PLANS_A_LENGTH)
    if has_validation and not is_planned:
        plan["lr_schedule"] = "held_out"
        given["plan_kwargs"] = dict(given["plan_kwargs"] or {}) | {"lr_schedule": "held_out"}
    if plan.get("lr_schedule") == "held_out":
        given["max_epochs"] *= _CEILING


def _planned_epochs(n_train: int) -> int:
    """40 epochs for 15,000 cells, scaled by the inverse square root, between 10 and 100.

    On simulated screens the validation ELBO was best after about 80 epochs of 3,000 cells and 40 of
    15,000; twice as many overfitted.
    """
    return int(np.clip(round(40 * (15_000 / n_train) ** 0.5), 10, 100))
