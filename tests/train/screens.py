"""Small registered screens for the tests of training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from scvi_sams import SAMSVAE
from scvi_sams.datasets import simulate_screen

LABELS = ["control", "A", "B", "A+B", "C"]
SMALL_MODEL: dict[str, Any] = {
    "n_latent": 3,
    "n_hidden": 8,
    "effect_n_hidden": 6,
    "effect_n_layers": 1,
}


def make_counts(n_cells: int = 60, n_genes: int = 6, form: str = "csr") -> AnnData:
    """Make cells with labels, doses and size factors.

    Gene 2 has no counts and gene 4 is always 3; a cell in four has a dose of zero.
    """
    rng = np.random.default_rng(0)
    x = rng.negative_binomial(2, 0.2, size=(n_cells, n_genes)).astype(np.float32)
    x[:, 0] += 1
    x[:, 2], x[:, 4] = 0, 3
    labels = [LABELS[cell % len(LABELS)] for cell in range(n_cells)]
    obs = pd.DataFrame(
        {
            "perturbation": labels,
            "dose": np.where(np.arange(n_cells) % 4 == 3, 0.0, 2.0),
            "factor": rng.uniform(0.3, 4, size=n_cells),
        },
        index=[f"cell{cell}" for cell in range(n_cells)],
    )
    convert = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}
    return AnnData(convert[form](x), obs=obs)


def make_screen(**changes: Any) -> AnnData:
    """Draw a screen with controls, four perturbations and two pairs."""
    settings: dict[str, Any] = {
        "n_genes": 25,
        "n_controls": 60,
        "n_perturbations": 4,
        "cells_per_perturbation": 40,
        "n_combinations": 2,
        "cells_per_combination": 20,
        "n_latent": 3,
        "mask_probability": 0.5,
        "library_size": 300.0,
    }
    return simulate_screen(**(settings | changes))


def make_model(adata: AnnData, *, setup: dict[str, Any] | None = None, **changes: Any) -> SAMSVAE:
    """Register data and build a small model."""
    SAMSVAE.setup_anndata(adata, **(setup or {}))
    return SAMSVAE(adata, **(SMALL_MODEL | changes))


def carriers(adata: AnnData, cells: Any, names: list[str]) -> np.ndarray:
    """Count the cells that carry each perturbation, by their labels."""
    labels = adata.obs["perturbation"].astype(str).to_numpy()[np.asarray(cells)]
    return np.array([sum(name in label.split("+") for label in labels) for name in names])
