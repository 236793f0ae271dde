"""Save and load models: complete files or none, with helpful errors."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from anndata import AnnData
from scvi.model.base import BaseModelClass

from scvi_sams._checks import as_path, check_anndata
from scvi_sams._compat import DATA_FILE_NAME, MODEL_FILE_NAME, MODEL_NAME_KEY, SETUP_ARGUMENTS_KEY
from scvi_sams._files import UNREADABLE, check_archive, write_h5ad
from scvi_sams.exceptions import (
    InvalidArgumentError,
    RegistrationError,
    SavingError,
    UnreadableDataError,
)
from scvi_sams.model._saved_data import check_writable, columns_kept, is_data_of
from scvi_sams.model._train_arguments import check_device

_OF_MODEL_FILE = {"save_kwargs", "legacy_mudata_format", "datamodule"}
_OF_DATA_FILE = {"compression", "compression_opts"}
_PARTS = ("model_state_dict", "var_names", "attr_dict")


def save_whole(
    model: BaseModelClass,
    save: Callable[..., None],
    dir_path: str | os.PathLike[str],
    overwrite: bool,
    save_anndata: bool,
    *,
    prefix: str | None,
    **kwargs: Any,
) -> None:
    """Save a model with ``save`` of scvi-tools to a temporary folder, then move the files.

    Data of another model from an earlier save in the folder are removed.
    """
    folder = as_path("dir_path", dir_path)
    if folder.exists() and not overwrite:
        raise SavingError(
            f"{str(folder)!r} already exists. Save elsewhere, or pass overwrite=True."
        )
    if save_anndata:
        if model.adata is None:
            raise SavingError("The model was loaded without data, so there is none to save.")
        check_writable(model.adata)
    further = {name: kwargs.pop(name) for name in _OF_MODEL_FILE & set(kwargs)}
    unknown = sorted(set(kwargs) - _OF_DATA_FILE)
    if unknown:
        raise InvalidArgumentError(f"`save` has no argument `{unknown[0]}`.")
    for table in (model.history_ or {}).values():
        # Names in pandas 3 have a type that pandas 2 cannot read.
        table.columns = table.columns.astype(object)
    made = next((part for part in [*reversed(folder.parents), folder] if not part.exists()), None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving_") as scratch:
            save(scratch, prefix, overwrite=True, **further)
            if save_anndata:
                with columns_kept(model.adata):
                    model.adata.strings_to_categoricals()
                    write_h5ad(
                        model.adata, Path(scratch) / f"{prefix or ''}{DATA_FILE_NAME}", **kwargs
                    )
            data = folder / f"{prefix or ''}{DATA_FILE_NAME}"
            layer = model.registry_[SETUP_ARGUMENTS_KEY]["layer"]
            if data.exists() and not (save_anndata or is_data_of(model.adata, layer, data)):
                data.unlink()
            for file in Path(scratch).iterdir():
                file.replace(folder / file.name)
    except BaseException as error:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        if not isinstance(error, OSError | RuntimeError):
            raise
        raise SavingError(
            f"The model cannot be saved in {str(folder)!r}: {error}. Check that it is a folder "
            "that you may write to and that the disk is not full."
        ) from error


def load_whole(
    model_class: type[BaseModelClass],
    load: Callable[..., Any],
    dir_path: str | os.PathLike[str],
    adata: AnnData | bool | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Load a model with ``load`` of scvi-tools, after checking files and arguments."""
    if adata is not None and adata is not False:
        check_anndata(RegistrationError, adata=adata)
    folder = as_path("dir_path", dir_path)
    check_device(kwargs.get("accelerator", "auto"), kwargs.get("device", "auto"))
    if kwargs.get("backup_url") is None:
        check_saved_model(folder, kwargs.get("prefix") or "", model_class.__name__)
    try:
        return load(str(folder), adata, *args, **kwargs)
    except OSError as error:
        raise UnreadableDataError(
            f"The files in {str(folder)!r} cannot be read: {error}. Copy them again, or pass "
            "`adata` if it is the saved data."
        ) from error


def check_saved_model(folder: Path, prefix: str, class_name: str) -> None:
    """Raise if a folder has no saved model of this class, or it is damaged."""
    path = folder / f"{prefix}{MODEL_FILE_NAME}"
    if not path.is_file():
        found = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else "nothing"
        raise UnreadableDataError(
            f"There is no saved model {str(path)!r}; in the folder there is {found}. Pass the "
            "folder that `save` wrote (and its `prefix`)."
        )
    try:
        check_archive(path)
        saved = torch.load(path, map_location="cpu", weights_only=False)
        attributes = {part: saved[part] for part in _PARTS}["attr_dict"]
        saved_name = attributes["registry_"][MODEL_NAME_KEY]
    except UNREADABLE as error:
        raise UnreadableDataError(
            f"{str(path)!r} is not a saved model, or is damaged or incomplete "
            f"({type(error).__name__}: {error}). Copy it again, or train and save again."
        ) from error
    if saved_name != class_name:
        raise UnreadableDataError(
            f"{str(path)!r} is a saved {saved_name}, not a {class_name}. Load it with "
            f"{saved_name}.load."
        )
