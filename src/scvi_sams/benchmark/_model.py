"""Models of scvi-tools as methods: they train on counts and predict normalised expression."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import torch
from scipy import sparse

from scvi_sams._plurals import counted
from scvi_sams.benchmark._screen import SIMULATION, Fold, lognorm, sizes
from scvi_sams.exceptions import SAMSError
from scvi_sams.interpretation._calls import called_masks
from scvi_sams.metrics._recovery import mask_recovery, mean_correlation_coefficient

_PREDICTION_SEED = 20231

_VALUES_AT_ONCE = 2**26
"""Cells x genes predicted at a time; their counts are stored as sparse matrices."""

EFFECT_THRESHOLD = 0.5
"""Size above which an effect is called active, in SD of basal states.

Fixed, because the true optimum is unknown for real data.
"""
MASK_THRESHOLD = 0.5
_DOSES = ("dosage_key", "dosage_obsm_key")


@dataclass(frozen=True)
class Extra:
    """A score of a whole fit."""

    mode: str
    metric: str
    value: float
    n_cells: int
    status: str = "ok"
    message: str = ""


@dataclass(frozen=True, eq=False)
class Fitted:
    """A method fitted to the cells of a fold."""

    predict: Callable[[str, str | None], ad.AnnData]
    """Predicts a perturbation in a level: log1p-normalised profile or cells, named in ``obs``."""
    profile: Callable[[str, str | None], np.ndarray | None] = lambda label, level: None
    """Mean profile of a perturbation in a level, if it is known more accurately than as the mean of
    ``predict``."""
    predict_cells: Callable[[str | None], sparse.csr_matrix] | None = None
    """Predicts cells of a level, the same for every perturbation, if profiles are means of more
    cells than should be stored."""
    extras: Callable[[], list[Extra]] = list
    """Computes scores that only this kind of method has, such as a likelihood."""


@dataclass(frozen=True, eq=False)
class ModelMethod:
    """A model class of this package, or one with the same methods, as a method to benchmark.

    The model is registered (``setup_anndata``) on a copy of the training and validation cells, and
    trained with that split; without validation cells it divides the training cells itself, as
    ``train`` does. Predictions are cells: training control cells (of the same level of the
    covariate) in random order receive the perturbation (``model.predict``), counts are sampled at
    each cell's own size, and converted to ``log(1 + target_sum * x / size)``. Samples are needed
    because the mean of a logarithm is not the logarithm of the mean: ``log1p`` of expected
    expression would be too high, above all for genes with low counts. All perturbations use the
    same cells, in the same basal states.

    Without levels, if the model has ``predict_ate``, the mean profile is the mean of the training
    control cells plus the expected effect on that scale, ``predict_ate(method="lognorm")``, because
    the noise of samples would count as error of the model.

    Parameters
    ----------
    model_class
        Class with ``setup_anndata``, ``train`` and ``predict``; if it has ``get_iwelbo``,
        ``get_perturbation_masks``, ``get_perturbation_effects`` and ``get_latent_representation``,
        these are scored as well.
    model_kwargs
        Arguments of the model, such as ``n_latent``. A model that predicts unmeasured perturbations
        gets the features of the benchmark, if there are any; ``{"perturbation_features": None}``
        omits them.
    train_kwargs
        Arguments of ``train``, such as ``max_epochs``. By default there is no progress bar.
    setup_kwargs
        Arguments of ``setup_anndata``, besides labels, ``batch_key`` and ``size_factor_key``;
        ``None``: the covariate of the benchmark, if there is one, as ``context_key`` if effects of
        the model can differ between contexts, otherwise as categorical covariate. Set it to compare
        both: ``{"context_key": "cell_type"}``, ``{"categorical_covariate_keys": ["cell_type"]}``,
        ``{}``.
    n_samples
        Number of cells sampled per perturbation (and level); control cells are reused if there are
        fewer.
    n_posterior_samples
        Number of samples of masks and effects, between which these cells are divided.
    n_iwelbo_samples
        Importance samples of the bound per test cell (paper: 100); ``None`` omits it.
    data
        Training data: ``"counts"``, or ``"lognorm"`` for the normalised expression, which a normal
        likelihood requires.

    Raises
    ------
    SAMSError
        If a number is not positive, or ``setup_kwargs`` has doses.

    Examples
    --------
    >>> wide = scvi_sams.evaluation.ModelMethod(
    ...     scvi_sams.SAMSVAE, model_kwargs={"n_latent": 100}, train_kwargs={"max_epochs": 60}
    ... )

    Pass it in the ``methods`` of :func:`benchmark`: ``{"100 latents": wide}``.
    """

    model_class: type
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    train_kwargs: Mapping[str, Any] = field(default_factory=dict)
    setup_kwargs: Mapping[str, Any] | None = None
    n_samples: int = 1000
    n_posterior_samples: int = 50
    n_iwelbo_samples: int | None = 100
    data: Literal["counts", "lognorm"] = "counts"

    def __post_init__(self) -> None:
        if min(self.n_samples, self.n_posterior_samples, self.n_iwelbo_samples or 1) < 1:
            raise SAMSError("Numbers of samples must be positive.")
        if self.data not in ("counts", "lognorm"):
            raise SAMSError(f"`data` must be 'counts' or 'lognorm', not {self.data!r}.")
        given = [key for key in _DOSES if dict(self.setup_kwargs or {}).get(key) is not None]
        if given:
            raise SAMSError(
                f"`setup_kwargs` has `{given[0]}`, but a benchmark compares labels, not doses: "
                "use cells of one dose, or put doses into the labels ('A@0.5')."
            )

    def description(self) -> dict[str, Any]:
        """Class and settings."""
        return {"class": self.model_class} | {
            key: value for key, value in vars(self).items() if key != "model_class"
        }

    def fit(self, fold: Fold, seed: int) -> Fitted:
        """Register and train a model on the training and validation cells of a fold."""
        cells = self._registered(fold)
        arguments = {"enable_progress_bar": False} | dict(self.train_kwargs)
        if fold.n_train < cells.n_obs:
            arguments["datasplitter_kwargs"] = {
                **arguments.get("datasplitter_kwargs", {}),
                "external_indexing": np.split(np.arange(cells.n_obs), [fold.n_train]),
            }
        with _seeded(seed):
            model = self.model_class(cells, **self._features(fold) | dict(self.model_kwargs))
            try:
                model.train(**arguments)
            except SystemExit as exit_:  # Lightning turns an interrupt into this
                raise KeyboardInterrupt from exit_
        trained = _TrainedModel(model, self, fold, seed)
        return Fitted(trained.predict, trained.profile, extras=trained.extras)

    def _features(self, fold: Fold) -> dict[str, Any]:
        if fold.features is None or not getattr(self.model_class, "_takes_features", False):
            return {}
        return {"perturbation_features": fold.features}

    def cells(self, fold: Fold, counts: ad.AnnData) -> ad.AnnData:
        """Copy cells, because models register them, with the data that the model is trained on."""
        cells = counts.copy()
        if self.data == "lognorm":
            cells.X = lognorm(cells.X, sizes(cells.X, cells.obs, fold.columns), fold.target_sum)
        return cells

    def _registered(self, fold: Fold) -> ad.AnnData:
        cells = self.cells(fold, fold.fitted)
        columns = fold.columns
        setup = self.setup_kwargs
        if setup is None:
            setup = self._setup_of_covariate(columns.covariate_key)
        self.model_class.setup_anndata(  # type: ignore[attr-defined]
            cells,
            perturbation_key=columns.perturbation_key,
            control=list(fold.train_labels.spelling.control),
            delimiter=fold.train_labels.spelling.delimiter,
            **{
                "batch_key": columns.batch_key,
                "size_factor_key": columns.size_factor_key if self.data == "counts" else None,
            }
            | dict(setup),
        )
        return cells

    def _setup_of_covariate(self, key: str | None) -> dict[str, Any]:
        """Contexts if effects can differ between levels, because levels are scored separately."""
        if key is None:
            return {}
        if getattr(self.model_class, "_has_contexts", False):
            return {"context_key": key}
        return {"categorical_covariate_keys": [key]}


@dataclass(eq=False)
class _TrainedModel:
    """A trained model that predicts cells."""

    model: Any
    method: ModelMethod
    fold: Fold
    seed: int
    _sampled: dict[tuple[str, str | None], list[Any]] = field(default_factory=dict, init=False)
    """Cells of perturbations that will be requested next."""

    def predict(self, perturbation: str, level: str | None) -> ad.AnnData:
        """Predict cells: training control cells of a level, had they been perturbed."""
        sources = self._sources(level)
        if (perturbation, level) not in self._sampled:
            self._sampled = self._sample_block(perturbation, level, sources)
        samples = self._sampled.pop((perturbation, level))
        labels = {self.fold.columns.perturbation_key: perturbation}
        if level is not None:
            labels[str(self.fold.columns.covariate_key)] = level
        return ad.AnnData(
            self._normalised(samples, sources),
            obs=pd.DataFrame(labels, index=[str(row) for row in range(len(sources))]),
            var=pd.DataFrame(index=self.fold.train.var_names.copy()),
        )

    def _sample_block(
        self, perturbation: str, level: str | None, sources: np.ndarray
    ) -> dict[tuple[str, str | None], list[Any]]:
        """Sample cells of a perturbation, and of those that follow it in its level.

        The overhead of a call is then shared by many perturbations. If they cannot all be
        predicted, only this one is.
        be predicted, of this one only.
        """
        known = [label for of_level, label in self.fold.perturbations if of_level == level]
        after = known[known.index(perturbation) :] if perturbation in known else [perturbation]
        per_label = len(sources) * self.fold.train.n_vars
        block = after[: max(1, _VALUES_AT_ONCE // per_label)]
        try:
            samples = self._samples_of(block, sources)
        except Exception:  # any error of a model may be due to one perturbation
            if block == [perturbation]:
                raise
            block = [perturbation]
            samples = self._samples_of(block, sources)
        return {(label, level): parts for label, parts in zip(block, samples, strict=True)}

    def _samples_of(self, labels: list[str], sources: np.ndarray) -> list[list[Any]]:
        """Sampled cells of each label, by posterior sample."""
        samples: list[list[Any]] = [[] for _ in labels]
        # The same numbers for every perturbation, independent of earlier requests.
        with _seeded(_PREDICTION_SEED + self.seed):
            for part in np.array_split(sources, self.method.n_posterior_samples):
                if not len(part):
                    continue
                cells = self.model.predict(
                    labels, indices=part, output="counts", **self._among_all
                ).X
                if cells.shape[0] != len(labels) * len(part):
                    raise SAMSError(
                        f"`predict` gave {counted(cells.shape[0], 'row')} for "
                        f"{counted(len(labels), 'perturbation')} of {counted(len(part), 'cell')} "
                        "each."
                    )
                for place, of_label in enumerate(samples):  # labels slowest
                    of_label.append(cells[place * len(part) : (place + 1) * len(part)])
        return samples

    @property
    def _among_all(self) -> dict[str, str]:
        """Observed effects are over labelled cells, whether they respond or not."""
        has_branches = getattr(getattr(self.model, "module", None), "has_branches", False)
        return {"among": "all"} if has_branches else {}

    def profile(self, perturbation: str, level: str | None) -> np.ndarray | None:
        """Mean of the training control cells plus the expected effect; ``None`` with levels."""
        expects = hasattr(self.model, "predict_ate") and self.method.data == "counts"
        if level is not None or not expects:
            return None
        controls = self.fold.train.X[self.fold.training_controls(None)]
        return np.asarray(controls.mean(axis=0)).ravel() + self._expected_effect(perturbation)

    def _expected_effect(self, perturbation: str) -> np.ndarray:
        """Effect on the natural logarithm of normalised counts, ``(n_genes,)``."""
        if perturbation in self._expected_effects:
            return self._expected_effects[perturbation]
        return self._effects_of([perturbation])[0]  # all together failed

    @cached_property
    def _expected_effects(self) -> dict[str, np.ndarray]:
        """Effects of all perturbations together, which share tables and the control's side."""
        labels = list(dict.fromkeys(label for _, label in self.fold.perturbations))
        try:
            return dict(zip(labels, self._effects_of(labels), strict=True))
        except SAMSError:  # the model does not know one of them
            return {}

    def _effects_of(self, labels: list[str]) -> np.ndarray:
        with _seeded(_PREDICTION_SEED + self.seed):
            effects = self.model.predict_ate(
                labels,
                **self._among_all,
                method="lognorm",
                basal="control",
                target_sum=self.fold.target_sum,
                n_samples=max(self.method.n_samples, 2),
                n_posterior_samples=max(self.method.n_posterior_samples, 2),
                interval=None,
                key_added=None,
            )
        return np.asarray(effects.X) * np.log(2)

    def extras(self) -> list[Extra]:
        """Score likelihoods of test cells and, for a simulated screen, the truth."""
        cells = self.method.cells(self.fold, self.fold.tested)
        with _seeded(_PREDICTION_SEED + self.seed):
            return [
                *_likelihoods(self.model, self.fold, cells, self.method.n_iwelbo_samples),
                *_truth(self.model, cells),
            ]

    def _sources(self, level: str | None) -> np.ndarray:
        """Positions of training control cells, all equally often up to one time."""
        controls = self.fold.training_controls(level)
        shuffled = np.random.default_rng(self.seed).permutation(controls)
        return np.resize(shuffled, self.method.n_samples)

    def _normalised(self, samples: list[Any], sources: np.ndarray) -> Any:
        if self.method.data == "lognorm":
            return np.concatenate([np.asarray(part) for part in samples])
        counts = sparse.csr_matrix(sparse.vstack([sparse.csr_matrix(part) for part in samples]))
        size = sizes(counts, self.fold.train.obs.iloc[sources], self.fold.columns)
        return lognorm(counts, np.maximum(size, 1), self.fold.target_sum)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed every global generator that models use; restore all of them afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the generator that scvi-tools and Lightning use
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def _likelihoods(model: Any, fold: Fold, cells: ad.AnnData, n_samples: int | None) -> list[Extra]:
    """Score the importance-weighted bound per test cell, of seen and of held-out labels."""
    if n_samples is None or not hasattr(model, "get_iwelbo"):
        return []
    extras = []
    for metric, chosen in (
        ("iwelbo_seen", ~fold.is_held_out),
        ("iwelbo_held_out", fold.is_held_out),
    ):
        positions = np.flatnonzero(chosen)
        if len(positions):
            settings = {"indices": positions, "n_samples": n_samples, "key_added": None}
            bound = partial(model.get_iwelbo, cells, **settings)
            extras.append(_attempt("model", metric, len(positions), bound))
    return extras


