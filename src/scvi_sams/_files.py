"""Write files completely or not at all."""

from __future__ import annotations

import os
import pickle
import uuid
import zipfile
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import h5py
from anndata import AnnData
from anndata.io import write_elem

from scvi_sams.exceptions import SavingError

UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    AttributeError,
    ImportError,
    TypeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
"""Errors of torch and pickle for truncated files, or files with other content."""
PARTIAL = ".partial-"
"""Prefix of the names of files that are being written."""


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let a function write a temporary file, then move it to its place in one step.

    If the disk is full or ``write`` is interrupted, an existing file is unchanged.

    Raises
    ------
    SavingError
        If it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f"{PARTIAL}{uuid.uuid4().hex}{path.suffix}")
    try:
        write(partial)
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_write(path, error) from error
        raise


def write_h5ad(adata: AnnData, path: str | os.PathLike[str], **dataset_kwargs: Any) -> None:
    """Write an AnnData; an OSError if the disk is full.

    HDF5 is not informed of a failed write: it would try again when Python exits, and crash with a
    segmentation fault.
    """
    with _Disk(path, "w+") as disk:
        try:
            with h5py.File(disk, "w") as file:
                write_elem(file, "/", adata, dataset_kwargs=dataset_kwargs)
        except Exception as error:
            if disk.failed is not None:  # HDF5 has read data that were never written
                raise disk.failed from error
            raise
        if disk.failed is not None:
            raise disk.failed


class _Disk(FileIO):
    """A file that stores its first write error."""

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all data, or nothing after the first failure."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while self.failed is None and len(rest):
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.failed = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Change the size of the file."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.failed = self.failed or error
            return size or 0


def check_archive(path: str | os.PathLike[str]) -> None:
    """Raise BadZipFile if a file written by torch is truncated, or one of its bits has changed.

    torch itself does not detect changed numbers.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def cannot_write(path: str | os.PathLike[str], error: BaseException) -> SavingError:
    """Create the error for a file or folder that cannot be written, with the reason."""
    return SavingError(
        f"{os.fspath(path)!r} cannot be written: {error}. Check that the disk is not full and that "
        "you may write there."
    )
