"""From counts to what each perturbation does: simulated cells with known truth, or real ones.

    python demo/run.py                      a simulated screen, some pairs held out
    python demo/run.py --data papalexi21    CRISPR knock-outs in THP-1 cells

Trains SAMS-VAE, prints how well it did on what it never saw, and writes the AnnData with all
results and three figures to ``demo_output/``.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scvi
from anndata import AnnData

import scvi_sams
from scvi_sams import evaluation

# Notes for developers of the libraries underneath; a newcomer can do nothing about them.
warnings.filterwarnings("ignore", module=r"(anndata|lightning|numba|scanpy|sklearn|umap)(\.|$)")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def simulated_screen(quick: bool) -> tuple[AnnData, dict, list[str]]:
    """A screen of a few thousand cells: its registration, and the pairs to hold out."""
    adata = scvi_sams.datasets.simulate_screen(
        n_genes=300 if quick else 800,
        n_controls=400,
        n_perturbations=16 if quick else 32,
        cells_per_perturbation=80,
        n_combinations=8 if quick else 20,
        cells_per_combination=60,
        n_latent=10,
    )
    held_out = evaluation.hold_out_combinations(adata.obs["perturbation"], 3 if quick else 6)
    return adata, {}, held_out


def real_screen(quick: bool) -> tuple[AnnData, dict, list[str]]:
    """Knock-outs of Papalexi et al. 2021: its registration; nothing but cells is held out."""
    adata = scvi_sams.datasets.papalexi21()
    if quick:
        adata = adata[:: 8 if quick else 1].copy()
    return adata, {"size_factor_key": "total_counts", "batch_key": "replicate"}, []


def train(adata: AnnData, registration: dict, split: dict, quick: bool) -> scvi_sams.SAMSVAE:
    """Register, train on the training cells with a progress bar, and return the model."""
    scvi_sams.SAMSVAE.setup_anndata(adata, **registration)
    model = scvi_sams.SAMSVAE(adata, n_latent=20)
    unseen = np.concatenate([split["test"], split["held_out"]])
    model.train(
        max_epochs=60 if quick else None,
        datasplitter_kwargs={"external_indexing": [split["train"], split["validation"], unseen]},
    )
    return model


def report(
    model: scvi_sams.SAMSVAE, adata: AnnData, split: dict, held_out: list[str], quick: bool
) -> tuple[pd.DataFrame, pd.DataFrame, AnnData, AnnData]:
    """Score the model on cells and pairs it never saw; also return called masks and ATE tables."""
    size_factor_key = "total_counts" if "total_counts" in adata.obs else None
    known = np.concatenate([split["train"], split["validation"]])
    unseen = split["held_out"] if held_out else split["test"]

    def effects(cells: np.ndarray, labels: list[str] | None = None) -> AnnData:
        # The controls of both sides stay apart from each other unless pairs are held out.
        if held_out:
            controls = np.flatnonzero(adata.obs["perturbation"] == "control")
            cells = np.union1d(cells, controls)
        return evaluation.observed_ate(
            adata, perturbations=labels, indices=cells, size_factor_key=size_factor_key
        )

    observed = effects(unseen, held_out or None)
    labels = list(observed.obs_names)
    predicted = model.predict_ate(labels, n_samples=500 if quick else 2500)
    trained = effects(known)
    if held_out:
        baseline, name = evaluation.additive_ate(trained, held_out), "additive baseline"
    else:
        baseline, name = evaluation.mean_ate(trained, labels), "mean of perturbations"

    what = "held-out pairs" if held_out else "held-out cells"
    rows: list[tuple[str, str, float]] = []
    for method, table in (("SAMS-VAE", predicted), (name, baseline)):
        score = evaluation.compare_ate(table, observed).loc["all"]
        rows += [
            (f"effects, Pearson r, {what}", method, score["pearson"]),
            ("the same, top 20 genes", method, score["pearson_top"]),
        ]
    likelihood = f"log-likelihood of a cell, {what} (nats)"
    rows.append((likelihood, "SAMS-VAE (IWELBO)", model.get_iwelbo(indices=unseen)))
    if "simulation" in adata.uns:
        best = scvi_sams.datasets.simulated_log_likelihood(adata[unseen]).mean()
        rows.append((likelihood, "truth, log p(x | z)", best))
    called = scvi_sams.tl.called_masks(model)
    rows += [
        ("mask entries called at an FDR of 5%", "SAMS-VAE", called.to_numpy().sum()),
        ("expected proportion of false entries", "SAMS-VAE", called.attrs["expected_false"]),
    ]
    if "simulation" in adata.uns:
        truth = adata.uns["simulation"]
        recovery = evaluation.mask_recovery(
            called.astype(float), pd.DataFrame(truth["true_masks"], index=truth["perturbations"])
        )
        rows += [
            (f"called entries, {title}", "SAMS-VAE", recovery[measure])
            for measure, title in (("precision", "precision"), ("recall", "recall"), ("f1", "F1"))
        ]
    table = pd.DataFrame(rows, columns=["measure", "method", "value"])
    return table.round(3), called, predicted, observed


def draw(
    model: scvi_sams.SAMSVAE,
    adata: AnnData,
    called: pd.DataFrame,
    predicted: AnnData,
    observed: AnnData,
    folder: Path,
) -> None:
    """Draw masks with effects, predicted against observed effects, and latent states."""
    effects = model.get_perturbation_effects()
    ax = scvi_sams.pl.masks(called, effects=effects.mean)
    ax.figure.savefig(folder / "masks.png", dpi=150, bbox_inches="tight")
    ax = scvi_sams.pl.ate_scatter(predicted, observed)
    ax.figure.savefig(folder / "ate.png", dpi=150, bbox_inches="tight")
    model.get_latent_representation()
    model.get_latent_representation(representation="perturbed")
    strongest = effects.mean.pow(2).sum(axis=1).nlargest(8).index
    axes = scvi_sams.pl.latent(adata, highlight=["control", *strongest])
    axes[0].figure.savefig(folder / "latent.png", dpi=150, bbox_inches="tight")
    plt.close("all")


def main() -> None:
    """Run the whole story."""
    parser = argparse.ArgumentParser(description="Train SAMS-VAE and read what it learned.")
    parser.add_argument("--data", choices=("simulated", "papalexi21"), default="simulated")
    parser.add_argument("--quick", action="store_true", help="small and short, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.perf_counter()
    scvi.settings.seed = arguments.seed

    load = simulated_screen if arguments.data == "simulated" else real_screen
    adata, registration, held_out = load(arguments.quick)
    split = evaluation.split_cells(adata.obs["perturbation"], held_out, seed=arguments.seed)
    if held_out:
        print(f"Held out, never trained on: {', '.join(held_out)}.")
    model = train(adata, registration, split, arguments.quick)
    table, called, predicted, observed = report(model, adata, split, held_out, arguments.quick)
    print(f"\n{table.to_string(index=False, formatters={'value': '{:.6g}'.format})}\n")

    arguments.output.mkdir(parents=True, exist_ok=True)
    draw(model, adata, called, predicted, observed, arguments.output)
    adata.write_h5ad(arguments.output / f"{arguments.data}.h5ad")
    model.save(str(arguments.output / "model"), overwrite=True)
    table.to_csv(arguments.output / "scores.csv", index=False)
    print(
        f"Wrote {arguments.data}.h5ad, model/, scores.csv, masks.png, ate.png and latent.png to "
        f"{arguments.output}/ ({time.perf_counter() - started:.0f} s in all)."
    )


if __name__ == "__main__":
    main()
