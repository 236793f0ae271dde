"""Is the size of ``test_perturbations`` what it says? Labels are permuted within strata.

With permuted labels no perturbation does anything, so that 5 % of p-values are to be below .05.

    python benchmarks/size_of_test.py [--screens papalexi21 mcfaline23] [--permutations 200]
        [--cells 20]
"""

from __future__ import annotations

import argparse
import logging

import numpy as np
import pandas as pd

import scvi_sams
from error_rates import SCREENS, Screen


def permuted(screen: Screen, n_cells: int | None, rng: np.random.Generator) -> np.ndarray:
    """p-values of one permutation; of each perturbation ``n_cells`` cells are kept."""
    adata, setup = screen.adata, screen.setup
    columns = [*setup.get("categorical_covariate_keys", ())]
    columns += [setup["batch_key"]] if "batch_key" in setup else []
    labels = adata.obs["perturbation"].astype(str)
    strata = [adata.obs[name].astype(str) for name in columns] or [np.zeros(len(labels))]
    labels = labels.groupby(strata).transform(rng.permutation)
    kept = np.ones(len(labels), dtype=bool)
    if n_cells is not None:
        place = pd.Series(rng.permutation(len(labels)), index=labels.index)
        kept = ((labels == "control") | (place.groupby(labels).rank() <= n_cells)).to_numpy()
    cells = adata[kept].copy()
    cells.obs["perturbation"] = labels[kept].to_numpy()
    scvi_sams.SAMSVAE.setup_anndata(cells, **setup)
    table = scvi_sams.SAMSVAE(cells).test_perturbations(key_added=None)
    return table["p_value"].dropna().to_numpy()


def main() -> None:
    """Print the share of p-values below three sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    screens = ["papalexi21", "mcfaline23", "hill18"]
    parser.add_argument("--screens", nargs="+", choices=SCREENS, default=screens)
    parser.add_argument("--permutations", type=int, default=200)
    parser.add_argument("--cells", type=int, help="of each perturbation; all by default")
    arguments = parser.parse_args()
    logging.getLogger("scvi.sams").setLevel(logging.ERROR)
    for name in arguments.screens:
        screen, rng = SCREENS[name](0), np.random.default_rng(0)
        found = [permuted(screen, arguments.cells, rng) for _ in range(arguments.permutations)]
        p_values = np.concatenate(found)
        shares = ", ".join(f"{(p_values < p).mean():.4f} below {p}" for p in (0.05, 0.01, 0.001))
        print(f"{name}: {len(p_values)} p-values, {shares}", flush=True)


if __name__ == "__main__":
    main()
