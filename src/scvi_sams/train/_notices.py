"""Keeps the notices of other packages out of what ``train`` prints."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_NOTICES = logging.getLogger("lightning.pytorch.utilities.rank_zero")
_WARNINGS_OF_NO_USE = (
    # Lightning's use of torch, which users cannot change.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # Means are logged per epoch.
    "The number of training batches .* is smaller than the logging interval",
)


@contextmanager
def without_notices() -> Iterator[None]:
    """Do not print Lightning's lines on devices, its tips and two of its warnings.

    Its other warnings and errors appear as usual, and so do its lines if a level was set for its
    logger, as in ``logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel("INFO")``.
    """
    level = _NOTICES.level
    if level == logging.NOTSET:
        _NOTICES.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in _WARNINGS_OF_NO_USE:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        _NOTICES.setLevel(level)
