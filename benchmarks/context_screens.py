"""Effects in three cell types of simulated screens: with contexts, shared labels, split labels.

50 perturbations, 300 genes, 500 control cells, three cell types; cells per perturbation are of all
types together. Screens:

- ``one type only``: every perturbation acts in one type, 80 cells.
- ``some in one type``: half of them, 80 cells.
- ``equal``: all types alike, 80 cells. ``equal, few cells``: 24 cells.
- ``unseen pairs``: all types alike, 80 cells; of every fifth perturbation one type is held out.

Printed are the F1 of masks of each perturbation in each type; correlation with the true average
treatment effect per type, and slope of predicted on true effects, each the mean over types; the
root mean square of what is predicted where there is no effect; coverage of 95 % intervals; the
share of parts of a context's own that are called; and CPU seconds of training. ``additive``: the
observed difference in other types, of pairs that were held out.

    python benchmarks/context_screens.py [--screens NAME ...] [--seeds 0 1 2] [--methods NAME ...]
"""

from __future__ import annotations

import argparse
import logging
import time
from typing import Any

import numpy as np
import pandas as pd
import scvi
import torch
from anndata import AnnData

from _common import print_conditions
from scvi_sams import SAMSVAE
from scvi_sams.datasets import simulate_screen, simulated_ate
from scvi_sams.evaluation import mask_recovery, observed_ate

SCREENS: dict[str, dict[str, Any]] = {
    "one type only": {"cell_type_specific_share": 1.0},
    "some in one type": {"cell_type_specific_share": 0.5},
    "equal": {},
    "equal, few cells": {"cells_per_perturbation": 24},
    "unseen pairs": {},
}
METHODS = ("contexts", "shared labels", "split labels")


def screen_of(name: str, seed: int) -> tuple[AnnData, np.ndarray]:
    """Draw a screen; which pairs are measured, perturbations x types."""
    settings = {"cells_per_perturbation": 80, **SCREENS[name]}
    cells = simulate_screen(
        n_genes=300,
        n_perturbations=50,
        n_combinations=0,
        n_controls=500,
        n_cell_types=3,
        seed=seed,
        **settings,
    )
    truth = cells.uns["simulation"]
    is_measured = np.ones((50, 3), dtype=bool)
    if name == "unseen pairs":
        rows = np.arange(0, 50, 5)
        is_measured[rows, np.arange(len(rows)) % 3] = False
        pairs = {
            (str(truth["perturbations"][t]), str(truth["cell_types"][c]))
            for t, c in np.argwhere(~is_measured)
        }
        labels = zip(cells.obs["perturbation"], cells.obs["cell_type"], strict=True)
        kept = np.array([(str(t), str(c)) not in pairs for t, c in labels])
        cells = cells[kept].copy()
    return cells, is_measured


def trained(cells: AnnData, method: str, seed: int, epochs: int | None) -> tuple[SAMSVAE, float]:
    """Train a model; CPU seconds."""
    cells = cells.copy()
    setup: dict[str, Any] = {"categorical_covariate_keys": ["cell_type"]}
    if method == "contexts":
        setup = {"context_key": "cell_type"}
    elif method == "split labels":
        name, cell_type = (cells.obs[key].astype(str) for key in ("perturbation", "cell_type"))
        cells.obs["label"] = np.where(name == "control", "control", name + "@" + cell_type)
        setup |= {"perturbation_key": "label"}
    SAMSVAE.setup_anndata(cells, **setup)
    scvi.settings.seed = seed
    model = SAMSVAE(cells, n_latent=20)
    start = time.process_time()
    model.train(epochs, accelerator="cpu", devices=1, enable_progress_bar=False)
    return model, time.process_time() - start


def masks_and_effects(
    model: SAMSVAE, method: str, names: list[str], cell_type: str
) -> tuple[pd.DataFrame, AnnData]:
    """Masks and effects of all perturbations in a type."""
    if method == "contexts":
        masks = model.get_perturbation_masks(context=cell_type)
        return masks, model.predict_ate(names, context=cell_type)
    masks = model.get_perturbation_masks()
    if method == "shared labels":
        return masks, model.predict_ate(names)
    labels = [f"{name}@{cell_type}" for name in names]
    known = [label for label in labels if label in masks.index]
    effects = model.predict_ate(known)
    return masks.loc[known].rename(index=lambda label: label.split("@")[0]), effects


