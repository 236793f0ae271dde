"""Checks of the arguments of ``train``, before cells are split or training starts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from inspect import signature
from typing import Any

import lightning.pytorch as lightning
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from scvi.dataloaders import AnnDataLoader, DataSplitter
from scvi.model.base import BaseModelClass
from scvi.train import Trainer, TrainingPlan
from torch.utils.data import DataLoader

from scvi_sams._checks import as_plain, check_bool, check_integer, check_number
from scvi_sams._compat import parse_device_args
from scvi_sams.data._data_modules import ScreenDataModule, StreamingDataModule
from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.train._plan import PerturbationTrainingPlan


def _arguments_of(*functions: Any) -> set[str]:
    names = {name for function in functions for name in signature(function).parameters}
    return names - {"self", "args", "kwargs", "data_loader_kwargs"}


_OF_TRAINER = _arguments_of(Trainer.__init__, lightning.Trainer.__init__) | {"ckpt_path"}
_OF_PLAN = _arguments_of(PerturbationTrainingPlan.__init__, TrainingPlan.__init__)
_OF_SPLITTING = _arguments_of(
    *(kind.__init__ for kind in (DataSplitter, AnnDataLoader, DataLoader)),
    *(kind.__init__ for kind in (ScreenDataModule, StreamingDataModule)),
) - {"adata_manager", "dataset", "indices", "shuffle"}
_SET_BY_TRAIN = {"train_size", "validation_size", "shuffle_set_split", "batch_size"}
_FLAGS = ("shuffle_set_split", "load_sparse_tensor", "early_stopping", "data_on_device")
_OTHER_NAMES = {
    "n_epochs": "Pass `max_epochs`.",
    "epochs": "Pass `max_epochs`.",
    "use_gpu": "Pass accelerator='gpu' or accelerator='cpu'.",
    "learning_rate": "It is one of the training plan: plan_kwargs={'lr': ...}.",
    "gpus": "Pass accelerator='gpu', and their number as `devices`.",
    "seed": "Set scvi.settings.seed before the model is made.",
}


def checked_arguments(model: BaseModelClass, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``train`` by name, with numpy numbers converted to plain ones.

    ``given`` includes those of Lightning's trainer. An error names the first that is unknown or
    invalid.
    """
    given = {name: as_plain(value) for name, value in given.items()}
    _check_known(model, given)
    for name in ("plan_kwargs", "datasplitter_kwargs"):
        if given[name] is not None:
            if not isinstance(given[name], Mapping):
                raise InvalidArgumentError(f"`{name}` must be a dict, not {given[name]!r}.")
            given[name] = {key: as_plain(value) for key, value in given[name].items()}
    for name in ("plan_config", "trainer_config"):
        config = given[name]
        if not (config is None or isinstance(config, Mapping) or hasattr(config, "to_kwargs")):
            raise InvalidArgumentError(
                f"`{name}` must be a dict or an object with `to_kwargs`, not {config!r}."
            )
    _check_splitting(given)
    check_bool(**{name: given[name] for name in _FLAGS})
    if given["max_epochs"] is not None:
        check_integer(max_epochs=given["max_epochs"])
    check_integer(batch_size=given["batch_size"])
    for name in ("train_size", "validation_size"):
        if given[name] is not None:
            check_number(**{name: given[name]})
    check_device(given["accelerator"], given["devices"])
    return given


def check_device(accelerator: object, devices: object) -> None:
    """Raise if Lightning does not know the hardware, or it is not available."""
    try:
        parse_device_args(accelerator=accelerator, devices=devices, return_device="torch")
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise InvalidArgumentError(
            f"`accelerator` is {accelerator!r} and `devices` is {devices!r}: {error}"
        ) from error


def _check_known(model: BaseModelClass, given: Mapping[str, Any]) -> None:
    of_train = _arguments_of(type(model).train) - {"trainer_kwargs"}
    for name in given:
        if name not in of_train | _OF_TRAINER:
            raise InvalidArgumentError(
                f"`train` has no argument `{name}`. {_advice(name, type(model), of_train)}".rstrip()
            )


def _advice(name: str, model_class: type[BaseModelClass], of_train: set[str]) -> str:
    """Where an unknown argument of ``train`` belongs; empty if unclear."""
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    if name in _OF_PLAN:
        return f"It is one of the training plan: plan_kwargs={{{name!r}: ...}}."
    if name in _OF_SPLITTING:
        return f"It is one of the split and its loader: datasplitter_kwargs={{{name!r}: ...}}."
    if name in _arguments_of(model_class.__init__):
        return f"It is one of the model: {model_class.__name__}(adata, {name}=...)."
    near = difflib.get_close_matches(name, sorted(of_train | _OF_TRAINER), n=2)
    return f"Did you mean {' or '.join(f'`{other}`' for other in near)}?" if near else ""


def _check_splitting(given: Mapping[str, Any]) -> None:
    for name in given["datasplitter_kwargs"] or {}:
        if name in _SET_BY_TRAIN:
            raise InvalidArgumentError(
                f"`{name}` is in `datasplitter_kwargs`: pass it to `train` itself."
            )
        if name not in _OF_SPLITTING:
            near = difflib.get_close_matches(name, sorted(_OF_SPLITTING), n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise InvalidArgumentError(
                f"`datasplitter_kwargs` has {name!r}, which is not an argument of the split or its "
                f"loader.{hint}"
            )
