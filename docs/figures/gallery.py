"""Draw one figure of each kind: ``python docs/figures/gallery.py``.

On knock-outs in THP-1 cells (Papalexi et al. 2021), and on simulated screens where the plot needs
doses, cell types, features, many pairs, or the truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
SIZE = {"size_factor_key": "total_counts"}
BASELINES = ["training mean", "EB-shrunken mean", "ridge on principal components"]


def published(*, responses: bool = False) -> scvi_sams.SAMSVAE:
    """Train on the published knock-outs, with a response rate of each guide if requested."""
    adata = scvi_sams.datasets.papalexi21()
    guides = {"guide_key": "guide"} if responses else {}
    scvi_sams.SAMSVAE.setup_anndata(adata, batch_key="replicate", **SIZE, **guides)
    return trained(adata, n_latent=20, responses=responses)


def trained(adata: AnnData, **settings: object) -> scvi_sams.SAMSVAE:
    """Train on a registered screen, always with the same seed."""
    scvi.settings.seed = 0
    model = scvi_sams.SAMSVAE(adata, **settings)
    model.train(enable_progress_bar=False)
    return model


def of_effects(model: scvi_sams.SAMSVAE) -> dict[str, Axes]:
    """Masks, programs, effects, training."""
    called, effects = tl.called_masks(model), model.get_perturbation_effects()
    used = called.columns[called.any()]
    strongest = effects.mean.loc["STAT1"].abs().idxmax()
    program = pl.program_genes(model.get_latent_programs(), strongest)
    ate = model.predict_ate(method="lograte")
    observed = evaluation.observed_ate(model.adata, **SIZE)
    predicted = model.predict_ate(list(observed.obs_names))
    return {
        "masks": pl.masks(called[used], effects=effects.mean[used]),
        "similarity": pl.similarity(tl.perturbation_similarity(ate)),
        "program_genes": program,
        "effect_volcano": pl.effect_volcano(ate, "STAT1"),
        "direct_effects": pl.direct_effects(model.get_direct_effects()),
        "ate_scatter": pl.ate_scatter(predicted, observed, label_top=6),
        "training_curves": np.ravel(pl.training_curves(model.history))[0],
    }


def of_cells(model: scvi_sams.SAMSVAE) -> dict[str, Axes]:
    """Latent states of every fifth cell, with the strongest perturbations in colours."""
    model.get_latent_representation()
    model.get_latent_representation(representation="perturbed")
    shown = ["control", "STAT1", "IFNGR1", "SMAD4", "IRF1", "BRD4"]
    return {"latent": pl.latent(model.adata[::5], highlight=shown)[0]}


def of_guides(model: scvi_sams.SAMSVAE) -> dict[str, Axes]:
    """Guides of different strength."""
    return {"guide_efficacy": pl.guide_efficacy(model, n_perturbations=6)}


def of_benchmark(adata: AnnData) -> dict[str, Axes]:
    """The model and baselines beside each other; half of the cells test."""
    sams_vae = evaluation.ModelMethod(scvi_sams.SAMSVAE, model_kwargs={"n_latent": 20})
    labels = adata.obs["perturbation"]
    result = evaluation.benchmark(
        adata,
        methods={"SAMS-VAE": sams_vae} | {name: name for name in BASELINES},
        split=evaluation.random_cells(labels, fractions=(0.4, 0.1, 0.5)),
        seeds=(0,),
        modes=("perturbench",),
        batch_key="replicate",
        progress_bar=False,
        **SIZE,
    )
    summary = result.summary()
    return {
        "benchmark_metric": pl.benchmark_metric(summary, "rmse_average"),
        "benchmark_specificity": pl.benchmark_specificity(summary),
        "benchmark_perturbations": pl.benchmark_perturbations(result.scores, "SAMS-VAE"),
    }


def of_learning_curve(adata: AnnData) -> dict[str, Axes]:
    """Baselines with few cells and with many."""
    curve = evaluation.learning_curve(adata, BASELINES, progress_bar=False, **SIZE)
    return {"learning_curve": pl.learning_curve(curve)}


def of_pairs() -> dict[str, Axes]:
    """Interactions, on a simulated screen of all pairs of ten perturbations."""
    adata = scvi_sams.datasets.simulate_screen(
        n_genes=300, n_perturbations=10, n_combinations=45, cells_per_combination=60, n_latent=6
    )
    scvi_sams.SAMSVAE.setup_anndata(adata)
    table = tl.genetic_interactions(trained(adata, n_latent=10))
    ax = pl.interaction_matrix(table, "observed_relative", lower="predicted_relative")
    return {"interaction_matrix": ax}


def of_doses() -> dict[str, Axes]:
    """Dose-response curves, on a simulated screen with four doses."""
    adata = scvi_sams.datasets.simulate_screen(
        n_genes=300,
        n_perturbations=12,
        cells_per_perturbation=120,
        n_combinations=0,
        n_latent=6,
        dosages=[0.25, 0.5, 1.0, 2.0],
    )
    scvi_sams.SAMSVAE.setup_anndata(adata, dosage_key="dosage")
    model = trained(adata, n_latent=10)
    name = model.get_perturbation_effects().mean.abs().sum(axis=1).idxmax()
    doses = np.linspace(0, 3, 13)
    return {"dose_response": pl.dose_response(model.predict_dose_response([name], doses), name)}


def of_contexts() -> dict[str, Axes]:
    """Effects in three simulated cell types; half of the effects exist in one of them only."""
    adata = scvi_sams.datasets.simulate_screen(
        n_genes=300,
        n_perturbations=30,
        cells_per_perturbation=120,
        n_combinations=0,
        n_latent=8,
        n_cell_types=3,
        cell_type_specific_share=0.5,
    )
    scvi_sams.SAMSVAE.setup_anndata(adata, context_key="cell_type")
    return {"context_effects": pl.context_effects(trained(adata, n_latent=12))}


def of_features() -> dict[str, Axes]:
    """Features, a third of which are informative, and masks, on a simulated screen."""
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
    features = adata.uns["perturbation_features"]
    model = trained(adata, n_latent=12, perturbation_features=features)
    truth = adata.uns["simulation"]
    true_masks = pd.DataFrame(truth["true_masks"], index=truth["perturbations"])
    calibration = evaluation.mask_calibration(model.get_perturbation_masks(), true_masks)
    return {
        "feature_importance": pl.feature_importance(tl.feature_importance(model)),
        "mask_calibration": pl.mask_calibration(calibration),
    }


def draw(figures_of: Callable[..., Mapping[str, Axes]], *arguments: object) -> None:
    """Write figures under the names of their functions, whatever was drawn before them."""
    scvi.settings.seed = 0
    for name, ax in figures_of(*arguments).items():
        ax.figure.savefig(FOLDER / f"gallery_{name}.png")
    plt.close("all")


def main() -> None:
    """Draw all of them."""
    plt.style.use(FOLDER / "print.mplstyle")
    model = published()
    draw(of_effects, model)
    draw(of_cells, model)
    draw(of_guides, published(responses=True))
    adata = scvi_sams.datasets.papalexi21()
    draw(of_benchmark, adata)
    draw(of_learning_curve, adata)
    for figures_of in (of_pairs, of_doses, of_contexts, of_features):
        draw(figures_of)


if __name__ == "__main__":
    main()
