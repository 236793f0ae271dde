"""Mini-batches of a registered screen: the order of cells, and a loader that reads blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scvi.data import AnnDataManager

from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.counts._block_reader import BlockReader
from scvi_sams.exceptions import InvalidSplitError


class BlockOrder:
    """Positions of cells in the order of an epoch, for one of several processes.

    If shuffled, blocks of neighbouring cells are in random order, and the cells of several blocks
    at a time are mixed in a buffer. The order depends only on seed and epoch: it is the same in all
    processes, and each uses its section of it. Within an epoch every cell occurs once, in one
    process. Sections differ by at most one cell, and all processes have the same number of batches,
    of sizes that differ by at most one.

    Parameters
    ----------
    indices
        Positions of the cells.
    batch_size
        Largest number of cells in a batch.
    shuffle
        Whether to shuffle. Otherwise cells keep their order, process after process.
    drop_last
        Whether all batches have ``batch_size`` cells; the remainder of an epoch is dropped.
    block_size
        Length of a block, in rows of the file.
    blocks_per_buffer
        Number of blocks that are mixed.
    seed
        Seed of the random order.
    rank, world_size
        Number of this process, and number of processes, at most one per cell.
    """

    def __init__(
        self,
        indices: np.ndarray,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        block_size: int = 512,
        blocks_per_buffer: int = 32,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        n_cells = len(indices)
        if world_size > max(n_cells, 1):
            raise InvalidSplitError(
                f"{n_cells} cells cannot be divided between {world_size} processes, each of which "
                "needs one or more. Use fewer devices, or other fractions of training and "
                "validation cells."
            )
        self.epoch = 0
        self._shuffle = shuffle
        self._seed = seed
        self._indices = np.sort(indices) if shuffle else np.asarray(indices)
        self._block_starts = np.flatnonzero(np.diff(self._indices // block_size, prepend=-1))
        self._batches_per_buffer = max(1, block_size * blocks_per_buffer // batch_size)
        first, last = n_cells * rank // world_size, n_cells * (rank + 1) // world_size
        n_fewest = n_cells // world_size
        if drop_last:
            ends = np.arange(n_fewest // batch_size + 1) * batch_size
        else:
            n_batches = min(-(-n_cells // (world_size * batch_size)), n_fewest)
            ends = _ends_of_batches(last - first, n_batches, batch_size)
        self._batch_ends = first + ends

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self._batch_ends) - 1

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order; called by Lightning."""
        self.epoch = epoch

    def buffers(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield buffers: positions, and the boundaries of batches within them.

        Batch ``i`` of a buffer is ``positions[ends[i] : ends[i + 1]]``.
        """
        blocks, block_ends = self._blocks_of_epoch()
        for first in range(0, len(self), self._batches_per_buffer):
            ends = self._batch_ends[first : first + self._batches_per_buffer + 1]
            positions = self._stretch(blocks, block_ends, ends[0], ends[-1])
            if self._shuffle:
                rng = np.random.default_rng([self._seed, self.epoch, int(ends[0]) + 1])
                positions = rng.permutation(positions)
            yield positions, ends - ends[0]

    def _blocks_of_epoch(self) -> tuple[np.ndarray, np.ndarray]:
        """Blocks in their order (first and last place in ``indices``), and the end of each."""
        ends = np.append(self._block_starts, len(self._indices))[1:]
        blocks = np.column_stack([self._block_starts, ends])
        if self._shuffle:
            blocks = np.random.default_rng([self._seed, self.epoch]).permutation(blocks)
        return blocks, np.cumsum(blocks[:, 1] - blocks[:, 0])

    def _stretch(
        self, blocks: np.ndarray, block_ends: np.ndarray, start: int, stop: int
    ) -> np.ndarray:
        """Positions ``start`` to ``stop - 1`` of all blocks one after another."""
        first, last = np.searchsorted(block_ends, [start, stop - 1], side="right")
        positions = np.concatenate([self._indices[a:b] for a, b in blocks[first : last + 1]])
        start_of_first = block_ends[first] - (blocks[first, 1] - blocks[first, 0])
        return positions[start - start_of_first : stop - start_of_first]


class ScreenLoader(ABC):
    """Yields mini-batches in a :class:`BlockOrder`; each iteration is another epoch."""

    batch_sampler = None

    def __init__(self, order: BlockOrder) -> None:
        # Named as in torch's DataLoader: Lightning passes the epoch to a `sampler`.
        self.sampler = order
        self.generator: torch.Generator | None = None

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield tensors by their registry keys."""
        # torch's DataLoader samples a seed here, and so do we: later random numbers then do not
        # depend on the loader.
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)
        for positions, ends in self.sampler.buffers():
            yield from self._batches(positions, ends)
        self.sampler.set_epoch(self.sampler.epoch + 1)

    @abstractmethod
    def _batches(
        self, positions: np.ndarray, ends: np.ndarray
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the mini-batches of a buffer; see :meth:`BlockOrder.buffers`."""


class BlockLoader(ScreenLoader):
    """Yields the mini-batches of :class:`~scvi.dataloaders.AnnDataLoader`, reading X in blocks.

    At any time one buffer of cells is in memory (as stored: sparse rows stay sparse), and one batch
    of dense ones.

    Parameters
    ----------
    adata_manager
        Manager of the registered AnnData; expression may be on disk or in memory.
    indices, batch_size, block_size, blocks_per_buffer, **order
        See :class:`BlockOrder`; of all cells if ``indices`` is ``None``.
    load_sparse_tensor, pin_memory
        See :class:`~scvi_sams.data.StreamingDataModule`.
    reader
        Reader of X; ``None`` for a new one.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        indices: np.ndarray | None = None,
        batch_size: int = 128,
        *,
        load_sparse_tensor: bool = False,
        pin_memory: bool = False,
        block_size: int = 512,
        blocks_per_buffer: int = 32,
        reader: BlockReader | None = None,
        **order: Any,
    ) -> None:
        if indices is None:
            indices = np.arange(adata_manager.adata.n_obs)
        buffer: dict[str, Any] = {"block_size": block_size, "blocks_per_buffer": blocks_per_buffer}
        super().__init__(BlockOrder(indices, batch_size, **buffer, **order))
        is_shuffled = order.get("shuffle", False)
        self._rows_per_read = block_size if is_shuffled else block_size * blocks_per_buffer
        self._load_sparse_tensor = load_sparse_tensor
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._reader = reader or registered_expression(adata_manager)
        self._keys = list(adata_manager.data_registry.keys())
        others = [key for key in self._keys if key != REGISTRY_KEYS.X]
        self._others = adata_manager.create_torch_dataset(data_and_attributes=others)

    def _batches(
        self, positions: np.ndarray, ends: np.ndarray
    ) -> Iterator[dict[str, torch.Tensor]]:
        buffer = self._read(positions)
        for start, stop in pairwise(ends):
            batch = {key: self._tensor(buffer[key][start:stop]) for key in self._keys}
            yield {k: v.pin_memory() for k, v in batch.items()} if self._pin_memory else batch

    def _read(self, positions: np.ndarray) -> dict[str, np.ndarray | sparse.csr_matrix]:
        order = np.argsort(positions, kind="stable")
        place = np.argsort(order, kind="stable")
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
            check_invariants=False,  # already checked by the reader
        )


def registered_expression(manager: AnnDataManager) -> BlockReader:
    """Return a reader of the registered expression."""
    location = manager.data_registry[REGISTRY_KEYS.X]
    name = f"adata.{location.attr_name}" + (
        f"[{location.attr_key!r}]" if location.attr_name == "layers" else ""
    )
    return BlockReader(manager.get_from_registry(REGISTRY_KEYS.X), name)


def _ends_of_batches(n_cells: int, n_batches: int, batch_size: int) -> np.ndarray:
    """Full batches and the rest; an otherwise empty batch takes a cell of the previous one."""
    ends = np.append(np.arange(n_batches) * batch_size, n_cells)
    return np.minimum(ends, n_cells - np.arange(n_batches, -1, -1))
