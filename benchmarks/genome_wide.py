"""What a genome-wide screen costs that streams from disk, by measurements of smaller ones.

Screens of 8,000 genes with 5 % non-zero counts and 200 cells per perturbation, a twentieth of them
controls, are written to a folder in chunks (h5ad), opened by ``open_screen``, trained on for some
steps in a new process, and deleted. Direct effects, whose sums are of all cells and not of these
steps only, are left out: ``direct_effects.py`` measures them. Cells and perturbations grow
together, so a line through the two largest screens is extended to 2 million cells with 10,000
perturbations; times of steps are means. CPU seconds of one thread; files are in the page cache,
as they have just been written.

    python benchmarks/genome_wide.py FOLDER [--cells 20000 100000 500000]
"""

from __future__ import annotations

import argparse
import logging
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scvi
import torch
from anndata.io import sparse_dataset, write_elem
from lightning.pytorch import Callback
from scipy import sparse

import scvi_sams
from _common import print_conditions
from memory import resident
from scvi_sams.data import StreamingDataModule, open_screen

N_GENES = 8_000
COUNTS_PER_CELL = 400
CELLS_PER_PERTURBATION = 200
GENOME_WIDE = 2_000_000
N_EPOCHS = 10
"""Epochs that are planned for so many cells."""
CELLS_PER_CHUNK = 20_000
N_STEPS = {512: 64, 2048: 16}
"""Steps by batch size: two buffers of cells of the loader."""


def write_screen(path: Path, n_cells: int) -> None:
    """Write random counts, a chunk of cells at a time."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for start in range(0, n_cells, CELLS_PER_CHUNK):
            counts = random_counts(min(CELLS_PER_CHUNK, n_cells - start), rng)
            if start:
                sparse_dataset(file["X"]).append(counts)
            else:
                write_elem(file, "X", counts)
        n_labels = n_cells // CELLS_PER_PERTURBATION
        names = np.array(["control", *(f"P{number:05d}" for number in range(n_labels))])
        is_control = rng.random(n_cells) < 0.05
        codes = np.where(is_control, 0, rng.integers(1, n_labels + 1, n_cells))
        labels = pd.Categorical.from_codes(codes, names)
        index = pd.RangeIndex(n_cells).astype(str)
        write_elem(file, "obs", pd.DataFrame({"perturbation": labels}, index=index))
        genes = [f"gene{number}" for number in range(N_GENES)]
        write_elem(file, "var", pd.DataFrame(index=genes))


def random_counts(n_cells: int, rng: np.random.Generator) -> sparse.csr_matrix:
    """About 400 non-zero counts in each cell, at random genes."""
    genes = rng.integers(N_GENES, size=n_cells * COUNTS_PER_CELL, dtype=np.int32)
    values = (1 + rng.poisson(1.0, len(genes))).astype(np.float32)
    starts = np.arange(0, len(genes) + 1, COUNTS_PER_CELL)
    counts = sparse.csr_matrix((values, genes, starts), shape=(n_cells, N_GENES))
    counts.sum_duplicates()
    return counts


class Clock(Callback):
    """CPU seconds of every step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.started = 0.0
        self.first = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.started = time.process_time()
        self.first = self.first or self.started

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(time.process_time() - self.started)


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and what it returns."""
    started = time.process_time()
    result = call()
    return time.process_time() - started, result


def train(model: scvi_sams.SAMSVAE, batch_size: int) -> Clock:
    """Train for a short epoch, with masks and without the rotation."""
    clock = Clock()
    model.train(
        max_epochs=1,
        accelerator="cpu",
        batch_size=batch_size,
        limit_train_batches=N_STEPS[batch_size],
        limit_val_batches=2,
        enable_progress_bar=False,
        callbacks=[clock],
    )
    return clock


def read(model: scvi_sams.SAMSVAE, batch_size: int) -> float:
    """CPU seconds of the loader per mini-batch, without a model."""
    loader = StreamingDataModule(model.adata_manager, batch_size=batch_size).train_dataloader()
    started = time.process_time()
    n_batches = sum(1 for _ in islice(loader, N_STEPS[batch_size]))
    return (time.process_time() - started) / n_batches


def measure(path: Path) -> dict[str, float]:
    """Costs of a screen in this process, which has only imported the package."""
    torch.set_num_threads(1)
    scvi.settings.seed = 0
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    costs, at_start = {}, resident("VmRSS")
    costs["open_screen, CPU s"], adata = seconds(lambda: open_screen(path))
    costs["setup_anndata, CPU s"], _ = seconds(lambda: scvi_sams.SAMSVAE.setup_anndata(adata))
    for batch_size in N_STEPS:
        model = scvi_sams.SAMSVAE(adata, direct_effects=False, stacking=False)
        started = time.process_time()
        clock = train(model, batch_size)
        costs["statistics before the first step, CPU s"] = clock.first - started
        # The first step loads compiled loops.
        step, reading = float(np.mean(clock.steps[1:])), read(model, batch_size)
        costs[f"step of {batch_size}, CPU ms"] = 1e3 * step
        costs[f"reading {batch_size}, CPU ms"] = 1e3 * reading
        costs[f"reading {batch_size}, share"] = reading / (step + reading)
    costs["peak memory above imports, MB"] = resident("VmHWM") - at_start
    folder = path.with_suffix(".model")
    model.save(folder, overwrite=True)
    costs["saved model, MB"] = sum(f.stat().st_size for f in folder.rglob("*")) / 1e6
    shutil.rmtree(folder)
    return costs


def extended(table: pd.DataFrame) -> pd.Series:
    """Values at the genome-wide screen.

    What grows with the screen is on a line through the two largest. Steps do not: each updates the
    250 parameters of every perturbation, 1 % of a step with 10,000, so it is their mean.
    """
    (x, y), (of_x, of_y) = table.columns[-2:], table.to_numpy().T[-2:]
    on_line = pd.Series(of_y + (of_y - of_x) * (GENOME_WIDE - y) / (y - x), table.index)
    is_of_step = table.index.str.contains("CPU ms|share")
    return on_line.mask(is_of_step, table.mean(axis=1))


def main() -> None:
    """Write, measure and delete one screen after the other; print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, nargs="+", default=[20_000, 100_000, 500_000])
    arguments = parser.parse_args()
    print_conditions()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    columns = {}
    for n_cells in sorted(arguments.cells):
        path = arguments.folder / f"genome_wide_{n_cells}.h5ad"
        try:
            write_screen(path, n_cells)
            size = path.stat().st_size / 1e6
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                columns[n_cells] = {"file, MB": size} | pool.submit(measure, path).result()
        finally:
            path.unlink(missing_ok=True)
        print(f"{n_cells:,} cells: {columns[n_cells]}", flush=True)
    table = pd.DataFrame(columns)
    if len(table.columns) > 1:
        table[f"{GENOME_WIDE:,}, extended"] = extended(table)
    print(table.round(3).to_string())
    for batch_size in N_STEPS if len(columns) > 1 else ():
        of_step = table.loc[[f"step of {batch_size}, CPU ms", f"reading {batch_size}, CPU ms"]]
        hours = of_step.iloc[:, -1].sum() / 3.6e6 * GENOME_WIDE / batch_size
        print(
            f"an epoch in batches of {batch_size}: {hours:.2f} CPU h; "
            f"{N_EPOCHS} epochs: {N_EPOCHS * hours:.1f} CPU h"
        )


if __name__ == "__main__":
    main()