def _truth(model: Any, cells: ad.AnnData) -> list[Extra]:
    """Score masks, effects and latents against the truth of a simulated screen."""
    truth = cells.uns.get(SIMULATION)
    if truth is None or "true_masks" not in truth:
        return []
    extras: list[Extra] = []
    true_masks = pd.DataFrame(
        np.asarray(truth["true_masks"]), index=[str(name) for name in truth["perturbations"]]
    )
    if hasattr(model, "get_perturbation_masks"):
        masks = model.get_perturbation_masks(key_added=None)
        extras += _recovery("mask", masks, true_masks, MASK_THRESHOLD)
        if hasattr(model, "test_perturbations"):
            called = called_masks(model, masks=masks).astype(float)
            extras += _recovery("called", called, true_masks, MASK_THRESHOLD)
    if hasattr(model, "get_perturbation_effects"):
        sizes = model.get_perturbation_effects(key_added=None).mean.abs()
        extras += _recovery("effect", sizes, true_masks, EFFECT_THRESHOLD)
    if hasattr(model, "get_latent_representation"):
        for representation, key in (("basal", "true_basal"), ("perturbed", "true_latent")):
            if key in cells.obsm:
                found = partial(_latent_recovery, model, cells, representation, cells.obsm[key])
                extras.append(_attempt("truth", f"mcc_{representation}", cells.n_obs, found))
    return extras


