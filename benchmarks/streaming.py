"""Cells per second from disk and from memory, and peak memory of training from disk.

Makes screens of 2,000 genes with 5 % non-zeros in a folder (kept there for the next time), reads
epochs of them in turn within one process, and trains a small model for one epoch, each in a process
of its own, for the peak of memory.

    python benchmarks/streaming.py FOLDER [--cells 200000] [--rounds 3] [--block-size 512]
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import scvi
import torch
from anndata import AnnData
from scipy import sparse
from scvi.dataloaders import AnnDataLoader

import scvi_sams
from _common import print_conditions, with_spread
from scvi_sams.counts._block_reader import BlockReader
from scvi_sams.data import StreamingDataModule, open_screen

N_GENES = 2_000
BATCH_SIZE = 512
FORMATS = ("h5ad", "zarr")


def make_file(folder: Path, n_cells: int, suffix: str) -> Path:
    """Counts of random genes; the tenth part of the cells are controls."""
    path = folder / f"screen_{n_cells}.{suffix}"
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    counts = sparse.vstack(
        [
            sparse.random(
                10_000,
                N_GENES,
                density=0.05,
                format="csr",
                dtype=np.float32,
                random_state=rng,
                data_rvs=lambda n: 1 + rng.poisson(1, n),
            )
            for _ in range(n_cells // 10_000)
        ],
        format="csr",
    )
    counts.sort_indices()
    names = np.array(["control"] * 11 + [f"P{number:03d}" for number in range(100)])
    obs = pd.DataFrame(
        {"perturbation": names[rng.integers(len(names), size=n_cells)]},
        index=np.arange(n_cells).astype(str),
    )
    adata = AnnData(counts, obs=obs)
    adata.write_zarr(path) if suffix == "zarr" else adata.write_h5ad(path)
    return path


def small_model(adata: AnnData) -> scvi_sams.SAMSVAE:
    scvi_sams.SAMSVAE.setup_anndata(adata)
    return scvi_sams.SAMSVAE(adata, n_latent=4, n_hidden=16, effect_n_hidden=8, effect_n_layers=1)


def cells_per_second(batches: Iterable, n_of: Callable) -> float:
    start = time.perf_counter()
    n_cells = sum(n_of(batch) for batch in batches)
    return n_cells / (time.perf_counter() - start)


def read_blocks(path: Path, block_size: int) -> Iterable[sparse.csr_matrix]:
    """Every block once, in random order, as it is stored."""
    reader = BlockReader(open_screen(path).X)
    starts = np.random.default_rng(0).permutation(np.arange(0, reader.n_rows, block_size))
    return (reader.read(start, min(start + block_size, reader.n_rows)) for start in starts)


def rates(paths: dict[str, Path], rounds: int, block_size: int) -> pd.DataFrame:
    in_memory = anndata.read_h5ad(paths["h5ad"])
    manager = small_model(in_memory).adata_manager
    loaders = {
        "in memory, loader of scvi-tools": AnnDataLoader(
            manager, batch_size=BATCH_SIZE, shuffle=True
        )
    }
    for suffix, path in paths.items():
        stream = StreamingDataModule(
            small_model(open_screen(path)).adata_manager,
            external_indexing=[np.arange(in_memory.n_obs)],
            batch_size=BATCH_SIZE,
            block_size=block_size,
        )
        loaders[f"{suffix}, streamed"] = stream.train_dataloader()
    timings: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, loader in loaders.items():
            timings.setdefault(name, []).append(
                cells_per_second(loader, lambda batch: len(batch["X"]))
            )
        for suffix, path in paths.items():
            timings.setdefault(f"{suffix}, bare reading of blocks", []).append(
                cells_per_second(read_blocks(path, block_size), lambda block: block.shape[0])
            )
    in_turn = np.array(next(iter(timings.values())))
    return pd.DataFrame(
        {
            "cells/s": {name: with_spread(values, 0) for name, values in timings.items()},
            "of in memory": {
                name: with_spread(values / in_turn) for name, values in timings.items()
            },
        }
    )


def memory(of: str) -> float:
    """Megabytes of this process, from Linux: ``ru_maxrss`` would be that of the parent at least."""
    line = next(line for line in Path("/proc/self/status").read_text().split("\n") if of in line)
    return int(line.split()[1]) / 1024


def peak_megabytes(path: Path, open_file: Callable[[Path], AnnData]) -> float:
    """Peak of registration, one epoch and latent states, above what the imports take."""
    torch.set_num_threads(1)
    before = memory("VmRSS")
    model = small_model(open_file(path))
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    model.get_latent_representation()
    return memory("VmHWM") - before


def quiet() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    scvi.settings.seed = 0


def in_a_new_process(function: Callable[[], float]) -> float:
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=quiet) as pool:
        return pool.submit(function).result()


def peaks(paths: dict[int, dict[str, Path]]) -> pd.DataFrame:
    rows = {}
    for n_cells, of_size in paths.items():
        for suffix, path in of_size.items():
            measure = partial(peak_megabytes, path, open_screen)
            rows[f"{n_cells:,} cells, {suffix}"] = in_a_new_process(measure)
        measure = partial(peak_megabytes, of_size["h5ad"], anndata.read_h5ad)
        rows[f"{n_cells:,} cells, in memory"] = in_a_new_process(measure)
    return pd.DataFrame({"peak above imports, MB": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--block-size", type=int, default=512)
    arguments = parser.parse_args()
    print_conditions()
    quiet()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    paths = {
        n_cells: {suffix: make_file(arguments.folder, n_cells, suffix) for suffix in FORMATS}
        for n_cells in (arguments.cells // 4, arguments.cells)
    }
    print(
        f"{arguments.cells:,} cells x {N_GENES:,} genes, 5 % non-zeros, batches of {BATCH_SIZE}, "
        f"blocks of {arguments.block_size}, median of {arguments.rounds}"
    )
    print(rates(paths[arguments.cells], arguments.rounds, arguments.block_size).to_string())
    print(peaks(paths).round(0).to_string())


if __name__ == "__main__":
    main()
