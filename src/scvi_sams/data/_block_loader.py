"""Mini-batches of a registered screen, read in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from scipy import sparse
from scvi.data import AnnDataManager

from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.data._block_order import BlockOrder
from scvi_sams.data._block_reader import BlockReader


class BlockLoader:
    """Yields the mini-batches of :class:`~scvi.dataloaders.AnnDataLoader`, reading X in blocks.

    Each iteration is another epoch. At any time one buffer of cells is in memory (as stored:
    sparse rows stay sparse), and one batch of dense ones.

    Parameters
    ----------
    adata_manager
        Of the registered AnnData; its expression may be on disk or in memory.
    indices
        Positions of the cells to read; ``None`` for all.
    batch_size, shuffle, drop_last, block_size, blocks_per_buffer, seed, rank, world_size
        See :class:`~scvi_sams.data.BlockOrder`.
    load_sparse_tensor
        Whether X, if it is sparse, is a sparse csr tensor in the batches.
    pin_memory
        Whether batches are in page-locked memory, where there is a GPU.
    reader
        Of X; ``None`` for a new one.

    Raises
    ------
    UnreadableDataError
        While reading, naming the rows that cannot be read.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        indices: np.ndarray | None = None,
        batch_size: int = 128,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        load_sparse_tensor: bool = False,
        pin_memory: bool = False,
        block_size: int = 512,
        blocks_per_buffer: int = 32,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        reader: BlockReader | None = None,
    ) -> None:
        if indices is None:
            indices = np.arange(adata_manager.adata.n_obs)
        # Named as in a DataLoader of torch: Lightning tells a `sampler` the epoch.
        self.batch_sampler = None
        self.sampler = BlockOrder(
            indices,
            batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            block_size=block_size,
            blocks_per_buffer=blocks_per_buffer,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        self._rows_per_read = block_size if shuffle else block_size * blocks_per_buffer
        self._load_sparse_tensor = load_sparse_tensor
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._reader = reader or registered_expression(adata_manager)
        self._keys = list(adata_manager.data_registry.keys())
        others = [key for key in self._keys if key != REGISTRY_KEYS.X]
        self._others = adata_manager.create_torch_dataset(data_and_attributes=others)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield tensors by their registry keys."""
        # A DataLoader of torch draws a seed here, and so do we: whatever is drawn next is then the
        # same whether cells are in memory or on disk.
        torch.empty((), dtype=torch.int64).random_()
        for positions, ends in self.sampler.buffers():
            buffer = self._read(positions)
            for start, stop in pairwise(ends):
                batch = {key: self._tensor(buffer[key][start:stop]) for key in self._keys}
                yield {k: v.pin_memory() for k, v in batch.items()} if self._pin_memory else batch
        self.sampler.set_epoch(self.sampler.epoch + 1)

    def _read(self, positions: np.ndarray) -> dict[str, np.ndarray | sparse.csr_matrix]:
        order = np.argsort(positions, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        rows = positions[order]
        x = self._reader.read_rows(rows, self._rows_per_read)
        buffer = {REGISTRY_KEYS.X: x.astype(np.float32, copy=False), **self._others[rows]}
        return {key: values[place] for key, values in buffer.items()}

    def _tensor(self, values: np.ndarray | sparse.csr_matrix) -> torch.Tensor:
        if isinstance(values, np.ndarray):
            return torch.from_numpy(values)
        if not self._load_sparse_tensor:
            return torch.from_numpy(values.toarray())
        return torch.sparse_csr_tensor(
            torch.from_numpy(values.indptr),
            torch.from_numpy(values.indices),
            torch.from_numpy(values.data),
            size=values.shape,
            check_invariants=False,  # the reader has checked them
        )


def registered_expression(manager: AnnDataManager) -> BlockReader:
    """Return a reader of the expression that is registered."""
    location = manager.data_registry[REGISTRY_KEYS.X]
    name = f"adata.{location.attr_name}" + (
        f"[{location.attr_key!r}]" if location.attr_name == "layers" else ""
    )
    return BlockReader(manager.get_from_registry(REGISTRY_KEYS.X), name)
