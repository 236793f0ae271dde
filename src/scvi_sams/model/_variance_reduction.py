"""Expected information of measuring a perturbation about others: optimal experimental design.

Given features, masks and effects follow linear regressions, one for each latent dimension, whose
weights have a normal posterior of covariance ``C``. Measuring perturbation t, with precision
``k_t``, reduces the variance of the prediction of s by::

    (phi_s' C phi_t)^2 / (phi_t' C phi_t + 1 / k_t)

whatever the result. The best perturbation maximises the sum over all predictions (Cohn,
Ghahramani & Jordan 1996, doi:10.1613/jair.295; MacKay 1992, doi:10.1162/neco.1992.4.4.590).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import expit

from scvi_sams.module._feature_prior import FeaturePrior

_SMALLEST = 1e-6


class Regressions(NamedTuple):
    """R Bayesian linear regressions on the same features of N perturbations."""

    features: np.ndarray
    """``(N, D)``."""
    covariance: np.ndarray
    """Covariance of the weights, ``(R, D, D)``."""
    precision: np.ndarray
    """Precision with which each perturbation would be measured, ``(N, R)``; 0: no information."""
    importance: np.ndarray
    """Weight of the variance of each prediction, ``(N, R)``."""


def regressions_of_features(
    prior: FeaturePrior, codes: np.ndarray, is_used: np.ndarray, squared_norms: np.ndarray
) -> Regressions:
    """Regressions of effects and of log-odds of masks, all latent dimensions of each.

    A shift has the mean ``P(m = 1) * e``. If its mask is on, an effect is known up to the variance
    that features do not explain; a mask informs its log-odds like one binary observation, by the
    bound of Jaakkola & Jordan 2000 with which the weights are fitted.

    Parameters
    ----------
    codes
        Perturbations to predict, ``(N,)``.
    is_used
        Latent dimensions with masks that may be on, ``(L,)``.
    squared_norms
        Squared effect of a unit shift on genes, summed over them, ``(L,)``.
    """

    def array(name: str) -> np.ndarray:
        return np.asarray(getattr(prior, name).double().cpu().numpy())

    features = array("features")[codes]
    of_masks, of_effects = array("mask_covariance"), array("effect_covariance")
    logits = prior.log_odds + features @ array("mask_weights")
    spread = _quadratic_forms(features, of_masks)
    on = expit(logits / np.sqrt(1 + np.pi * spread / 8)) * is_used
    mean = features @ array("effect_weights")
    root = np.maximum(np.sqrt(np.square(logits) + spread), _SMALLEST)
    return Regressions(
        features,
        np.concatenate([of_effects, of_masks]),
        np.concatenate(
            [
                on / (float(prior.unexplained) * prior.variance),
                np.tanh(root / 2) / (2 * root) * is_used,
            ],
            axis=1,
        ),
        np.concatenate([np.square(on), np.square(on * (1 - on) * mean)], axis=1)
        * np.tile(squared_norms, 2),
    )


def most_telling(regressions: Regressions, n_chosen: int) -> tuple[np.ndarray, np.ndarray]:
    """Choose perturbations one by one, by their information beyond the previous ones.

    Returns
    -------
    Positions, ``(n_chosen,)``, and the proportion of the variance of all predictions, before any
    measurement, that each removes. Of ties the first is chosen. Without variance, proportions are
    0.
    """
    features, covariance, precision, importance = regressions
    covariance = covariance.copy()
    by_importance = np.stack([(features.T * counts) @ features for counts in importance.T])
    variance = _quadratic_forms(features, covariance)
    total = (importance * variance).sum()
    # For each perturbation phi' C S C phi, where S is the sum of importance times phi phi'.
    covered = _quadratic_forms(features, covariance @ by_importance @ covariance)
    is_free = np.ones(len(features), dtype=bool)
    chosen, shares = [], []
    for _ in range(min(n_chosen, len(features))):
        reduction = (precision * covered / (1 + precision * variance)).sum(axis=1)
        best = int(np.argmax(np.where(is_free, reduction, -np.inf)))
        chosen.append(best)
        shares.append(reduction[best] / total if total > 0 else 0.0)
        is_free[best] = False
        # The posterior after it (Sherman-Morrison), and the change for all.
        direction = covariance @ features[best]  # (R, D)
        onwards = (by_importance @ direction[..., None])[..., 0]
        factor = precision[best] / (1 + precision[best] * variance[best])
        along = features @ direction.T
        further = features @ (covariance @ onwards[..., None])[..., 0].T
        covered -= 2 * factor * along * further
        covered += np.square(factor * along) * (direction * onwards).sum(axis=1)
        variance -= factor * np.square(along)
        covariance -= factor[:, None, None] * direction[:, :, None] * direction[:, None]
    return np.array(chosen), np.array(shares)


def _quadratic_forms(features: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """``phi' A phi`` of each row ``(N, D)`` and matrix ``(R, D, D)``, one matrix at a time."""
    return np.stack([((features @ one) * features).sum(axis=1) for one in matrices], axis=1)
