"""How often 95 % intervals hold the truth, on simulated screens of several sizes.

Of all labels x genes, of singles and of pairs (measured and held out), and of the norms of effects.
Default settings of the model.

    python benchmarks/intervals.py [--screens "40 x 50 x 60" ...] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import numpy as np
import pandas as pd
import scvi

from _common import print_conditions
from scvi_sams import SAMSVAE, datasets

SCREENS: dict[str, dict[str, Any]] = {
    "40 x 50 cells x 60 genes": {
        "n_genes": 60, "n_perturbations": 40, "cells_per_perturbation": 50, "n_combinations": 0,
    },
    "40 x 50 cells x 400 genes, 20 pairs": {
        "n_genes": 400, "n_perturbations": 40, "cells_per_perturbation": 50, "n_combinations": 20,
        "cells_per_combination": 50,
    },
    "25 x 20 cells x 500 genes": {
        "n_genes": 500, "n_perturbations": 25, "cells_per_perturbation": 20, "n_combinations": 0,
    },
    "panel, 14 x 500 cells x 70 genes": {
        "n_genes": 70, "n_perturbations": 14, "cells_per_perturbation": 500, "n_combinations": 0,
        "knockdown": (0.7, 0.95), "library_size": 500.0,
    },
}  # fmt: skip


def covered(screen: str, seed: int, epochs: int | None) -> dict[str, float]:
    """Train on a simulated screen without half of its pairs; the share of truth in intervals."""
    adata = datasets.simulate_screen(n_controls=500, seed=seed, **SCREENS[screen])
    labels = adata.obs["perturbation"].astype(str)
    pairs = sorted({label for label in labels if "+" in label})
    held_out = pairs[::2]
    cells = adata[~labels.isin(held_out)].copy()
    SAMSVAE.setup_anndata(cells)
    scvi.settings.seed = seed
    model = SAMSVAE(cells)
    model.train(epochs, accelerator="cpu", devices=1, enable_progress_bar=False)
    names = [*model.perturbations, *pairs]
    truth = datasets.simulated_ate(adata, names, n_samples=20_000)
    found = model.predict_ate(names, library_size=1e4, key_added=None)
    true, error = np.asarray(truth.X), truth.layers["standard_error"]
    low, high = found.layers["interval_low"] - error, found.layers["interval_high"] + error
    inside = (low <= true) & (true <= high)
    groups = {
        "singles": np.arange(len(names)) < len(model.perturbations),
        "measured pairs": np.isin(names, pairs[1::2]),
        "held-out pairs": np.isin(names, held_out),
    }
    shares = {name: inside[rows].mean() if rows.any() else np.nan for name, rows in groups.items()}
    norms = np.linalg.norm(true, axis=1)
    obs = found.obs
    shares["norms"] = np.mean(
        (obs["effect_norm_low"] <= norms) & (norms <= obs["effect_norm_high"])
    )
    shares["Pearson"] = np.corrcoef(np.asarray(found.X).ravel(), true.ravel())[0, 1]
    shares["width / sd of truth"] = np.mean(high - low) / true.std()
    return shares


def main() -> None:
    """Print a row for each screen and seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--screens", nargs="+", choices=SCREENS, default=list(SCREENS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of every training; the default number if unset")
    arguments = parser.parse_args()
    print_conditions()
    for logger in ("scvi", "scvi.sams", "lightning.pytorch"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    rows = [
        {"screen": screen, "seed": seed} | covered(screen, seed, arguments.epochs)
        for screen in arguments.screens
        for seed in arguments.seeds
    ]
    print(pd.DataFrame(rows).set_index(["screen", "seed"]).round(3).to_string())


if __name__ == "__main__":
    main()
