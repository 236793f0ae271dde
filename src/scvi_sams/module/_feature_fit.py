"""Prior of masks and effects given features of perturbations, fitted to estimates of effects.

For perturbation t with features ``phi_t`` (the last of which is 1) and latent dimension l::

    logit P(m_tl = 1) = logit(alpha) + u_l . phi_t
    e_tl ~ Normal(w_l . phi_t, beta^2)          s_tl = m_tl * e_tl

An estimate of an effect is normal around ``s_tl`` with a known variance. By expectation and
maximisation, with the posterior of ``u`` (by the bound of Jaakkola & Jordan 2000) and of ``w``:

- each weight has its own prior variance, half of which is that of its feature in all dimensions: an
  uninformative feature has none, and one that matters in one dimension may (automatic relevance
  determination, MacKay 1995);
- ``beta^2`` is the part of the prior variance of effects that features do not explain.

If features are uninformative, weights shrink to zero, and the prior is the one without features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import expit

_N_STEPS, _N_STEPS_OF_FOLDS = 40, 25
"""Iterations of expectation-maximisation; later changes are a few percent."""
_FEWEST_EFFECTS = 5.0
"""Smallest expected number of effects on a dimension with weights."""
_INITIAL_SHARE = 0.1
"""Initial proportion of the variance of effects that features explain."""
_INITIAL_LOGIT_VARIANCE = 0.5
_LEAST_VARIANCE = 1e-8
_LEAST_UNEXPLAINED = 0.05
_MOST_LOG_ODDS = 30.0
_SMALLEST = 1e-6


class Weights(NamedTuple):
    """Posterior of the weights of features, for L latent dimensions and D features."""

    masks: np.ndarray
    """Means of ``u``, ``(D, L)``."""
    covariance_of_masks: np.ndarray
    """``(L, D, D)``."""
    effects: np.ndarray
    """Means of ``w``, ``(D, L)``."""
    covariance_of_effects: np.ndarray
    """``(L, D, D)``."""
    unexplained: float
    """``beta^2`` per prior variance of effects."""

    @classmethod
    def nothing(cls, n_features: int, n_latent: int) -> Weights:
        """Weights of uninformative features: zero."""
        means = np.zeros((2, n_features, n_latent))
        covariances = np.zeros((2, n_latent, n_features, n_features))
        return cls(means[0], covariances[0], means[1], covariances[1], 1.0)


class Prior(NamedTuple):
    """Prior of perturbations given features, ``(N, L)`` each."""

    log_odds: np.ndarray
    """Log-odds of masks, averaged over the posterior of the weights."""
    mean: np.ndarray
    """Mean of effects with masks on."""
    variance: np.ndarray
    """Variance of effects, including that of the weights."""


class Estimates(NamedTuple):
    """Effects and their variances, ``(T, L)`` each."""

    effects: np.ndarray
    variance: np.ndarray


def fit_weights(
    features: np.ndarray,
    estimates: Estimates,
    log_odds: float,
    prior_variance: float,
    *,
    n_steps: int = _N_STEPS,
) -> Weights:
    """Fit the weights of features ``(T, D)``; ``log_odds`` are those without features."""
    n_features, n_latent = features.shape[1], estimates.effects.shape[1]
    weights = Weights.nothing(n_features, n_latent)
    # Nothing can be learned from dimensions without effects.
    on = expit(log_odds + _log_bayes_factor(estimates, 0.0, prior_variance))
    used = np.flatnonzero(on.sum(axis=0) >= _FEWEST_EFFECTS)
    if not len(used):
        return weights
    found = _fit(
        features,
        Estimates(*(part[:, used] for part in estimates)),
        log_odds,
        prior_variance,
        n_steps,
    )
    for whole, part in zip(weights[:4], found[:4], strict=True):
        place = (used,) if whole.ndim == 3 else (slice(None), used)
        whole[place] = part
    return weights._replace(unexplained=found.unexplained)


def _fit(
    features: np.ndarray,
    estimates: Estimates,
    log_odds: float,
    prior_variance: float,
    n_steps: int,
) -> Weights:
    effects, noise = estimates
    n_features, n_latent = features.shape[1], effects.shape[1]
    shape = (n_features, n_latent)
    of_masks = _Strengths(np.full(shape, _INITIAL_LOGIT_VARIANCE / n_features))
    of_effects = _Strengths(np.full(shape, _INITIAL_SHARE * prior_variance / n_features))
    weights = Weights.nothing(n_features, n_latent)
    unexplained = prior_variance
    spread_of_masks, spread_of_effects = np.zeros((2, *effects.shape))
    for _ in range(n_steps):
        prior_logits = log_odds + features @ weights.masks
        mean = features @ weights.effects
        evidence = _log_bayes_factor(estimates, mean, unexplained + spread_of_effects)
        on = expit(np.clip(prior_logits + evidence, -_MOST_LOG_ODDS, _MOST_LOG_ODDS))
        precision = on / (noise + unexplained)
        means, covariances = of_effects.posterior(features, precision, precision * effects)
        spread_of_effects = _spread(features, covariances)
        # Jaakkola and Jordan's bound is tightest at the root of the second moment of the logit.
        logit = np.sqrt(np.square(prior_logits) + spread_of_masks)
        curvature = np.tanh(logit / 2) / (2 * np.maximum(logit, _SMALLEST))
        targets = on - 0.5 - curvature * log_odds
        logits, covariances_of_logits = of_masks.posterior(features, curvature, targets)
        spread_of_masks = _spread(features, covariances_of_logits)
        # Effects given that masks are on, and their squared distance from the prediction.
        mean = features @ means
        known = 1 / noise + 1 / unexplained
        expected = (effects / noise + mean / unexplained) / known
        rest = np.square(expected - mean) + 1 / known + spread_of_effects
        whole = np.square(expected) + 1 / known
        share = (on * rest).sum() / max((on * whole).sum(), _SMALLEST)
        unexplained = prior_variance * float(np.clip(share, _LEAST_UNEXPLAINED, 1))
        weights = Weights(
            logits, covariances_of_logits, means, covariances, unexplained / prior_variance
        )
    return weights


class _Strengths:
    """Prior variances of weights, ``(D, L)``, estimated jointly."""

    def __init__(self, variances: np.ndarray) -> None:
        self.variances = variances

    def posterior(
        self, features: np.ndarray, precision: np.ndarray, targets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posterior of weights given precisions and precision-weighted targets, ``(T, L)`` each."""
        inverse = (features.T * precision.T[:, None]) @ features
        diagonal = np.arange(features.shape[1])
        inverse[:, diagonal, diagonal] += 1 / self.variances.T
        covariances = np.linalg.inv(inverse)
        means = (covariances @ (features.T @ targets).T[..., None])[..., 0].T
        squared = np.square(means) + covariances[:, diagonal, diagonal].T
        of_features = squared.mean(axis=1, keepdims=True)
        self.variances = np.maximum((squared + of_features) / 2, _LEAST_VARIANCE)
        return means, covariances


