"""CPU time of an epoch beside scvi.model.SCVI of the same widths on the same AnnData.

Both with one hidden layer of 400, 50 latent dimensions, a negative binomial likelihood, one
particle, batches of 512 by default and no validation; SCVI otherwise as it comes (dropout, batch
normalisation). Models are made anew and take turns in one process; what a call to ``train`` costs
besides its epochs, the search for sparse axes included, is taken away by the difference of four
epochs and two. The second table is the share of a step that logging takes.

    python benchmarks/beside_scvi.py [--cells 8192] [--genes 2000] [--batch-size 512] [--rounds 5]
    python benchmarks/beside_scvi.py --cells 6400 --genes 300 --batch-size 64
    python benchmarks/beside_scvi.py --cells 6400 --genes 50 --batch-size 64 --hidden 128
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
from lightning.pytorch import Callback

import scvi_sams
from step_time import cpu_seconds, simulated_counts


class LoggingTime(Callback):
    """CPU seconds of steps, and of calls that only log."""

    def __init__(self) -> None:
        self.of_steps, self.of_logging = 0.0, 0.0
        self._depth = 0

    def on_train_start(self, trainer: Any, plan: Any) -> None:
        for name in ("compute_and_log_metrics", "log"):
            setattr(plan, name, self._timed(getattr(plan, name)))

    def on_train_batch_start(self, *arguments: Any) -> None:
        self._start = time.process_time()

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.of_steps += time.process_time() - self._start

    def __deepcopy__(self, memo: dict) -> LoggingTime:
        return self

    def _timed(self, function: Callable) -> Callable:
        def timed(*arguments: Any, **named: Any) -> None:
            start = time.process_time()
            self._depth += 1
            function(*arguments, **named)
            self._depth -= 1
            if not self._depth:  # metrics are logged within
                self.of_logging += time.process_time() - start

        return timed


def epoch(train: Callable[[int], None]) -> float:
    """CPU seconds of an epoch beyond the second."""
    two = cpu_seconds(lambda: train(2))
    return (cpu_seconds(lambda: train(4)) - two) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=8192)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--latent", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    adata = simulated_counts(arguments.cells, arguments.genes, 100)
    scvi_sams.SAMSVAE.setup_anndata(adata)
    scvi.model.SCVI.setup_anndata(adata)
    widths = {"n_hidden": arguments.hidden, "n_latent": arguments.latent, "n_layers": 1}
    common = {
        "train_size": 1.0,
        "batch_size": arguments.batch_size,
        "enable_progress_bar": False,
    }

    def ours(n_epochs: int, **more: Any) -> None:
        scvi.settings.seed = 0
        model = scvi_sams.SAMSVAE(adata, **widths)
        model.train(n_epochs, **common, **more)

    def theirs(n_epochs: int, **more: Any) -> None:
        scvi.settings.seed = 0
        model = scvi.model.SCVI(adata, gene_likelihood="nb", **widths)
        model.train(n_epochs, **common, **more)

    times = np.array([(epoch(ours), epoch(theirs)) for _ in range(arguments.rounds + 1)])[1:]
    table = pd.DataFrame(
        {"epoch, CPU s": np.median(times, axis=0)}, index=["SAMSVAE", "scvi.model.SCVI"]
    )
    table["cells/s"] = arguments.cells / table["epoch, CPU s"]
    print(table.round(2).to_string())
    print(f"ratio: {np.median(times[:, 0] / times[:, 1]):.2f}")
    shares = {}
    for name, train in (("SAMSVAE", ours), ("scvi.model.SCVI", theirs)):
        logging_time = LoggingTime()
        train(2, callbacks=[logging_time])
        shares[name] = logging_time.of_logging / logging_time.of_steps
    print("share of logging: " + ", ".join(f"{n} {share:.3f}" for n, share in shares.items()))


if __name__ == "__main__":
    main()
