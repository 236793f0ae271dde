"""How much memory do training and predictions take above the loaded AnnData?

A million cells x 2,000 genes (a hundred counts each, csr) with 10,000 perturbations: registration,
some training steps with their statistics, masks, and latent states of a share of the cells; then
effects of all 10,000 on 5,000 genes in calls of bounded size. Peaks of resident memory, Linux only.

    python benchmarks/memory.py [--cells 1000000] [--perturbations 10000]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

import scvi_sams
from _common import print_conditions

_STATUS = Path("/proc/self/status")
_RESET_PEAK = Path("/proc/self/clear_refs")


def resident(field: str) -> float:
    """Megabytes: ``VmRSS``, what is resident now, or ``VmHWM``, the most since the last reset."""
    return int(re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())[1]) / 1024


def peak_above_start(function: Callable[[], Any]) -> float:
    """Megabytes by which memory rises while a function runs."""
    before = resident("VmRSS")
    _RESET_PEAK.write_text("5")
    function()
    return resident("VmHWM") - before


def screen(n_cells: int, n_genes: int, n_labels: int, counts_per_cell: int = 100) -> AnnData:
    """Few counts per cell, at random genes; a tenth of the cells are controls."""
    rng = np.random.default_rng(0)
    indices = rng.integers(n_genes, size=n_cells * counts_per_cell, dtype=np.int32)
    starts = np.arange(0, len(indices) + 1, counts_per_cell)
    counts = sparse.csr_matrix(
        (np.ones(len(indices), np.float32), indices, starts), shape=(n_cells, n_genes)
    )
    counts.sum_duplicates()
    names = np.array(["control", *(f"P{number:05d}" for number in range(n_labels))])
    codes = np.where(rng.random(n_cells) < 0.1, 0, rng.integers(1, n_labels + 1, n_cells))
    labels = pd.Categorical.from_codes(codes, names)
    obs = pd.DataFrame({"perturbation": labels}, index=pd.RangeIndex(n_cells).astype(str))
    return AnnData(counts, obs=obs)


def training_peaks(n_cells: int, n_labels: int) -> dict[str, float]:
    """Peaks of what is done with a model of 2,000 genes."""
    adata = screen(n_cells, 2000, n_labels)
    print(f"AnnData loaded: {resident('VmRSS'):,.0f} MB resident", flush=True)
    peaks = {"registration": peak_above_start(lambda: scvi_sams.SAMSVAE.setup_anndata(adata))}
    model = scvi_sams.SAMSVAE(adata)
    limits = {"limit_train_batches": 100, "limit_val_batches": 20}
    peaks["training"] = peak_above_start(
        lambda: model.train(max_epochs=2, accelerator="cpu", enable_progress_bar=False, **limits)
    )
    peaks["masks and effects"] = peak_above_start(
        lambda: (model.get_perturbation_masks(), model.get_perturbation_effects())
    )
    some = np.arange(0, n_cells, 10)
    peaks["latent states of every tenth cell"] = peak_above_start(
        lambda: model.get_latent_representation(indices=some)
    )
    peaks["ELBO of every tenth cell"] = peak_above_start(lambda: model.get_elbo(indices=some))
    return peaks


def prediction_peak(n_labels: int) -> float:
    """Peak of ``predict_ate`` for all perturbations on 5,000 genes, less its result."""
    adata = screen(5 * n_labels, 5000, n_labels)
    scvi_sams.SAMSVAE.setup_anndata(adata)
    model = scvi_sams.SAMSVAE(adata)
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, limit_train_batches=2)
    result: list[AnnData] = []
    peak = peak_above_start(
        lambda: result.append(model.predict_ate(method="mean", n_samples=20, key_added=None))
    )
    tables = [result[0].X, *result[0].layers.values()]
    return peak - sum(table.nbytes for table in tables) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--perturbations", type=int, default=10_000)
    arguments = parser.parse_args()
    print_conditions()
    peaks = training_peaks(arguments.cells, arguments.perturbations)
    peaks["all effects on 5,000 genes, less the result"] = prediction_peak(arguments.perturbations)
    table = pd.Series(peaks, name="peak above what was there, MB")
    print(table.round(0).astype(int).to_string())


if __name__ == "__main__":
    main()
