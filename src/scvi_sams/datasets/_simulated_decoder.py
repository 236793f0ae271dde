"""The true decoder of a simulated screen: from latent states to proportions of genes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from scipy.special import softmax

_LEAKY_SLOPE = 0.2


@dataclass(frozen=True, eq=False)
class TrueDecoder:
    """Log expression is ``gene_bias + W2 leaky_relu(W1 z) + offset``; proportions: its softmax."""

    hidden_weight: np.ndarray
    """W1, hidden x latent."""
    gene_weight: np.ndarray
    """W2, genes x hidden."""
    gene_bias: np.ndarray
    """Log expression of the genes at z = 0."""
    own_gene_effects: csr_matrix | None
    """Perturbations x genes: change of log expression at dose 1; ``None`` if there is none."""
    cell_type_bias: np.ndarray | None
    """Cell types x genes: added to log expression; ``None`` if there is one type."""

    @classmethod
    def of(cls, simulation: Mapping[str, Any], genes: pd.Index) -> Self:
        """Build it, for some of the genes, from the truth of a screen in ``uns``."""
        decoder = simulation["decoder"]
        rows = pd.Index(simulation["gene_names"]).get_indexer(genes)
        of_types = decoder.get("cell_type_bias")
        return cls(
            hidden_weight=decoder["hidden_weight"],
            gene_weight=decoder["gene_weight"][rows],
            gene_bias=decoder["gene_bias"][rows],
            own_gene_effects=_own_gene_effects(simulation, genes),
            cell_type_bias=None if of_types is None else of_types[:, rows],
        )

    def proportions(self, latent: np.ndarray, offset: np.ndarray | float = 0.0) -> np.ndarray:
        """Expected proportion of each gene in the counts, states x genes."""
        hidden = latent.astype(np.float64) @ self.hidden_weight.T
        hidden = np.where(hidden > 0, hidden, _LEAKY_SLOPE * hidden)
        return softmax(hidden @ self.gene_weight.T + self.gene_bias + offset, axis=1)

    def offset(self, dosage: csr_matrix | None, cell_type: np.ndarray | None) -> np.ndarray | float:
        """Log expression that does not depend on latent states, states x genes (0 if none).

        ``dosage``: effective doses, states x perturbations; ``cell_type``: code of each state.
        """
        offset: np.ndarray | float = 0.0
        if self.own_gene_effects is not None and dosage is not None:
            offset = (dosage @ self.own_gene_effects).toarray()
        if self.cell_type_bias is not None and cell_type is not None:
            offset = offset + self.cell_type_bias[cell_type]
        return offset


def _own_gene_effects(simulation: Mapping[str, Any], genes: pd.Index) -> csr_matrix | None:
    """Assign the effect of each perturbation to the gene of its name, if that gene is present."""
    if "true_own_gene_effects" not in simulation:
        return None
    columns = genes.get_indexer(pd.Index(simulation["perturbations"]))
    rows = np.flatnonzero(columns >= 0)
    values = simulation["true_own_gene_effects"][rows]
    return csr_matrix((values, (rows, columns[rows])), shape=(len(columns), len(genes)))
