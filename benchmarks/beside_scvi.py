"""CPU time of an epoch beside scvi.model.SCVI of the same widths on the same AnnData.

Both with one hidden layer of 400, 50 latent dimensions, a negative binomial likelihood, one
particle, batches of 512 and no validation; SCVI otherwise as it comes (dropout, batch
normalisation). Models are made anew and take turns in one process; what a call to ``train`` costs
besides its epochs, the search for sparse axes included, is taken away by the difference of four
epochs and two.

    python benchmarks/beside_scvi.py [--cells 8192] [--genes 2000] [--rounds 5]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import pandas as pd
import scvi
import torch

import scvi_sams
from step_time import cpu_seconds, simulated_counts

WIDTHS = {"n_hidden": 400, "n_latent": 50, "n_layers": 1}


def epoch(train: Callable[[int], None]) -> float:
    """CPU seconds of an epoch beyond the second."""
    two = cpu_seconds(lambda: train(2))
    return (cpu_seconds(lambda: train(4)) - two) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=8192)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    adata = simulated_counts(arguments.cells, arguments.genes, 100)
    scvi_sams.SAMSVAE.setup_anndata(adata)
    scvi.model.SCVI.setup_anndata(adata)
    common = {"train_size": 1.0, "batch_size": 512, "enable_progress_bar": False}

    def ours(n_epochs: int) -> None:
        scvi.settings.seed = 0
        model = scvi_sams.SAMSVAE(adata, **WIDTHS)
        model.train(n_epochs, **common)

    def theirs(n_epochs: int) -> None:
        scvi.settings.seed = 0
        model = scvi.model.SCVI(adata, gene_likelihood="nb", **WIDTHS)
        model.train(n_epochs, **common)

    times = np.array([(epoch(ours), epoch(theirs)) for _ in range(arguments.rounds + 1)])[1:]
    table = pd.DataFrame(
        {"epoch, CPU s": np.median(times, axis=0)}, index=["SAMSVAE", "scvi.model.SCVI"]
    )
    table["cells/s"] = arguments.cells / table["epoch, CPU s"]
    print(table.round(2).to_string())
    print(f"ratio: {np.median(times[:, 0] / times[:, 1]):.2f}")


if __name__ == "__main__":
    main()
