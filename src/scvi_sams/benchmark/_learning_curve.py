"""Performance of methods with few and with many training cells of each perturbation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from scvi_sams._checks import as_list, check_integer, check_number
from scvi_sams.benchmark._definitions import FAILURES
from scvi_sams.benchmark._fit import ScoreOptions
from scvi_sams.benchmark._methods import resolve_methods
from scvi_sams.benchmark._model import ModelMethod
from scvi_sams.benchmark._run import as_seeds, columns_of_models, run_methods
from scvi_sams.benchmark._screen import Columns, Reference, make_screen, sizes
from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.labels._labels import Labels
from scvi_sams.labels._spelling import Control
from scvi_sams.labels._stratified import stratified_split
from scvi_sams.metrics._observed import labels_of
from scvi_sams.splits._split import Split, make_split

_RANK = ("perturbench", "rank_rmse_average")
_MODES = ("sams", "perturbench")


def learning_curve(
    adata: ad.AnnData,
    methods: Mapping[str, Any] | Sequence[str],
    *,
    cells: Sequence[int | None] = (10, 20, 50, 100, None),
    seeds: Sequence[int] = (0, 1, 2),
    train_size: float = 0.5,
    perturbation_key: str = "perturbation",
    control: Control = "control",
    delimiter: str | None = "+",
    layer: str | None = None,
    batch_key: str | None = None,
    size_factor_key: str | None = None,
    target_sum: float | None = None,
    reference: Reference = "all",
    versions: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
    n_jobs: int | None = None,
    progress_bar: bool = True,
) -> pd.DataFrame:
    """Score methods fitted to different numbers of cells of each perturbation.

    For each seed the cells of every label are divided at random into cells that may train and test
    cells. Of the former, a number of cells of each perturbation (and combination) train, where
    larger numbers include the smaller ones; all control cells among them always train. Test cells
    are the same for all numbers. Fits and scores are those of :func:`benchmark`, with the same
    controls: ``"control mean"``, ``"mean of perturbations"``, and ``"half of the test cells"``,
    which does not depend on the number of training cells. Both of its sides are half of the test
    cells, so methods can exceed it if they train on more cells.

    Parameters
    ----------
    adata
        Counts, cells x genes. Not changed.
    methods
        As for :func:`benchmark`. Models use some of the training cells for their own validation, as
        in ``train``; all others are fitted to all of them.
    cells
        Training cells of each perturbation; ``None`` is all that may train. Perturbations with
        fewer cells train with what they have.
    seeds
        Seeds of splits and methods.
    train_size
        Fraction of the cells of each label that may train.
    perturbation_key, control, delimiter, layer, batch_key, size_factor_key
        As for :func:`benchmark`.
    target_sum
        Total to which cells are normalised; ``None``: the median size of all cells, so that errors
        are in the same units for all fits.
    reference
        As for :func:`benchmark`; ``"test"`` is fair to methods that shrink their effects.
    versions, folder, n_jobs, progress_bar
        As for :func:`benchmark`.

    Returns
    -------
    One row per number of cells, method and seed:

    - ``method``; ``cells_per_perturbation``, as requested (missing for ``None``);
      ``n_cells``, the median over perturbations of the number of training cells; ``seed``.
    - ``pearson``, ``rmse``: of predicted and observed average treatment effects, over all
      perturbations x genes together. An effect is the difference of mean
      ``log2(1 + target_sum * x / size)`` from the control cells of ``reference``. A failed
      prediction counts as no effect.
    - ``mean_pearson``: mean over perturbations of the correlation over genes.
    - ``rank``: mean over perturbations of the rank of a prediction among those of all perturbations
      by its distance to the observation, 0 best, 0.5 chance (``rank_rmse_average``).
    - ``n_failed``: number of failed perturbations, and ``message``, the reason of the first.
      Means are then NaN, except for the rank, which has its worst value.

    Raises
    ------
    InvalidArgumentError
        If ``cells`` or ``seeds`` are not whole numbers of at least 1 (seeds: 0), ``cells`` contains
        a number twice, or ``train_size`` is not between 0 and 1.
    SAMSError, KeyboardInterrupt
        As for :func:`benchmark`.

    See Also
    --------
    scvi_sams.pl.learning_curve : plots the table.

    Examples
    --------
    >>> curve = scvi_sams.evaluation.learning_curve(
    ...     adata, ["training mean"], cells=(5, None), seeds=[0], progress_bar=False
    ... )
    >>> mean = curve[curve["method"] == "training mean"].set_index("n_cells")
    >>> mean.index.tolist()  # six pairs and eight singles, of 30 and 60 cells
    [5.0, 30.0]
    >>> bool(mean.loc[30, "rmse"] < mean.loc[5, "rmse"])
    True
    """
    numbers = _as_numbers_of_cells(cells)
    seeds = as_seeds(seeds)
    check_number(above=0, below=1, train_size=train_size)
    chosen = {
        name: replace(method, n_iwelbo_samples=None) if isinstance(method, ModelMethod) else method
        for name, method in resolve_methods(methods).items()
    }
    labels = labels_of(adata, perturbation_key, control, delimiter)
    screen = make_screen(
        adata,
        labels,
        Columns(perturbation_key, None, batch_key, size_factor_key),
        layer=layer,
        target_sum=target_sum,
        other_columns=columns_of_models(chosen.values(), adata),
        reference=reference,
    )
    if target_sum is None:
        size = sizes(screen.counts.X, screen.counts.obs, screen.columns)
        screen = replace(screen, target_sum=float(np.median(size)))
    splits_of = {
        number: {seed: _split(labels, number, train_size, seed) for seed in seeds}
        for number in numbers
    }
    tables = []
    for number, splits in splits_of.items():
        result = run_methods(
            chosen,
            screen,
            splits,
            ScoreOptions(_MODES, target_genes=None, n_top_genes=20),
            versions=versions,
            folder=folder,
            n_jobs=n_jobs,
            progress_bar=progress_bar,
        )
        n_cells = {seed: _median_cells(labels, split) for seed, split in splits.items()}
        tables.append(_summarised(result.scores, number, n_cells))
    curve = pd.concat(tables, ignore_index=True)
    return curve.astype({"cells_per_perturbation": "Int64", "message": str})


def _as_numbers_of_cells(cells: object) -> list[int | None]:
    numbers = as_list("cells", cells, "numbers of cells or None")
    for number in numbers:
        if number is not None:
            check_integer(cells=number)
    if not numbers or len(set(numbers)) < len(numbers):
        raise InvalidArgumentError(f"`cells` is {numbers}; pass at least one number, each once.")
    return [None if number is None else int(number) for number in numbers]


def _split(labels: Labels, number: int | None, train_size: float, seed: int) -> Split:
    """Same test cells for any number of training cells, which are nested."""
    shares = (train_size, 0.0, 1 - train_size)
    train, _, test = stratified_split(labels.name_of_cell, shares, seed=seed)
    if number is not None:
        shuffled = np.random.default_rng([seed, 1]).permutation(train)
        place = pd.Series(shuffled).groupby(labels.name_of_cell[shuffled]).cumcount().to_numpy()
        train = shuffled[(place < number) | labels.is_control[shuffled]]
    return make_split(
        labels,
        train,
        np.empty(0, dtype=np.int64),
        test,
        name="cells per perturbation",
        seed=seed,
        settings={"cells_per_perturbation": number, "train_size": train_size},
        control=labels.spelling.control,
        delimiter=labels.spelling.delimiter,
    )


def _median_cells(labels: Labels, split: Split) -> float:
    """Median over perturbations of the number of training cells."""
    trained = split.train[~labels.is_control[split.train]]
    return float(pd.Series(labels.name_of_cell[trained]).value_counts().median())


def _summarised(
    scores: pd.DataFrame, number: int | None, n_cells: Mapping[Any, float]
) -> pd.DataFrame:
    """One row per method and seed."""
    rows = []
    for (method, seed), of_fit in scores.groupby(["method", "seed"], sort=False):
        effects = _rows(of_fit, "sams", "pearson")
        failed = effects[effects["status"].isin(FAILURES)]
        rows.append(
            {
                "method": method,
                "cells_per_perturbation": number,
                "n_cells": n_cells[seed],
                "seed": seed,
                "pearson": _rows(of_fit, "sams", "pearson", pooled=True)["value"].item(),
                "rmse": _rows(of_fit, "sams", "rmse", pooled=True)["value"].item(),
                "mean_pearson": effects["value"].mean(skipna=False),
                "rank": _rows(of_fit, *_RANK)["value"].mean(skipna=False),
                "n_failed": len(failed),
                "message": failed["message"].iloc[0] if len(failed) else "",
            }
        )
    return pd.DataFrame(rows)


def _rows(scores: pd.DataFrame, mode: str, metric: str, *, pooled: bool = False) -> pd.DataFrame:
    """Rows of a metric: of every perturbation, or the one over all of them."""
    of_metric = (scores["mode"] == mode) & (scores["metric"] == metric)
    return scores[of_metric & ((scores["perturbation"] == "all") == pooled)]
