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
from anndata import AnnData
from scipy import sparse

import scvi_sams
from _common import print_conditions, print_ratio, with_spread
from step_time import cpu_seconds, simulated_counts, training_step

NUMBERS = (100, 10_000)


def step_times(n_cells: int, n_genes: int, rounds: int) -> np.ndarray:
    """CPU milliseconds of steps, rounds x numbers of perturbations."""
    steps = {}
    for number in NUMBERS:
        adata = simulated_counts(8 * n_cells, n_genes, number)
        scvi_sams.SAMSVAE.setup_anndata(adata)
        steps[number] = training_step(adata, 1, n_cells)
    timings = [[cpu_seconds(step) for step in steps.values()] for _ in range(rounds + 2)]
    # The first rounds warm up.
    return 1e3 * np.array(timings[2:])


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
    print_conditions()
    scvi.settings.seed = 0
    times = step_times(arguments.cells, arguments.genes, arguments.rounds)
    table = pd.DataFrame({"step, ms": [with_spread(of, 1) for of in times.T]}, index=NUMBERS)
    print(table.rename_axis("perturbations").to_string())
    print_ratio("a step with 10,000 perturbations to 100", times[:, 1] / times[:, 0])
    seconds = registration_time(1_000_000, 10_000)
    print(f"registration of a million cells with 10,000 labels: {seconds:.1f} CPU s")


if __name__ == "__main__":
    main()
