"""Finished fits in a folder: whole or not there, whenever the process ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd

from scvi_sams.benchmark._predictions import Predictions

_STATUS = "status.json"
_PROFILES = "prediction.h5ad"
_CELLS = "cells.h5ad"
_PARTIAL = ".partial-"
_TEXT = ("perturbation", "covariate", "mode", "metric", "status", "message")


@dataclass(frozen=True, eq=False)
class StoredFit:
    """What is kept of a fit: predictions, and a record of all else."""

    predictions: Predictions
    record: dict[str, Any]


class FitStore:
    """A folder with one folder per fit.

    A fit is written beside its place and renamed, which is one step of the file system: a process
    that is killed leaves either nothing or all of it. Tables of scores are added in the same way.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder) / "fits"

    def prepare(self) -> None:
        """Make the folder, and clear away what an earlier process did not finish."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for partial in self.folder.glob(f"**/{_PARTIAL}*"):
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink(missing_ok=True)

    def place(self, method: str, seed: int, key: str) -> Path:
        """Folder of a fit."""
        readable = re.sub(r"[^A-Za-z0-9]+", "-", method).strip("-").lower()[:40]
        return self.folder / f"{readable}-seed{seed}-{key[:16]}"

    def load(self, place: Path) -> StoredFit | None:
        """Read a fit; ``None`` if it is not there."""
        if not (place / _STATUS).exists():
            return None
        record = json.loads((place / _STATUS).read_text(encoding="utf-8"))
        messages = {(level, label): text for level, label, text in record.pop("messages")}
        cells = ad.read_h5ad(place / _CELLS) if (place / _CELLS).exists() else None
        return StoredFit(Predictions(ad.read_h5ad(place / _PROFILES), cells, messages), record)

    def save(self, place: Path, fit: StoredFit) -> None:
        """Write a fit."""
        messages = [[*key, text] for key, text in fit.predictions.messages.items()]
        partial = place.with_name(f"{_PARTIAL}{uuid.uuid4().hex}")
        partial.mkdir(parents=True)
        fit.predictions.profiles.write_h5ad(partial / _PROFILES)
        if fit.predictions.cells is not None:
            fit.predictions.cells.write_h5ad(partial / _CELLS, compression="gzip")
        status = json.dumps(fit.record | {"messages": messages}, indent=1)
        (partial / _STATUS).write_text(status, encoding="utf-8")
        try:
            os.rename(partial, place)
        except OSError:
            if not (place / _STATUS).exists():
                raise
            shutil.rmtree(partial)  # another process was first, with the same fit

    def load_scores(self, place: Path, key: str) -> pd.DataFrame | None:
        """Read a table of scores; ``None`` if it is not there."""
        path = _scores_path(place, key)
        if not path.exists():
            return None
        return pd.read_csv(
            path,
            dtype=dict.fromkeys(_TEXT, str),
            keep_default_na=False,
            converters={"value": _number, "chance": _number},
        )

    def save_scores(self, place: Path, key: str, scores: pd.DataFrame) -> None:
        """Write a table of scores beside the fit."""
        write_whole(_scores_path(place, key), lambda path: scores.to_csv(path, index=False))


def _number(text: str) -> float:
    """Exactly the number that was written; pandas' own parser may be off by the last bit."""
    return float(text) if text else float("nan")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and rename it."""
    partial = path.with_name(f"{_PARTIAL}{uuid.uuid4().hex}{path.suffix}")
    write(partial)
    os.replace(partial, path)


def _scores_path(place: Path, key: str) -> Path:
    return place / f"scores-{key[:16]}.csv"
