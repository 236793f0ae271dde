"""Does the paper's order of models by likelihood hold? Held-out cells of the simulated screen.

The paper reports, by IWELBO, correlated basal states above mean-field ones, and SAMS-VAE above
SVAE+ above a conditional VAE. The cells scored here have labels that were trained on, pairs among
them, so that SVAE+ has a likelihood too. About two minutes a model and seed on one thread.

    python benchmarks/likelihoods.py [--seeds 0 1 2] [--models SAMS-VAE SVAE+ ...]
"""

from __future__ import annotations

import argparse
from typing import Any

import pandas as pd

import scvi_sams
from _common import print_conditions
from scvi_sams import datasets
from simulated_screen import QUICK_EPOCHS, QUICK_SCREEN, fit

MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "SAMS-VAE": (scvi_sams.SAMSVAE, {}),
    "CPA-VAE": (scvi_sams.CPAVAE, {}),
    "SVAE+": (scvi_sams.SVAEPlus, {}),
    "conditional VAE": (scvi_sams.ConditionalVAE, {}),
    "CPA-VAE, mean-field": (scvi_sams.CPAVAE, {"correlated_basal": False}),
    "SAMS-VAE, mean-field": (scvi_sams.SAMSVAE, {"correlated_basal": False}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--quick", action="store_true", help="a small screen and few epochs")
    arguments = parser.parse_args()
    print_conditions()
    quick: dict[str, Any] = {}
    if arguments.quick:
        quick = {"epochs": QUICK_EPOCHS, "screen": QUICK_SCREEN}
    bounds: dict[str, dict[int, float]] = {}
    for name in arguments.models:
        model_class, settings = MODELS[name]
        bounds[name] = {}
        for seed in arguments.seeds:
            model, adata, split, *_ = fit(seed, settings, model_class=model_class, **quick)
            bound = model.get_iwelbo(indices=split["test"], key_added=None)
            truth = datasets.simulated_log_likelihood(adata[split["test"]]).mean()
            bounds[name][seed] = bound - truth
            print(f"{name}, seed {seed}: {bounds[name][seed]:.2f}", flush=True)
    table = pd.DataFrame(bounds).T.rename_axis(columns="seed")
    print("\nIWELBO minus the likelihood given the true states, nats per cell")
    print(table.assign(mean=table.mean(axis=1)).round(2).to_string())


if __name__ == "__main__":
    main()
