"""The simulator's decoder: latent places to shares of the genes."""

from collections.abc import Iterator, Mapping

import numpy as np
from scipy.special import softmax

_LEAKY_SLOPE = 0.2
_ENTRIES_PER_CHUNK = 2_000_000  # cells x genes that are dense at a time: 16 MB per array


def chunks_of_cells(n_cells: int, n_genes: int) -> Iterator[slice]:
    """Slices of cells that are few enough to be dense."""
    step = max(1, _ENTRIES_PER_CHUNK // n_genes)
    return (slice(start, min(start + step, n_cells)) for start in range(0, n_cells, step))


def proportions(decoder: Mapping[str, np.ndarray], latent: np.ndarray) -> np.ndarray:
    """Expected share of each gene in the counts, places x genes."""
    hidden = latent.astype(np.float64) @ decoder["hidden_weight"].T
    hidden = np.where(hidden > 0, hidden, _LEAKY_SLOPE * hidden)
    return softmax(hidden @ decoder["gene_weight"].T + decoder["gene_bias"], axis=1)