def _latent_recovery(
    model: Any, cells: ad.AnnData, representation: str, truth: np.ndarray
) -> float:
    latents = model.get_latent_representation(cells, representation=representation, key_added=None)
    return mean_correlation_coefficient(latents, truth)


def _recovery(
    name: str, estimate: pd.DataFrame, true_masks: pd.DataFrame, threshold: float
) -> list[Extra]:
    # Combinations that are separate perturbations have no true mask, and perturbations without
    # training cells have no estimate.
    shared = true_masks.index.intersection(estimate.index)
    if not len(shared):
        return []
    found = mask_recovery(estimate.loc[shared], true_masks.loc[shared], threshold=threshold)
    return [
        Extra("truth", f"{name}_{score}", float(found[score]), 0)
        for score in ("precision", "recall", "f1")
    ]


def _attempt(mode: str, metric: str, n_cells: int, score: Callable[[], float]) -> Extra:
    try:
        return Extra(mode, metric, float(score()), n_cells)
    except SAMSError as error:  # the model has no such quantity, or cannot score these cells
        return Extra(mode, metric, np.nan, n_cells, "undefined", str(error))
    except Exception as error:  # noqa: BLE001 - any error of a model is a row
        return Extra(mode, metric, np.nan, n_cells, "failed", f"{type(error).__name__}: {error}")
