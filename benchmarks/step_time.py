"""CPU time of a training step against the time of its bare matrix products.

The products are those that no implementation can avoid: x through the encoder once, decoder and
effect network for each particle, forward and backward. Both are timed in turn in this process, so
that the ratio holds when the machine's speed drifts.

    python benchmarks/step_time.py [--cells 512] [--genes 2000] [--particles 5] [--rounds 15]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import scvi
import torch
from anndata import AnnData
from scipy import sparse

import scvi_sams
from _common import print_conditions, print_ratio, with_spread


def simulated_counts(n_cells: int, n_genes: int, n_perturbations: int) -> AnnData:
    """Counts with about 57 % non-zero entries; a tenth of the cells are controls, a fifth pairs."""
    rng = np.random.default_rng(0)
    mean = rng.lognormal(0.0, 1.0, n_genes)
    mean *= 2.5 / mean.mean()
    counts = rng.poisson(mean * rng.gamma(3.0, 1 / 3, (n_cells, n_genes)))
    names = np.array([f"P{i:05d}" for i in range(n_perturbations)])
    first, second = rng.integers(n_perturbations, size=(2, n_cells))
    kind = rng.choice(3, n_cells, p=[0.1, 0.7, 0.2])
    pairs = np.char.add(np.char.add(names[first], "+"), names[second])
    labels = np.select(
        [kind == 0, (kind == 1) | (first == second)], ["control", names[first]], pairs
    )
    return AnnData(
        sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame({"perturbation": labels}, index=[str(i) for i in range(n_cells)]),
    )


EFFECT_NETWORK = {"effect_n_hidden": 400, "effect_n_layers": 4}
"""Of the paper; our default is smaller."""


def training_step(
    adata: AnnData, n_particles: int, n_cells: int, **settings: Any
) -> Callable[[], None]:
    """One optimiser step of the model's own module, plan and loader output."""
    model = scvi_sams.SAMSVAE(adata, n_latent=50, n_particles=n_particles, **settings)
    model.train(max_epochs=1, enable_progress_bar=False, batch_size=n_cells)
    module = model.module.train()
    plan = model._training_plan_cls(module, lr_schedule="constant")
    optimizer = plan.configure_optimizers()["optimizer"]
    loader = model._make_data_loader(adata, batch_size=n_cells, shuffle=True)
    batches = [batch for batch in loader if len(batch["X"]) == n_cells]
    position = 0

    def step() -> None:
        nonlocal position
        position = (position + 1) % len(batches)
        _, _, output = module(batches[position])
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 100.0)
        optimizer.step()

    return step


def bare_products(
    n_cells: int, n_genes: int, n_particles: int, n_rows: int, hidden: int = 400, latent: int = 50
) -> Callable[[], None]:
    """The same matrix products with nothing between them."""
    shapes = [
        # rows, inner, columns, whether the input needs a gradient
        (n_cells, n_genes, hidden, False),
        (n_particles * n_cells, latent, hidden, True),  # shift -> encoder
        (n_particles * n_cells, hidden, 2 * latent, True),
        (n_particles * n_cells, latent, hidden, True),  # decoder
        (n_particles * n_cells, hidden, n_genes, True),
        (n_particles * n_rows, latent, hidden, True),  # effect network
        *[(n_particles * n_rows, hidden, hidden, True)] * 3,
        (n_particles * n_rows, hidden, 2 * latent, True),
    ]
    operands = [
        (torch.randn(m, k), torch.randn(k, n), torch.randn(m, n), needs)
        for m, k, n, needs in shapes
    ]
    buffers = [(torch.empty(m, n), torch.empty(k, n), torch.empty(m, k)) for m, k, n, _ in shapes]

    def products() -> None:
        for (a, b, g, needs), (out, grad_b, grad_a) in zip(operands, buffers, strict=True):
            torch.mm(a, b, out=out)
            torch.mm(a.T, g, out=grad_b)
            if needs:
                torch.mm(g, b.T, out=grad_a)

    return products


def cpu_seconds(function: Callable[[], None]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=512)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--perturbations", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    print_conditions()
    scvi.settings.seed = 0
    adata = simulated_counts(8 * arguments.cells, arguments.genes, arguments.perturbations)
    scvi_sams.SAMSVAE.setup_anndata(adata)
    rows, ratios = [], {}
    for n_particles in arguments.particles:
        step = training_step(adata, n_particles, arguments.cells, **EFFECT_NETWORK)
        products = bare_products(
            arguments.cells, arguments.genes, n_particles, arguments.perturbations
        )
        timings = [(cpu_seconds(step), cpu_seconds(products)) for _ in range(arguments.rounds + 2)]
        ours, bare = np.array(timings[2:]).T
        ratios[n_particles] = ours / bare
        rows.append(
            {
                "particles": n_particles,
                "step, ms": with_spread(1e3 * ours, 1),
                "bare products, ms": with_spread(1e3 * bare, 1),
                "cells/s": with_spread(arguments.cells / ours, 0),
            }
        )
    print(
        f"{arguments.cells} cells x {arguments.genes} genes, {arguments.perturbations} "
        f"perturbations, median (smallest-largest) of {arguments.rounds}"
    )
    print(pd.DataFrame(rows).to_string(index=False))
    for n_particles, values in ratios.items():
        print_ratio(f"a step to its bare products, particles: {n_particles}", values)


if __name__ == "__main__":
    main()
