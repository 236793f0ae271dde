"""The data module that keeps all cells on the device, as sparse as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scvi.data import AnnDataManager

from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.data._block_loader import registered_expression
from scvi_sams.data._block_order import BlockOrder
from scvi_sams.data._data_module import ScreenDataModule

_ROWS_PER_READ = 16_384
_BLOCK_SIZE = 64
"""Neighbouring cells that stay in one process for an epoch, where there are several; within a
process all cells are mixed."""


class ResidentDataModule(ScreenDataModule):
    """Keeps the cells in the memory of the device that trains, for ``model.train(datamodule=...)``.

    A GPU trains faster than a processor can cut mini-batches out of a sparse matrix and send them.
    Here they are sent once, as they are stored, and mini-batches are made dense where they are
    needed. ``model.train(data_on_device=True)`` makes one of these. The split is that of other
    training with the same seed; on several processes each holds all cells and trains on its part.

    Memory: for each non-zero value 2 bytes of its gene (4 from 32,768 genes on) and 1, 2 or 4 of
    the value, whichever holds all of them exactly; for a dense matrix 4 bytes a value. A million
    cells with 1,000 genes each are 3 GB.

    Parameters
    ----------
    adata_manager
        Of the registered screen: ``model.adata_manager``.
    train_size, validation_size, shuffle_set_split
        As in ``model.train()``.
    external_indexing
        Positions of training, validation and test cells, in place of the split.
    batch_size
        Cells per step and process; the last batch of an epoch has the rest.
    drop_last
        Whether the last batch of an epoch is left out if it is not full.
    seed
        Of the order of cells; ``None`` for ``scvi.settings.seed`` (0 if unset).

    Raises
    ------
    InvalidSplitError
        If the split has no training cells, or a cell twice.

    Examples
    --------
    >>> import scvi_sams
    >>> scvi_sams.SAMSVAE.setup_anndata(adata)
    >>> model = scvi_sams.SAMSVAE(adata, n_latent=5, n_hidden=16)
    >>> resident = scvi_sams.data.ResidentDataModule(model.adata_manager, batch_size=256)
    >>> model.train(max_epochs=1, datamodule=resident, enable_progress_bar=False)
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        *,
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        external_indexing: Sequence[np.ndarray | None] | None = None,
        batch_size: int = 512,
        drop_last: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            adata_manager,
            train_size=train_size,
            validation_size=validation_size,
            shuffle_set_split=shuffle_set_split,
            external_indexing=external_indexing,
            drop_last=drop_last,
            seed=seed,
        )
        self._batch_size = batch_size
        self._cells: ResidentCells | None = None

    def loader(self, indices: np.ndarray, **order: Any) -> ResidentLoader:
        """Return a loader of cells on the device; they are sent there when the first is made."""
        trains_on = None if self.trainer is None else self.trainer.strategy.root_device
        device = trains_on or torch.device("cpu")
        if self._cells is None or self._cells.device != device:
            self._cells = ResidentCells(self.adata_manager, device)
        order |= {"block_size": _BLOCK_SIZE, "blocks_per_buffer": len(indices)}  # one buffer
        return ResidentLoader(self._cells, BlockOrder(indices, self._batch_size, **order))

    def teardown(self, stage: str) -> None:
        """Free the memory of the device when training has ended."""
        self._cells = None


class ResidentLoader:
    """Yields mini-batches of cells that are on the device, without waiting for it."""

    def __init__(self, cells: ResidentCells, order: BlockOrder) -> None:
        self.batch_sampler = None
        self.sampler = order  # named as in a DataLoader of torch: Lightning tells it the epoch
        self._cells = cells

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield tensors by their registry keys."""
        # A DataLoader of torch draws a seed here, and so do we: later draws are then the same.
        torch.empty((), dtype=torch.int64).random_()
        for positions, ends in self.sampler.buffers():
            rows = torch.from_numpy(positions).to(self._cells.device)
            n_values = np.add.reduceat(self._cells.values_of_cells[positions], ends[:-1])
            for (start, stop), n in zip(pairwise(ends.tolist()), n_values.tolist(), strict=True):
                yield self._cells.batch(rows[start:stop], n)
        self.sampler.set_epoch(self.sampler.epoch + 1)


class ResidentCells:
    """All that is registered of all cells, on a device.

    Parameters
    ----------
    adata_manager
        Of the registered AnnData.
    device
        Where its values go.

    Attributes
    ----------
    values_of_cells
        Number of stored values of every cell, on the processor: with it sizes of mini-batches are
        known without asking the device.
    """

    def __init__(self, adata_manager: AnnDataManager, device: torch.device) -> None:
        self.device = device
        n_cells = adata_manager.adata.n_obs
        reader = registered_expression(adata_manager)
        x = reader.read_rows(np.arange(n_cells), _ROWS_PER_READ)
        self.n_genes = x.shape[1]
        if sparse.issparse(x):
            x = sparse.csr_matrix(x)
            if not x.has_canonical_format:  # values that are stored twice add up
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
        # Stored value i of cell b of the batch: place in the stored arrays, and in the dense ones.
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
    """The same numbers in the smallest of some types; what is not whole in single precision."""
    if not len(values):
        return values.astype(np.uint8)
    if values.dtype.kind == "f" and (values != np.round(values)).any():
        return values.astype(np.float32)
    low, high = values.min(), values.max()
    for dtype in (np.uint8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return values.astype(dtype)
    return values.astype(np.float32)
