"""Ridge regression of the effects of perturbations on their features."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from typing import NamedTuple

import numpy as np

_STRENGTHS = 10.0 ** np.arange(-1, 5.1, 0.5)
"""Penalties of ridge regression, relative to the precision of effects."""
_WEAK = 1e-6


class _Sums(NamedTuple):
    """Weighted sums over perturbations: of 1, features, effects and their products."""

    n: np.ndarray
    features: np.ndarray
    """``(D,)``, and in the next ``(D, D)``."""
    squared: np.ndarray
    effects: np.ndarray
    """``(G,)``, and in the next ``(D, G)``."""
    products: np.ndarray

    @classmethod
    def of(cls, weights: np.ndarray, features: np.ndarray, effects: np.ndarray) -> _Sums:
        """Sums over some perturbations; ``weights`` are ``(R,)``."""
        weighed = weights[:, None] * features
        return cls(
            weights.sum(),
            weighed.sum(axis=0),
            weighed.T @ features,
            weights @ effects,
            weighed.T @ effects,
        )

    def plus(self, other: _Sums, sign: int = 1) -> _Sums:
        """Sums over the perturbations of both, or of the first without those of the other."""
        return _Sums(*(mine + sign * theirs for mine, theirs in zip(self, other, strict=True)))


class Line(NamedTuple):
    """Ridge regression of effects on features, gene by gene, around their means."""

    mean: np.ndarray
    """Effects at mean features, ``(G,)``."""
    mean_features: np.ndarray
    coefficients: np.ndarray
    """``(D, G)``."""

    @classmethod
    def fit(cls, sums: _Sums, strength: float) -> Line:
        """Fit to the perturbations of the sums."""
        n = max(float(sums.n), _WEAK)
        mean, mean_features = sums.effects / n, sums.features / n
        squared = sums.squared - n * np.outer(mean_features, mean_features)
        products = sums.products - n * np.outer(mean_features, mean)
        inverse = np.linalg.inv(squared + strength * np.eye(len(squared)))
        return cls(mean, mean_features, inverse @ products)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Predict effects, ``(R, G)``."""
        return self.mean + (features - self.mean_features) @ self.coefficients


class Ridge(NamedTuple):
    """Regression on all perturbations, and on those outside of each fold."""

    whole: Line
    of_folds: dict[int, Line]

    def held_out(self, features: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predictions by the perturbations of other folds, and their means, ``(R, G)`` each."""
        predicted = [
            self.of_folds[fold](x[None])[0] for x, fold in zip(features, folds, strict=True)
        ]
        means = [self.of_folds[fold].mean for fold in folds]
        return np.stack(predicted), np.stack(means)


def fit_ridge(
    read: Callable[[], Iterator[tuple[slice, np.ndarray]]],
    weights: np.ndarray,
    features: np.ndarray,
    folds: np.ndarray,
    precision: np.ndarray,
    chosen: np.ndarray,
) -> Ridge | None:
    """Regress effects on features; ``None`` if effects outside of a fold are unknown.

    The penalty is the largest whose prediction of other folds is within two standard errors of the
    best.

    Parameters
    ----------
    read
        Yields positions of perturbations and their effects, ``(R, G)``.
    weights
        Weights of perturbations, ``(T,)``; 0 for unknown effects.
    features, folds
        ``(T, D)`` and ``(T,)``.
    precision, chosen
        Weight of each effect in choosing the penalty, ``(G,)``, and positions of those used.
    """
    sums: dict[int, _Sums] = {}
    of_chosen = np.zeros((len(folds), len(chosen)))
    for rows, effects in read():
        of_chosen[rows] = effects[:, chosen]
        for fold in np.unique(folds[rows]).tolist():
            own = folds[rows] == fold
            part = _Sums.of(weights[rows][own], features[rows][own], effects[own])
            sums[fold] = part if fold not in sums else sums[fold].plus(part)
    parts = list(sums.values())
    total = reduce(_Sums.plus, parts[1:], parts[0])
    others = {fold: total.plus(own, -1) for fold, own in sums.items()}
    if min(float(part.n) for part in others.values()) < _WEAK:
        return None

    def squared_errors(strength: float) -> np.ndarray:
        found = np.zeros(len(folds))
        for fold, part in others.items():
            some = part._replace(effects=part.effects[chosen], products=part.products[:, chosen])
            rows = folds == fold
            missed = Line.fit(some, strength)(features[rows]) - of_chosen[rows]
            found[rows] = weights[rows] * (precision[chosen] * np.square(missed)).sum(axis=1)
        return found

    errors_of = [squared_errors(strength) for strength in _STRENGTHS]
    best = errors_of[int(np.argmin([errors.mean() for errors in errors_of]))]
    as_good = [not is_above_noise(errors - best) for errors in errors_of]
    strength = _STRENGTHS[np.flatnonzero(as_good).max()]
    of_folds = {fold: Line.fit(part, strength) for fold, part in others.items()}
    return Ridge(Line.fit(total, strength), of_folds)


def is_above_noise(gain: np.ndarray) -> bool:
    """Whether the mean gain over perturbations is more than two standard errors."""
    return bool(gain.mean() > 2 * gain.std() / np.sqrt(len(gain)))
