"""Draw the picture of the front page: ``python docs/figures/overview.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import scanpy as sc
import scvi
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import scvi_sams
from scvi_sams import evaluation, pl, tl

FOLDER = Path(__file__).parent
RECEPTOR_GROUP = "IFN-gamma receptor group"
GROUPS = {
    "control": "control",
    "IFNGR1": RECEPTOR_GROUP,
    "IFNGR2": RECEPTOR_GROUP,
    "JAK2": RECEPTOR_GROUP,
    "STAT1": RECEPTOR_GROUP,
    "SMAD4": "SMAD4",
    "IRF1": "IRF1",
}
COLOURS = {"control": "0.45", RECEPTOR_GROUP: "#009E73", "SMAD4": "#D55E00", "IRF1": "#0072B2"}


def trained() -> scvi_sams.SAMSVAE:
    """A model of knock-outs in THP-1 cells, with default settings."""
    scvi.settings.seed = 0
    adata = scvi_sams.datasets.papalexi21()
    scvi_sams.SAMSVAE.setup_anndata(adata, size_factor_key="total_counts", batch_key="replicate")
    model = scvi_sams.SAMSVAE(adata, n_latent=20)
    model.train(enable_progress_bar=False)
    return model


def draw_cells(model: scvi_sams.SAMSVAE, ax: Axes) -> None:
    """UMAP of every third cell, with effects of perturbations; other knock-outs are light grey."""
    model.get_latent_representation(representation="perturbed")
    adata = model.adata[::3].copy()
    sc.pp.neighbors(adata, use_rep="X_sams_perturbed")
    sc.tl.umap(adata)
    groups = adata.obs["perturbation"].astype(str).map(GROUPS)
    at = adata.obsm["X_umap"]
    ax.scatter(*at[groups.isna()].T, s=2, color="0.85", linewidths=0, rasterized=True)
    for name, colour in COLOURS.items():
        cells = at[groups == name].T
        ax.scatter(*cells, s=3, color=colour, label=name, linewidths=0, rasterized=True)
    ax.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2", title="cells")
    ax.legend(markerscale=4, frameon=False, handletextpad=0.2)


def draw(model: scvi_sams.SAMSVAE) -> Figure:
    """Cells, masks, genes of a latent program, effects."""
    scvi.settings.seed = 0
    figure, ((cells, masks), (program, scatter)) = plt.subplots(
        2, 2, figsize=(7.6, 7.4), layout="constrained", height_ratios=(1.15, 1)
    )
    draw_cells(model, cells)
    called, effects = tl.called_masks(model), model.get_perturbation_effects()
    used = called.columns[called.any()]
    pl.masks(called[used], effects=effects.mean[used], ax=masks)
    masks.set_title("effects on latent dimensions")
    strongest = effects.mean.loc["STAT1"].abs().idxmax()
    pl.program_genes(model.get_latent_programs(), strongest, ax=program)
    program.set_title(f"genes of {strongest}")
    observed = evaluation.observed_ate(model.adata, size_factor_key="total_counts")
    predicted = model.predict_ate(list(observed.obs_names))
    pl.ate_scatter(predicted, observed, label_top=4, ax=scatter)
    scatter.set_title("effects on genes")
    return figure


if __name__ == "__main__":
    plt.style.use(FOLDER / "print.mplstyle")
    draw(trained()).savefig(FOLDER / "overview.png")
