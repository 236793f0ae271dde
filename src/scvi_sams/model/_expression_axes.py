"""Axes of expression in which registered cells vary, and strata for comparisons."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scvi.data import AnnDataManager

from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.train._statistics import chunks_of_cells

_MOST_GENES = 2000
"""The most variable genes; more take longer, and add no shared variation."""
_MOST_CELLS = 20_000
"""Cells from which axes are computed; all cells are tested."""
_ROWS_AT_ONCE = 4096
"""Cells that are dense at a time."""
_SEED = 9173


def principal_features(
    manager: AnnDataManager, strata: np.ndarray, n_components: int, *, counts: bool
) -> np.ndarray:
    """Project all cells on the axes in which they vary most within strata, ``(n_cells, k)``.

    Axes are those of log-normalised and standardised expression of the most variable genes. Cells
    used to compute them are read once, and all cells once more.
    """
    everything = np.arange(len(strata))
    chosen = everything
    if len(strata) > _MOST_CELLS:
        rng = np.random.default_rng(_SEED)
        chosen = np.sort(rng.choice(len(strata), _MOST_CELLS, replace=False))
    blocks = list(chunks_of_cells(manager, chosen))
    typical_size = (
        float(np.median(np.concatenate([size for _, size in blocks]))) if counts else None
    )
    logged = sparse.csr_array(
        sparse.vstack([log_normalised(x, s, typical_size) for x, s in blocks])
    )
    del blocks
    genes, sd, axes = principal_axes(logged, indicators(strata[chosen]), n_components)
    loadings = axes / sd[:, None]
    projected = [
        log_normalised(x, size, typical_size)[:, genes] @ loadings
        for x, size in chunks_of_cells(manager, everything)
    ]
    return centred(np.concatenate(projected), indicators(strata))


def log_normalised(
    x: sparse.csr_matrix, size: np.ndarray, typical_size: float | None
) -> sparse.csr_array:
    """``log(1 + typical_size * x / size)``; values that are not counts are unchanged."""
    if typical_size is None:
        return sparse.csr_array(x)
    return sparse.csr_array((sparse.diags_array(typical_size / size) @ x).log1p())


def principal_axes(
    logged: sparse.csr_array, of_stratum: sparse.csr_array, n_components: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Genes, their SDs within strata, and principal axes, ``(n_genes, k)``."""
    n = np.asarray(of_stratum.sum(axis=1))
    mean, variance = variance_within(logged, of_stratum)
    most_variable = np.argsort(-variance, kind="stable")[:_MOST_GENES]
    genes = np.sort(most_variable[variance[most_variable] > 1e-8])
    sd = np.sqrt(variance[genes])
    of_genes = sparse.csr_array(logged[:, genes])
    products = np.zeros((len(genes), len(genes)))
    for start in range(0, of_genes.shape[0], _ROWS_AT_ONCE):
        values = of_genes[start : start + _ROWS_AT_ONCE].toarray() / sd
        products += values.T @ values
    centres = mean[:, genes] / sd
    _, axes = np.linalg.eigh(products - centres.T @ (n[:, None] * centres))
    return genes, sd, axes[:, ::-1][:, :n_components]


def variance_within(
    values: sparse.csr_array, of_stratum: sparse.csr_array
) -> tuple[np.ndarray, np.ndarray]:
    """Means of each gene in strata, ``(n_strata, G)``, and its variance within them, ``(G,)``."""
    n = np.asarray(of_stratum.sum(axis=1))
    mean = (of_stratum @ values).toarray() / n[:, None]
    squares = np.asarray(values.multiply(values).sum(axis=0)).ravel()
    return mean, (squares - n @ np.square(mean)) / values.shape[0]


def indicators(strata: np.ndarray) -> sparse.csr_array:
    """1 if a cell is in a stratum, non-empty strata x cells."""
    number, stratum = np.unique(strata, return_inverse=True)
    cells = np.arange(len(strata))
    return sparse.csr_array((np.ones(len(cells)), (stratum, cells)), (len(number), len(cells)))


def centred(features: np.ndarray, of_stratum: sparse.csr_array) -> np.ndarray:
    """Features minus their means within strata."""
    means = (of_stratum @ features) / np.asarray(of_stratum.sum(axis=1))[:, None]
    return features - of_stratum.T @ means


def strata_of_cells(manager: AnnDataManager) -> np.ndarray:
    """Code of each cell's combination of batch, categories and context."""
    columns = [np.asarray(manager.get_from_registry(REGISTRY_KEYS.BATCH)).reshape(-1, 1)]
    for key in (REGISTRY_KEYS.CATEGORICAL_COVARIATES, REGISTRY_KEYS.CONTEXTS):
        if key in manager.data_registry:
            columns.append(np.asarray(manager.get_from_registry(key)))
    table = np.concatenate(columns, axis=1).astype(np.int64)
    return np.unique(table, axis=0, return_inverse=True)[1].reshape(-1)


def continuous_covariates(manager: AnnDataManager) -> np.ndarray | None:
    """Registered continuous covariates, ``(n_cells, n)``; ``None`` if there are none."""
    if REGISTRY_KEYS.CONTINUOUS_COVARIATES not in manager.data_registry:
        return None
    return np.asarray(manager.get_from_registry(REGISTRY_KEYS.CONTINUOUS_COVARIATES), dtype=float)