def score(
    cells: AnnData,
    is_measured: np.ndarray,
    method: str,
    seed: int,
    epochs: int | None,
    *,
    unseen: bool,
) -> dict[str, float]:
    """Compare with the truth; of pairs that were held out where these are asked for."""
    truth = cells.uns["simulation"]
    names, types = ([str(n) for n in truth[key]] for key in ("perturbations", "cell_types"))
    response = np.asarray(truth.get("true_response", np.ones((len(names), len(types)), dtype=bool)))
    model, seconds = (None, 0.0) if method == "additive" else trained(cells, method, seed, epochs)
    found, true_masks, per_type = [], [], []
    for place, cell_type in enumerate(types):
        chosen = is_measured[:, place] != unseen
        if model is None:
            others = cells[(cells.obs["cell_type"] != cell_type).to_numpy()].copy()
            ate = observed_ate(others, perturbation_key="perturbation", control="control")
            ate = ate[[name for name, used in zip(names, chosen, strict=True) if used]]
        else:
            masks, ate = masks_and_effects(model, method, names, cell_type)
            if method != "split labels":
                ate, masks = ate[chosen], masks[chosen]
            masks.index = [f"{name}@{cell_type}" for name in masks.index]
            found.append(masks)
            own = truth["true_masks"] * response[:, [place]]
            true_masks.append(pd.DataFrame(own[chosen], index=masks.index))
        kept = [name for name, used in zip(names, chosen, strict=True) if used]
        expected = np.asarray(simulated_ate(cells, kept, cell_type=cell_type).X)
        values = np.asarray(ate.X)
        nothing = ~response[chosen, place]
        columns = {
            "r": np.corrcoef(values.ravel(), expected.ravel())[0, 1],
            "slope": (values * expected).sum() / np.square(expected).sum(),
            "rmse": np.sqrt(np.square(values - expected).mean()),
            "where none": np.sqrt(np.square(values[nothing]).mean()) if nothing.any() else np.nan,
        }
        if model is not None:
            low, high = (np.asarray(ate.layers[f"interval_{end}"]) for end in ("low", "high"))
            columns["coverage"] = ((low <= expected) & (expected <= high)).mean()
        per_type.append(columns)
    row = pd.DataFrame(per_type).mean().to_dict()
    if found:
        row["f1"] = float(mask_recovery(pd.concat(found), pd.concat(true_masks))["f1"])
    if model is not None and model.module.contexts is not None:
        with torch.no_grad():
            rows = model.module.effect_rows.measured
            own = model.module.contexts.inclusion_probability(rows) > 0.5
        row["own called"] = float(own.float().mean())
    return row | {"cpu": seconds}


def main() -> None:
    """Print every seed, and means over them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--screens", nargs="+", choices=list(SCREENS), default=list(SCREENS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of every training; the default number if unset")
    arguments = parser.parse_args()
    for name in ("scvi", "scvi.sams", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print_conditions()
    rows = []
    for screen in arguments.screens:
        unseen = screen == "unseen pairs"
        methods = [m for m in arguments.methods if not (unseen and m == "split labels")]
        for seed in arguments.seeds:
            cells, is_measured = screen_of(screen, seed)
            for method in [*methods, *(["additive"] if unseen else [])]:
                row = score(cells, is_measured, method, seed, arguments.epochs, unseen=unseen)
                rows.append({"screen": screen, "method": method, "seed": seed, **row})
                print(pd.DataFrame(rows[-1:]).round(3).to_string(header=len(rows) == 1), flush=True)
    means = pd.DataFrame(rows).drop(columns="seed")
    print(means.groupby(["screen", "method"], sort=False).mean().round(3).to_string())


if __name__ == "__main__":
    main()
