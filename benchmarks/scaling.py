"""How the time of public functions grows with cells, perturbations, genes and latent dimensions.

One size at a time is made four times as large as in a small screen; printed are CPU seconds
of one thread at each size (two calls, of which the first may load or compile), and the exponent of
the shorter at the largest size against the smallest. Constant costs pull exponents down where times
are small.

    python benchmarks/scaling.py [--quick]
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scvi

import scvi_sams
from _common import print_conditions

SMALL = {"cells": 2000, "perturbations": 50, "genes": 200, "latent": 10}
QUICK = {"cells": 500, "perturbations": 25, "genes": 50, "latent": 5}
FACTORS = (1, 4)
AXES = ("cells", "perturbations", "genes", "latent")


def model_of(sizes: dict[str, int]) -> Any:
    """Train for one epoch; half of the cells are controls."""
    half = sizes["cells"] // 2
    adata = scvi_sams.datasets.simulate_screen(
        n_genes=sizes["genes"],
        n_controls=half,
        n_perturbations=sizes["perturbations"],
        cells_per_perturbation=max(4, half // sizes["perturbations"]),
        n_combinations=0,
    )
    scvi_sams.SAMSVAE.setup_anndata(adata)
    model = scvi_sams.SAMSVAE(adata, n_latent=sizes["latent"])
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    return model


def calls(model: Any) -> dict[str, Callable[[], object]]:
    """Public functions, with few samples: their number plays no part in exponents."""
    names = model.perturbations
    first = names[:5]
    pairs = [f"{a}+{b}" for a, b in pairwise(names[:21])]
    effects = model.get_perturbation_effects(key_added=None).mean
    every_cell = list(range(model.adata.n_obs))
    few = {"n_samples": 200, "n_posterior_samples": 20}
    return {
        "get_latent_representation": lambda: model.get_latent_representation(key_added=None),
        "get_elbo": lambda: model.get_elbo(n_samples=1, key_added=None),
        "get_normalized_expression": lambda: model.get_normalized_expression(return_numpy=True),
        "get_perturbation_masks": lambda: model.get_perturbation_masks(key_added=None),
        "get_perturbation_effects": lambda: model.get_perturbation_effects(key_added=None),
        "get_latent_programs": lambda: model.get_latent_programs(n_cells=None, key_added=None),
        "predict_ate, all": lambda: model.predict_ate(key_added=None, **few),
        "predict, 5 labels": lambda: model.predict(first),
        "predict_interactions, 20 pairs": lambda: model.predict_interactions(pairs, **few),
        "basal_leakage": lambda: scvi_sams.evaluation.basal_leakage(model, indices=every_cell),
        "perturbation_similarity": lambda: scvi_sams.tl.perturbation_similarity(effects),
        "pl.masks": lambda: scvi_sams.pl.masks(effects.abs().clip(0, 1)),
    }


def seconds(call: Callable[[], object]) -> list[float]:
    """CPU seconds of two calls."""
    found = []
    for _ in range(2):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
        plt.close("all")
    return found


def main() -> None:
    """Print a table for each axis."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="from an even smaller screen on")
    start = QUICK if parser.parse_args().quick else SMALL
    print_conditions()
    logging.disable(logging.WARNING)
    scvi.settings.seed = 0
    base = {name: seconds(call) for name, call in calls(model_of(start)).items()}
    for axis in AXES:
        columns = {FACTORS[0] * start[axis]: base}
        for factor in FACTORS[1:]:
            sizes = start | {axis: factor * start[axis]}
            columns[sizes[axis]] = {
                name: seconds(call) for name, call in calls(model_of(sizes)).items()
            }
        times = pd.DataFrame(columns)
        least = times.map(min)
        table = times.map(lambda of_two: f"{min(of_two):.3f}-{max(of_two):.3f}")
        ratio = least.iloc[:, -1] / least.iloc[:, 0]
        table["exponent"] = (np.log(ratio) / np.log(FACTORS[-1])).round(2)
        print(f"\n{axis}\n{table.to_string()}", flush=True)


if __name__ == "__main__":
    plt.switch_backend("agg")
    main()
