"""Draw the picture of the front page: ``python docs/figures/overview.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import scanpy as sc
import scvi
from matplotlib.figure import Figure

import scvi_sams
from scvi_sams import evaluation, pl, tl

FOLDER = Path(__file__).parent
RECEPTOR_GROUP = ["IFNGR1", "IFNGR2", "JAK2", "STAT1"]


def trained() -> scvi_sams.SAMSVAE:
    """A model of knock-outs in THP-1 cells, with default settings."""
    scvi.settings.seed = 0
    adata = scvi_sams.datasets.papalexi21()
    scvi_sams.SAMSVAE.setup_anndata(adata, size_factor_key="total_counts", batch_key="replicate")
    model = scvi_sams.SAMSVAE(adata, n_latent=20)
    model.train(enable_progress_bar=False)
    return model


def draw(model: scvi_sams.SAMSVAE) -> Figure:
    """Cells, masks, genes of a mechanism, effects."""
    adata = model.adata
    figure, grid = plt.subplots(2, 2, figsize=(9.5, 8), layout="constrained")
    axes = grid.ravel()
    model.get_latent_representation(representation="perturbed")
    sc.pp.neighbors(adata, use_rep="X_sams_perturbed")
    sc.tl.umap(adata)
    named = dict.fromkeys(RECEPTOR_GROUP, "IFN-gamma receptor group")
    named |= {"control": "control", "SMAD4": "SMAD4", "IRF1": "IRF1"}
    groups = adata.obs["perturbation"].astype(str).map(named)
    at = adata.obsm["X_umap"]
    axes[0].scatter(*at[groups.isna()].T, s=1, color="0.85", rasterized=True)
    for name, colour in zip(
        dict.fromkeys(named.values()), ("#009e73", "0.45", "#d55e00", "#0072b2"), strict=True
    ):
        axes[0].scatter(
            *at[groups == name].T, s=1.5, color=colour, label=name, rasterized=True, zorder=2
        )
    axes[0].set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2", title="cells")
    axes[0].legend(markerscale=5, fontsize=8, frameon=False, loc="upper right")

    called, effects = tl.called_masks(model), model.get_perturbation_effects()
    used = called.columns[called.any()]
    pl.masks(called[used], effects=effects.mean[used], ax=axes[1])
    axes[1].set_title("mechanisms that each perturbation moves")
    strongest = effects.mean.loc["STAT1"].abs().idxmax()
    pl.program_genes(model.get_latent_programs(), strongest, ax=axes[2])
    axes[2].set_title("genes of a mechanism")
    observed = evaluation.observed_ate(adata, size_factor_key="total_counts")
    pl.ate_scatter(model.predict_ate(list(observed.obs_names)), observed, ax=axes[3])
    axes[3].set_title("effects on genes")
    return figure


if __name__ == "__main__":
    draw(trained()).savefig(FOLDER / "overview.png", dpi=150)
