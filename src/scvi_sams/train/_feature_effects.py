"""How far features of perturbations tell of their effects: learned from ones that are left out.

A perturbation without cells is predicted by a weighted sum of

- the model: masks and effects from their prior given features, decoded;
- ridge regression of observed effects on features, gene by gene;
- the mean effect of measured perturbations.

The weights, and how far such predictions are off, come from perturbations that are left out, a
fifth at a time (stacking, Wolpert 1992). Where features say nothing the mean is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from scvi_sams._torch import fixed_seed
from scvi_sams.module._feature_prior import PriorOfEffects
from scvi_sams.module._perturbation_module import PerturbationModule
from scvi_sams.train._control_decoder import ControlDecoder
from scvi_sams.train._expected_rates import N_POSTERIOR
from scvi_sams.train._observed_effects import ObservedEffects

_SEED = 60041
_STATES_OF_HELD_OUT = 2
"""Basal states for each posterior sample, where effects are averaged over perturbations anyway."""
_STRENGTHS = 10.0 ** np.arange(-1, 5.1, 0.5)
"""Of ridge regression, per precision of effects."""
_GENES_FOR_STRENGTH = 500
_GENES_OF_PRIOR = 5.0
"""Perturbations that the mean squared error over genes is worth, for that of each gene."""
_WEAK = 1e-6


@torch.no_grad()
def fit_to_features(module: PerturbationModule, observed: ObservedEffects) -> None:
    """Learn how far features tell of the effects of perturbations that are left out."""
    kept = module.unmeasured
    if kept is None or not kept.is_fitted or module.features is None:
        return
    features = module.features
    if not bool(features.is_fitted):  # masks started without a dense phase
        measured = torch.arange(features.n_perturbations, device=module.device)
        mean, sd = module.shared_moments(measured)
        features.fit(mean, sd.square(), measured)
    slope = observed.scale.slope
    values = features.features[: features.n_perturbations, :-1].double().cpu().numpy()
    folds = features.folds.cpu().numpy()
    scores = _Scores.of(observed, len(folds))
    ridge = _fit_ridge(observed, scores, values, folds)
    if ridge is None:
        return
    decoder = ControlDecoder(module, -1)
    # Products of the three predictions and the observed effect, of each gene and perturbation.
    of_genes = np.zeros((4, 4, len(slope)))
    of_rows = np.zeros((len(folds), 4, 4))
    for rows, effects, errors in _observed(observed, len(folds)):
        prior = PriorOfEffects(*features.held_out[:, rows])
        of_model = decoder.effects(_samples(prior, module), _STATES_OF_HELD_OUT).of_shift
        parts = np.stack(
            [
                decoder.scale.slope * decoder.scale.compared(of_model),
                *ridge.held_out(values[rows], folds[rows]),
                slope * effects,
            ]
        )
        parts = np.where(np.isfinite(errors), parts, 0)
        of_genes += np.einsum("itg,jtg->ijg", parts, parts)
        of_rows[rows] = np.einsum("itg,jtg,g->tij", parts, parts, scores.precision)
    weights = _weights(of_rows)
    error = np.append(weights, -1)
    squared = np.einsum("i,ijg,j->g", error, of_genes, error) - scores.noise
    mean = max(float(squared.sum() / scores.n_known.sum()), 0.0)
    variance = np.maximum(squared, 0) + _GENES_OF_PRIOR * mean
    line = ridge.whole
    kept.fill(
        mean=torch.as_tensor(line.mean),
        coefficients=torch.as_tensor(line.coefficients),
        mean_features=torch.as_tensor(line.mean_features),
        weights=torch.as_tensor(weights),
        variance=torch.as_tensor(variance / (scores.n_known + _GENES_OF_PRIOR)),
    )


class _Scores(NamedTuple):
    """Sums over perturbations, in differences of means of logs, ``(G,)`` each."""

    squares: np.ndarray
    """Of observed effects."""
    noise: np.ndarray
    """Squares of their errors."""
    n_known: np.ndarray

    @classmethod
    def of(cls, observed: ObservedEffects, n_perturbations: int) -> _Scores:
        """Sum over all perturbations that have cells."""
        slope = observed.scale.slope
        squares, noise, n_known = np.zeros((3, len(slope)))
        for _, effects, errors in _observed(observed, n_perturbations):
            known = np.isfinite(errors)
            squares += np.where(known, np.square(slope * effects), 0).sum(axis=0)
            noise += np.where(known, np.square(slope * errors), 0).sum(axis=0)
            n_known += known.sum(axis=0)
        return cls(squares, noise, np.maximum(n_known, 1))

    @property
    def signal(self) -> float:
        """Mean square of effects, without that of errors."""
        return max(float((self.squares - self.noise).sum() / self.n_known.sum()), _WEAK)

    @property
    def precision(self) -> np.ndarray:
        """What genes count: by how well can be told what is predicted of them."""
        return 1 / (self.noise / self.n_known + self.signal)


def _observed(
    effects: ObservedEffects, n_perturbations: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Rows, effects at unit doses and their errors, which are infinite where nothing is known."""
    for block in effects.blocks(range(n_perturbations)):
        yield block.rows, block.observed / block.dose, block.error / block.dose


