"""What :class:`CellModel` computes of cells in mini-batches, and which genes and batch it is of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi.data import AnnDataManager

from scvi_sams._checks import as_names, check_integer
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.exceptions import MissingKeyError
from scvi_sams.model._screen_model import ScreenModel
from scvi_sams.module._minibatch import positions_in, sum_over_slots

_MAX_ELEMENTS = 2**23
"""Numbers in the largest array (particles x cells x genes) of a step: 32 MB in float32."""


def negative_log_terms(
    model: ScreenModel,
    adata: AnnData,
    positions: np.ndarray,
    batch_size: int | None,
    n_samples: int,
) -> np.ndarray:
    """Reconstruction error and divergences per cell, ``(2, n_cells)``."""
    terms = np.empty((2, len(positions)), dtype=np.float64)
    for place, tensors in model._batches(adata, positions, batch_size):
        _, _, output = model.module(tensors, inference_kwargs={"n_particles": n_samples})
        terms[0, place] = output.reconstruction_loss["reconstruction_loss"].cpu().numpy()
        terms[1, place] = sum(output.kl_local.values()).cpu().numpy()
    return terms


def importance_weighted_bounds(
    model: ScreenModel,
    adata: AnnData,
    positions: np.ndarray,
    batch_size: int | None,
    n_samples: int,
) -> np.ndarray:
    """Importance-weighted bound per cell, ``(n_cells,)``."""
    module = model.module
    rows = model._perturbations_of(adata, positions)
    batch_size = 128 if batch_size is None else batch_size
    check_integer(batch_size=batch_size)
    n_chunk = max(1, min(n_samples, _MAX_ELEMENTS // (batch_size * adata.n_vars)))
    chunks = [min(n_chunk, n_samples - start) for start in range(0, n_samples, n_chunk)]
    shifts = [module.global_posterior(rows, size).shifts for size in chunks]
    bound = np.empty(len(positions), dtype=np.float64)
    for place, cells in model._cells(adata, positions, batch_size):
        slots = positions_in(rows, cells.codes)
        weights = torch.cat(
            [
                module.log_importance_weights(
                    cells, sum_over_slots(table, slots, cells.doses), size
                )
                for table, size in zip(shifts, chunks, strict=True)
            ]
        )
        bound[place] = (torch.logsumexp(weights, 0) - math.log(n_samples)).cpu().numpy()
    return bound


def positions_of_genes(gene_list: Sequence[str] | None, known: Sequence[str]) -> np.ndarray:
    """Positions of genes among those of the model; ``None`` for all."""
    genes = pd.Index(known)
    if gene_list is None:
        return np.arange(len(genes))
    asked = as_names("gene_list", gene_list)
    found = genes.get_indexer(pd.Index(asked, dtype=object))
    if (found < 0).any():
        unknown = [gene for gene, place in zip(asked, found, strict=True) if place < 0]
        raise MissingKeyError(
            f"Genes {unknown[:5]} are not among those of the model, such as {list(genes[:3])}."
        )
    return found


def batch_code(batch: str, manager: AnnDataManager) -> int:
    """Number of a batch of the training data."""
    mapping = manager.get_state_registry(REGISTRY_KEYS.BATCH)["categorical_mapping"]
    matches = np.flatnonzero(np.asarray(mapping) == batch)
    if not len(matches):
        raise MissingKeyError(f"Batch {batch!r} is not one of {list(mapping)}.")
    return int(matches[0])


def rows_of_all_cells(values: np.ndarray, indices: np.ndarray, n_obs: int) -> np.ndarray:
    """Spread results of some cells over all rows of an AnnData, as a copy; other rows are NaN."""
    full = np.full((n_obs, *values.shape[1:]), np.nan, dtype=values.dtype)
    full[indices] = values
    return full
