"""What the module must know of the training cells before the first step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from scipy import sparse
from scvi.data import AnnDataManager

from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.data._block_loader import registered_expression
from scvi_sams.data._field import registered_labels
from scvi_sams.module._perturbation_module import TrainingStatistics

_ROWS_PER_CHUNK = 16_384


def training_statistics(
    manager: AnnDataManager, train_indices: np.ndarray, *, counts: bool
) -> TrainingStatistics:
    """Count cells per perturbation and compute moments of genes, over training cells only.

    Parameters
    ----------
    manager
        Manager of the registered AnnData.
    train_indices
        Positions of the training cells.
    counts
        Whether expression is counts (then scaled by size, and log1p for the encoder).

    Returns
    -------
    Statistics; the expression is read in chunks of rows and never densified.
    """
    codes = registered_labels(manager).codes
    codes = codes[train_indices]
    n_perturbations = manager.summary_stats.n_perturbations
    inputs, scaled = _Moments(), _Moments()
    inverse_sizes: list[np.ndarray] = []
    for x, size in _chunks(manager, np.sort(train_indices)):
        if counts:
            inputs.add(x.log1p())
            scaled.add(sparse.diags_array(1 / size) @ x)
            inverse_sizes.append(1 / size)
        else:
            inputs.add(x)
            scaled.add(x)
    return TrainingStatistics(
        cells_per_perturbation=_float(np.bincount(codes[codes >= 0], minlength=n_perturbations)),
        input_mean=_float(inputs.mean),
        input_sd=_float(np.sqrt(inputs.variance)),
        scaled_mean=_float(scaled.mean),
        scaled_variance=_float(scaled.variance),
        inverse_size_mean=float(np.concatenate(inverse_sizes).mean()) if counts else 1.0,
    )


class _Moments:
    """Running mean and variance per column, in float64."""

    def __init__(self) -> None:
        self.n = 0
        self.total: np.ndarray | float = 0.0
        self.total_of_squares: np.ndarray | float = 0.0

    def add(self, rows: sparse.csr_matrix) -> None:
        self.n += rows.shape[0]
        self.total = self.total + np.asarray(rows.sum(axis=0)).ravel()
        self.total_of_squares = (
            self.total_of_squares + np.asarray(rows.multiply(rows).sum(axis=0)).ravel()
        )

    @property
    def mean(self) -> np.ndarray:
        return np.asarray(self.total) / self.n

    @property
    def variance(self) -> np.ndarray:
        return np.maximum(np.asarray(self.total_of_squares) / self.n - self.mean**2, 0)


def _chunks(
    manager: AnnDataManager, indices: np.ndarray
) -> Iterator[tuple[sparse.csr_matrix, np.ndarray]]:
    reader = registered_expression(manager)
    size_factor = (
        np.asarray(manager.get_from_registry(REGISTRY_KEYS.SIZE_FACTOR), dtype=float).ravel()
        if REGISTRY_KEYS.SIZE_FACTOR in manager.data_registry
        else None
    )
    # Chunks of neighbouring rows, so that each is read at once where the file is on disk.
    ends_of_chunks = np.flatnonzero(np.diff(indices // _ROWS_PER_CHUNK)) + 1
    for rows in np.split(indices, ends_of_chunks):
        x = sparse.csr_matrix(reader.read_rows(rows, _ROWS_PER_CHUNK), dtype=np.float64)
        size = np.asarray(x.sum(axis=1)).ravel() if size_factor is None else size_factor[rows]
        yield x, size


def _float(values: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float32)