def _samples(prior: PriorOfEffects, module: PerturbationModule) -> Tensor:
    """Samples of shifts whose mean is exact, ``(P, R, L)``."""
    assert module.features is not None
    log_odds = torch.where(module.masks.is_excluded, -torch.inf, prior.log_odds)
    mean, _ = PriorOfEffects(log_odds, prior.mean, prior.variance).moments()
    with fixed_seed(_SEED):
        masks = module.masks.sample_by(log_odds, N_POSTERIOR)
        shape = (N_POSTERIOR, *mean.shape)
        effects = prior.mean + prior.variance.sqrt() * torch.randn(shape).to(mean)
    shifts = masks * effects
    return mean + shifts - shifts.mean(dim=0)


def _weights(products: np.ndarray) -> np.ndarray:
    """Weights of least squares, none of them negative, from products ``(T, 4, 4)``.

    The mean, which comes third, has all of the weight where the others do not improve on it by more
    than two standard errors over perturbations.
    """
    total = products.sum(axis=0)
    known, target = total[:-1, :-1], total[:-1, -1]
    scale = np.trace(known) + np.finfo(float).tiny
    factor = np.linalg.cholesky(known + _WEAK * scale * np.eye(len(known)))
    found, _ = nnls(factor.T, np.linalg.solve(factor, target))
    of_mean = np.array([0, 0, max(target[2], 0) / (known[2, 2] + _WEAK * scale)])
    gain = _squared_errors(products, of_mean) - _squared_errors(products, found)
    return found if _is_above_noise(gain) else of_mean


def _squared_errors(products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    error = np.append(weights, -1)
    return np.einsum("i,tij,j->t", error, products, error)


def _is_above_noise(gain: np.ndarray) -> bool:
    """Whether what perturbations gain on average is more than two standard errors."""
    return bool(gain.mean() > 2 * gain.std() / np.sqrt(len(gain)))


class _Sums(NamedTuple):
    """Weighted sums over perturbations: of 1, features, effects and of their products."""

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


class _Line(NamedTuple):
    """Ridge regression of effects on features, gene by gene, around their means."""

    mean: np.ndarray
    """Effects at mean features, ``(G,)``."""
    mean_features: np.ndarray
    coefficients: np.ndarray
    """``(D, G)``."""

    @classmethod
    def fit(cls, sums: _Sums, strength: float) -> _Line:
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


class _Ridge(NamedTuple):
    """Regression on all perturbations, and on those outside of each fold."""

    whole: _Line
    of_folds: dict[int, _Line]

    def held_out(self, features: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predictions by the perturbations of other folds, and their means, ``(R, G)`` each."""
        predicted = [
            self.of_folds[fold](x[None])[0] for x, fold in zip(features, folds, strict=True)
        ]
        means = [self.of_folds[fold].mean for fold in folds]
        return np.stack(predicted), np.stack(means)


def _fit_ridge(
    observed: ObservedEffects, scores: _Scores, features: np.ndarray, folds: np.ndarray
) -> _Ridge | None:
    """Regress observed effects on features; ``None`` where a fold has no cells.

    Perturbations weigh by how much of what their cells show is no error. The strength is the
    largest that predicts perturbations of other folds as well as any does, but for two standard
    errors, on the genes that vary most.
    """
    slope, signal = observed.scale.slope, scores.signal
    chosen = np.sort(np.argsort(scores.noise - scores.squares)[:_GENES_FOR_STRENGTH])
    sums: dict[int, _Sums] = {}
    weights, of_chosen = np.zeros(len(folds)), np.zeros((len(folds), len(chosen)))
    for rows, effects, errors in _observed(observed, len(folds)):
        error = np.where(np.isfinite(errors), slope * errors, np.inf)
        weights[rows] = signal / (signal + np.square(error).mean(axis=1))
        of_chosen[rows] = (slope * effects)[:, chosen]
        for fold in np.unique(folds[rows]).tolist():
            own = folds[rows] == fold
            part = _Sums.of(weights[rows][own], features[rows][own], slope * effects[own])
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
            missed = _Line.fit(some, strength)(features[rows]) - of_chosen[rows]
            found[rows] = weights[rows] * (scores.precision[chosen] * np.square(missed)).sum(axis=1)
        return found

    errors_of = [squared_errors(strength) for strength in _STRENGTHS]
    best = errors_of[int(np.argmin([errors.mean() for errors in errors_of]))]
    as_good = [not _is_above_noise(errors - best) for errors in errors_of]
    strength = _STRENGTHS[np.flatnonzero(as_good).max()]
    of_folds = {fold: _Line.fit(part, strength) for fold, part in others.items()}
    return _Ridge(_Line.fit(total, strength), of_folds)
