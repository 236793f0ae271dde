"""Predicted effects against those of held-out cells, beside estimators that know no model.

Half of the cells of each perturbation train (or as many as are asked for), with half of the control
cells; effects in the other half, against the other half of the controls, are what is predicted. All
settings are the defaults. Nulls are perturbations whose EB-shrunken effects in the tested cells are
next to zero.

    python benchmarks/effects.py papalexi21 --cells 10 20 50 100 all --seeds 0 1 2
    python benchmarks/effects.py panel --cells 20 all
    python benchmarks/effects.py norman19
"""

from __future__ import annotations

import argparse
import logging
import time

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData

import scvi_sams
from _common import print_conditions
from scvi_sams import datasets, evaluation

PAIRS = ["KLF1+MAP2K6", "KLF1+TGFBR2", "MAP2K3+MAP2K6", "MAP2K3+SLC38A2", "MAPK1+TGFBR2"]
NULL_RMS = 0.02
"""Root mean square over genes, log2 units, below which tested cells say that there is no effect."""
BASELINES = {
    "training mean": evaluation.TrainingMean,
    "EB-shrunken mean": evaluation.EBMean,
    "ash-shrunken mean": evaluation.AshMean,
}
PAIR_BASELINES = {
    "additive": evaluation.Additive,
    "additive of EB singles": evaluation.EBMean,
    "additive of ash singles": evaluation.ShrunkenAdditive,
}


def read_screen(name: str) -> tuple[AnnData, dict[str, str]]:
    """Read or simulate a screen; returns arguments of ``setup_anndata`` too."""
    if name == "papalexi21":
        return datasets.papalexi21(), {"batch_key": "replicate", "size_factor_key": "total_counts"}
    if name == "norman19":
        return datasets.norman19_subset(), {"size_factor_key": "total_counts"}
    panel = datasets.simulate_screen(
        n_genes=70,
        n_perturbations=14,
        cells_per_perturbation=1000,
        n_controls=1000,
        n_combinations=0,
        knockdown=(0.7, 0.95),
        library_size=500.0,
        effect_scale=0.5,
        seed=11,
    )
    return panel, {}


def split(adata: AnnData, n_cells: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the cells that train, and of the tested half."""
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    rng = np.random.default_rng(seed)
    train, test = [], []
    for label in np.unique(labels):
        cells = rng.permutation(np.flatnonzero(labels == label))
        half = len(cells) // 2
        kept = half if label == "control" or n_cells is None else min(half, n_cells)
        train.append(cells[:kept])
        test.append(cells[half:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def effects_of_baseline(
    method: type, train: AnnData, names: list[str], size_factor_key: str | None
) -> np.ndarray:
    """Effects that a baseline predicts, log2 units."""
    cells = train.copy()
    counts = cells.X
    size = np.asarray(counts.sum(axis=1)).ravel()
    if size_factor_key is not None:
        size = cells.obs[size_factor_key].to_numpy()
    cells.X = counts.multiply(1e4 / size[:, None]).tocsr().log1p()
    controls = (cells.obs["perturbation"] == "control").to_numpy()
    predicted = np.asarray(method().fit(cells).predict(names).X)
    return (predicted - np.asarray(cells.X[controls].mean(axis=0))) / np.log(2)


def scores(predicted: np.ndarray, observed: np.ndarray, nulls: np.ndarray) -> dict[str, float]:
    """Pooled and per perturbation; a constant prediction correlates with nothing."""
    with np.errstate(invalid="ignore"):
        rows = [np.corrcoef(p, o)[0, 1] for p, o in zip(predicted, observed, strict=True)]
    ranks = evaluation.rank_scores(predicted, observed)
    return {
        "Pearson": np.corrcoef(predicted.ravel(), observed.ravel())[0, 1],
        "RMSE": np.sqrt(np.mean(np.square(predicted - observed))),
        "mean Pearson": np.nan_to_num(rows).mean(),
        "rank": float(np.mean(np.asarray(ranks))),
        "RMS of nulls": np.sqrt(np.mean(np.square(predicted[nulls]))) if nulls.any() else np.nan,
    }


def run(name: str, n_cells: int | None, seed: int, epochs: int | None) -> list[dict[str, object]]:
    """Score the model and the baselines of one split."""
    adata, setup = read_screen(name)
    if name == "norman19":
        labels = adata.obs["perturbation"].astype(str)
        train = np.flatnonzero(~labels.isin(PAIRS))
        test = np.flatnonzero(labels.isin([*PAIRS, "control"]))
        names, baselines = PAIRS, PAIR_BASELINES
    else:
        train, test = split(adata, n_cells, seed)
        names = sorted(set(adata.obs["perturbation"].astype(str)) - {"control"})
        baselines = BASELINES
    key = setup.get("size_factor_key")
    observed = evaluation.observed_ate(
        adata, indices=test, perturbations=names, size_factor_key=key
    ).X
    own = effects_of_baseline(evaluation.EBMean, adata[test].copy(), names, key)
    nulls = np.sqrt(np.mean(np.square(own), axis=1)) < NULL_RMS
    cells = adata[train].copy()
    rows = [
        {"method": method}
        | scores(effects_of_baseline(baseline, cells, names, key), observed, nulls)
        for method, baseline in baselines.items()
    ]
    scvi.settings.seed = seed
    scvi_sams.SAMSVAE.setup_anndata(cells, **setup)
    model = scvi_sams.SAMSVAE(cells)
    started = time.process_time()
    model.train(epochs, enable_progress_bar=False)
    seconds = time.process_time() - started
    for method, is_stacked in (("SAMSVAE", True), ("SAMSVAE, not stacked", False)):
        model.stacking = is_stacked
        predicted = model.predict_ate(names, interval=None, key_added=None).X
        rows.append({"method": method, "CPU s": seconds} | scores(predicted, observed, nulls))
    return [{"screen": name, "cells": n_cells or "all", "seed": seed} | row for row in rows]


def main() -> None:
    """Print means over seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("screen", choices=["papalexi21", "panel", "norman19"])
    parser.add_argument("--cells", nargs="+", default=["all"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="of every training; the default number if unset")
    arguments = parser.parse_args()
    print_conditions()
    for logger in ("scvi", "scvi.sams", "lightning.pytorch"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    for number in arguments.cells:
        n_cells = None if number == "all" else int(number)
        rows = [
            row
            for seed in arguments.seeds
            for row in run(arguments.screen, n_cells, seed, arguments.epochs)
        ]
        table = pd.DataFrame(rows).drop(columns="seed")
        means = table.groupby(["screen", "cells", "method"], sort=False).mean()
        print(means.round(4).to_string(), flush=True)


if __name__ == "__main__":
    main()
