"""One fit of one method: load or train, predict, score."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from threadpoolctl import threadpool_limits

from scvi_sams.baselines._simple import PerturbationMean, mean_of_halves
from scvi_sams.benchmark._definitions import FAILURES
from scvi_sams.benchmark._methods import Method
from scvi_sams.benchmark._model import Extra, Fitted
from scvi_sams.benchmark._screen import Fold, Screen, make_fold
from scvi_sams.benchmark._store import (
    FitStore,
    Key,
    Predictions,
    StoredFit,
    fingerprint,
    settings_text,
)
from scvi_sams.exceptions import SavingError, UnknownPerturbationError
from scvi_sams.metrics._comparison import Options, Side, read_side
from scvi_sams.metrics._observed import check_predicted
from scvi_sams.metrics._scoring import METRICS, metrics_by_mode, score_sides
from scvi_sams.splits._split import Split
from scvi_sams.train._interruption import interrupts_raise

_SINGLE_CELL = "A single test cell cannot be halved."


@dataclass(frozen=True)
class ScoreOptions:
    """Scores to compute; see :func:`scvi_sams.evaluation.score_predictions`."""

    modes: tuple[str, ...]
    target_genes: Mapping[str, str | Sequence[str]] | None
    n_top_genes: int

    @property
    def keep_cells(self) -> bool:
        """Whether a mode requires predicted cells."""
        return any(_needs(mode) == {"cells"} for mode in self.modes)


@dataclass(frozen=True, eq=False)
class Task:
    """A method and a seed; ``method`` is ``None`` for the positive control."""

    name: str
    method: Method | None
    seed: int
    split: Split
    key: str
    versions: dict[str, str]


def run_task(
    task: Task,
    screen: Screen,
    options: ScoreOptions,
    store: FitStore,
    n_threads: int | None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Load or compute the fit, score it, store it, and describe how it ran."""
    score_key = fingerprint(options, task.versions, screen.reference)
    place = store.place(task.name, task.seed, task.key)
    kept = store.load(place, task.key)
    scores = None if kept is None else store.load_scores(place, score_key)
    if kept is not None and scores is not None:
        return _outcome(task, scores, kept, from_folder=True)
    with _limited_threads(n_threads):
        fold = make_fold(screen, task.split)
        if task.method is None:
            # Halves of cells are fast to compute: only scores are stored.
            started = time.perf_counter()
            predictions, scored = half_of_test_cells(fold, task.seed, keep_cells=options.keep_cells)
            fit = StoredFit(predictions, _record(task, "ok", "", [], started))
        else:
            scored = fold
            with interrupts_raise():  # an interrupted training must not be scored or stored
                fit = kept or _fit(task, task.method, fold, options)
        tables = [
            _score_fold(scored, fit.predictions, options),
            _extra_rows([Extra(**extra) for extra in fit.record["extras"]]),
        ]
    # Profiles have no distances between cells: there may be nothing to score.
    filled = [table for table in tables if len(table)] or tables[-1:]
    scores = pd.concat(filled, ignore_index=True)
    scores["message"] = scores["message"].fillna("")
    if "covariate" in scores:
        scores["covariate"] = scores["covariate"].fillna("all")
    not_kept = ""
    if store.is_kept and fit.record["status"] == "ok":
        try:
            if kept is None:
                store.save(place, fit)
            store.save_scores(place, score_key, scores)
        except SavingError as error:  # continue: the fit is more important than the folder
            not_kept = f"not kept: {error}"
    return _outcome(task, scores, fit, from_folder=kept is not None, not_kept=not_kept)


def _outcome(
    task: Task, scores: pd.DataFrame, fit: StoredFit, *, from_folder: bool, not_kept: str = ""
) -> tuple[pd.DataFrame, dict[str, Any]]:
    named = {"method": task.name, "seed": task.seed}
    told = {key: fit.record[key] for key in ("status", "message", "seconds")}
    told["message"] = told["message"] or not_kept
    # Starts with the columns that identify the task.
    scores = pd.DataFrame(named, index=scores.index).join(scores)
    return scores, named | told | {"from_folder": from_folder}


