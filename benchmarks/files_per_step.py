"""Calls, functions and files of this package that one training mini-batch passes through.

Counted with ``sys.setprofile`` in a step late in training: from one call of the plan's
``training_step`` to the next one of the same epoch, so that reading the cells, the step, the
optimiser and the loggers are all in it. Comprehensions and compiled loops do not count.

    python benchmarks/files_per_step.py
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback

import scvi_sams
from _common import print_conditions

FOLDER = str(Path(scvi_sams.__file__).parent)
STEP = 4


class CountCalls(Callback):
    """Profile one mini-batch of the second epoch."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, str]] = Counter()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx in (STEP, STEP + 1):
            sys.setprofile(self.count if batch_idx == STEP else None)

    def count(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(FOLDER) and code.co_name[0] != "<":
            self.calls[code.co_filename[len(FOLDER) + 1 :], code.co_qualname] += 1


def main() -> None:
    print_conditions()
    adata = scvi_sams.datasets.simulate_screen(n_genes=100)
    scvi_sams.SAMSVAE.setup_anndata(adata)
    counter = CountCalls()
    scvi_sams.SAMSVAE(adata).train(
        max_epochs=2,
        batch_size=128,
        callbacks=[counter],
        plan_kwargs={"dense_fraction": 0.0},
        enable_progress_bar=False,
    )
    for (file, function), n_calls in sorted(counter.calls.items()):
        print(f"{file:40} {function:55} {n_calls}")
    files = {file for file, _ in counter.calls}
    n_calls = sum(counter.calls.values())
    print(f"{n_calls} calls of {len(counter.calls)} functions in {len(files)} files")


if __name__ == "__main__":
    main()
