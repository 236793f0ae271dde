"""Cells that escaped: what responses recover and what they cost; guides that differ.

Simulated screens (50 perturbations x 80 cells, 400 genes, 30 pairs of which ten are held out), and
the screen of Papalexi et al. 2021 with eight fake targets made of control cells. Each is fitted
with and without responses, with default settings.

    python benchmarks/responses.py [--seeds 0 1 2] [--screens "none" "half" ...] [--papalexi21]
"""

from __future__ import annotations

import argparse
import logging
import time
from typing import Any

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData
from scipy.optimize import minimize_scalar
from scipy.special import logit
from scipy.stats import chi2
from sklearn.metrics import roc_auc_score

from _common import print_conditions
from scvi_sams import SAMSVAE, datasets
from scvi_sams.evaluation import mask_recovery

ESCAPE: dict[str, float | tuple[float, float]] = {
    "none": 0.0, "30 %": 0.3, "half": 0.5, "by target, 0 - 70 %": (0.0, 0.7),
}  # fmt: skip
CERTAIN = 1e-7
N_HELD_OUT, N_FAKES, CELLS_PER_FAKE = 10, 8, 150


def trained(
    cells: AnnData, seed: int, epochs: int | None, *, responses: bool, **setup: str
) -> tuple[SAMSVAE, float]:
    """Train a model with default settings, and say how many CPU seconds that took."""
    SAMSVAE.setup_anndata(cells, **setup)
    scvi.settings.seed = seed
    model = SAMSVAE(cells, n_latent=20, responses=responses)
    start = time.process_time()
    model.train(epochs, accelerator="cpu", devices=1, enable_progress_bar=False)
    return model, time.process_time() - start


def simulated(escape: str, seed: int, epochs: int | None) -> list[dict[str, Any]]:
    """Compare both kinds of model on a screen with known escape."""
    adata = datasets.simulate_screen(
        n_genes=400, n_controls=400, n_perturbations=50, cells_per_perturbation=80,
        n_combinations=30, cells_per_combination=60, n_latent=15,
        escape_rate=ESCAPE[escape], seed=seed,
    )  # fmt: skip
    labels = adata.obs["perturbation"].astype(str)
    held_out = sorted({label for label in labels if "+" in label})[:N_HELD_OUT]
    cells = adata[~labels.isin(held_out)].copy()
    singles = [str(name) for name in adata.uns["simulation"]["perturbations"]]
    n, names = len(singles), [*singles, *held_out]
    truth = np.asarray(datasets.simulated_ate(adata, names, n_samples=20_000).X)
    rows = []
    for responses in (False, True):
        model, seconds = trained(cells.copy(), seed, epochs, responses=responses)
        found = np.asarray(model.predict_ate(names, library_size=1e4, key_added=None).X)
        masks = model.get_perturbation_masks(key_added=None)
        row = {
            "escape": escape, "seed": seed, "responses": responses,
            "slope": slope(truth[:n], found[:n]), "r": correlation(truth[:n], found[:n]),
            "pairs r": correlation(truth[n:], found[n:]),
            "pairs slope": slope(truth[n:], found[n:]),
            "F1": mask_recovery(masks, adata.uns["simulation"]["true_masks"])["f1"],
            "CPU s": seconds,
        }  # fmt: skip
        rows.append(row | (of_cells(model) if responses else {}))
    return rows


def slope(truth: np.ndarray, found: np.ndarray) -> float:
    """Of a regression of what was found on the truth, through the origin."""
    return float((truth * found).sum() / np.square(truth).sum())


def correlation(truth: np.ndarray, found: np.ndarray) -> float:
    """Over perturbations x genes."""
    return float(np.corrcoef(truth.ravel(), found.ravel())[0, 1])


def of_cells(model: SAMSVAE) -> dict[str, float]:
    """How well responses of cells are told, where the model says that it can tell."""
    cells = model.adata
    assert cells is not None
    probability = model.get_response_probability(key_added=None)
    is_known = ~np.isnan(probability)
    is_perturbed = (cells.obs["perturbation"].astype(str) != "control").to_numpy()
    responded = np.ones(cells.n_obs, dtype=bool)
    if "true_escaped" in cells.obs:
        responded = ~cells.obs["true_escaped"].to_numpy()
    found, true = probability[is_known], responded[is_known]
    both = true.any() and not true.all()
    return {
        "known": is_known.sum() / is_perturbed.sum(),
        "AUC": float(roc_auc_score(true, found)) if both else np.nan,
        "calibration error": calibration_error(found, true),
        "mean p": float(found.mean()),
        "mean true": float(true.mean()),
    }


def calibration_error(probability: np.ndarray, true: np.ndarray) -> float:
    """Expected calibration error in ten bins of equal width."""
    bins = np.minimum((probability * 10).astype(int), 9)
    return float(
        sum(
            abs(probability[bins == b].mean() - true[bins == b].mean()) * (bins == b).mean()
            for b in np.unique(bins)
        )
    )


