"""Features of simulated perturbations, which explain a share of their masks and effects."""

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
    """Features, standard normal, and what is linear in them; noise columns come last."""

    rng: np.random.Generator
    values: np.ndarray
    """Perturbations x features; 0 until :meth:`masks` draws them."""
    share: float
    """Of the variance of liabilities and of effects that features explain."""
    mask_weights: np.ndarray
    """Features x latents: ``values @ mask_weights`` has variance ``share``."""
    effect_weights: np.ndarray
    """The same of effects of standard deviation 1."""

    @classmethod
    def draw(cls, rng: np.random.Generator, settings: Mapping[str, Any]) -> Self:
        """Draw weights; features are drawn with the masks that depend on them."""
        n_latent, share = settings["n_latent"], settings["feature_share"]
        n_noise = settings["n_noise_features"]

        def weights() -> np.ndarray:
            drawn = rng.normal(size=(settings["n_features"], n_latent))
            # Of length 1, so that the share holds for every latent.
            drawn *= np.sqrt(share) / np.linalg.norm(drawn, axis=0)
            return np.concatenate([drawn, np.zeros((n_noise, n_latent))])

        of_masks, of_effects = weights(), weights()
        values = np.zeros((settings["n_perturbations"], len(of_masks)))
        return cls(rng, values, share, of_masks, of_effects)

    def masks(self, rows: np.ndarray, uniform: np.ndarray, probability: float) -> np.ndarray:
        """Which latents are active: whose liability is high enough, in a share of ``probability``.

        ``rows`` are positions of perturbations, and ``uniform`` what their masks are drawn by,
        rows x latents. Their features are drawn too, again with every call: a perturbation whose
        features leave no latent active could otherwise be without any for ever.
        """
        self.values[rows] = self.rng.normal(size=self.values[rows].shape)
        noise = -np.sqrt(1 - self.share) * ndtri(uniform)
        return self.values[rows] @ self.mask_weights + noise > -ndtri(probability)

    def effects(self, noise: np.ndarray, scale: float) -> np.ndarray:
        """Effects of standard deviation ``scale``, as ``noise``, which is what else they are."""
        explained = scale * (self.values @ self.effect_weights)
        return explained + np.sqrt(1 - self.share) * noise

    def truth(self, scale: float) -> dict[str, np.ndarray]:
        """What is kept in ``uns["simulation"]``."""
        return {
            "true_mask_weights": self.mask_weights,
            "true_effect_weights": scale * self.effect_weights,
        }

    def table(self, names: Sequence[str], n_noise: int) -> pd.DataFrame:
        """Features as users have them."""
        n_features = self.values.shape[1] - n_noise
        columns = numbered("feature_", n_features, 2) + numbered("noise_", n_noise, 2)
        return pd.DataFrame(self.values, index=list(names), columns=columns)
