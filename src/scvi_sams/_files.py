"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import pickle
import uuid
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

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
"""What torch and pickle raise on files that are cut short, or hold something else."""
PARTIAL = ".partial-"
"""What names of files begin with that are being written."""


def write_whole(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let a function write a file beside its place, then move it there, in one step.

    On a full disk, or where ``write`` is interrupted, what was there before is as it was.

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


def check_archive(path: str | os.PathLike[str]) -> None:
    """Raise BadZipFile if a file that torch wrote is cut short, or a bit of it has changed.

    torch itself reads changed numbers as they are.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def cannot_write(path: str | os.PathLike[str], error: BaseException) -> SavingError:
    """Say that a file or folder cannot be written, and why."""
    return SavingError(
        f"{os.fspath(path)!r} cannot be written: {error}. Check that the disk is not full and that "
        "you may write there."
    )
