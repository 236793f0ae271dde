"""Programs with a planted gene set, and a model in which something is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scvi

from model.builders import TRAINING
from scvi_sams import SAMSVAE
from scvi_sams.datasets import simulate_screen

GENES = [f"G{number}" for number in range(200)]
SETS = {
    "planted": GENES[:20],
    **{f"other {n}": GENES[20 + n * 30 : 50 + n * 30] for n in range(5)},
}


def planted_programs() -> pd.DataFrame:
    """``planted`` rises along the first latent and falls along the second; the third is off."""
    values = np.random.default_rng(0).normal(scale=0.2, size=(len(GENES), 3))
    values[:20] += [2.0, -2.0, 0.0]
    values[:, 2] = 0
    return pd.DataFrame(values, index=GENES, columns=["latent_0", "latent_1", "latent_2"])


def train_until_called(first_genes: Sequence[str] = (), **changes: Any) -> SAMSVAE:
    """Train on two guides per perturbation and two contexts, long enough to find something.

    ``first_genes`` are names of the first genes, and ``changes`` settings of the screen.
    """
    scvi.settings.seed = 0
    sizes = {
        "n_genes": 60,
        "n_controls": 150,
        "n_perturbations": 5,
        "cells_per_perturbation": 60,
        "n_combinations": 0,
        "n_latent": 3,
        "mask_probability": 0.5,
        "guides_per_perturbation": 2,
        "n_cell_types": 2,
    }
    adata = simulate_screen(**(sizes | changes))
    adata.var_names = [*first_genes, *adata.var_names[len(first_genes) :]]
    SAMSVAE.setup_anndata(adata, guide_key="guide", context_key="cell_type")
    model = SAMSVAE(adata, n_latent=4, n_hidden=32)
    model.train(max_epochs=30, **(TRAINING | {"plan_kwargs": {}}))
    return model
