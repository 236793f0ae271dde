"""Cells on the training device, sparse as stored, and their mini-batches."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from scipy import sparse
from scvi.data import AnnDataManager

from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.counts._block_reader import BlockReader
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
    mini-batches are then known without synchronising with the device. Expression is read and
    transferred in blocks of rows, so that host memory holds one block of a screen on disk.
    """

    def __init__(self, adata_manager: AnnDataManager, device: torch.device) -> None:
        self.device = device
        reader = registered_expression(adata_manager)
        self.n_genes = reader.n_columns
        if reader.n_stored is None:
            self.values_of_cells = np.zeros(reader.n_rows, dtype=np.int64)
            self.dense: torch.Tensor | None = self._dense_of(reader)
        else:
            self.genes, self.values, self.values_of_cells = self._stored_of(reader, reader.n_stored)
            self.starts = torch.from_numpy(_starts_of(self.values_of_cells)).to(device)
            self.dense = None
        keys = list(adata_manager.data_registry.keys())
        others = [key for key in keys if key != REGISTRY_KEYS.X]
        dataset = adata_manager.create_torch_dataset(data_and_attributes=others)
        arrays = dataset[np.arange(reader.n_rows)]
        self.others = {key: torch.from_numpy(arrays[key]).to(device) for key in others}

    def _dense_of(self, reader: BlockReader) -> torch.Tensor:
        dense = torch.empty(reader.n_rows, self.n_genes, device=self.device)
        for start, block in _blocks_of(reader):
            # A copy, as torch warns about arrays that are read-only.
            dense[start : start + len(block)] = torch.from_numpy(np.array(block, dtype=np.float32))
        return dense

    def _stored_of(
        self, reader: BlockReader, n_stored: int
    ) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Gene and value of each stored value, and their number for each cell.

        Blocks are written to arrays of final length: concatenating blocks on the device would need
        twice its memory. The type of values is widened when a block needs it.
        """
        type_of_genes = _as_small_as_possible(np.array([self.n_genes - 1])).dtype
        genes = torch.from_numpy(np.empty(0, type_of_genes)).new_empty(n_stored, device=self.device)
        values = torch.empty(n_stored, dtype=torch.uint8, device=self.device)
        values_of_cells = np.empty(reader.n_rows, dtype=np.int64)
        stop = 0
        for first, block in _blocks_of(reader):
            rows = _without_duplicates(sparse.csr_matrix(block))
            start, stop = stop, stop + len(rows.data)
            genes[start:stop] = torch.from_numpy(rows.indices.astype(type_of_genes))
            data = torch.from_numpy(_as_small_as_possible(rows.data))
            values = values.to(torch.promote_types(values.dtype, data.dtype))
            values[start:stop] = data
            values_of_cells[first : first + rows.shape[0]] = np.diff(rows.indptr)
        return genes, values, values_of_cells

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


def _blocks_of(reader: BlockReader) -> Iterator[tuple[int, np.ndarray | sparse.spmatrix]]:
    """Blocks of rows, each with the position of its first row."""
    for start in range(0, reader.n_rows, _ROWS_PER_READ):
        yield start, reader.read(start, min(start + _ROWS_PER_READ, reader.n_rows))


def _without_duplicates(rows: sparse.csr_matrix) -> sparse.csr_matrix:
    """Rows in which duplicate entries are added up, as scipy does when it makes them dense."""
    if rows.has_canonical_format:
        return rows
    rows = rows.copy()  # rows of a matrix in memory share its arrays
    rows.sum_duplicates()
    return rows


def _starts_of(values_of_cells: np.ndarray) -> np.ndarray:
    """Position of the first stored value of each cell, and the end of the last one, in 64 bits."""
    return np.concatenate([[0], np.cumsum(values_of_cells, dtype=np.int64)])


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
