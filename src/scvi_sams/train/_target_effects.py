"""The effect of perturbations on the genes that they target, for perturbations without cells.

Other genes, and features, say little about it: CRISPRi lowers each target, CRISPRa raises it. These
effects are predicted by one change of the log rate, the same for all, if this predicts left-out
perturbations better.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from scvi_sams.train._compared_scale import Scale
from scvi_sams.train._ridge import is_above_noise

_FEWEST_TARGETS = 5
"""With fewer, neither a mean change nor its variance between perturbations is known."""
_N_CHANGES = 201
_WEAK = 1e-6


class TargetGenes(NamedTuple):
    """Effects of perturbations on their own genes, at the positions of these genes, ``(G,)``.

    A gene is the target of at most one perturbation, the one with its name.
    """

    effects: np.ndarray
    """On the compared scale."""
    errors: np.ndarray
    """Infinite for genes that are not targets."""

    @classmethod
    def unknown(cls, n_genes: int) -> TargetGenes:
        """No targets."""
        return cls(np.zeros(n_genes), np.full(n_genes, np.inf))


class TargetEffect(NamedTuple):
    """What a perturbation does to its target."""

    log_change: float
    """Change of the log rate; of the mean, for values that are not counts."""
    variance: float
    """Variance of effects between perturbations, on the compared scale."""


def fit_target_effect(
    targets: TargetGenes, scale: Scale, predicted: np.ndarray
) -> TargetEffect | None:
    """Fit one change to all targets, by least squares on the compared scale.

    Parameters
    ----------
    targets
        Observed effects.
    scale
        Scale of these effects.
    predicted
        Other predictions for left-out perturbations, in differences of means of logs, ``(G,)``.

    Returns
    -------
    ``None`` if there are fewer than five targets, or if for a left-out target, the change that fits
    all others has no smaller squared error than ``predicted``, by two standard errors.
    """
    known = np.flatnonzero(np.isfinite(targets.errors))
    if len(known) < _FEWEST_TARGETS:
        return None
    slope = scale.slope[known]
    effects, noise = targets.effects[known], np.square(targets.errors[known])
    signal = (np.square(slope) * (np.square(effects) - noise)).mean()
    precision = 1 / (np.square(slope) * noise + max(signal, _WEAK))
    largest = np.abs(scale.log_change(targets.effects[None])[0, known]).max()
    changes = np.linspace(-largest, largest, _N_CHANGES)
    # Of every change (rows) for every target.
    everywhere = np.ones(len(scale.slope))
    fitted = np.stack([scale.compared(change * everywhere[None])[0, known] for change in changes])
    squared = precision * np.square(slope * (fitted - effects))
    total = squared.sum(axis=1)
    of_others = (total[:, None] - squared).argmin(axis=0)
    missed = fitted[of_others, np.arange(len(known))] - effects
    without = precision * np.square(predicted[known] - slope * effects)
    if not is_above_noise(without - precision * np.square(slope * missed)):
        return None
    weights = np.square(slope)
    variance = (weights * (np.square(missed) - noise)).sum() / weights.sum()
    return TargetEffect(float(changes[total.argmin()]), float(max(variance, 0.0)))
