"""Is the size of ``test_perturbations`` what it says? Labels are permuted within strata.

With permuted labels no perturbation does anything, so that 5 % of p-values are to be below .05.

    python benchmarks/size_of_test.py [--screens papalexi21 mcfaline23] [--permutations 200]
        [--cells 20]

With ``--states`` models are trained on the permuted labels, and the same test looks at latent
states of cells instead: of those that were trained on, and of validation cells.

    python benchmarks/size_of_test.py --states --screens mcfaline23 --permutations 6
"""

from __future__ import annotations

import argparse
import logging
from collections import defaultdict

import numpy as np
import pandas as pd
import scvi

import scvi_sams
from _common import print_conditions
from error_rates import SCREENS, Screen
from scvi_sams._group_tests import group_tests, normal_scores
from scvi_sams.data._field import registered_labels
from scvi_sams.model._expression_axes import strata_of_cells


def permuted(screen: Screen, n_cells: int | None, rng: np.random.Generator) -> scvi_sams.SAMSVAE:
    """Make a model of permuted labels; of each perturbation ``n_cells`` cells are kept."""
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
    return scvi_sams.SAMSVAE(cells)


def of_cells(model: scvi_sams.SAMSVAE) -> dict[str, np.ndarray]:
    """p-values of the test as it is."""
    return {"cells": model.test_perturbations(key_added=None)["p_value"].dropna().to_numpy()}


def of_states(model: scvi_sams.SAMSVAE) -> dict[str, np.ndarray]:
    """Train, and test latent states of cells that were trained on or not."""
    model.train(enable_progress_bar=False)
    labels, strata = registered_labels(model.adata_manager), strata_of_cells(model.adata_manager)
    found = {}
    for representation in ("basal", "perturbed"):
        for name, cells in (
            ("training", model.train_indices),
            ("validation", model.validation_indices),
        ):
            states = model.get_latent_representation(
                indices=cells, representation=representation, key_added=None
            )
            states = states[:, np.argsort(-states.std(axis=0))].astype(float)
            tests = group_tests(normal_scores(states), labels[cells], strata[cells])
            p_values = tests.p_value[np.isfinite(tests.p_value)]
            found[f"{representation} states of {name} cells"] = p_values
    return found


def main() -> None:
    """Print the share of p-values below three sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    screens = ["papalexi21", "mcfaline23", "hill18"]
    parser.add_argument("--screens", nargs="+", choices=SCREENS, default=screens)
    parser.add_argument("--permutations", type=int, default=200)
    parser.add_argument("--cells", type=int, help="of each perturbation; all by default")
    parser.add_argument("--states", action="store_true", help="of trained models")
    arguments = parser.parse_args()
    print_conditions()
    for logger in ("scvi", "scvi.sams", "lightning.pytorch"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    p_values_of = of_states if arguments.states else of_cells
    for name in arguments.screens:
        screen, rng = SCREENS[name](0), np.random.default_rng(0)
        found: dict[str, list[np.ndarray]] = defaultdict(list)
        for number in range(arguments.permutations):
            scvi.settings.seed = number
            for what, values in p_values_of(permuted(screen, arguments.cells, rng)).items():
                found[what].append(values)
        for what, lists in found.items():
            p = np.concatenate(lists)
            shares = ", ".join(
                f"{(p < size).mean():.4f} below {size}" for size in (0.05, 0.01, 0.001)
            )
            print(f"{name}, {what}: {len(p)} p-values, {shares}", flush=True)


if __name__ == "__main__":
    main()
