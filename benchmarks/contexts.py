"""Effects that depend on the context: is a cell type predicted whose treated cells were held out?

``kang``: interferon beta on five types of blood cells of two donors (Kang et al. 2018). The treated
cells of each type in turn are held out, and their mean is predicted. Scale: mean over cells of
``log(1 + 1e4 * x / size)`` of each gene, natural logarithm, size the sum over the 1,267 genes
(``scanpy.pp.normalize_total(target_sum=1e4)``, ``log1p``). Printed is the root mean squared error
over genes.

Models have the donor as batch, and predict by counts drawn for the control cells of the type, had
they been treated. ``change``: the mean of the observed control cells of the type plus the
difference of predicted treated and predicted control cells, so that errors of the model in what
control cells are like do not count.

    python benchmarks/contexts.py kang [--seeds 0 1 2] [--models contexts covariate plain]
"""

from __future__ import annotations

import argparse
import logging
import time
from typing import Any

import numpy as np
import pandas as pd
import scanpy as sc
import scvi
from anndata import AnnData

from _common import print_conditions
from scvi_sams import SAMSVAE, datasets
from scvi_sams.evaluation import OtherLevelsMean, VectorArithmetic

TREATMENT = "interferon beta"
MODELS: dict[str, dict[str, Any]] = {
    "contexts": {"context_key": "cell_type"},
    "covariate": {"categorical_covariate_keys": ["cell_type"]},
    "plain": {},
}
N_DRAWS = 20
"""Times that each control cell is predicted, each time with other masks, effects and counts."""


def normalised(counts: AnnData) -> AnnData:
    """``log(1 + 1e4 * x / size)`` of counts."""
    cells = counts.copy()
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    return cells


def mean(cells: AnnData) -> np.ndarray:
    """Mean over cells, ``(n_genes,)``."""
    return np.asarray(cells.X.mean(axis=0)).ravel()


def by_baselines(training: AnnData, cell_type: str) -> dict[str, np.ndarray]:
    """Predict the treated mean without a model; the first says that nothing changes."""
    is_own = (training.obs["cell_type"] == cell_type).to_numpy()
    predicted = {"no change": mean(training[is_own])}  # its treated cells are held out
    for name, method in (
        ("vector arithmetic", VectorArithmetic), ("mean of other types", OtherLevelsMean),
    ):  # fmt: skip
        fitted = method(covariate_key="cell_type").fit(training)
        predicted[name] = np.asarray(fitted.predict([TREATMENT], [cell_type]).X)[0]
    return predicted


def by_model(
    training: AnnData, cell_type: str, seed: int, setup: dict[str, Any], epochs: int | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Predict means of treated and of control cells; CPU seconds of training."""
    cells = training.copy()
    SAMSVAE.setup_anndata(cells, batch_key="donor", **setup)
    scvi.settings.seed = seed
    model = SAMSVAE(cells, n_latent=20)
    start = time.process_time()
    model.train(epochs, accelerator="cpu", devices=1, enable_progress_bar=False)
    seconds = time.process_time() - start
    controls = np.flatnonzero(cells.obs["cell_type"] == cell_type)
    sums = np.zeros((2, cells.n_vars))
    for _ in range(N_DRAWS):
        drawn = normalised(model.predict([TREATMENT, "control"], indices=controls, output="counts"))
        sums += [mean(part) for part in (drawn[: len(controls)], drawn[len(controls) :])]
    treated, control = sums / N_DRAWS
    return treated, control, seconds


def kang(seeds: list[int], models: list[str], epochs: int | None) -> pd.DataFrame:
    """Root mean squared errors, (method, seed) x cell types; baselines have no seed."""
    counts = datasets.kang18_subset()
    cells = normalised(counts)
    is_treated = (cells.obs["perturbation"] == TREATMENT).to_numpy()
    errors: dict[tuple[str, str], dict[str, float]] = {}

    def score(method: str, seed: str, cell_type: str, predicted: np.ndarray) -> None:
        error = float(np.sqrt(np.square(predicted - observed).mean()))
        errors.setdefault((method, seed), {})[cell_type] = error

    for cell_type in cells.obs["cell_type"].cat.categories:
        held_out = is_treated & (cells.obs["cell_type"] == cell_type).to_numpy()
        observed = mean(cells[held_out])
        noise = cells[held_out].X.toarray().std(axis=0, ddof=1) / np.sqrt(held_out.sum())
        score("standard error of the observed mean", "", cell_type, observed + noise)
        for name, profile in by_baselines(cells[~held_out].copy(), cell_type).items():
            score(name, "", cell_type, profile)
        own_controls = mean(cells[~held_out & (cells.obs["cell_type"] == cell_type).to_numpy()])
        for seed in seeds:
            for name in models:
                treated, control, seconds = by_model(
                    counts[~held_out], cell_type, seed, MODELS[name], epochs
                )
                score(f"SAMSVAE, {name}", str(seed), cell_type, treated)
                change = own_controls + treated - control
                score(f"SAMSVAE, {name}, change", str(seed), cell_type, change)
                error = errors[f"SAMSVAE, {name}, change", str(seed)][cell_type]
                print(f"{cell_type}, {name}, {seed}: {error:.3f}, {seconds:.0f} CPU s", flush=True)
    table = pd.DataFrame(errors).T.rename_axis(["method", "seed"])
    return table.assign(median=table.median(axis=1), mean=table.mean(axis=1))


def main() -> None:
    """Print errors of every seed, and their means over seeds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["kang"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--epochs", type=int, help="of every training; the default number if unset")
    arguments = parser.parse_args()
    logging.getLogger("scvi.sams").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print_conditions()
    table = kang(arguments.seeds, arguments.models, arguments.epochs)
    print(table.round(3).to_string())
    print(table.groupby("method", sort=False).mean().round(3).to_string())


if __name__ == "__main__":
    main()
