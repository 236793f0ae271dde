"""CPU seconds of what a user does with a screen, with and without the loops of ``kernels``.

Registration, training with default settings, masks, predicted effects of all perturbations with
intervals, latent states, hits, and three differential expressions. Every path runs in a process of
its own, one after the other, so that each pays for loading its loops; on one thread. "Without" is
torch, as on an accelerator.

    python benchmarks/whole_path.py [--screens papalexi21 simulated] [--rounds 1]
        [--kernels on off] [--epochs 6]

``--epochs`` trains for fewer and scales the seconds up to the default number.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import numpy as np
import pandas as pd
import scvi
import torch
from anndata import AnnData

import scvi_sams
from _common import print_conditions, print_ratio, with_spread
from scvi_sams.model._training import _planned_epochs
from scvi_sams.module import _negative_binomial, _rising_factorial

SCREENS: dict[str, tuple[Callable[[], AnnData], dict[str, Any], dict[str, Any]]] = {
    "papalexi21": (
        scvi_sams.datasets.papalexi21,
        {"perturbation_key": "perturbation", "size_factor_key": "total_counts"},
        {"n_latent": 20},
    ),
    "simulated": (scvi_sams.datasets.simulate_benchmark_screen, {}, {}),
    "small": (scvi_sams.datasets.simulate_screen, {}, {"n_latent": 10}),
}
"""How to get it, arguments of ``setup_anndata`` and of the model."""


class FewBeyondTable(_rising_factorial._TableOfTensors):
    """Stirling's series for counts beyond the table alone: a processor can ask which they are."""

    def __init__(self, theta: torch.Tensor, x: torch.Tensor) -> None:
        super().__init__(theta, np.full(len(theta), _rising_factorial.TABLE_SIZE - 1))

    def read(self, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        last = _rising_factorial.TABLE_SIZE - 1
        entries = counts.clamp(max=last).int().add_(self.first).flatten()
        values = self.values.index_select(0, entries).view(counts.shape)
        slopes = self.slopes.index_select(0, entries).view(counts.shape)
        cells, genes = (counts > last).nonzero(as_tuple=True)
        value, slope = _rising_factorial._beyond_table(counts[cells, genes], self.theta[genes])
        values[cells, genes] += value
        slopes[cells, genes] += slope
        return values.sum(-1), slopes


def switch_off_kernels() -> None:
    """Let torch do in this process what compiled loops do."""
    _negative_binomial._ChunkOfLoops = _negative_binomial._ChunkOfTensors
    _rising_factorial._TableOfLoops = FewBeyondTable


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.process_time()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.process_time() - started


def path(screen: str, kernels: str, n_epochs: int | None) -> dict[str, float]:
    """Seconds of each step."""
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    scvi.settings.seed = 0
    if kernels == "off":
        switch_off_kernels()
    load, registration, settings = SCREENS[screen]
    adata = load()
    seconds: dict[str, float] = {}
    with timed(seconds, "an epoch of 500 cells: loading"):
        some = adata[::40].copy()
        scvi_sams.SAMSVAE.setup_anndata(some, **registration)
        scvi_sams.SAMSVAE(some, **settings).train(max_epochs=1, enable_progress_bar=False)
    with timed(seconds, "registration"):
        scvi_sams.SAMSVAE.setup_anndata(adata, **registration)
        model = scvi_sams.SAMSVAE(adata, **settings)
    with timed(seconds, "training"):
        model.train(max_epochs=n_epochs, enable_progress_bar=False)
    if n_epochs is not None:
        seconds["training"] *= _planned_epochs(len(model.train_indices)) / n_epochs
    with timed(seconds, "masks"):
        model.get_perturbation_masks()
    with timed(seconds, "predicted effects"):
        labels = [label for label in adata.obs["perturbation"].unique() if label != "control"]
        model.predict_ate(labels)
    with timed(seconds, "latent states"):
        model.get_latent_representation()
    with timed(seconds, "hits"):
        scvi_sams.tl.perturbation_hits(model)
    with timed(seconds, "three differential expressions"):
        for label in labels[:3]:
            model.differential_expression(group1=label)
    seconds["total"] = math.fsum(seconds.values())
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--screens", nargs="+", default=["papalexi21", "simulated"], choices=SCREENS
    )
    parser.add_argument("--kernels", nargs="+", default=["on", "off"], choices=("on", "off"))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--epochs", type=int)
    arguments = parser.parse_args()
    print_conditions()
    for screen in arguments.screens:
        runs = []
        for _ in range(arguments.rounds):
            for kernels in arguments.kernels:
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    seconds = pool.submit(path, screen, kernels, arguments.epochs).result()
                runs.append({"kernels": kernels, **seconds})
        times = pd.DataFrame(runs).groupby("kernels", sort=False)
        print(f"{screen}, CPU seconds, median of {arguments.rounds}")
        print(times.agg(with_spread).T.to_string())
        if len(times) == 2:
            on, off = (runs.to_numpy() for _, runs in times["total"])
            print_ratio(f"the path with kernels {' to '.join(arguments.kernels)}", on / off)


if __name__ == "__main__":
    main()
