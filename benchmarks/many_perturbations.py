"""Does the number of perturbations cost time or memory? Steps and registration at 100 and 10,000.

Steps of the default model, one particle, are timed in turn in this process; both screens have the
same cells and genes. Registration: a million cells with few counts, 10,000 labels and pairs of
them, so that labels and not counts are what takes time.

    python benchmarks/many_perturbations.py [--rounds 25] [--cells 512] [--genes 2000]
"""

from __future__ import annotations

import argparse

import numpy as np
import pandas as pd
import scvi
import torch
from anndata import AnnData
from scipy import sparse

import scvi_sams
from step_time import cpu_seconds, simulated_counts, training_step

NUMBERS = (100, 10_000)


def step_times(n_cells: int, n_genes: int, rounds: int) -> pd.DataFrame:
    """Median CPU time of a step for each number of perturbations."""
    steps = {}
    for number in NUMBERS:
        adata = simulated_counts(8 * n_cells, n_genes, number)
        scvi_sams.SAMSVAE.setup_anndata(adata)
        steps[number] = training_step(adata, 1, n_cells)
    timings = [[cpu_seconds(step) for step in steps.values()] for _ in range(rounds + 2)]
    # The first rounds warm up.
    milliseconds = 1e3 * np.median(timings[2:], axis=0)
    table = pd.DataFrame({"step, ms": milliseconds}, index=list(steps))
    table["ratio"] = milliseconds / milliseconds[0]
    return table.rename_axis("perturbations")


def registration_time(n_cells: int, n_labels: int) -> float:
    """CPU seconds of ``setup_anndata``; a third of the cells carry pairs."""
    rng = np.random.default_rng(0)
    names = np.array([f"P{i:05d}" for i in range(n_labels)])
    first, second = rng.integers(n_labels, size=(2, n_cells))
    labels = names[first].astype(object)
    is_pair = (rng.random(n_cells) < 1 / 3) & (first != second)
    labels[is_pair] = names[first[is_pair]] + "+" + names[second[is_pair]]
    labels[rng.random(n_cells) < 0.1] = "control"
    counts = sparse.csr_matrix(
        (np.ones(n_cells, np.float32), np.arange(n_cells) % 20, np.arange(n_cells + 1)),
        shape=(n_cells, 20),
    )
    obs = pd.DataFrame({"perturbation": pd.Categorical(labels)})
    adata = AnnData(counts, obs=obs.set_index(obs.index.astype(str)))
    return cpu_seconds(lambda: scvi_sams.SAMSVAE.setup_anndata(adata))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=512)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scvi.settings.seed = 0
    table = step_times(arguments.cells, arguments.genes, arguments.rounds)
    print(table.round(2).to_string())
    seconds = registration_time(1_000_000, 10_000)
    print(f"registration of a million cells with 10,000 labels: {seconds:.1f} CPU s")


if __name__ == "__main__":
    main()