def _spread(features: np.ndarray, covariances: np.ndarray) -> np.ndarray:
    """Variance of weighted sums of features, ``(N, L)``."""
    return ((features @ covariances) * features).sum(axis=-1).T


def _log_bayes_factor(
    estimates: Estimates, mean: np.ndarray | float, variance: np.ndarray | float
) -> np.ndarray:
    """Log density ratio of estimates with masks on and off."""
    effects, noise = estimates
    on = noise + variance
    return 0.5 * (np.log(noise / on) - np.square(effects - mean) / on + np.square(effects) / noise)


def prior_of(
    features: np.ndarray, weights: Weights, log_odds: float, prior_variance: float
) -> Prior:
    """Prior of masks and effects given features ``(N, D)``."""
    logits = log_odds + features @ weights.masks
    spread = _spread(features, weights.covariance_of_masks)
    variance = weights.unexplained * prior_variance + _spread(
        features, weights.covariance_of_effects
    )
    # Mean of the logistic function of a normal logit (MacKay 1992).
    averaged = logits / np.sqrt(1 + np.pi * spread / 8)
    return Prior(averaged, features @ weights.effects, variance)


def log_evidence(estimates: Estimates, prior: Prior) -> np.ndarray:
    """Log density of the estimates of each perturbation, minus that without any effect."""
    factor = _log_bayes_factor(estimates, prior.mean, prior.variance)
    off, on = -np.logaddexp(0, prior.log_odds), -np.logaddexp(0, -prior.log_odds)
    return np.logaddexp(off, on + factor).sum(axis=1)


def held_out_prior(
    features: np.ndarray,
    estimates: Estimates,
    log_odds: float,
    prior_variance: float,
    folds: np.ndarray,
) -> Prior:
    """Prior of each perturbation given features, fitted to the perturbations of other folds."""
    found = Prior(*np.zeros((3, *estimates.effects.shape)))
    for fold in np.unique(folds):
        others = folds != fold
        weights = fit_weights(
            features[others],
            Estimates(*(part[others] for part in estimates)),
            log_odds,
            prior_variance,
            n_steps=_N_STEPS_OF_FOLDS,
        )
        for whole, part in zip(
            found, prior_of(features[~others], weights, log_odds, prior_variance), strict=True
        ):
            whole[~others] = part
    return found
