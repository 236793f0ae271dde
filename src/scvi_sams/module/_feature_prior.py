"""Prior of masks and effects given features, for measured and unmeasured perturbations.

See :mod:`~scvi_sams.module._feature_fit` for the prior. It is fitted when masks are initialised, to
effects on sparse axes; until then, and if features are uninformative, it is the prior without
features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from scvi_sams.module._feature_fit import (
    Estimates,
    Prior,
    Weights,
    fit_weights,
    held_out_prior,
    log_evidence,
    prior_of,
)
from scvi_sams.module._rotation import signed_permutation

MOST_FEATURES = 100
"""Largest number of columns with weights; larger tables are reduced to this number."""
_N_FOLDS = 5
_FEWEST_PERTURBATIONS = 10
"""Smallest number of perturbations for which features are used."""


class PriorOfEffects(NamedTuple):
    """Prior of masks, and of effects with masks on; ``(R, L)`` each."""

    log_odds: Tensor
    mean: Tensor
    variance: Tensor

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and second moment of masked effects."""
        on = torch.sigmoid(self.log_odds)
        return on * self.mean, on * (self.mean.square() + self.variance)


class FeaturePrior(nn.Module):
    """Prior of masks and effects given features, of T measured perturbations and U others.

    Parameters
    ----------
    features
        ``(T + U, D)``, rows of measured perturbations first; rows without features are 0.
    n_perturbations, n_latent
        T and L.
    log_odds, scale
        Log-odds of masks and SD of effects, without features.

    Attributes
    ----------
    of_measured
        Log-odds of masks, mean and variance of effects of measured perturbations, ``(3, T, L)``:
        the prior in the training objective.
    held_out
        The same, fitted to the perturbations of the other folds.
    folds
        Fold of each measured perturbation, ``(T,)``.
    """

    features: Tensor
    of_measured: Tensor
    held_out: Tensor
    folds: Tensor
    mask_weights: Tensor
    mask_covariance: Tensor
    effect_weights: Tensor
    effect_covariance: Tensor
    unexplained: Tensor
    is_fitted: Tensor

    def __init__(
        self,
        features: np.ndarray,
        *,
        n_perturbations: int,
        n_latent: int,
        log_odds: float,
        scale: float,
    ) -> None:
        super().__init__()
        self.n_perturbations = n_perturbations
        self.log_odds, self.variance = log_odds, scale**2
        n_weights = features.shape[1] + 1
        with_intercept = np.concatenate([features, np.ones((len(features), 1))], axis=1)
        self.register_buffer("features", torch.as_tensor(with_intercept, dtype=torch.float32))
        without = torch.tensor([log_odds, 0.0, self.variance], dtype=torch.float32)[:, None, None]
        self.register_buffer("of_measured", without.repeat(1, n_perturbations, n_latent))
        self.register_buffer("held_out", self.of_measured.clone())
        # Fixed, so that folds are the same in each process.
        order = np.random.default_rng(n_perturbations).permutation(n_perturbations)
        self.register_buffer("folds", torch.as_tensor(order % _N_FOLDS))
        for name in ("mask", "effect"):
            self.register_buffer(f"{name}_weights", torch.zeros(n_weights, n_latent))
            self.register_buffer(f"{name}_covariance", torch.zeros(n_latent, n_weights, n_weights))
        self.register_buffer("unexplained", torch.ones(()))
        self.register_buffer("is_fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, effects: Tensor, variance: Tensor, codes: Tensor) -> None:
        """Fit to estimates of effects and their variances, ``(R, L)``, of ``codes``, ``(R,)``.

        The prior is used only if it makes effects of left-out perturbations (a fifth at a time)
        more likely by more than two standard errors, both than the prior without features and than
        the frequency of effects on each dimension, which is not a feature. It is not used with
        fewer than ten perturbations.
        """
        if len(codes) < _FEWEST_PERTURBATIONS:
            return
        estimates = Estimates(_as_array(effects), _as_array(variance))
        features = _as_array(self.features)
        of_codes = features[codes.cpu().numpy()]
        settings = (self.log_odds, self.variance)
        folds = self.folds[codes].cpu().numpy()
        held_out = held_out_prior(of_codes, estimates, *settings, folds)
        without = Prior(
            *(
                np.full_like(part, value)
                for part, value in zip(held_out, (self.log_odds, 0.0, self.variance), strict=True)
            )
        )
        self.is_fitted.fill_(True)
        evidence = log_evidence(estimates, held_out)
        by_dimension = held_out_prior(of_codes[:, -1:], estimates, *settings, folds)
        for other in (without, by_dimension):
            gain = evidence - log_evidence(estimates, other)
            if gain.mean() <= 2 * gain.std() / len(gain) ** 0.5:
                return
        weights = fit_weights(of_codes, estimates, *settings)
        self.held_out[:, codes] = self._as_tensor(np.stack(held_out))
        measured = features[: self.n_perturbations]
        self.of_measured.copy_(self._as_tensor(np.stack(prior_of(measured, weights, *settings))))
        self.mask_weights.copy_(self._as_tensor(weights.masks))
        self.mask_covariance.copy_(self._as_tensor(weights.covariance_of_masks))
        self.effect_weights.copy_(self._as_tensor(weights.effects))
        self.effect_covariance.copy_(self._as_tensor(weights.covariance_of_effects))
        self.unexplained.fill_(weights.unexplained)

    def _as_tensor(self, values: np.ndarray) -> Tensor:
        return torch.as_tensor(values).to(self.features)

    def measured(self, codes: Tensor) -> PriorOfEffects:
        """Prior of measured perturbations in the training objective."""
        return PriorOfEffects(*self.of_measured[:, codes])

    def of(self, codes: Tensor) -> PriorOfEffects:
        """Prior of any perturbations."""
        tables = (
            self.mask_weights,
            self.mask_covariance,
            self.effect_weights,
            self.effect_covariance,
        )
        masks, mask_covariance, effects, effect_covariance = map(_as_array, tables)
        weights = Weights(
            masks, mask_covariance, effects, effect_covariance, float(self.unexplained)
        )
        features = _as_array(self.features[codes])
        found = prior_of(features, weights, self.log_odds, self.variance)
        return PriorOfEffects(*map(self._as_tensor, found))

    @torch.no_grad()
    def permute(self, order: Tensor, signs: Tensor) -> None:
        """Reorder latent dimensions: the new ``l`` is the old ``order[l]``, times ``signs[l]``."""
        signed = signed_permutation(order, signs)
        for table in (self.of_measured, self.held_out):
            table.copy_(table[..., order])
            table[1] *= signs
        self.mask_weights.copy_(self.mask_weights[:, order])
        self.effect_weights.copy_(self.effect_weights @ signed)
        for covariance in (self.mask_covariance, self.effect_covariance):
            covariance.copy_(covariance[order])


def _as_array(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()