def _fit(task: Task, method: Method, fold: Fold, options: ScoreOptions) -> StoredFit:
    started = time.perf_counter()
    try:
        fitted = method.fit(fold, task.seed)
    except Exception as error:  # noqa: BLE001 - any error of a method is a row of the table
        message = describe_error(error)
        nothing = Predictions.of(fold, {}, {}, dict.fromkeys(fold.perturbations, message))
        return StoredFit(nothing, _record(task, "failed", message, [], started))
    predictions = predict_all(fitted, fold, keep_cells=options.keep_cells)
    try:
        extras = fitted.extras()
    except Exception as error:  # noqa: BLE001 - as above
        extras = [Extra("model", "extras", np.nan, 0, "failed", describe_error(error))]
    return StoredFit(predictions, _record(task, "ok", "", extras, started))


def predict_all(fitted: Fitted, fold: Fold, *, keep_cells: bool) -> Predictions:
    """Predict every tested perturbation; a failure of one does not stop the others."""
    profiles: dict[Key, np.ndarray] = {}
    cells: dict[Key, sparse.csr_matrix] = {}
    messages: dict[Key, str] = {}

    @cache
    def shift(level: str) -> np.ndarray:
        """Difference of the training control cells of a level from all of them."""
        of_level, of_all = (
            fold.train.X[fold.training_controls(chosen)].mean(axis=0) for chosen in (level, None)
        )
        return np.asarray(of_level - of_all).ravel()

    for level, label in fold.perturbations:
        try:
            profile = fitted.profile(label, level)
            if profile is not None and not keep_cells:
                profiles[level, label] = profile
                continue
            rows = _rows(fitted.predict(label, level), fold, level, label, shift)
            if profile is None:
                profile = np.asarray(rows.mean(axis=0, dtype=np.float64)).ravel()
            profiles[level, label] = profile
            if keep_cells and fitted.predict_cells is not None:
                rows = fitted.predict_cells(level)
            if keep_cells and rows.shape[0] > 1:
                cells[level, label] = sparse.csr_matrix(rows)
        except Exception as error:  # noqa: BLE001 - any error of a method is a row of the table
            messages[level, label] = describe_error(error)
    return Predictions.of(fold, profiles, cells, messages)


def half_of_test_cells(fold: Fold, seed: int, *, keep_cells: bool) -> tuple[Predictions, Fold]:
    """Predict by halves of cells, level by level; also return the fold to score it on.

    This is the positive control, as in :func:`split_half`.
    """
    observed, labels = fold.observed, fold.observed_labels
    levels, name_of = fold.columns.levels(observed), labels.canonical
    group = np.zeros(observed.n_obs) if levels is None else levels
    profiles: dict[Key, np.ndarray] = {}
    cells: dict[Key, sparse.csr_matrix] = {}
    messages: dict[Key, str] = {}
    scored = [np.flatnonzero(labels.is_control)]
    for name in pd.unique(group):
        level = None if levels is None else name
        positions = np.flatnonzero(group == name)
        n_cells = pd.Series(name_of[positions]).value_counts()
        alone = set(n_cells.index[n_cells == 1]) - {labels.control}
        messages |= {(level, label): _SINGLE_CELL for label in alone}
        is_alone = np.isin(name_of[positions], list(alone))
        scored.append(positions[is_alone])
        positions = positions[~is_alone]
        if labels.is_control[positions].all():
            continue
        genes = observed.var_names
        means, places = mean_of_halves(observed.X[positions], labels[positions], genes, seed)
        half = positions[places]
        scored.append(np.delete(positions, places))
        for label, profile in zip(means.obs_names, np.asarray(means.X), strict=True):
            profiles[level, label] = profile
            if keep_cells:
                cells[level, label] = observed.X[half[name_of[half] == label]]
    kept = np.unique(np.concatenate(scored))
    scored_on = replace(fold, observed=observed[kept], observed_labels=labels[kept])
    return Predictions.of(fold, profiles, cells, messages), scored_on


def describe_error(error: BaseException) -> str:
    """Name and message of an error."""
    return f"{type(error).__name__}: {error}"


def _rows(
    prediction: ad.AnnData,
    fold: Fold,
    level: str | None,
    label: str,
    shift: Callable[[str], np.ndarray],
) -> np.ndarray | sparse.csr_matrix:
    """Predicted rows of one perturbation and level, genes as in the data."""
    covariate_key = fold.columns.covariate_key
    knows_level = level is None or covariate_key in prediction.obs
    if level is not None and knows_level:
        prediction = prediction[(prediction.obs[covariate_key].astype(str) == level).to_numpy()]
    if prediction.n_obs == 0:
        at = "" if level is None else f" in {level!r}"
        raise UnknownPerturbationError(f"There is no predicted row for {label!r}{at}.")
    genes = fold.train.var_names
    check_predicted(genes, prediction.var_names)
    if not prediction.var_names.equals(genes):
        prediction = prediction[:, genes]
    rows = prediction.X
    if level is None or knows_level:
        return rows if sparse.issparse(rows) else np.asarray(rows)
    dense = rows.toarray() if sparse.issparse(rows) else np.asarray(rows)
    return np.maximum(dense + shift(level), 0)


