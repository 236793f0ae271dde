"""From masks to biology: tables that say what latent dimensions and perturbations do.

Plain functions on the tables that models return, or on trained models; also as ``scvi_sams.tl``.
"""

from scvi_sams.interpretation._hits import perturbation_hits
from scvi_sams.interpretation._programs import gene_ranking, latent_perturbations, top_genes
from scvi_sams.interpretation._similarity import perturbation_similarity

__all__ = [
    "gene_ranking",
    "latent_perturbations",
    "perturbation_hits",
    "perturbation_similarity",
    "top_genes",
]
