"""Predictions of a fit, and finished fits in a folder, identified by a fingerprint.

Fits are stored completely or not at all, whenever the process ends, and later damage is detected by
checksums. The fingerprint covers data, split, settings and package version.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Self

import anndata as ad
import joblib
import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams._files import PARTIAL, cannot_write, write_h5ad, write_whole
from scvi_sams.benchmark._screen import SIMULATION, Fold, Screen
from scvi_sams.exceptions import SAMSError
from scvi_sams.features._table import FeatureTable
from scvi_sams.splits._split import Split

logger = logging.getLogger("scvi.sams")

_STATUS = "status.json"
_PROFILES = "prediction.h5ad"
_CELLS = "cells.h5ad"
_CHECKSUMS = "sha256"
_TEXT = ("perturbation", "covariate", "mode", "metric", "status", "message")


Key = tuple[str | None, str]
"""Level of the covariate (``None`` without one) and label."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of one method on one fold."""

    profiles: ad.AnnData
    """Mean profiles: one row per predicted perturbation (and level of the covariate)."""
    cells: ad.AnnData | None
    """Predicted cells; ``None`` unless they are scored and the method predicts cells."""
    messages: dict[Key, str]
    """Reasons why the others have no prediction."""

    @classmethod
    def of(
        cls,
        fold: Fold,
        profiles: dict[Key, np.ndarray],
        cells: dict[Key, sparse.csr_matrix],
        messages: dict[Key, str],
    ) -> Self:
        """Concatenate profiles, and cells if there are any."""
        stacked = _stack({key: profile[None] for key, profile in profiles.items()}, fold)
        return cls(stacked, _stack(cells, fold) if cells else None, messages)


def _stack(rows: dict[Key, np.ndarray] | dict[Key, sparse.csr_matrix], fold: Fold) -> ad.AnnData:
    """Concatenate predictions, with label and level in ``obs``."""
    keys = [key for key, matrix in rows.items() for _ in range(matrix.shape[0])]
    obs = pd.DataFrame(
        {fold.columns.perturbation_key: pd.Series([label for _, label in keys], dtype=object)}
    )
    if fold.columns.covariate_key is not None:
        obs[fold.columns.covariate_key] = pd.Series([level for level, _ in keys], dtype=object)
    obs.index = obs.index.astype(str)
    matrices = list(rows.values())
    genes = fold.train.var_names
    if not matrices:
        expression = np.empty((0, len(genes)))
    elif sparse.issparse(matrices[0]):
        expression = sparse.csr_matrix(sparse.vstack(matrices))
    else:
        expression = np.concatenate(matrices)
    return ad.AnnData(expression, obs=obs, var=pd.DataFrame(index=genes.copy()))


@dataclass(frozen=True, eq=False)
class StoredFit:
    """Stored parts of a fit: predictions, and a record of everything else."""

    predictions: Predictions
    record: dict[str, Any]


