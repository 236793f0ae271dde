"""Draw one figure of each kind on a simulated screen: ``python docs/figures/gallery.py``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import scvi
from anndata import AnnData
from matplotlib.axes import Axes

import scvi_sams
from scvi_sams import evaluation, pl, tl

FOLDER = Path(__file__).parent
SCREEN = {
    "n_genes": 400,
    "n_controls": 400,
    "n_perturbations": 20,
    "cells_per_perturbation": 100,
    "n_combinations": 20,
    "cells_per_combination": 60,
    "n_latent": 8,
}


def train(adata: AnnData, **registration: str) -> scvi_sams.SAMSVAE:
    """Train with default settings."""
    scvi_sams.SAMSVAE.setup_anndata(adata, **registration)
    model = scvi_sams.SAMSVAE(adata, n_latent=12)
    model.train(enable_progress_bar=False)
    return model


def of_model(model: scvi_sams.SAMSVAE) -> dict[str, Axes]:
    """Masks, programs, effects, training."""
    masks, effects = model.get_perturbation_masks(), model.get_perturbation_effects()
    truth = model.adata.uns["simulation"]
    true_masks = pd.DataFrame(truth["true_masks"], index=truth["perturbations"])
    observed = evaluation.observed_ate(model.adata)
    strongest = effects.mean.abs().sum(axis=1).idxmax()
    ate = model.predict_ate(method="lograte")
    return {
        "masks": pl.masks(tl.called_masks(model), effects=effects.mean),
        "mask_calibration": pl.mask_calibration(evaluation.mask_calibration(masks, true_masks)),
        "program_genes": pl.program_genes(
            model.get_latent_programs(), effects.mean.loc[strongest].abs().idxmax()
        ),
        "effect_volcano": pl.effect_volcano(ate, strongest),
        "ate_scatter": pl.ate_scatter(model.predict_ate(list(observed.obs_names)), observed),
        "similarity": pl.similarity(tl.perturbation_similarity(ate)),
        "interaction_matrix": pl.interaction_matrix(
            tl.genetic_interactions(model), "observed_relative", lower="predicted_relative"
        ),
        "training_curves": np.ravel(pl.training_curves(model.history))[0],
    }


def of_cells(model: scvi_sams.SAMSVAE) -> dict[str, Axes]:
    """Latent states, on UMAPs of some perturbations."""
    model.get_latent_representation()
    model.get_latent_representation(representation="perturbed")
    norms = model.get_perturbation_effects().mean.pow(2).sum(axis=1)
    axes = pl.latent(model.adata, highlight=["control", *norms.nlargest(5).index])
    return {"latent": axes[0]}


def of_doses() -> dict[str, Axes]:
    """Dose-response curves."""
    adata = scvi_sams.datasets.simulate_screen(**SCREEN, dosages=[0.25, 0.5, 1.0, 2.0])
    model = train(adata, dosage_key="dosage")
    name = model.get_perturbation_effects().mean.abs().sum(axis=1).idxmax()
    return {"dose_response": pl.dose_response(model.predict_dose_response([name]), name)}


def of_targets() -> dict[str, Axes]:
    """Direct effects, on a screen of knock-downs."""
    adata = scvi_sams.datasets.simulate_screen(**SCREEN, knockdown=(0.7, 0.95))
    return {"direct_effects": pl.direct_effects(train(adata).get_direct_effects(), n_genes=40)}


def of_guides() -> dict[str, Axes]:
    """Guides of different strength, on a screen in which cells escape."""
    adata = scvi_sams.datasets.simulate_screen(
        n_genes=400,
        n_perturbations=15,
        cells_per_perturbation=240,
        n_combinations=0,
        n_latent=8,
        guides_per_perturbation=3,
        guide_efficacy=(0.0, 1.0),
        escape_rate=0.2,
    )
    scvi_sams.SAMSVAE.setup_anndata(adata, guide_key="guide")
    model = scvi_sams.SAMSVAE(adata, n_latent=12, responses=True)
    model.train(enable_progress_bar=False)
    return {"guide_efficacy": pl.guide_efficacy(model)}


def of_contexts() -> dict[str, Axes]:
    """Effects in three cell types, half of which exist in one of them only."""
    adata = scvi_sams.datasets.simulate_screen(
        n_genes=300,
        n_perturbations=30,
        cells_per_perturbation=120,
        n_combinations=0,
        n_latent=8,
        n_cell_types=3,
        cell_type_specific_share=0.5,
    )
    return {"context_effects": pl.context_effects(train(adata, context_key="cell_type"))}


def of_features() -> dict[str, Axes]:
    """Weights of features, a third of which tell of mechanisms."""
    adata = scvi_sams.datasets.simulate_screen(
        n_genes=200,
        n_perturbations=80,
        cells_per_perturbation=40,
        n_combinations=0,
        n_latent=8,
        mask_probability=0.3,
        n_features=5,
        n_noise_features=10,
        feature_share=0.8,
    )
    scvi_sams.SAMSVAE.setup_anndata(adata)
    table = adata.uns["perturbation_features"]
    model = scvi_sams.SAMSVAE(adata, n_latent=12, perturbation_features=table)
    model.train(enable_progress_bar=False)
    return {"feature_importance": pl.feature_importance(tl.feature_importance(model))}


def of_benchmark(adata: AnnData) -> dict[str, Axes]:
    """Baselines beside each other."""
    labels = adata.obs["perturbation"]
    result = evaluation.benchmark(
        adata,
        methods=["additive", "matching mean", "ridge on principal components"],
        split=lambda seed: evaluation.combination_hold_out(labels, seed=seed),
        seeds=(0, 1),
        progress_bar=False,
    )
    summary = result.summary()
    return {
        "benchmark_metric": pl.benchmark_metric(summary, "rmse_average"),
        "benchmark_specificity": pl.benchmark_specificity(summary),
        "benchmark_perturbations": pl.benchmark_perturbations(result.scores, "additive"),
    }


def of_learning_curve(adata: AnnData) -> dict[str, Axes]:
    """Baselines with few cells and with many."""
    curve = evaluation.learning_curve(
        adata,
        ["training mean", "ridge on principal components", "additive"],
        cells=(3, 5, 10, 20, None),
        progress_bar=False,
    )
    return {"learning_curve": pl.learning_curve(curve)}


def save(figures: Mapping[str, Axes]) -> None:
    """Write figures under the names of their functions."""
    for name, ax in figures.items():
        ax.figure.savefig(FOLDER / f"gallery_{name}.png", dpi=80, bbox_inches="tight")
    plt.close("all")


def main() -> None:
    """Draw all of them."""
    scvi.settings.seed = 0
    adata = scvi_sams.datasets.simulate_screen(**SCREEN)
    model = train(adata)
    save(of_model(model))
    save(of_cells(model))
    save(of_doses())
    save(of_targets())
    save(of_guides())
    save(of_contexts())
    save(of_features())
    save(of_benchmark(adata))
    save(of_learning_curve(adata))


if __name__ == "__main__":
    main()
