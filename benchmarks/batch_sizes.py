"""CPU seconds of training, and how good the model is, by batch size and learning rates.

All trainings are ended by held-out cells, as by default, and differ only in the batch size and the
factor of both learning rates. Test cells are never trained on: half of the cells of each label of
real screens, a fifth of the simulated screen (30 perturbations x 200 cells x 800 genes). "10 cells"
trains on 10 of each perturbation and all control cells of the other half. Printed are CPU seconds
until training stops, also relative to 512 cells of the same screen and seed, the IWELBO of test
cells minus that of 512, mask F1 where masks are known, and predicted against observed effects in
test cells.

    python benchmarks/batch_sizes.py FOLDER [--screens simulated ...] [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData

from _common import print_conditions
from scvi_sams import SAMSVAE, datasets, evaluation

RATES = {"lr": 2e-3, "table_lr": 1e-2}
"""Defaults of the training plan."""
ARMS = {
    "512": (512, 1.0),
    "128": (128, 1.0),
    "256": (256, 1.0),
    "512, rates x 1.4": (512, 2**0.5),
    "512, rates x 2": (512, 2.0),
    "1024, rates x 1.4": (1024, 2**0.5),
    "1024, rates x 2": (1024, 2.0),
}
"""Batch size, and factor of the learning rates. Others are compared with the first one."""
N_SCORED = 2000
"""Test cells of which the IWELBO is computed."""


class Screen(NamedTuple):
    """A screen, its columns, the fraction of cells that may train, and how many do at most."""

    read: Callable[[int], AnnData]
    columns: Mapping[str, Any] = MappingProxyType({})
    train_size: float = 0.5
    cells: int | None = None


def simulated(seed: int) -> AnnData:
    """30 perturbations of 200 cells, 800 genes."""
    return datasets.simulate_screen(
        n_genes=800, n_perturbations=30, cells_per_perturbation=200, n_combinations=0, seed=seed
    )


def _papalexi21(cells: int | None) -> Screen:
    columns = {"batch_key": "replicate", "size_factor_key": "total_counts"}
    return Screen(lambda _: datasets.papalexi21(), columns, cells=cells)


SCREENS = {
    "simulated": Screen(simulated, train_size=0.8),
    "norman19": Screen(lambda _: datasets.norman19_subset(), {"size_factor_key": "total_counts"}),
    "papalexi21": _papalexi21(None),
    "papalexi21, 20 cells": _papalexi21(20),
    "papalexi21, 10 cells": _papalexi21(10),
}


def split(adata: AnnData, screen: Screen, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training (with validation) and test cells; all control cells that may train do."""
    labels = adata.obs["perturbation"].astype(str)
    shares = (screen.train_size, 0.0, 1 - screen.train_size)
    cells = evaluation.split_cells(labels, [], fractions=shares, seed=seed)
    train = cells["train"]
    if screen.cells is not None:
        train = np.random.default_rng([seed, 1]).permutation(train)
        of_train = labels.iloc[train]
        place = of_train.groupby(of_train.to_numpy()).cumcount().to_numpy()
        train = np.sort(train[(place < screen.cells) | (of_train == "control").to_numpy()])
    return train, cells["test"]


def trained_and_scored(
    adata: AnnData, screen: Screen, arm: str, seed: int, epochs: int | None
) -> dict[str, Any]:
    """Train with the batch size and rates of an arm; time it, and score test cells."""
    train, test = split(adata, screen, seed)
    cells, others = adata[train].copy(), adata[test].copy()
    batch_size, factor = ARMS[arm]
    scvi.settings.seed = seed
    SAMSVAE.setup_anndata(cells, **screen.columns)
    model = SAMSVAE(cells)
    started = time.process_time()
    model.train(
        max_epochs=epochs,
        batch_size=batch_size,
        plan_kwargs={name: factor * rate for name, rate in RATES.items()},
        enable_progress_bar=False,
    )
    seconds = time.process_time() - started
    scored = np.random.default_rng(seed).permutation(others.n_obs)[:N_SCORED]
    row = {
        "cells": len(train),
        "CPU s": seconds,
        "epochs": len(model.history["elbo_validation"]),
        "steps": int(model.trainer.global_step),
        "IWELBO": model.get_iwelbo(others, indices=scored, key_added=None),
    }
    key = screen.columns.get("size_factor_key")
    counts = adata.X.sum(axis=1) if key is None else adata.obs[key]
    scale = {"target_sum": float(np.median(np.asarray(counts)))}
    observed = evaluation.observed_ate(others, size_factor_key=key, **scale)
    predicted = model.predict_ate(list(observed.obs_names), interval=None, key_added=None, **scale)
    effects = evaluation.compare_ate(predicted, observed).loc["all"]
    row |= {"r": effects["pearson"], "RMSE": effects["rmse"], "mask F1": np.nan}
    if "simulation" in adata.uns:
        truth = adata.uns["simulation"]
        masks = pd.DataFrame(truth["true_masks"], index=truth["perturbations"])
        found = model.get_perturbation_masks(key_added=None)
        row["mask F1"] = evaluation.mask_recovery(found, masks)["f1"]
    return row


def print_tables(rows: pd.DataFrame) -> None:
    """Each training beside the first arm of its screen and seed, then means over seeds."""
    keys = ["screen", "seed"]
    first = rows[rows["arm"] == next(iter(ARMS))].set_index(keys)
    first = first.loc[pd.MultiIndex.from_frame(rows[keys])]
    rows["relative"] = rows["CPU s"].to_numpy() / first["CPU s"].to_numpy()
    rows["IWELBO gain"] = rows["IWELBO"].to_numpy() - first["IWELBO"].to_numpy()
    print(rows.round(3).to_string(index=False))
    columns = ["CPU s", "relative", "epochs", "steps", "IWELBO gain", "mask F1", "r", "RMSE"]
    print("\nMeans over seeds")
    print(rows.groupby(["screen", "arm"], sort=False)[columns].mean().round(3).to_string())


def main() -> None:
    """Run what is not in the folder yet, all arms of a seed and screen in turn; print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--screens", nargs="+", choices=SCREENS, default=list(SCREENS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--epochs", type=int, help="of each training; by default held-out cells end it"
    )
    arguments = parser.parse_args()
    print_conditions()
    logging.disable(logging.WARNING)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    file = arguments.folder / "batch_sizes.csv"
    rows = pd.read_csv(file).to_dict("records") if file.exists() else []
    done = {(row["screen"], row["seed"], row["arm"]) for row in rows}
    for seed in arguments.seeds:
        for name in arguments.screens:
            screen = SCREENS[name]
            adata = screen.read(seed)
            for arm in arguments.arms:
                if (name, seed, arm) in done:
                    continue
                scores = trained_and_scored(adata, screen, arm, seed, arguments.epochs)
                rows.append({"screen": name, "seed": seed, "arm": arm} | scores)
                print(rows[-1], flush=True)
                pd.DataFrame(rows).to_csv(file, index=False)
    print_tables(pd.DataFrame(rows))


if __name__ == "__main__":
    main()
