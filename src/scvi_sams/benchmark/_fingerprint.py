"""What a result depends on, in a few characters: data, split, settings, package version."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd

from scvi_sams.benchmark._screen import SIMULATION, Screen
from scvi_sams.exceptions import SAMSError
from scvi_sams.splits._split import Split


def settings_text(value: Any) -> str:
    """Write settings as JSON, the same for equal settings in every process.

    Raises
    ------
    SAMSError
        If a setting cannot be described.
    """
    return json.dumps(_plain(value), sort_keys=True)


def fingerprint(*values: Any) -> str:
    """SHA-256 of some settings."""
    return hashlib.sha256(settings_text(list(values)).encode()).hexdigest()


def screen_fingerprint(screen: Screen) -> str:
    """SHA-256 of counts, names, labels and covariates, and of the truth of a simulated screen."""
    counts = screen.counts
    parts = [counts.X.data, counts.X.indices, counts.X.indptr]
    parts += [np.asarray(counts.obsm[key]) for key in sorted(counts.obsm)]
    if SIMULATION in counts.uns:
        parts.append(np.asarray(counts.uns[SIMULATION].get("true_masks", ())))
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).tobytes())
    obs = counts.obs.astype(str)
    for column in sorted(obs):
        digest.update(json.dumps([column, obs[column].tolist()]).encode())
    names = [counts.obs_names.tolist(), counts.var_names.tolist()]
    digest.update(settings_text([names, screen.columns, screen.target_sum]).encode())
    return digest.hexdigest()


def split_fingerprint(split: Split) -> str:
    """SHA-256 of the cells of a split and of what it holds out."""
    return fingerprint(vars(split))


def _plain(value: Any) -> Any:
    """Describe a value by what JSON can hold."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (np.ndarray, pd.Series, pd.Index)):
        array = np.asarray(value)
        return [str(array.dtype), list(array.shape), joblib.hash(array)]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(settings_text(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (Path, Enum)):
        return str(value)
    if isinstance(value, functools.partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if type(value).__module__.startswith("torch"):
        return str(value)
    if hasattr(value, "__dict__"):
        return [_plain(type(value)), _plain(vars(value))]
    raise SAMSError(
        f"The setting {value!r} cannot be described, so its results could not be recognised. Pass "
        "numbers, text, arrays or collections of these."
    )
