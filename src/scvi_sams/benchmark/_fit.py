"""One fit of one method: load or train, predict, score."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from scvi_sams.benchmark._controls import half_of_test_cells
from scvi_sams.benchmark._extras import Extra
from scvi_sams.benchmark._fingerprint import fingerprint, settings_text
from scvi_sams.benchmark._methods import Method
from scvi_sams.benchmark._predictions import (
    Predictions,
    describe_error,
    predict_all,
    stack_predictions,
)
from scvi_sams.benchmark._scoring import ScoreOptions, extra_rows, score_fold
from scvi_sams.benchmark._screen import Fold, Screen, make_fold
from scvi_sams.benchmark._store import FitStore, StoredFit
from scvi_sams.splits._split import Split


@dataclass(frozen=True, eq=False)
class Task:
    """A method and a seed; ``method`` is ``None`` for the positive control."""

    name: str
    method: Method | None
    seed: int
    split: Split
    key: str
    versions: dict[str, str]


@dataclass(frozen=True, eq=False)
class Outcome:
    """Scores of a task, and how it ran."""

    scores: pd.DataFrame
    run: dict[str, object]


def run_task(
    task: Task,
    screen: Screen,
    options: ScoreOptions,
    store: FitStore | None,
    n_threads: int | None,
) -> Outcome:
    """Load the fit or make it, score it, and keep what was made."""
    score_key = fingerprint(options, task.versions)
    place = None if store is None else store.place(task.name, task.seed, task.key)
    kept = None if store is None or place is None else store.load(place)
    if store is not None and place is not None and kept is not None:
        scores = store.load_scores(place, score_key)
        if scores is not None:
            return Outcome(_of(task, scores), _run(task, kept, from_folder=True))
    with _limited_threads(n_threads):
        fold = make_fold(screen, task.split)
        if task.method is None:
            # Two halves of cells cost nothing: only scores are worth keeping.
            started = time.perf_counter()
            predictions, scored = half_of_test_cells(fold, task.seed, keep_cells=options.keep_cells)
            fit = StoredFit(predictions, _record(task, "ok", "", [], started))
        else:
            scored = fold
            fit = kept or _fit(task, task.method, fold, options)
        tables = [
            score_fold(scored, fit.predictions, options),
            extra_rows([Extra(**extra) for extra in fit.record["extras"]]),
        ]
    # A profile has no distance between cells: there may be nothing to score.
    filled = [table for table in tables if len(table)] or tables[-1:]
    scores = pd.concat(filled, ignore_index=True)
    scores["message"] = scores["message"].fillna("")
    if "covariate" in scores:
        scores["covariate"] = scores["covariate"].fillna("all")
    if store is not None and place is not None and fit.record["status"] == "ok":
        if kept is None:
            store.save(place, fit)
        store.save_scores(place, score_key, scores)
    return Outcome(_of(task, scores), _run(task, fit, from_folder=kept is not None))


def _fit(task: Task, method: Method, fold: Fold, options: ScoreOptions) -> StoredFit:
    started = time.perf_counter()
    try:
        fitted = method.fit(fold, task.seed)
    except Exception as error:  # noqa: BLE001 - whatever a method raises is a row of the table
        message = describe_error(error)
        nothing = Predictions(
            stack_predictions({}, fold), None, dict.fromkeys(fold.perturbations, message)
        )
        return StoredFit(nothing, _record(task, "failed", message, [], started))
    predictions = predict_all(fitted, fold, keep_cells=options.keep_cells)
    try:
        extras = fitted.extras()
    except Exception as error:  # noqa: BLE001 - as above
        extras = [Extra("model", "extras", np.nan, 0, "failed", describe_error(error))]
    return StoredFit(predictions, _record(task, "ok", "", extras, started))


def _record(
    task: Task, status: str, message: str, extras: list[Extra], started: float
) -> dict[str, object]:
    return {
        "method": task.name,
        "seed": task.seed,
        "status": status,
        "message": message,
        "seconds": time.perf_counter() - started,
        "key": task.key,
        "versions": task.versions,
        "settings": None if task.method is None else settings_text(task.method.description()),
        "extras": [vars(extra) for extra in extras],
    }


def _of(task: Task, scores: pd.DataFrame) -> pd.DataFrame:
    scores = scores.copy()
    scores.insert(0, "method", task.name)
    scores.insert(1, "seed", task.seed)
    return scores


def _run(task: Task, fit: StoredFit, *, from_folder: bool) -> dict[str, object]:
    return {
        "method": task.name,
        "seed": task.seed,
        "status": fit.record["status"],
        "message": fit.record["message"],
        "seconds": fit.record["seconds"],
        "from_folder": from_folder,
    }


@contextmanager
def _limited_threads(n_threads: int | None) -> Iterator[None]:
    if n_threads is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        with threadpool_limits(n_threads):
            yield
    finally:
        torch.set_num_threads(before)
