"""The benchmark: several methods on the same cells of one screen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import joblib
import pandas as pd
from rich.progress import Progress

from scvi_sams._checks import as_list, as_names, as_path, check_integer
from scvi_sams._versions import installed_versions
from scvi_sams.benchmark._fit import ScoreOptions, Task, run_task
from scvi_sams.benchmark._methods import POSITIVE_CONTROL, Method, resolve_methods
from scvi_sams.benchmark._model import ModelMethod
from scvi_sams.benchmark._result import BenchmarkResult
from scvi_sams.benchmark._screen import Columns, Reference, Screen, make_screen
from scvi_sams.benchmark._store import (
    FitStore,
    fingerprint,
    screen_fingerprint,
    settings_text,
    split_fingerprint,
)
from scvi_sams.exceptions import InvalidArgumentError, InvalidSplitError, SAMSError
from scvi_sams.features._table import FeatureTable, as_feature_table
from scvi_sams.labels._labels import Labels
from scvi_sams.labels._names import listing
from scvi_sams.labels._spelling import Control, Spelling
from scvi_sams.metrics._observed import labels_of
from scvi_sams.metrics._scoring import check_modes
from scvi_sams.splits._split import PARTS, Split, check_split

logger = logging.getLogger("scvi.sams")


def benchmark(
    adata: ad.AnnData,
    *,
    methods: Mapping[str, Any] | Sequence[str],
    split: Split | Callable[[int], Split],
    seeds: Sequence[int] = (0, 1, 2),
    modes: Sequence[str] = ("sams", "perturbench", "cell-eval", "systema"),
    perturbation_key: str = "perturbation",
    control: Control = "control",
    delimiter: str | None = "+",
    layer: str | None = None,
    covariate_key: str | None = None,
    batch_key: str | None = None,
    size_factor_key: str | None = None,
    target_sum: float | None = None,
    target_genes: Mapping[str, str | Sequence[str]] | None = None,
    n_top_genes: int = 20,
    perturbation_features: Any = None,
    reference: Reference = "all",
    versions: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
    n_jobs: int | None = None,
    progress_bar: bool = True,
) -> BenchmarkResult:
    """Fit methods on the same training cells and score predictions on the same test cells.

    Controls are always included: two negative ones, ``"control mean"`` (no effect) and ``"mean of
    perturbations"`` (the same effect for all), and a positive one, ``"half of the test cells"``,
    which predicts the other half. A method that fits as well as the mean of perturbations and is at
    chance level in the metrics of specificity does not distinguish perturbations.

    Parameters
    ----------
    adata
        Counts, cells x genes. Not changed.
    methods
        Names and methods (or the names of built-in methods only). A method is one of

        - a built-in one, by name: ``"SAMSVAE"``, ``"CPAVAE"``, ``"SVAEPlus"``,
          ``"ConditionalVAE"``, ``"training mean"``, ``"EB-shrunken mean"``, ``"ash-shrunken
          mean"``, ``"additive"``, ``"additive of shrunken singles"``, ``"matching mean"``, ``"ridge
          on principal components"``, ``"linear additive"``, ``"latent additive"``, ``"decoder
          only"``, for levels of a covariate ``"vector arithmetic"`` and ``"mean of other
          levels"``, and with ``perturbation_features`` ``"feature ridge"``, ``"feature
          neighbours"`` and ``"shuffled features"`` (the ridge on those of other perturbations),
          with defaults;
        - :class:`ModelMethod`, a model class with settings;
        - an object with ``fit(train_adata)`` and ``predict(perturbations)``, such as a
          :class:`BaselineMethod`. A copy is fitted; baselines of this package use the labels,
          covariate and seed of the benchmark;
        - a function ``predict(train_adata, perturbations)``, called once per seed.

        ``train_adata`` contains training cells only: ``X`` is ``log(1 + target_sum * x / size)``,
        ``layers["counts"]`` the counts, ``obs[perturbation_key]`` canonical labels; for a function,
        ``uns["benchmark"]`` contains ``seed``, ``target_sum`` and the names of columns and
        controls. Return an AnnData in the units of ``X`` with labels in ``obs[perturbation_key]``
        and one row (a profile) or several (cells) per perturbation.
    split
        Training, validation and test cells, or a function of the seed that returns a split.
    seeds
        Seeds of methods and, if ``split`` is a function, of splits.
    modes
        Metrics, as for :func:`score_predictions`. All methods are compared by mean profiles;
        ``"distances"`` is scored for those that predict cells.
    perturbation_key, control, delimiter
        Labels, as for :func:`score_predictions`. Doses are not supported: cells of one label that
        are registered with several doses raise an error.
    layer
        Layer of ``adata`` with the counts; ``None`` for ``X``.
    covariate_key
        Column of ``obs`` with groups, such as cell types, that are scored separately. Predictions
        without this column are used as effects: they are shifted by the difference of the training
        control cells of the group from all of them (and clipped at 0).
    batch_key, size_factor_key
        Columns of ``obs`` for models; counts are also normalised by the size factor instead of
        their sum.
    target_sum
        Total to which cells are normalised; ``None``: the median size of the training cells of
        each split.
    target_genes, n_top_genes
        As for :func:`score_predictions`.
    perturbation_features
        Features of perturbations, for those without training cells
        (:func:`perturbation_hold_out`): any input of
        :func:`~scvi_sams.features.as_feature_table`, or its key in ``adata.uns``. Models and
        baselines that support features use them; others fail for these perturbations, and their
        rows say so.
    reference
        Control cells to which effects are relative: ``"all"`` of the split, or for observed effects
        those among the ``"test"`` cells and for predicted effects those among the training cells.
    versions
        Versions of methods by name, of your choice. The code of a function (or of a custom class)
        has no fingerprint: change its version when the code changes, otherwise results of the
        earlier code are reused from ``folder``.
    folder
        Folder for finished fits: predictions (``.h5ad``), scores and a record. A later call reuses
        fits with the same data, split, settings, seed and package version; other modes or target
        genes are scored again without fitting. Each fit is written to a temporary place and
        renamed, so that an interrupted process loses only the running fit. Fits that raised an
        error are tried again; damaged ones are repeated with a warning. If the disk is full,
        results are returned anyway, and ``runs`` lists what was not stored. A folder can be used by
        one call at a time.
    n_jobs
        Number of parallel fits, each in its own process; ``None`` is 1, or the value set by
        :func:`joblib.parallel_config`.
    progress_bar
        Whether to show a progress bar.

    Returns
    -------
    The scores. Failed methods are not omitted: their rows have a status and a message.

    Raises
    ------
    InvalidSplitError
        If a split leaks, or does not fit the data or the labels; raised before any fit.
    MissingKeyError, InvalidCountsError, InvalidCovariateError, InvalidPerturbationLabelError
        If columns, counts or labels are missing or malformed.
    InvalidDosageError
        If cells of a label are registered with several doses.
    InvalidArgumentError
        If ``seeds`` are not whole numbers of at least 0, each once, or ``perturbation_features``
        are not a table of finite numbers with features of a perturbation of the data.
    SAMSError
        If there is no such method or mode, or names are reserved.
    SavingError
        If nothing can be written to ``folder``; raised before any fit.
    KeyboardInterrupt
        At Ctrl-C; training stops after the current step. Finished fits are stored, the running one
        is not.

    Notes
    -----
    The unit of work is a fit, which takes minutes to hours and is independent of all others, so one
    process per fit uses the machine best. Cores are divided between them, because numerical
    libraries that each start a thread per core slow each other down. joblib does this on one
    machine without further dependencies, and on a cluster with the same code::

        with joblib.parallel_config(backend="dask"):  # or "ray", once registered
            benchmark(..., folder="a folder that all workers see")

    With ``reference="all"``, the reference of predicted and observed effects are all control cells
    of the split, including training cells: with few test controls, their noise would be common to
    all observed effects and look like something to predict. But the sampling error of the training
    controls is then part of the observed effects, and a method that retains it, such as a mean
    without shrinkage, has the higher correlation. If effects are weak or controls few, use
    ``reference="test"``: errors of the two sides are then independent.

    Examples
    --------
    >>> from scvi_sams import evaluation
    >>> labels = adata.obs["perturbation"]
    >>> def no_change(train_adata, perturbations):
    ...     controls = train_adata[train_adata.obs["perturbation"] == "control"]
    ...     mean = np.asarray(controls.X.mean(axis=0)).reshape(1, -1)
    ...     return AnnData(
    ...         np.repeat(mean, len(perturbations), axis=0),
    ...         obs=pd.DataFrame({"perturbation": perturbations}, index=perturbations),
    ...         var=train_adata.var,
    ...     )
    >>> result = evaluation.benchmark(
    ...     adata,
    ...     methods={"additive": "additive", "mine": no_change},
    ...     split=lambda seed: evaluation.combination_hold_out(labels, seed=seed),
    ...     seeds=[0],
    ...     progress_bar=False,
    ... )
    >>> summary = result.summary()
    >>> sorted(summary["method"].unique())
    ['additive', 'control mean', 'half of the test cells', 'mean of perturbations', 'mine']
    >>> result.to_html("report.html")
    """
    chosen = resolve_methods(methods)
    modes = tuple(dict.fromkeys(as_names("modes", modes)))
    check_modes(modes)
    options = ScoreOptions(modes, target_genes, n_top_genes)
    seeds = as_seeds(seeds)
    labels = labels_of(adata, perturbation_key, control, delimiter)
    features = None
    if perturbation_features is not None:
        features = as_feature_table(perturbation_features, uns=adata.uns)
        _check_features(features, labels)
    screen = make_screen(
        adata,
        labels,
        Columns(perturbation_key, covariate_key, batch_key, size_factor_key),
        layer=layer,
        target_sum=target_sum,
        other_columns=columns_of_models(chosen.values(), adata),
        features=features,
        reference=reference,
    )
    made_by = split if callable(split) else lambda seed: split
    splits = {seed: made_by(seed) for seed in seeds}
    return run_methods(
        chosen,
        screen,
        splits,
        options,
        versions=versions,
        folder=folder,
        n_jobs=n_jobs,
        progress_bar=progress_bar,
    )


def as_seeds(seeds: object) -> list[int]:
    """Return seeds as a list; an error if it is empty or contains a seed twice."""
    seeds = as_list("seeds", seeds, "whole numbers, such as [0, 1, 2]")
    for seed in seeds:
        check_integer(at_least=0, seeds=seed)
    seeds = [int(seed) for seed in seeds]
    if not seeds or len(set(seeds)) < len(seeds):
        raise SAMSError(f"`seeds` is {seeds}; pass at least one, each once.")
    return seeds


def run_methods(
    methods: Mapping[str, Method],
    screen: Screen,
    splits: Mapping[int, Split],
    options: ScoreOptions,
    *,
    versions: Mapping[str, str] | None,
    folder: str | Path | None,
    n_jobs: int | None,
    progress_bar: bool,
) -> BenchmarkResult:
    """Fit and score every method on the split of every seed, as :func:`benchmark` does."""
    _check_options(versions, folder, n_jobs)
    for made in splits.values():
        _check(made, screen)
    data_key = screen_fingerprint(screen)
    tasks = _tasks(methods, splits, data_key, options, dict(versions or {}))
    store = FitStore(folder)
    store.prepare()
    for made in splits.values():
        store.keep_split(made)
    tables, runs = zip(*_run_all(tasks, screen, options, store, n_jobs, progress_bar), strict=True)
    scores = pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)
    return BenchmarkResult(
        # Applies to new scores and to scores read from files.
        scores=scores.astype({"message": str}),
        runs=pd.DataFrame(runs),
        settings=_settings(screen, data_key, splits, options, methods),
    )


def _run_all(
    tasks: list[Task],
    screen: Screen,
    options: ScoreOptions,
    store: FitStore,
    n_jobs: int | None,
    progress_bar: bool,
) -> list[tuple[pd.DataFrame, dict[str, Any]]]:
    n_workers = joblib.effective_n_jobs(n_jobs)
    n_threads = None if n_workers == 1 else max(1, joblib.cpu_count() // n_workers)
    parallel = joblib.Parallel(n_jobs=n_jobs, return_as="generator_unordered")
    order = {(task.name, task.seed): place for place, task in enumerate(tasks)}
    outcomes = []
    try:
        with Progress(disable=not progress_bar, transient=True) as progress:
            bar = progress.add_task("benchmark", total=len(tasks))
            for outcome in parallel(
                joblib.delayed(run_task)(task, screen, options, store, n_threads) for task in tasks
            ):
                outcomes.append(outcome)
                run = outcome[1]
                if run["status"] == "ok" and run["message"]:
                    logger.warning(f"{run['method']}, seed {run['seed']}: {run['message']}")
                text = f"{run['method']}, seed {run['seed']}: {run['status']}"
                progress.update(bar, advance=1, description=text)
    except KeyboardInterrupt:
        kept = f"stored in {str(store.folder.parent)!r}: the same call continues from there"
        logger.warning(
            f"Interrupted after {len(outcomes)} of {len(tasks)} fits, which are "
            + (f"{kept}." if store.is_kept else "lost: pass a `folder` to store fits.")
        )
        raise
    return sorted(outcomes, key=lambda outcome: order[outcome[1]["method"], outcome[1]["seed"]])


def _tasks(
    methods: Mapping[str, Method],
    splits: Mapping[int, Split],
    data_key: str,
    options: ScoreOptions,
    versions: dict[str, str],
) -> list[Task]:
    unknown = sorted(set(versions) - set(methods))
    if unknown:
        raise SAMSError(
            f"`versions` names {', '.join(map(repr, unknown))}: no method of that name."
        )
    installed = installed_versions()
    tasks = []
    for name, method in [*methods.items(), (POSITIVE_CONTROL, None)]:
        described = None if method is None else method.description()
        for seed, split in splits.items():
            key = fingerprint(
                data_key,
                split_fingerprint(split),
                name,
                described,
                versions.get(name),
                seed,
                options.keep_cells,
                installed["scvi_sams"],
            )
            tasks.append(Task(name, method, seed, split, key, installed))
    return tasks


def _check_features(features: FeatureTable, labels: Labels) -> None:
    if set(labels.carried).isdisjoint(features.names):
        raise InvalidArgumentError(
            "`perturbation_features` has no row of a perturbation of the data; it has "
            f"{listing(features.names)}, and cells have {listing(labels.carried)}."
            + features.transposed_hint(labels.carried)
        )


def _check_options(versions: object, folder: object, n_jobs: object) -> None:
    if not (versions is None or isinstance(versions, Mapping)):
        raise InvalidArgumentError(f"`versions` must be a dict by method, not {versions!r}.")
    if folder is not None:
        as_path("folder", folder)
    if n_jobs is not None:
        check_integer(at_least=None, n_jobs=n_jobs)
        if n_jobs == 0:
            raise InvalidArgumentError("`n_jobs` is 0: pass the number of parallel fits, or None.")


def _check(split: Split, screen: Screen) -> None:
    if not isinstance(split, Split):
        raise InvalidSplitError(
            f"`split` gave {type(split).__name__}; it must be a Split (make_split, norman_ood, "
            "random_cells, ...) or a function of the seed that returns one."
        )
    spelling = screen.labels.spelling
    if Spelling(split.control, split.delimiter) != spelling:
        raise InvalidSplitError(
            f"The split was made with control {split.control} and delimiter {split.delimiter!r}, "
            f"the benchmark is run with {spelling.control} and {spelling.delimiter!r}. Use the "
            "same."
        )
    check_split(split, screen.labels, covariate=screen.columns.levels(screen.counts))


def columns_of_models(methods: Iterable[Method], adata: ad.AnnData) -> list[str]:
    """Columns of obs in settings of models: their covariates."""
    named: list[Any] = []
    for method in methods:
        if isinstance(method, ModelMethod):
            for value in dict(method.setup_kwargs or {}).values():
                named += list(value) if isinstance(value, (list, tuple)) else [value]
    return [name for name in named if isinstance(name, str) and name in adata.obs]


def _settings(
    screen: Screen,
    data_key: str,
    splits: Mapping[int, Split],
    options: ScoreOptions,
    methods: Mapping[str, Method],
) -> dict[str, Any]:
    labels = screen.labels
    return {
        "versions": installed_versions(),
        "data": {
            "n_cells": screen.counts.n_obs,
            "n_genes": screen.counts.n_vars,
            "n_perturbations": len(labels.names) - 1,
            "n_control_cells": int(labels.is_control.sum()),
            "features": "" if screen.features is None else repr(screen.features),
            "fingerprint": data_key,
        },
        "columns": vars(labels.spelling) | vars(screen.columns),
        "seeds": list(splits),
        "splits": {
            seed: {
                "name": split.name,
                "settings": dict(split.settings),
                "seed": split.seed,
                **{f"n_{part}": len(getattr(split, part)) for part in PARTS},
                "held_out": list(split.held_out),
                "held_out_perturbations": list(split.held_out_perturbations),
                "fingerprint": split_fingerprint(split),
            }
            for seed, split in splits.items()
        },
        "modes": list(options.modes),
        "reference": screen.reference,
        "n_top_genes": options.n_top_genes,
        "target_sum": screen.target_sum or "median size of the training cells",
        "methods": {name: settings_text(m.description()) for name, m in methods.items()},
    }
