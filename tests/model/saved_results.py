"""Results without noise, by which a model that was saved elsewhere is known again."""

from __future__ import annotations

from typing import Any

import numpy as np

LABELS = ["P001", "P002+P004"]


def saved_results(model: Any) -> dict[str, np.ndarray]:
    """Compute results, and effects on genes with the error of their average."""
    effects = model.get_perturbation_effects(key_added=None)
    ate = model.predict_ate(LABELS, n_samples=20_000, key_added=None)
    return {
        "basal": model.get_latent_representation(key_added=None),
        "perturbed": model.get_latent_representation(representation="perturbed", key_added=None),
        "masks": model.get_perturbation_masks(key_added=None).to_numpy(),
        "effects": effects.mean.to_numpy(),
        "sd": effects.sd.to_numpy(),
        "programs": model.get_latent_programs(key_added=None).to_numpy(),
        "ate": np.asarray(ate.X),
        "ate_error": np.asarray(ate.layers["standard_error"]),
    }