def _score_fold(fold: Fold, predictions: Predictions, options: ScoreOptions) -> pd.DataFrame:
    """Score mean profiles, and cells if there are any; name failures and their reasons."""
    genes, labels = fold.observed.var_names, fold.observed_labels
    observed = Side(sparse.csr_array(fold.observed.X), labels, fold.columns.levels(fold.observed))
    chosen = Options(options.target_genes, _centroid(fold), options.n_top_genes)
    profiles = _on_reference(predictions.profiles, fold)
    scores = []
    for predicted, modes in (
        (profiles, [mode for mode in options.modes if _needs(mode) != {"cells"}]),
        (predictions.cells, [mode for mode in options.modes if "cells" in _needs(mode)]),
    ):
        if predicted is None or not modes:
            continue
        keys = fold.columns.perturbation_key, fold.columns.covariate_key
        side = read_side(predicted, genes, "predicted", *keys, labels.spelling)
        table = score_sides(side, observed, genes, modes, chosen)
        if predicted is predictions.cells:
            # All methods are compared by their profiles; cells add metrics that require cells.
            rows = zip(table["mode"], table["metric"], strict=True)
            table = table[[METRICS[row].needs == "cells" for row in rows]]
        scores.append(table if observed.levels is not None else table.drop(columns="covariate"))
    if not scores:
        return pd.DataFrame()
    return _explained(pd.concat(scores, ignore_index=True), fold, predictions.messages)


def _on_reference(profiles: ad.AnnData, fold: Fold) -> ad.AnnData:
    """Profiles whose effects, relative to training controls, are relative to the reference."""
    if not fold.has_own_reference:
        return profiles
    profiles = profiles.copy()
    levels = fold.columns.levels(profiles)
    moved = np.asarray(profiles.X, dtype=np.float64)
    for level in [None] if levels is None else pd.unique(levels):
        rows = slice(None) if levels is None else levels == level
        moved[rows] += fold.difference_of_controls(level)
    profiles.X = moved
    return profiles


def _needs(mode: str) -> set[str | None]:
    """Kinds of predictions that the metrics of a mode require."""
    return {metric.needs for metric in metrics_by_mode()[mode]}


def _extra_rows(extras: Sequence[Extra]) -> pd.DataFrame:
    """Rows of the scores of a whole fit."""
    columns = [field.name for field in fields(Extra)]
    return pd.DataFrame([vars(extra) for extra in extras], columns=columns).assign(
        perturbation="all", higher_is_better=True, chance=np.nan
    )


def _centroid(fold: Fold) -> np.ndarray | None:
    """Mean over training perturbations of their means, the reference of Systema.

    Computed by the baseline that predicts it, so that this baseline is exactly equal to it: a
    correlation would turn a rounding difference into an effect.
    """
    if fold.columns.covariate_key is not None:
        return None
    baseline = PerturbationMean()._fit(fold.train.X, fold.train_labels, fold.train.var_names)
    return np.asarray(_on_reference(baseline.predict(["any perturbation"]), fold).X)[0]


def _explained(scores: pd.DataFrame, fold: Fold, messages: Mapping[Key, str]) -> pd.DataFrame:
    if fold.columns.covariate_key is None:
        keys = [(None, label) for label in scores["perturbation"]]
    else:
        keys = list(zip(scores["covariate"], scores["perturbation"], strict=True))
    message = pd.Series([messages.get(key, "") for key in keys], index=scores.index, dtype=object)
    failed = scores["status"].eq("missing") & message.ne("")
    scores["status"] = scores["status"].mask(failed, "failed")
    of_all = scores["perturbation"].eq("all") & scores["status"].isin(FAILURES)
    n_failed = len(messages)
    message[of_all] = (
        f"{n_failed} of {len(fold.perturbations)} predictions failed and count as no effect"
        if n_failed
        else "a prediction that is not finite counts as no effect"
    )
    not_finite = scores["status"].eq("nan") & message.eq("")
    message[not_finite] = "the prediction contains values that are not finite"
    return scores.assign(message=message)


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
