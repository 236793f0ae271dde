"""How many cells does a perturbation need? Masks of 5 to 1,000 cells per perturbation, one screen.

Twenty perturbations of each size beside 1,000 control cells, 1,000 genes and 30 true latents;
default settings. Masks are called at 5 % FDR over the whole screen, as a user would. Nine CPU
minutes a seed on one thread of a busy machine, of which training took eight.

    python benchmarks/cells_per_perturbation.py [--seeds 0 1 2]
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData

import scvi_sams
from _common import print_conditions
from scvi_sams import datasets, evaluation


class Size(NamedTuple):
    """Size of the screen and length of training."""

    cell_counts: tuple[int, ...]
    perturbations_per_count: int
    n_genes: int
    epochs: int | None


FULL = Size((5, 20, 100, 1000), 20, 1000, None)
QUICK = Size((5, 50), 5, 100, 2)


def make_screen(seed: int, size: Size) -> tuple[AnnData, pd.Series]:
    """Draw as many cells for each perturbation, then keep few of some; counts by perturbation."""
    adata = datasets.simulate_screen(
        n_genes=size.n_genes,
        n_controls=1000,
        n_perturbations=size.perturbations_per_count * len(size.cell_counts),
        cells_per_perturbation=max(size.cell_counts),
        n_combinations=0,
        n_latent=30,
        seed=seed,
    )
    names = adata.uns["simulation"]["perturbations"]
    counts = pd.Series(np.resize(size.cell_counts, len(names)), index=names)
    label = adata.obs["perturbation"].astype(str)
    kept = label.groupby(label).cumcount() < label.map(counts).fillna(np.inf)
    return adata[kept.to_numpy()].copy(), counts


def run(seed: int, size: Size) -> pd.DataFrame:
    """Train on one screen; one row of scores per number of cells."""
    adata, counts = make_screen(seed, size)
    scvi.settings.seed = seed
    scvi_sams.SAMSVAE.setup_anndata(adata)
    model = scvi_sams.SAMSVAE(adata)
    started = time.process_time()
    model.train(size.epochs, enable_progress_bar=False)
    print(f"seed {seed}: {time.process_time() - started:.0f} CPU seconds of training", flush=True)
    masks = model.get_perturbation_masks(key_added=None).loc[counts.index]
    truth = _on_estimated_latents(masks, adata.uns["simulation"]["true_masks"])
    calls = evaluation.active_at_fdr(masks, 0.05)
    rows = {}
    for count in size.cell_counts:
        group = (counts == count).to_numpy()
        # As one column: dimensions are matched already, over the perturbations of all groups.
        entries = masks[group].to_numpy().reshape(-1, 1)
        true = truth[group].reshape(-1, 1)
        called = calls[group].to_numpy().reshape(-1, 1)
        by_half = evaluation.mask_recovery(entries, true)
        by_fdr = evaluation.mask_recovery(called, true)
        calibration = evaluation.mask_calibration(entries, true)
        rows[count] = {
            "true entries": true.sum(),
            "P": by_half["precision"],
            "R": by_half["recall"],
            "F1": by_half["f1"],
            "ECE": calibration.expected_calibration_error,
            "calls at 5 % FDR": called.sum(),
            "false among them": 1 - by_fdr["precision"] if called.any() else np.nan,
            "R at 5 % FDR": by_fdr["recall"],
        }
    return pd.DataFrame(rows).T.rename_axis("cells")


def _on_estimated_latents(masks: pd.DataFrame, true_masks: np.ndarray) -> np.ndarray:
    """True masks in the model's dimensions; those without a true partner are off."""
    estimated, true = evaluation.match_latents(masks.to_numpy(), true_masks)
    truth = np.zeros(masks.shape, dtype=bool)
    truth[:, estimated] = true_masks[:, true]
    return truth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--quick", action="store_true", help="a small screen and few epochs")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else FULL
    print_conditions()
    results = []
    for seed in arguments.seeds:
        results.append(run(seed, size))
        print(results[-1].round(3).to_string(), flush=True)
    if len(results) > 1:
        median = pd.concat(results).groupby("cells").median()
        print("median of the seeds", median.round(3).to_string(), sep="\n")


if __name__ == "__main__":
    main()
