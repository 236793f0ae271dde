"""Draw the figures of the five-minute start: ``python docs/figures/quickstart.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import scvi

import scvi_sams

FOLDER = Path(__file__).parent


def trained() -> scvi_sams.SAMSVAE:
    """A model of knock-outs in THP-1 cells, with default settings."""
    scvi.settings.seed = 0
    adata = scvi_sams.datasets.papalexi21()
    scvi_sams.SAMSVAE.setup_anndata(adata, size_factor_key="total_counts", batch_key="replicate")
    model = scvi_sams.SAMSVAE(adata, n_latent=20)
    model.train()
    return model


def draw(model: scvi_sams.SAMSVAE) -> None:
    """Masks, and the genes that change along the dimension of STAT1."""
    scvi.settings.seed = 0
    called, effects = scvi_sams.tl.called_masks(model), model.get_perturbation_effects()
    used = called.columns[called.any()]
    ax = scvi_sams.pl.masks(called[used], effects=effects.mean[used])
    ax.figure.savefig(FOLDER / "quickstart_masks.png")
    strongest = effects.mean.loc["STAT1"].abs().idxmax()
    ax = scvi_sams.pl.program_genes(model.get_latent_programs(), strongest)
    ax.figure.savefig(FOLDER / "quickstart_program.png")
    plt.close("all")


if __name__ == "__main__":
    plt.style.use(FOLDER / "print.mplstyle")
    draw(trained())
