"""Where do masks come right, and where do they break? Screens of other shapes, and ablations.

Every line is one training on the screen of simulated_screen.py with one thing changed; the median
over seeds is printed. About two and a half minutes a line and seed on one thread.

    python benchmarks/masks.py [--seeds 0 1 2] [--cases standard "30 % of the cells" ...]
"""

from __future__ import annotations

import argparse
from typing import Any

import pandas as pd

import scvi_sams
from _common import print_conditions
from simulated_screen import QUICK_EPOCHS, QUICK_SCREEN, fit, score

FEW_CELLS = {"n_controls": 300, "cells_per_perturbation": 39, "cells_per_combination": 36}
MANY_PERTURBATIONS = {
    "n_perturbations": 500,
    "cells_per_perturbation": 26,
    "n_combinations": 250,
    "cells_per_combination": 24,
}
PAPER: dict[str, Any] = {"evidence_cells": None, "effect_prior_scale": 1.0}
"""What "plain" means: the paper's priors and its bound, and masks trained from the start."""
NO_ROTATION = {"dense_fraction": 0.0}

CASES: dict[str, dict[str, Any]] = {
    "standard": {},
    "30 % of the cells": {"screen": FEW_CELLS},
    "5 x the perturbations, same cells": {"screen": MANY_PERTURBATIONS},
    "mask probability .02": {"screen": {"mask_probability": 0.02}},
    "mask probability .3": {"screen": {"mask_probability": 0.3}},
    "10 true latents": {"screen": {"n_latent": 10}},
    "60 true latents": {"screen": {"n_latent": 60}},
    "mean-field effects": {"settings": {"correlated_effects": False}},
    "no rotation": {"plan": NO_ROTATION},
    "no coarsening": {"settings": {"evidence_cells": None}},
    "curved dimensions left on": {"plan": {"max_curvature": None}},
    "plain, correlated": {"settings": PAPER, "plan": NO_ROTATION},
    "plain, correlated basal states": {
        "settings": PAPER | {"correlated_effects": False},
        "plan": NO_ROTATION,
    },
    "plain, correlated effects": {
        "settings": PAPER | {"correlated_basal": False},
        "plan": NO_ROTATION,
    },
    "plain, mean-field": {
        "settings": PAPER | {"correlated_basal": False, "correlated_effects": False},
        "plan": NO_ROTATION,
    },
    "dense effects, rotated": {"plan": {"dense_fraction": 1.0}},
    "dense effects, not rotated": {"model_class": scvi_sams.CPAVAE},
}
COLUMNS = {
    "mask precision": "P",
    "mask recall": "R",
    "mask F1": "F1",
    "mask F1, best threshold on effects": "F1 by size",
    "expected calibration error": "ECE",
    "false discoveries at 5 % FDR": "FDP at 5 %",
    "recall at 5 % FDR": "R at 5 %",
    "IWELBO, test, minus log p(x | true z)": "IWELBO - truth",
    "ATE Pearson, held-out pairs": "ATE pairs",
    "ATE Pearson, held-out pairs, additive baseline": "additive",
    "ATE slope, held-out pairs": "slope",
    "AUC perturbed vs control, basal": "basal AUC",
    "CPU seconds of training": "CPU s",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--quick", action="store_true", help="small screens and few epochs")
    arguments = parser.parse_args()
    print_conditions()
    lines = {}
    for case in arguments.cases:
        chosen = {"settings": {}, **CASES[case]}
        if arguments.quick:
            screen = chosen.get("screen", {}) | QUICK_SCREEN
            chosen |= {"screen": screen, "epochs": QUICK_EPOCHS}
        scores = pd.DataFrame([score(fit(seed, **chosen)) for seed in arguments.seeds])
        lines[case] = scores.median().reindex(COLUMNS).rename(COLUMNS)
        print(lines[case].rename(case).round(3).to_frame().T.to_string(), flush=True)
    print(pd.DataFrame(lines).T.round(3).to_string())


if __name__ == "__main__":
    main()
