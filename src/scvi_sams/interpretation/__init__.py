"""Interpretation: tables of what latent dimensions and perturbations do.

Functions on the tables that models return, or on trained models; also as ``scvi_sams.tl``.
"""

from scvi_sams.interpretation._calls import called_masks, entry_q_values
from scvi_sams.interpretation._cell_counts import cell_counts
from scvi_sams.interpretation._context_interactions import context_interactions
from scvi_sams.interpretation._contexts import context_effects
from scvi_sams.interpretation._decoys import decoy_check
from scvi_sams.interpretation._enrichment import enrichment
from scvi_sams.interpretation._export import export
from scvi_sams.interpretation._features import feature_importance
from scvi_sams.interpretation._guides import guide_efficacy
from scvi_sams.interpretation._interactions import genetic_interactions, observed_interactions
from scvi_sams.interpretation._perturbations import (
    hierarchical_order,
    perturbation_hits,
    perturbation_similarity,
)
from scvi_sams.interpretation._programs import gene_ranking, latent_perturbations, top_genes
from scvi_sams.interpretation._targets import target_knockdown

__all__ = [
    "called_masks",
    "cell_counts",
    "context_effects",
    "context_interactions",
    "decoy_check",
    "enrichment",
    "entry_q_values",
    "export",
    "feature_importance",
    "gene_ranking",
    "genetic_interactions",
    "guide_efficacy",
    "hierarchical_order",
    "latent_perturbations",
    "observed_interactions",
    "perturbation_hits",
    "perturbation_similarity",
    "target_knockdown",
    "top_genes",
]
