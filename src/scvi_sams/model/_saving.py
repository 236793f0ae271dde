"""Saving and loading: whole files or none, and errors that say what is in the way."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from anndata import AnnData
from scvi.model.base import BaseModelClass

from scvi_sams._checks import check_anndata
from scvi_sams._compat import MODEL_FILE_NAME, MODEL_NAME_KEY
from scvi_sams.exceptions import RegistrationError, SavingError, UnreadableDataError

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


class SavingMixin(BaseModelClass):
    """Adds to :meth:`save` and :meth:`load` of scvi-tools that nothing is half done."""

    def save(
        self,
        dir_path: str | os.PathLike[str],
        prefix: str | None = None,
        overwrite: bool = False,
        save_anndata: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the model in a folder; files appear there only once they are complete.

        Parameters
        ----------
        dir_path
            Folder, which is made.
        prefix
            Of the names of the files.
        overwrite
            Whether files of an earlier save may be replaced.
        save_anndata
            Whether the training data is saved too.
        **kwargs
            See :meth:`scvi.model.base.BaseModelClass.save`.

        Raises
        ------
        SavingError
            If the folder exists and ``overwrite`` is false, or nothing can be written there. What
            was there before is as it was.
        """
        folder = Path(dir_path)
        if folder.exists() and not overwrite:
            raise SavingError(
                f"{str(folder)!r} already exists. Save elsewhere, or pass overwrite=True."
            )
        if save_anndata and self.adata is None:
            raise SavingError("The model was loaded without data, so there is none to save.")
        self._make_history_readable_by_pandas_2()
        is_new = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".saving_") as scratch:
                super().save(scratch, prefix, overwrite=True, save_anndata=save_anndata, **kwargs)
                for file in Path(scratch).iterdir():
                    file.replace(folder / file.name)
        except (OSError, RuntimeError) as error:
            if is_new:
                shutil.rmtree(folder, ignore_errors=True)
            raise SavingError(
                f"The model cannot be saved in {str(folder)!r}: {error}. Check that it is a folder "
                "that you may write to and that the disk is not full."
            ) from error

    def _make_history_readable_by_pandas_2(self) -> None:
        """Give tables names of type object: those of pandas 3 are of one that pandas 2 lacks."""
        for table in (self.history_ or {}).values():
            table.columns = table.columns.astype(object)

    @classmethod
    def load(
        cls,
        dir_path: str | os.PathLike[str],
        adata: AnnData | bool | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Load a model from the folder that :meth:`save` wrote.

        Reading a saved model executes code that is in it, as scvi-tools reads it with pickle: load
        only models from people whom you trust.

        Parameters
        ----------
        dir_path
            That folder.
        adata
            Cells with the genes of the training data, which need not be registered; ``None`` for
            those saved with the model, ``False`` for none.
        *args, **kwargs
            See :meth:`scvi.model.base.BaseModelClass.load`, such as ``accelerator`` and ``prefix``.

        Raises
        ------
        UnreadableDataError
            If there is no saved model in the folder, it is damaged, or it is one of another class.
        SAMSError
            If ``adata`` does not fit the model.
        """
        if adata is not None and adata is not False:
            check_anndata(RegistrationError, adata=adata)
        folder = Path(dir_path)
        if kwargs.get("backup_url") is None:
            _check_saved_model(folder, kwargs.get("prefix") or "", cls.__name__)
        try:
            return super().load(str(folder), adata, *args, **kwargs)
        except OSError as error:
            raise UnreadableDataError(
                f"The files in {str(folder)!r} cannot be read: {error}. Copy them again, or pass "
                "`adata` if it is the saved data."
            ) from error


def _check_saved_model(folder: Path, prefix: str, class_name: str) -> None:
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
