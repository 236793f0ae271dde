"""Saving and loading: whole files or none, and errors that say what is in the way."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scvi.model.base import BaseModelClass

from scvi_sams._compat import MODEL_FILE_NAME, MODEL_NAME_KEY
from scvi_sams.exceptions import SavingError, UnreadableDataError

_PARTS = ("model_state_dict", "var_names", "attr_dict")
_DAMAGED_OR_FOREIGN = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    AttributeError,
    ImportError,
    TypeError,
    pickle.UnpicklingError,
)
"""What torch and pickle raise on files that are cut short or are no saved model."""


def save_whole(
    model: BaseModelClass,
    save: Callable[..., None],
    dir_path: str | os.PathLike[str],
    overwrite: bool,
    save_anndata: bool,
    **kwargs: Any,
) -> None:
    """Save a model by ``save`` of scvi-tools beside the folder's files, then move it there."""
    folder = Path(dir_path)
    if folder.exists() and not overwrite:
        raise SavingError(
            f"{str(folder)!r} already exists. Save elsewhere, or pass overwrite=True."
        )
    if save_anndata and model.adata is None:
        raise SavingError("The model was loaded without data, so there is none to save.")
    for table in (model.history_ or {}).values():
        # Names of pandas 3 are of a type that pandas 2 lacks, and cannot read.
        table.columns = table.columns.astype(object)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving_") as scratch:
            save(scratch, overwrite=True, save_anndata=save_anndata, **kwargs)
            for file in Path(scratch).iterdir():
                file.replace(folder / file.name)
    except (OSError, RuntimeError) as error:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise SavingError(
            f"The model cannot be saved in {str(folder)!r}: {error}. Check that it is a folder "
            "that you may write to and that the disk is not full."
        ) from error


def check_saved_model(folder: Path, prefix: str, class_name: str) -> None:
    """Raise an error if there is no saved model of this class in a folder, or it is damaged."""
    path = folder / f"{prefix}{MODEL_FILE_NAME}"
    if not path.is_file():
        found = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else "nothing"
        raise UnreadableDataError(
            f"There is no saved model {str(path)!r}; in the folder there is {found}. Name the "
            "folder that `save` wrote (and its `prefix`)."
        )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=False)
        attributes = {part: saved[part] for part in _PARTS}["attr_dict"]
        saved_name = attributes["registry_"][MODEL_NAME_KEY]
    except _DAMAGED_OR_FOREIGN as error:
        raise UnreadableDataError(
            f"{str(path)!r} is no saved model, or is damaged or incomplete "
            f"({type(error).__name__}: {error}). Copy it again, or train and save anew."
        ) from error
    if saved_name != class_name:
        raise UnreadableDataError(
            f"{str(path)!r} is a saved {saved_name}, not a {class_name}. Load it with "
            f"{saved_name}.load."
        )
