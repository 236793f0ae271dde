"""CPU time of a training step beside scvi.model.SCVI of the same widths on the same AnnData.

Both with one hidden layer of 400, 50 latent dimensions, a negative binomial likelihood, one
particle, batches of 512 by default and no validation; SCVI otherwise as it comes (dropout, batch
normalisation). Models are made anew and take turns in one process. A step lasts from one mini-batch
to the next of the same epoch: reading cells, optimiser and logging are part of it, the first epoch
and what a training does once are not. Masks are trained from the start. Printed is the median step
of a training, over rounds. The last line is the share of a step that logging takes.

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
from lightning.pytorch import Callback

import scvi_sams
from _common import print_conditions, print_ratio, with_spread
from step_time import simulated_counts

EPOCHS = 3
"""Of each training; the first one is not timed."""


class StepTimes(Callback):
    """CPU seconds from each mini-batch to the next of its epoch, without the first epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(
        self, trainer: Any, plan: Any, batch: Any, batch_idx: int, *arguments: Any
    ) -> None:
        now = time.process_time()
        if trainer.current_epoch > 0 and batch_idx > 0:
            self.seconds.append(now - self._before)
        self._before = now

    def __deepcopy__(self, memo: dict) -> StepTimes:
        return self


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


def median_step(train: Callable[[Callback], None]) -> float:
    """Median CPU seconds of a step of one training."""
    times = StepTimes()
    train(times)
    return float(np.median(times.seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=8192)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--latent", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print_conditions()
    adata = simulated_counts(arguments.cells, arguments.genes, 100)
    scvi_sams.SAMSVAE.setup_anndata(adata)
    scvi.model.SCVI.setup_anndata(adata)
    widths = {"n_hidden": arguments.hidden, "n_latent": arguments.latent, "n_layers": 1}
    common = {
        "train_size": 1.0,
        "batch_size": arguments.batch_size,
        "enable_progress_bar": False,
    }

    def ours(callback: Callback) -> None:
        scvi.settings.seed = 0
        model = scvi_sams.SAMSVAE(adata, **widths)
        from_start = {"dense_fraction": 0.0}
        model.train(EPOCHS, callbacks=[callback], plan_kwargs=from_start, **common)

    def theirs(callback: Callback) -> None:
        scvi.settings.seed = 0
        model = scvi.model.SCVI(adata, gene_likelihood="nb", **widths)
        model.train(EPOCHS, callbacks=[callback], **common)

    models = {"SAMSVAE": ours, "scvi.model.SCVI": theirs}
    times = np.array(
        [[median_step(train) for train in models.values()] for _ in range(arguments.rounds)]
    )
    table = pd.DataFrame(
        {
            "step, CPU ms": [with_spread(1e3 * column, 1) for column in times.T],
            "cells/s": [with_spread(arguments.batch_size / column, 0) for column in times.T],
        },
        index=list(models),
    )
    print(table.to_string())
    print_ratio("a step to one of scvi.model.SCVI", times[:, 0] / times[:, 1])
    shares = {}
    for name, train in models.items():
        logging_time = LoggingTime()
        train(logging_time)
        shares[name] = logging_time.of_logging / logging_time.of_steps
    print("share of logging: " + ", ".join(f"{n} {share:.3f}" for n, share in shares.items()))


if __name__ == "__main__":
    main()
