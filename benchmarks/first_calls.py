"""Do the first training and the first predicted effects of a process take longer than later ones?

Three new processes each train the same new model three times (two epochs, same seed) and then
predict the effects of all perturbations three times; three more load a saved model and predict.
Loops compiled by numba are loaded from their cache: the process that saves the model compiles them
if that was never done. Printed are CPU seconds, the extra time of the first call over the median of
the others, and the number of modules that the first call imports; medians over processes.

    python benchmarks/first_calls.py [--processes 3]
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import pandas as pd
import scvi
import torch
from anndata import AnnData

import scvi_sams
from _common import print_conditions, with_spread

N_CALLS = 3


def screen() -> AnnData:
    """30 perturbations of 60 cells, 800 genes."""
    adata = scvi_sams.datasets.simulate_screen(
        n_genes=800, n_perturbations=30, cells_per_perturbation=60, n_combinations=0
    )
    scvi_sams.SAMSVAE.setup_anndata(adata)
    return adata


def trained(adata: AnnData) -> scvi_sams.SAMSVAE:
    """The same training at every call."""
    scvi.settings.seed = 0
    model = scvi_sams.SAMSVAE(adata)
    model.train(max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    return model


def save(folder: str) -> None:
    """Train a model and save it."""
    trained(screen()).save(folder, save_anndata=True, overwrite=True)


def compared(call: Callable[[], Any]) -> dict[str, float]:
    """CPU seconds of calls, of which the first is compared with the others."""
    seconds: list[float] = []
    n_modules = [len(sys.modules)]
    for _ in range(N_CALLS):
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
        n_modules.append(len(sys.modules))
    others = float(np.median(seconds[1:]))
    return {
        "first": seconds[0],
        "others": others,
        "extra": seconds[0] - others,
        "modules": n_modules[1] - n_modules[0],
    }


def in_this_process(folder: str, *, is_loaded: bool) -> dict[str, dict[str, float]]:
    """Compare calls in a process that has only imported the package."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    found = {}
    if is_loaded:
        model = scvi_sams.SAMSVAE.load(folder)
    else:
        adata = screen()
        found["training"] = compared(partial(trained, adata))
        model = trained(adata)
    name = f"predict_ate after {'loading' if is_loaded else 'training'}"
    found[name] = compared(partial(model.predict_ate, key_added=None))
    return found


def in_a_new_process(function: Callable[[], Any]) -> Any:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function).result()


def main() -> None:
    """Print a row for each kind of call."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=3, help="of each kind")
    arguments = parser.parse_args()
    print_conditions()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        in_a_new_process(partial(save, folder))
        for _ in range(arguments.processes):
            for is_loaded in (False, True):
                measure = partial(in_this_process, folder, is_loaded=is_loaded)
                found = in_a_new_process(measure)
                rows += [{"call": name, **values} for name, values in found.items()]
    table = pd.DataFrame(rows).groupby("call", sort=False).agg(with_spread)
    print(table.rename(columns={"extra": "extra of the first"}).to_string())


if __name__ == "__main__":
    main()
