"""Features of simulated perturbations, which explain a proportion of their masks and effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from scipy.special import ndtri

from scvi_sams.datasets._simulated_cells import numbered


@dataclass(frozen=True, eq=False)
class TrueFeatures:
    """Standard normal features and linear functions of them; noise columns come last."""

    rng: np.random.Generator
    values: np.ndarray
    """Perturbations x features; 0 until :meth:`masks` samples them."""
    share: float
    """Proportion of the variance of liabilities and effects that features explain."""
    mask_weights: np.ndarray
    """Features x latents: ``values @ mask_weights`` has variance ``share``."""
    effect_weights: np.ndarray
    """The same for effects with SD 1."""

    @classmethod
    def draw(cls, rng: np.random.Generator, settings: Mapping[str, Any]) -> Self:
        """Sample weights; features are sampled with the masks that depend on them."""
        n_latent, share = settings["n_latent"], settings["feature_share"]
        n_noise = settings["n_noise_features"]

        def weights() -> np.ndarray:
            drawn = rng.normal(size=(settings["n_features"], n_latent))
            # Of length 1, so that the proportion is the same for every latent.
            drawn *= np.sqrt(share) / np.linalg.norm(drawn, axis=0)
            return np.concatenate([drawn, np.zeros((n_noise, n_latent))])

        of_masks, of_effects = weights(), weights()
        values = np.zeros((settings["n_perturbations"], len(of_masks)))
        return cls(rng, values, share, of_masks, of_effects)

    def masks(self, rows: np.ndarray, uniform: np.ndarray, probability: float) -> np.ndarray:
        """Sample which latents are active: those with a high liability, ``probability`` of all.

        ``rows`` are positions of perturbations, and ``uniform`` random numbers for their masks,
        rows x latents. Features are sampled with every call as well: a perturbation whose features
        leave no latent active could otherwise never get one.
        """
        self.values[rows] = self.rng.normal(size=self.values[rows].shape)
        noise = -np.sqrt(1 - self.share) * ndtri(uniform)
        return self.values[rows] @ self.mask_weights + noise > -ndtri(probability)

    def effects(self, noise: np.ndarray, scale: float) -> np.ndarray:
        """Effects with SD ``scale``, of which ``noise`` is the part not explained by features."""
        explained = scale * (self.values @ self.effect_weights)
        return explained + np.sqrt(1 - self.share) * noise

    def truth(self, scale: float) -> dict[str, np.ndarray]:
        """Truth to store in ``uns["simulation"]``."""
        return {
            "true_mask_weights": self.mask_weights,
            "true_effect_weights": scale * self.effect_weights,
        }

    def table(self, names: Sequence[str], n_noise: int) -> pd.DataFrame:
        """Features in the form in which users have them."""
        n_features = self.values.shape[1] - n_noise
        columns = numbered("feature_", n_features, 2) + numbered("noise_", n_noise, 2)
        return pd.DataFrame(self.values, index=list(names), columns=columns)
