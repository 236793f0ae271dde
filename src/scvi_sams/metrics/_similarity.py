"""Similarity of profiles over genes, for the metrics of every mode.

Inputs are arrays whose last axis is genes; all other axes (such as perturbations) are kept.
"""

from __future__ import annotations

from typing import SupportsFloat

import numpy as np


def ratio(numerator: SupportsFloat, denominator: SupportsFloat) -> float:
    """Divide; 0 where there is nothing to divide by."""
    divisor = float(denominator)
    return float(numerator) / divisor if divisor > 0 else 0.0


def rmse(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Root mean squared error, ``sqrt(mean_g (x - y)^2)``, in the units of the input."""
    return np.sqrt(np.mean((predicted - observed) ** 2, axis=-1))


def mae(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Mean absolute error, ``mean_g |x - y|``, in the units of the input."""
    return np.mean(np.abs(predicted - observed), axis=-1)


def pearson(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Pearson correlation over genes; 0 where a side is constant: no relation was shown."""
    return cosine(centred(predicted), centred(observed))


def cosine(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Cosine similarity, ``x.y / (|x| |y|)``; 0 where a side is zero: no relation was shown."""
    product = np.sum(predicted * observed, axis=-1)
    norms = np.linalg.norm(predicted, axis=-1) * np.linalg.norm(observed, axis=-1)
    return np.divide(product, norms, out=np.zeros_like(norms), where=norms > 0)


def centred(values: np.ndarray) -> np.ndarray:
    """Subtract the mean over genes."""
    spread = np.ptp(values, axis=-1, keepdims=True)
    # The mean of equal numbers may differ from them by rounding, which is no variation.
    return np.where(spread == 0, 0, values - values.mean(axis=-1, keepdims=True))


def largest(effects: np.ndarray, n_genes: int) -> np.ndarray:
    """Positions of the genes with the largest absolute effect, largest first."""
    return np.argsort(-np.abs(effects), axis=-1, kind="stable")[..., :n_genes]
