"""Methods of a benchmark: built-in methods by name, baselines, functions and models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams._checks import as_list
from scvi_sams.baselines._base import BaselineMethod
from scvi_sams.baselines._features import FeatureBaseline, FeatureNeighbours, FeatureRidge
from scvi_sams.baselines._levels import LevelBaseline, OtherLevelsMean, VectorArithmetic
from scvi_sams.baselines._shrunken import AshMean, EBMean, ShrunkenAdditive
from scvi_sams.baselines._simple import (
    Additive,
    ControlMean,
    MatchingMean,
    PCARidge,
    PerturbationMean,
    TrainingMean,
)
from scvi_sams.baselines._trained import DecoderOnly, LatentAdditive, LinearAdditive
from scvi_sams.benchmark._model import Fitted, ModelMethod
from scvi_sams.benchmark._screen import Fold
from scvi_sams.exceptions import SAMSError
from scvi_sams.model._comparators import CPAVAE, ConditionalVAE, SVAEPlus
from scvi_sams.model._sams_vae import SAMSVAE

NO_CHANGE = "control mean"
NEGATIVE_CONTROL = "mean of perturbations"
POSITIVE_CONTROL = "half of the test cells"

BUILT_IN: dict[str, Callable[[], Any]] = {
    NO_CHANGE: ControlMean,
    NEGATIVE_CONTROL: PerturbationMean,
    "training mean": TrainingMean,
    "EB-shrunken mean": EBMean,
    "ash-shrunken mean": AshMean,
    "additive": Additive,
    "additive of shrunken singles": ShrunkenAdditive,
    "matching mean": MatchingMean,
    "ridge on principal components": PCARidge,
    "linear additive": LinearAdditive,
    "latent additive": LatentAdditive,
    "decoder only": DecoderOnly,
    "vector arithmetic": VectorArithmetic,
    "mean of other levels": OtherLevelsMean,
    "feature ridge": FeatureRidge,
    "feature neighbours": FeatureNeighbours,
    "shuffled features": partial(FeatureRidge, shuffled=True),
    "SAMSVAE": partial(ModelMethod, SAMSVAE),
    "CPAVAE": partial(ModelMethod, CPAVAE),
    "SVAEPlus": partial(ModelMethod, SVAEPlus),
    "ConditionalVAE": partial(ModelMethod, ConditionalVAE),
}
"""To add a comparator, add a line here."""

_MOST_CONTROL_CELLS = 1000

PredictFunction = Callable[[ad.AnnData, Sequence[str]], ad.AnnData]


def resolve_methods(methods: Mapping[str, Any] | Sequence[str]) -> dict[str, Method]:
    """Give every method the same interface; add the negative controls.

    Raises
    ------
    SAMSError
        If a string is not the name of a built-in method, a value is not a method, or a name is
        reserved.
    """
    wanted = "a dict of methods by name, or a list of built-in names"
    several = methods if isinstance(methods, Mapping) else as_list("methods", methods, wanted)
    named = dict(several) if isinstance(several, Mapping) else {name: name for name in several}
    for name in (NO_CHANGE, NEGATIVE_CONTROL, POSITIVE_CONTROL):
        given = named.pop(name, name)
        if given != name:
            raise SAMSError(
                f"{name!r} is a control that is always run; give the method another name."
            )
    named = {NO_CHANGE: NO_CHANGE, NEGATIVE_CONTROL: NEGATIVE_CONTROL} | named
    return {
        name: NoChange(ControlMean()) if name == NO_CHANGE else _resolve(name, method)
        for name, method in named.items()
    }


def _resolve(name: str, method: Any) -> Method:
    if not isinstance(name, str) or not name.strip():
        raise SAMSError(f"The name of a method must be text, not {name!r}.")
    if isinstance(method, str):
        if method not in BUILT_IN:
            raise SAMSError(
                f"There is no built-in method {method!r}; choose from "
                f"{', '.join(map(repr, BUILT_IN))}."
            )
        method = BUILT_IN[method]()
    if isinstance(method, ModelMethod):
        return method
    if isinstance(method, type):
        raise SAMSError(
            f"The method {name!r} is the class {method.__name__}. Pass an instance of it, or "
            "ModelMethod(class) if it is a model."
        )
    if hasattr(method, "fit") and hasattr(method, "predict"):
        return EstimatorMethod(method)
    if callable(method):
        return FunctionMethod(name, method)
    raise SAMSError(
        f"The method {name!r} is of type {type(method).__name__}. Pass a built-in name, an object "
        "with fit and predict, a function predict(train_adata, perturbations), or ModelMethod."
    )


@dataclass(frozen=True, eq=False)
class EstimatorMethod:
    """An object with ``fit(train_adata)`` and ``predict(perturbations)``."""

    estimator: Any

    def fit(self, fold: Fold, seed: int) -> Fitted:
        """Fit a copy to the training cells."""
        estimator = copy.deepcopy(self.estimator)
        if isinstance(estimator, BaselineMethod) and hasattr(estimator, "seed"):
            estimator.seed = seed
        if isinstance(estimator, LevelBaseline):
            return _fitted_by_level(estimator, fold)
        if isinstance(estimator, FeatureBaseline) and estimator.features is None:
            estimator.features = fold.features
        # A baseline may have its own ``fit``, which does more than read the cells.
        if getattr(type(estimator), "fit", None) is BaselineMethod.fit:
            # Labels are parsed already, whatever column the baseline expects.
            estimator._fit(fold.train.X, fold.train_labels, fold.train.var_names)
        else:
            estimator.fit(fold.train.copy())
        return Fitted(lambda perturbation, level: estimator.predict([perturbation]))

    def description(self) -> dict[str, Any]:
        """Class and settings."""
        settings = {k: v for k, v in vars(self.estimator).items() if not k.startswith("_")}
        if isinstance(self.estimator, BaselineMethod):
            # Set by the benchmark.
            for key in ("perturbation_key", "covariate_key", "control", "delimiter", "seed"):
                settings.pop(key, None)
        return {"class": type(self.estimator), "settings": settings}


def _fitted_by_level(baseline: LevelBaseline, fold: Fold) -> Fitted:
    """Fit a baseline that needs the level of every cell, and of the prediction."""
    train, columns = fold.train, fold.columns
    baseline.covariate_key = columns.covariate_key
    baseline._fit_levels(train.X, fold.train_labels, columns.levels(train), train.var_names)
    return Fitted(lambda perturbation, level: baseline.predict([perturbation], [str(level)]))


class NoChange(EstimatorMethod):
    """The control mean as profile, and control cells as cells: a negative control for both."""

    def fit(self, fold: Fold, seed: int) -> Fitted:
        """Take the training control cells."""

        def cells(level: str | None) -> sparse.csr_matrix:
            shuffled = np.random.default_rng(seed).permutation(fold.training_controls(level))
            return fold.train.X[np.sort(shuffled[:_MOST_CONTROL_CELLS])]

        return replace(super().fit(fold, seed), predict_cells=cells)


@dataclass(frozen=True, eq=False)
class FunctionMethod:
    """A function ``predict(train_adata, perturbations)``, called once for all perturbations."""

    name: str
    function: PredictFunction

    def fit(self, fold: Fold, seed: int) -> Fitted:
        """Call the function."""
        train = fold.train.copy()
        train.uns["benchmark"] = {
            "seed": seed,
            "target_sum": fold.target_sum,
            "perturbation_key": fold.columns.perturbation_key,
            "control": fold.train_labels.control,
            "delimiter": fold.train_labels.spelling.delimiter,
            "covariate_key": fold.columns.covariate_key,
        }
        labels = list(dict.fromkeys(label for _, label in fold.perturbations))
        prediction = self.function(train, labels)
        key = fold.columns.perturbation_key
        if not isinstance(prediction, ad.AnnData):
            raise SAMSError(
                f"The function returned {type(prediction).__name__}; it must return an AnnData of "
                f"predictions with labels in obs[{key!r}]."
            )
        if key not in prediction.obs:
            raise SAMSError(
                f"The function returned an AnnData without obs[{key!r}], which must name the "
                "perturbation of each row."
            )
        rows = pd.Series(prediction.obs[key].to_numpy(), dtype=object).astype(str)
        return Fitted(lambda perturbation, level: prediction[(rows == perturbation).to_numpy()])

    def description(self) -> dict[str, Any]:
        """Its name: code has no fingerprint."""
        return {"function": self.name}


Method: TypeAlias = ModelMethod | EstimatorMethod | FunctionMethod
"""Interface of methods: ``fit(fold, seed)``, and ``description()`` for the fingerprint."""
