"""What measuring a perturbation is expected to tell of others: optimal design of experiments.

Given features, masks and effects follow linear regressions, one for each latent dimension, whose
weights have a normal posterior of covariance ``C``. Measuring perturbation t, with precision
``k_t``, reduces the variance of what is predicted of s by::

    (phi_s' C phi_t)^2 / (phi_t' C phi_t + 1 / k_t)

whatever comes out. Best is what reduces most the sum over all that are to be predicted (Cohn,
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
    """Of the weights, ``(R, D, D)``."""
    precision: np.ndarray
    """Of what measuring each perturbation would tell, ``(N, R)``; 0 tells nothing."""
    importance: np.ndarray
    """What the variance of each prediction counts, ``(N, R)``."""


def regressions_of_features(
    prior: FeaturePrior, codes: np.ndarray, is_used: np.ndarray, squared_norms: np.ndarray
) -> Regressions:
    """Regressions of effects and of log-odds of masks, all latent dimensions of each.

    A shift has the mean ``P(m = 1) * e``. An effect is known but for what features leave
    unexplained, where its mask is on; a mask tells of its log-odds what one yes or no does, by the
    bound of Jaakkola & Jordan 2000 that the weights are fitted by.

    Parameters
    ----------
    codes
        Perturbations that are to be predicted, ``(N,)``.
    is_used
        Latent dimensions that masks may be on in, ``(L,)``.
    squared_norms
        What a shift by one does to genes, squared and summed over them, ``(L,)``.
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
    """Choose perturbations, each by what it tells beyond those before it.

    Returns
    -------
    Positions, ``(n_chosen,)``, and by which share of the variance of all predictions, before any
    is measured, each reduces it. Of equals the first is chosen. Where there is no variance, shares
    are 0.
    """
    features, covariance, precision, importance = regressions
    covariance = covariance.copy()
    by_importance = np.stack([(features.T * counts) @ features for counts in importance.T])
    variance = _quadratic_forms(features, covariance)
    total = (importance * variance).sum()
    # Of each perturbation phi' C S C phi, where S is the sum of importance times phi phi'.
    covered = _quadratic_forms(features, covariance @ by_importance @ covariance)
    is_free = np.ones(len(features), dtype=bool)
    chosen, shares = [], []
    for _ in range(min(n_chosen, len(features))):
        reduction = (precision * covered / (1 + precision * variance)).sum(axis=1)
        best = int(np.argmax(np.where(is_free, reduction, -np.inf)))
        chosen.append(best)
        shares.append(reduction[best] / total if total > 0 else 0.0)
        is_free[best] = False
        # The posterior after it (Sherman & Morrison), and what that changes for all.
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
    """``phi' A phi`` of each row ``(N, D)`` and matrix ``(R, D, D)``, without all at once."""
    return np.stack([((features @ one) * features).sum(axis=1) for one in matrices], axis=1)