def papalexi21(seed: int, epochs: int | None) -> tuple[list[dict[str, Any]], pd.DataFrame]:
    """Compare models with and without responses and guides; a table of guides of the last."""
    adata = datasets.papalexi21()
    label, guide = (adata.obs[key].astype(str).to_numpy() for key in ("perturbation", "guide"))
    rng = np.random.default_rng(seed)
    controls = rng.permutation(np.flatnonzero(label == "control"))[: N_FAKES * CELLS_PER_FAKE]
    for number, cell in enumerate(controls):
        label[cell] = f"FAKE{number // CELLS_PER_FAKE}"
        guide[cell] = f"{label[cell]}g{number % 3 + 1}"
    adata.obs["perturbation"], adata.obs["guide"] = label, guide
    rows = []
    for name, responses, setup in (
        ("without", False, {}), ("responses", True, {}),
        ("responses, guides", True, {"guide_key": "guide"}),
    ):  # fmt: skip
        model, seconds = trained(adata.copy(), seed, epochs, responses=responses, **setup)
        held_out = model.validation_indices
        perturbed = held_out[label[held_out] != "control"]
        masks = model.get_perturbation_masks(key_added=None) > 0.5
        on = masks.index[masks.any(axis=1)]
        row = {
            "model": name, "seed": seed, "CPU s": seconds,
            "IWELBO": model.get_iwelbo(indices=held_out, key_added=None),
            "of perturbed": model.get_iwelbo(indices=perturbed, key_added=None),
            "targets": len([gene for gene in on if not gene.startswith("FAKE")]),
            "fakes": len([gene for gene in on if gene.startswith("FAKE")]),
        }  # fmt: skip
        rows.append(row)
        if name == "responses":
            cells = pd.DataFrame({"gene": label, "guide": guide})
            found = model.get_response_probability(key_added=None)
            cells["p"] = np.clip(found, CERTAIN, 1 - CERTAIN)
            rate = pd.Series(model.module.responses.rates.numpy(), index=model.perturbations)
            cells["evidence"] = logit(cells["p"]) - logit(cells["gene"].map(rate))
    cells = cells[cells["p"].notna()]
    table = cells.groupby("guide").agg(gene=("gene", "first"), n=("p", "size"), blind=("p", "mean"))
    registered = model.adata_manager.get_state_registry("guides")["names"]
    of_guides = model.module.responses.log_odds()[len(model.perturbations) :].sigmoid()
    table["rate"] = pd.Series(of_guides.detach().numpy(), index=list(map(str, registered)))
    table["p of equal rates"] = table["gene"].map(guides_that_differ(cells))
    return rows, table


def guides_that_differ(cells: pd.DataFrame) -> dict[str, float]:
    """p-value of each gene's guides having one rate of response, by a likelihood ratio.

    By cells of a model that knows no guides; ``evidence`` is how much likelier each is if it
    responds, as a logarithm.
    """
    return {
        gene: chi2.sf(
            2 * (sum(best_fit(of_guide) for _, of_guide in guides) - best_fit(evidence)),
            guides.ngroups - 1,
        )
        for gene, evidence in cells.groupby("gene")["evidence"]
        if (guides := evidence.groupby(cells["guide"])).ngroups > 1
    }


def best_fit(evidence: pd.Series) -> float:
    """Log-likelihood of cells at the rate of responses that suits them best."""
    values = evidence.to_numpy()

    def cost(log_odds: float) -> float:
        with_response = values - np.logaddexp(0, -log_odds)
        return -float(np.logaddexp(with_response, -np.logaddexp(0, log_odds)).sum())

    return -float(minimize_scalar(cost, bounds=(-12, 12), method="bounded").fun)


def main() -> None:
    """Print tables, row by row as they come."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--screens", nargs="*", choices=list(ESCAPE), default=list(ESCAPE))
    parser.add_argument("--papalexi21", action="store_true")
    parser.add_argument("--epochs", type=int, help="of every training; the default number if unset")
    arguments = parser.parse_args()
    logging.getLogger("scvi.sams").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print_conditions()
    rows = []
    for escape in arguments.screens:
        for seed in arguments.seeds:
            rows += simulated(escape, seed, arguments.epochs)
            print(pd.DataFrame(rows[-2:]).round(3).to_string(), flush=True)
    if rows:
        table = pd.DataFrame(rows).drop(columns="seed")
        means = table.groupby(["escape", "responses"], sort=False).mean()
        print(means.round(3).to_string())
    for seed in arguments.seeds if arguments.papalexi21 else []:
        compared, guides = papalexi21(seed, arguments.epochs)
        print(pd.DataFrame(compared).round(3).to_string(), flush=True)
        print(guides.round({"blind": 2, "rate": 2}).to_string(), flush=True)


if __name__ == "__main__":
    main()