class FitStore:
    """A folder with one folder per fit; without a folder nothing is stored.

    A fit is written to a temporary place and renamed, which is atomic: a killed process leaves all
    of it or nothing. Tables of scores are added in the same way. The record of a fit contains the
    checksums of its files and of itself; the name of a table contains its own.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.is_kept = folder is not None
        self.folder = Path(folder or ".") / "fits"
        self._splits = Path(folder or ".") / "splits"

    def prepare(self) -> None:
        """Create the folder, and remove incomplete fits of an earlier process.

        Raises
        ------
        SavingError
            If nothing can be written there.
        """
        if not self.is_kept:
            return
        try:
            for folder in (self.folder, self._splits):
                folder.mkdir(parents=True, exist_ok=True)
                for partial in folder.glob(f"**/{PARTIAL}*"):
                    if partial.is_dir():
                        shutil.rmtree(partial, ignore_errors=True)
                    else:
                        partial.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def keep_split(self, split: Split) -> None:
        """Write a split next to the fits, under its fingerprint."""
        if self.is_kept:
            split.save(self._splits / f"{split_fingerprint(split)[:16]}.npz")

    def place(self, method: str, seed: int, key: str) -> Path:
        """Folder of a fit."""
        readable = re.sub(r"[^A-Za-z0-9]+", "-", method).strip("-").lower()[:40]
        return self.folder / f"{readable}-seed{seed}-{key[:16]}"

    def load(self, place: Path, key: str) -> StoredFit | None:
        """Read the fit of a fingerprint; ``None`` if missing, or damaged (with a warning)."""
        if not self.is_kept or not _files_of_a_fit(place):
            return None
        try:
            record = _verified_record(place, key)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            logger.warning(
                f"The fit in {str(place)!r} is damaged and is repeated "
                f"({type(error).__name__}: {error})."
            )
            _clear(place)
            return None
        messages = {(level, label): text for level, label, text in record.pop("messages")}
        cells = ad.read_h5ad(place / _CELLS) if (place / _CELLS).exists() else None
        return StoredFit(Predictions(ad.read_h5ad(place / _PROFILES), cells, messages), record)

    def save(self, place: Path, fit: StoredFit) -> None:
        """Write a fit; a SavingError, and no file, if that fails."""
        messages = [[*key, text] for key, text in fit.predictions.messages.items()]
        partial = place.with_name(f"{PARTIAL}{uuid.uuid4().hex}")
        try:
            partial.mkdir(parents=True)
            write_h5ad(fit.predictions.profiles, partial / _PROFILES)
            if fit.predictions.cells is not None:
                write_h5ad(fit.predictions.cells, partial / _CELLS, compression="gzip")
            record = fit.record | {"messages": messages, _CHECKSUMS: _checksums(partial)}
            sealed = record | {"checksum": _checksum(_as_text(record).encode())}
            (partial / _STATUS).write_text(json.dumps(sealed, indent=1), encoding="utf-8")
            _move(partial, place)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise cannot_write(place, error) from error
            raise

    def load_scores(self, place: Path, key: str) -> pd.DataFrame | None:
        """Read a table of scores; ``None`` if missing, or damaged (with a warning)."""
        for path in place.glob(f"scores-{key[:16]}-*.csv"):
            if path.stem.endswith(_checksum(path.read_bytes())[:16]):
                return pd.read_csv(
                    path,
                    dtype=dict.fromkeys(_TEXT, str),
                    keep_default_na=False,
                    converters={"value": _exact, "chance": _exact},
                )
            logger.warning(f"The scores in {str(path)!r} are damaged and are computed again.")
            path.unlink()
        return None

    def save_scores(self, place: Path, key: str, scores: pd.DataFrame) -> None:
        """Write a table of scores next to the fit."""
        text = scores.to_csv(index=False).encode()
        path = place / f"scores-{key[:16]}-{_checksum(text)[:16]}.csv"
        write_whole(path, lambda partial: partial.write_bytes(text))


def _files_of_a_fit(place: Path) -> list[Path]:
    names = (_STATUS, _PROFILES, _CELLS)
    return [place / name for name in names if (place / name).exists()]


def _verified_record(place: Path, key: str) -> dict[str, Any]:
    """Read the record of a fit; an error if it, or a file that it names, has changed."""
    record = json.loads((place / _STATUS).read_text(encoding="utf-8"))
    if record.pop("checksum", None) != _checksum(_as_text(record).encode()):
        raise ValueError(f"{_STATUS} has changed")
    if record["key"] != key:
        raise ValueError("it belongs to other data or settings")
    found, written = _checksums(place), record.pop(_CHECKSUMS)
    if found != written:
        changed = [name for name in {**written, **found} if written.get(name) != found.get(name)]
        raise ValueError(f"{', '.join(changed)} has changed")
    return record


def _clear(place: Path) -> None:
    """Remove the files of a fit, and nothing else."""
    with suppress(OSError):
        for path in [*_files_of_a_fit(place), *place.glob("scores-*.csv")]:
            path.unlink()
        place.rmdir()


def _move(partial: Path, place: Path) -> None:
    try:
        os.rename(partial, place)
    except OSError:
        if not (place / _STATUS).exists():
            raise
        shutil.rmtree(partial)  # another process has already stored the same fit


def _checksums(folder: Path) -> dict[str, str]:
    files = [path for path in _files_of_a_fit(folder) if path.name != _STATUS]
    return {path.name: _checksum(path.read_bytes()) for path in files}


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _as_text(record: dict[str, Any]) -> str:
    return json.dumps(record, sort_keys=True)


def _exact(text: str) -> float:
    """Parse a number exactly, which pandas 2 does only on request, and pandas 3 always."""
    return float(text or "nan")


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
    """SHA-256 of counts, names, labels, covariates and features, and of simulated truth."""
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
    digest.update(
        settings_text([names, screen.columns, screen.labels.spelling, screen.target_sum]).encode()
    )
    if screen.features is not None:
        digest.update(screen.features.digest.encode())
    return digest.hexdigest()


def split_fingerprint(split: Split) -> str:
    """SHA-256 of the cells of a split and of what it holds out."""
    return fingerprint(vars(split))


def _plain(value: Any) -> Any:
    """Describe a value in types that JSON can store."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, FeatureTable):
        return ["FeatureTable", value.digest]
    if isinstance(value, (np.ndarray, pd.Series, pd.Index)):
        array = np.asarray(value)
        return [str(array.dtype), list(array.shape), joblib.hash(array)]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(settings_text(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, functools.partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, (Path, Enum)) or type(value).__module__.startswith("torch"):
        return str(value)
    if hasattr(value, "__dict__"):
        return [_plain(type(value)), _plain(vars(value))]
    raise SAMSError(
        f"The setting {value!r} cannot be described, so its results could not be recognised. "
        "Pass numbers, text, arrays or collections of these."
    )
