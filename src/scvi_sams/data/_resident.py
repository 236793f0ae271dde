"""Cells on the training device, sparse as stored, and their mini-batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from scipy import sparse
from scvi.data import AnnDataManager

from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.data._block_loader import BlockOrder, ScreenLoader, registered_expression

_ROWS_PER_READ = 16_384


class ResidentLoader(ScreenLoader):
    """Yields mini-batches of cells on the device, without synchronising with it."""

    def __init__(self, cells: ResidentCells, order: BlockOrder) -> None:
        super().__init__(order)
        self._cells = cells

    def _batches(
        self, positions: np.ndarray, ends: np.ndarray
    ) -> Iterator[dict[str, torch.Tensor]]:
        rows = torch.from_numpy(positions).to(self._cells.device)
        n_values = np.add.reduceat(self._cells.values_of_cells[positions], ends[:-1])
        for (start, stop), n in zip(pairwise(ends.tolist()), n_values.tolist(), strict=True):
            yield self._cells.batch(rows[start:stop], n)


class ResidentCells:
    """All registered data of all cells, on a device.

    ``values_of_cells``, the number of stored values of every cell, is on the CPU: sizes of
    mini-batches are then known without synchronising with the device.
    """

    def __init__(self, adata_manager: AnnDataManager, device: torch.device) -> None:
        self.device = device
        n_cells = adata_manager.adata.n_obs
        reader = registered_expression(adata_manager)
        x = reader.read_rows(np.arange(n_cells), _ROWS_PER_READ)
        self.n_genes = x.shape[1]
        if sparse.issparse(x):
            x = sparse.csr_matrix(x)
            if not x.has_canonical_format:  # duplicate entries add up
                x = x.copy()
                x.sum_duplicates()
            self.values_of_cells = np.diff(x.indptr)
            self.starts = torch.from_numpy(x.indptr.astype(np.int64)).to(device)
            self.genes = torch.from_numpy(_as_small_as_possible(x.indices)).to(device)
            self.values = torch.from_numpy(_as_small_as_possible(x.data)).to(device)
            self.dense = None
        else:
            self.values_of_cells = np.zeros(n_cells, dtype=np.int64)
            self.dense = torch.from_numpy(np.asarray(x, dtype=np.float32)).to(device)
        keys = list(adata_manager.data_registry.keys())
        others = [key for key in keys if key != REGISTRY_KEYS.X]
        arrays = adata_manager.create_torch_dataset(data_and_attributes=others)[np.arange(n_cells)]
        self.others = {key: torch.from_numpy(arrays[key]).to(device) for key in others}

    def batch(self, rows: torch.Tensor, n_values: int) -> dict[str, torch.Tensor]:
        """Return the cells in ``rows``, which have ``n_values`` stored values, with dense X."""
        x = self.dense[rows] if self.dense is not None else self._made_dense(rows, n_values)
        return {REGISTRY_KEYS.X: x} | {key: values[rows] for key, values in self.others.items()}

    def _made_dense(self, rows: torch.Tensor, n_values: int) -> torch.Tensor:
        starts = self.starts[rows]
        lengths = self.starts[rows + 1] - starts
        # Stored value i of cell b of the batch: position in the stored and in the dense arrays.
        first = lengths.cumsum(0) - lengths
        cells = torch.arange(len(rows), device=self.device)
        offsets = torch.stack([starts - first, cells * self.n_genes])
        offsets = offsets.repeat_interleave(lengths, dim=1, output_size=n_values)
        stored = offsets[0] + torch.arange(n_values, device=self.device)
        places = offsets[1] + self.genes[stored]
        x = torch.zeros(len(rows) * self.n_genes, device=self.device)
        x[places] = self.values[stored].float()
        return x.view(len(rows), self.n_genes)


def _as_small_as_possible(values: np.ndarray) -> np.ndarray:
    """The same numbers in the smallest exact type; non-integers in single precision."""
    if not len(values):
        return values.astype(np.uint8)
    if values.dtype.kind == "f" and (values != np.round(values)).any():
        return values.astype(np.float32)
    low, high = values.min(), values.max()
    for dtype in (np.uint8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return values.astype(dtype)
    return values.astype(np.float32)
