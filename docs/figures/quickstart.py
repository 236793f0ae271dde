"""Draw the figures of the five-minute start: ``python docs/figures/quickstart.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import scvi

import scvi_sams

FOLDER = Path(__file__).parent


def main() -> None:
    """Train on knock-outs in THP-1 cells with default settings, and draw masks and a program."""
    scvi.settings.seed = 0
    adata = scvi_sams.datasets.papalexi21()
    scvi_sams.SAMSVAE.setup_anndata(adata, size_factor_key="total_counts", batch_key="replicate")
    model = scvi_sams.SAMSVAE(adata, n_latent=20)
    model.train()
    called, effects = scvi_sams.tl.called_masks(model), model.get_perturbation_effects()
    used = called.columns[called.any()]
    ax = scvi_sams.pl.masks(called[used], effects=effects.mean[used])
    ax.figure.savefig(FOLDER / "quickstart_masks.png", dpi=130, bbox_inches="tight")
    strongest = effects.mean.loc["STAT1"].abs().idxmax()
    ax = scvi_sams.pl.program_genes(model.get_latent_programs(), strongest)
    ax.figure.savefig(FOLDER / "quickstart_program.png", dpi=130, bbox_inches="tight")
    plt.close("all")


if __name__ == "__main__":
    main()
