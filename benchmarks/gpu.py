"""Cells per second of training on a GPU, beside scvi.model.SCVI of the same widths.

One particle, one hidden layer of 400, 50 latent dimensions, mini-batches of 4,096. Wall time of
an epoch (all but the first of one training), and of its steps alone, without Lightning and
scvi-tools around them. With cells on the
device or sent by scvi-tools' loader, in single precision, TF32 and automatic mixed precision.
Memory traffic is what passes over mini-batches need (over a hundred over cells x genes,
see docs/scaling.md), beside what copying within the device reaches.

    python benchmarks/gpu.py [--accelerator gpu] [--cells 100000] [--genes 2000]
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scvi
import torch
from anndata import AnnData
from lightning.pytorch import Callback

import scvi_sams
from _common import print_conditions, with_spread
from scvi_sams.data._resident import ResidentCells, ResidentLoader
from step_time import simulated_counts

WIDTHS = {"n_hidden": 400, "n_latent": 50, "n_layers": 1}
PASSES = 128
"""Over the values of a mini-batch, read or written, in a step: as counted for 512 x 500."""
CELLS_MADE = 8192
"""Of which the screen is made up by repetition: values differ enough for a timing."""
SETTINGS = [
    # cells, precision of products, precision of the trainer
    ("sent", "highest", "32-true"),
    ("sent sparse", "highest", "32-true"),
    ("on the device", "highest", "32-true"),
    ("on the device", "high", "32-true"),
    ("on the device", "high", "bf16-mixed"),
]


def make_screen(n_cells: int, n_genes: int) -> AnnData:
    part = simulated_counts(min(n_cells, CELLS_MADE), n_genes, 100)
    whole = anndata.concat([part] * -(-n_cells // part.n_obs))
    whole.obs_names_make_unique()
    return whole[:n_cells].copy()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


class EpochTimes(Callback):
    """Wall seconds of every epoch but the first; the device is waited for at the end of each."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: list[float] = []
        self._device, self._before = device, math.nan

    def on_train_epoch_end(self, trainer: Any, plan: Any) -> None:
        wait(self._device)
        now = time.perf_counter()
        if trainer.current_epoch > 0:
            self.seconds.append(now - self._before)
        self._before = now

    def __deepcopy__(self, memo: dict) -> EpochTimes:
        return self


def step_seconds(model: Any, batch_size: int, device: torch.device, rounds: int) -> np.ndarray:
    """Mean step of each pass, with cells on the device; mini-batches made dense are included."""
    data = scvi_sams.data.ResidentDataModule(
        model.adata_manager, train_size=1.0, batch_size=batch_size, drop_last=True
    )
    cells = ResidentCells(model.adata_manager, device)
    loader = ResidentLoader(cells, data.train_dataloader().sampler)
    module = model.module.to(device).train()
    plan = model._training_plan_cls(module, lr_schedule="constant")
    optimizer = plan.configure_optimizers()["optimizer"]

    def one_pass() -> None:
        for batch in loader:
            _, _, output = module(batch)
            optimizer.zero_grad()
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 100.0)
            optimizer.step()

    one_pass()
    times = [seconds(one_pass, device) for _ in range(rounds)]
    return np.array(times) / len(loader)


def copied_per_second(device: torch.device) -> float:
    """Bytes read and written per second when a large array is copied within the device."""
    source = torch.empty(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times = [seconds(lambda: target.copy_(source), device) for _ in range(5)]
    return 2 * source.numel() * 4 / float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--accelerator", default="gpu")
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print_conditions(threads=None)
    warnings.filterwarnings("ignore", message=".*(log_every_n_steps|num_workers|CSR tensor).*")
    device = torch.device("cuda" if arguments.accelerator == "gpu" else arguments.accelerator)
    n_cells, n_genes, batch_size = arguments.cells, arguments.genes, arguments.batch_size
    adata = make_screen(n_cells, n_genes)
    scvi_sams.SAMSVAE.setup_anndata(adata)
    scvi.model.SCVI.setup_anndata(adata)
    common = {
        "accelerator": arguments.accelerator,
        "devices": 1,
        "train_size": 1.0,
        "batch_size": batch_size,
        "enable_progress_bar": False,
    }
    limit = copied_per_second(device)
    rows = []

    def add(name: str, cells: str, products: str, trainer: str, per_second: np.ndarray) -> None:
        traffic = np.median(per_second) * n_genes * 4 * PASSES
        rate = with_spread(per_second, 0)
        rows.append([name, cells, products, trainer, rate, traffic / 1e9, traffic / limit])

    def cells_per_second(train: Callable[[EpochTimes], None]) -> np.ndarray:
        times = EpochTimes(device)
        train(times)
        return n_cells / np.array(times.seconds)

    for cells, products, trainer in SETTINGS:
        torch.set_float32_matmul_precision(products)

        def ours(times: EpochTimes, cells: str = cells, trainer: str = trainer) -> None:
            scvi.settings.seed = 0
            scvi_sams.SAMSVAE(adata, **WIDTHS).train(
                arguments.rounds + 1,
                callbacks=[times],
                plan_kwargs={"dense_fraction": 0.0},  # masks are trained in all epochs alike
                precision=trainer,
                data_on_device=cells == "on the device",
                load_sparse_tensor=cells == "sent sparse",
                **common,
            )

        add("SAMSVAE", cells, products, trainer, cells_per_second(ours))
        if cells == "on the device" and trainer == "32-true":
            model = scvi_sams.SAMSVAE(adata, **WIDTHS)
            model.train(1, **common)
            per_step = step_seconds(model, batch_size, device, arguments.rounds)
            add("SAMSVAE, steps alone", cells, products, trainer, batch_size / per_step)
    for products in ("highest", "high"):
        torch.set_float32_matmul_precision(products)

        def theirs(times: EpochTimes) -> None:
            scvi.settings.seed = 0
            model = scvi.model.SCVI(adata, gene_likelihood="nb", **WIDTHS)
            model.train(arguments.rounds + 1, callbacks=[times], **common)

        add("scvi.model.SCVI", "sent", products, "32-true", cells_per_second(theirs))
    where = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    print(
        f"{n_cells} cells x {n_genes} genes, batches of {batch_size}, {where}, torch "
        f"{torch.__version__}; copies within the device: {limit / 1e9:,.0f} GB/s"
    )
    columns = ["model", "cells", "products", "trainer", "cells/s", "GB/s", "share of copying"]
    print(pd.DataFrame(rows, columns=columns).round(2).to_string(index=False))


if __name__ == "__main__":
    main()
