"""What a training step costs, as a formula fitted to measurements, and what that makes of a screen.

Steps of several sizes are timed in turn; non-negative least squares of relative errors give the
seconds per step, per floating-point operation of the matrix products, per value of expression and
particle, and per parameter. The formula then says how long screens of other sizes take on one
thread of this machine. It is a plan, not a measurement.

    python benchmarks/cost_model.py [--rounds 9]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scvi
from scipy.optimize import nnls

import scvi_sams
from _common import print_conditions, with_spread
from step_time import cpu_seconds, simulated_counts, training_step

HIDDEN, LATENT, EFFECT_HIDDEN = 400, 50, 200
"""Widths of the default model."""


class Step(NamedTuple):
    """Size of a training step."""

    cells: int
    genes: int
    particles: int
    perturbations: int


MEASURED = (
    Step(128, 2000, 1, 100),
    Step(512, 500, 1, 100),
    Step(512, 2000, 1, 100),
    Step(512, 2000, 5, 100),
    Step(512, 5000, 1, 100),
    Step(2048, 2000, 1, 100),
    Step(512, 2000, 1, 10_000),
)
SCREENS = {
    "20,000 cells x 2,000 genes, 100 perturbations, 40 epochs": (Step(512, 2000, 1, 100), 8e5),
    "2 million cells x 5,000 genes, 10,000 perturbations, 10 epochs": (
        Step(512, 5000, 1, 10_000),
        2e7,
    ),
    "100 million cells x 2,000 genes, 1,100 perturbations, 10 epochs": (
        Step(512, 2000, 1, 1_100),
        1e9,
    ),
}
"""Step and number of cells seen in all."""
TERMS = ("s per step", "s per 1e9 operations", "s per 1e6 values", "s per 1e6 parameters")


def terms(step: Step) -> np.ndarray:
    """How often a step pays each of ``TERMS``."""
    cells, genes, particles, perturbations = step
    # Two operations per entry of a product, and as many for each gradient that is needed.
    encoder = 4 * cells * genes * HIDDEN
    decoder = 6 * cells * particles * genes * HIDDEN
    latent = 6 * cells * particles * HIDDEN * 4 * LATENT
    # Most perturbations of a mini-batch are different ones.
    rows = min(perturbations, 1.2 * cells)
    effects = 6 * particles * rows * EFFECT_HIDDEN * (EFFECT_HIDDEN + 3 * LATENT)
    parameters = 2 * genes * HIDDEN + perturbations * (EFFECT_HIDDEN + LATENT)
    operations = encoder + decoder + latent + effects
    return np.array([1, operations / 1e9, cells * particles * genes / 1e6, parameters / 1e6])


def smaller(step: Step) -> Step:
    """A step to try the script with."""
    cells, genes, particles, perturbations = step
    return Step(cells // 4, genes // 10, particles, min(perturbations, 300))


def measured_seconds(sizes: Sequence[Step], rounds: int) -> np.ndarray:
    """CPU seconds of steps, rounds x sizes, in turn in one process."""
    steps = []
    for size in sizes:
        adata = simulated_counts(8 * size.cells, size.genes, size.perturbations)
        scvi_sams.SAMSVAE.setup_anndata(adata)
        steps.append(training_step(adata, size.particles, size.cells))
    timings = [[cpu_seconds(step) for step in steps] for _ in range(rounds + 2)]
    return np.array(timings[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="smaller steps")
    arguments = parser.parse_args()
    print_conditions()
    scvi.settings.seed = 0
    sizes = [smaller(size) for size in MEASURED] if arguments.quick else MEASURED
    timings = measured_seconds(sizes, arguments.rounds)
    seconds = np.median(timings, axis=0)
    design = np.array([terms(size) for size in sizes])
    prices, _ = nnls(design / seconds[:, None], np.ones(len(seconds)))
    print(pd.Series(prices, index=TERMS).map("{:.4f}".format).to_string(), end="\n\n")
    table = pd.DataFrame(sizes)
    table["measured, ms"] = [with_spread(1e3 * of_size, 1) for of_size in timings.T]
    table["formula, ms"] = 1e3 * design @ prices
    table["cells/s"] = table["cells"] / seconds
    print(table.round(1).to_string(index=False), end="\n\n")
    for name, (step, n_cells) in SCREENS.items():
        hours = n_cells / step.cells * terms(step) @ prices / 3600
        print(f"{name}: {hours:.2f} CPU hours by the formula")


if __name__ == "__main__":
    main()
