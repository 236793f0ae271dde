"""Predict effects from features of perturbations: learned from perturbations that are left out.

A perturbation without cells is predicted by a weighted sum of

- the model: masks and effects from their prior given features, decoded;
- shifts by ridge regression on features, decoded;
- effects on genes by ridge regression on features;
- the mean effect of measured perturbations.

The weights, and the error of such predictions, come from perturbations that are left out, a fifth
at a time (stacking, Wolpert 1992). If features are uninformative, only the mean is left.

The gene that a perturbation targets is predicted by :mod:`~scvi_sams.train._target_effects`, and is
unknown to all of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from scvi_sams._torch import fixed_seed
from scvi_sams.module._feature_prior import PriorOfEffects
from scvi_sams.module._perturbation_module import PerturbationModule
from scvi_sams.module._unmeasured import COMPONENTS_OF_UNMEASURED
from scvi_sams.train._control_decoder import ControlDecoder
from scvi_sams.train._expected_rates import N_POSTERIOR
from scvi_sams.train._observed_effects import ObservedEffects
from scvi_sams.train._ridge import Ridge, fit_ridge, is_above_noise
from scvi_sams.train._target_effects import TargetGenes, fit_target_effect

_SEED = 60041
_STATES_OF_HELD_OUT = 2
"""Basal states per posterior sample; few, because perturbations are averaged as well."""
_GENES_FOR_STRENGTH = 500
_PERTURBATIONS_OF_PRIOR = 5.0
"""Weight, in perturbations, of the mean squared error over genes in that of each gene."""
_WEAK = 1e-6


@torch.no_grad()
def fit_to_features(module: PerturbationModule, observed: ObservedEffects) -> None:
    """Learn to predict effects of left-out perturbations from features."""
    kept = module.unmeasured
    if kept is None or not kept.is_fitted or module.features is None:
        return
    features = module.features
    if not bool(features.is_fitted):  # masks were trained without a dense phase
        measured = torch.arange(features.n_perturbations, device=module.device)
        mean, sd = module.shared_moments(measured)
        # A mask that is off in all samples has no variance.
        variance = sd.square().clamp(min=_WEAK * features.variance)
        features.fit(mean, variance, measured)
    slope = observed.scale.slope
    values = features.features[: features.n_perturbations, :-1].double().cpu().numpy()
    folds = features.folds.cpu().numpy()
    targets = kept.target_genes[: len(folds)].cpu().numpy()
    effects_of = _Observed(observed, len(folds), targets)
    scores = _Scores.of(effects_of)
    ridge, of_shifts = _regressions(module, effects_of, scores, values, folds)
    if ridge is None or of_shifts is None:
        return
    decoder = ControlDecoder(module, -1)
    # Products of the predictions and the observed effect, for each gene and perturbation.
    n_parts = len(COMPONENTS_OF_UNMEASURED) + 1
    of_genes = np.zeros((n_parts, n_parts, len(slope)))
    of_rows = np.zeros((len(folds), n_parts, n_parts))
    of_targets = np.zeros((n_parts - 1, len(slope)))
    for rows, effects, errors in effects_of:
        prior = PriorOfEffects(*features.held_out[:, rows])
        some = values[rows], folds[rows]
        shifts = torch.as_tensor(of_shifts.held_out(*some)[0]).to(features.features)
        decoded = (
            decoder.effects(_samples(prior, module), _STATES_OF_HELD_OUT).of_shift,
            decoder.mean_effects(shifts, _STATES_OF_HELD_OUT),
        )
        compared = [decoder.scale.slope * decoder.scale.compared(part) for part in decoded]
        parts = np.stack([*compared, *ridge.held_out(*some), slope * effects])
        row, gene = effects_of.targets_in(rows)
        of_targets[:, gene] = parts[:-1, row, gene]
        parts = np.where(np.isfinite(errors), parts, 0)
        of_genes += np.einsum("itg,jtg->ijg", parts, parts)
        of_rows[rows] = np.einsum("itg,jtg,g->tij", parts, parts, scores.precision)
    weights = _weights(of_rows)
    error = np.append(weights, -1)
    squared = np.einsum("i,ijg,j->g", error, of_genes, error) - scores.noise
    mean = max(float(squared.sum() / scores.n_known.sum()), 0.0)
    variance = np.maximum(squared, 0) + _PERTURBATIONS_OF_PRIOR * mean
    line = ridge.whole
    target = fit_target_effect(scores.targets, decoder.scale, weights @ of_targets)
    if target is not None:
        kept.fill(
            target_change=torch.tensor([target.log_change]),
            target_variance=torch.tensor([target.variance]),
        )
    kept.fill(
        mean=torch.as_tensor(line.mean),
        coefficients=torch.as_tensor(line.coefficients),
        mean_features=torch.as_tensor(line.mean_features),
        mean_shift=torch.as_tensor(of_shifts.whole.mean),
        shift_coefficients=torch.as_tensor(of_shifts.whole.coefficients),
        weights=torch.as_tensor(weights),
        variance=torch.as_tensor(variance / (scores.n_known + _PERTURBATIONS_OF_PRIOR)),
    )


class _Observed:
    """Observed effects at unit doses, without those of perturbations on their own genes.

    ``targets``, ``(T,)``, are the positions of these genes, -1 where they are unknown.
    """

    def __init__(
        self, observed: ObservedEffects, n_perturbations: int, targets: np.ndarray
    ) -> None:
        self.slope, self.n_perturbations = observed.scale.slope, n_perturbations
        self._observed, self._targets = observed, targets

    def __iter__(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yield rows, effects and their errors, which are infinite for unknown effects."""
        for rows, effects, errors in self.with_targets():
            own = self.targets_in(rows)
            effects[own], errors[own] = 0, np.inf
            yield rows, effects, errors

    def with_targets(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Yield the same with effects on the own genes."""
        for block in self._observed.blocks(range(self.n_perturbations)):
            yield block.rows, block.observed / block.dose, block.error / block.dose

    def targets_in(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Positions among ``rows`` of perturbations with a gene, and of these genes."""
        targets = self._targets[rows]
        row = np.flatnonzero(targets >= 0)
        return row, targets[row]


class _Scores(NamedTuple):
    """Sums over perturbations, in differences of means of logs, ``(G,)`` each but the last."""

    squares: np.ndarray
    """Squares of observed effects."""
    noise: np.ndarray
    """Squares of their errors."""
    n_known: np.ndarray
    of_rows: np.ndarray
    """Mean of the squared errors of each perturbation, ``(T,)``; infinite without cells."""
    targets: TargetGenes

    @classmethod
    def of(cls, observed: _Observed) -> _Scores:
        """Sum over all perturbations with cells."""
        slope = observed.slope
        squares, noise, n_known = np.zeros((3, len(slope)))
        of_rows = np.zeros(observed.n_perturbations)
        targets = TargetGenes.unknown(len(slope))
        for rows, effects, errors in observed.with_targets():
            row, gene = observed.targets_in(rows)
            targets.effects[gene], targets.errors[gene] = effects[row, gene], errors[row, gene]
            errors[row, gene] = np.inf
            known = np.isfinite(errors)
            of_errors = np.square(slope * np.where(known, errors, 0))
            n_genes = known.sum(axis=1)
            of_rows[rows] = np.where(
                n_genes > 0, of_errors.sum(axis=1) / np.maximum(n_genes, 1), np.inf
            )
            squares += np.where(known, np.square(slope * effects), 0).sum(axis=0)
            noise += of_errors.sum(axis=0)
            n_known += known.sum(axis=0)
        return cls(squares, noise, np.maximum(n_known, 1), of_rows, targets)

    @property
    def signal(self) -> float:
        """Mean square of effects, corrected for errors."""
        return max(float((self.squares - self.noise).sum() / self.n_known.sum()), _WEAK)

    @property
    def precision(self) -> np.ndarray:
        """Weights of genes: the precision with which predictions can be evaluated."""
        return 1 / (self.noise / self.n_known + self.signal)


def _regressions(
    module: PerturbationModule,
    observed: _Observed,
    scores: _Scores,
    features: np.ndarray,
    folds: np.ndarray,
) -> tuple[Ridge | None, Ridge | None]:
    """Regress observed effects on features, and mean shifts.

    Perturbations are weighted by the proportion of their observed effects that is not error.
    """
    weights = scores.signal / (scores.signal + scores.of_rows)
    varying = np.sort(np.argsort(scores.noise - scores.squares)[:_GENES_FOR_STRENGTH])

    def effects() -> Iterator[tuple[slice, np.ndarray]]:
        for rows, found, _ in observed:
            yield rows, observed.slope * found

    codes = torch.arange(len(folds), device=module.device)
    shifts = module.shared_moments(codes)[0].double().cpu().numpy()
    every = np.arange(shifts.shape[1])
    return (
        fit_ridge(effects, weights, features, folds, scores.precision, varying),
        fit_ridge(
            lambda: iter([(slice(None), shifts)]),
            *(weights, features, folds, np.ones(len(every)), every),
        ),
    )


def _samples(prior: PriorOfEffects, module: PerturbationModule) -> Tensor:
    """Samples of shifts with an exact mean, ``(P, R, L)``."""
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
    """Non-negative least squares weights from products ``(T, k + 1, k + 1)``.

    The mean, which is last, has all of the weight unless the others improve on it by more than two
    standard errors over perturbations.
    """
    total = products.sum(axis=0)
    known, target = total[:-1, :-1], total[:-1, -1]
    scale = np.trace(known) + np.finfo(float).tiny
    factor = np.linalg.cholesky(known + _WEAK * scale * np.eye(len(known)))
    found, _ = nnls(factor.T, np.linalg.solve(factor, target))
    of_mean = np.zeros(len(target))
    of_mean[-1] = max(target[-1], 0) / (known[-1, -1] + _WEAK * scale)
    gain = _squared_errors(products, of_mean) - _squared_errors(products, found)
    return found if is_above_noise(gain) else of_mean


def _squared_errors(products: np.ndarray, weights: np.ndarray) -> np.ndarray:
    error = np.append(weights, -1)
    return np.einsum("i,tij,j->t", error, products, error)
