"""The order in which cells are read from disk: blocks, mixed in a buffer, cut into batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from scvi_sams.exceptions import InvalidSplitError


class BlockOrder:
    """Positions of cells in the order of an epoch, for one process of several.

    Shuffled, blocks of neighbouring cells come in random order, and the cells of some blocks at a
    time are mixed in a buffer. That order is a function of seed and epoch only: all processes have
    the same one, and each takes its stretch of it. Within an epoch every cell occurs once, in one
    process. Stretches differ by at most one cell, and all processes have equally many batches, of
    sizes that differ by at most one.

    Parameters
    ----------
    indices
        Positions of the cells.
    batch_size
        Largest number of cells in a batch.
    shuffle
        Whether to shuffle. Otherwise cells come as they are given, the processes one after another.
    drop_last
        Whether all batches are of ``batch_size`` cells; what is left of an epoch does not occur.
    block_size
        Length of a block, in rows of the file.
    blocks_per_buffer
        Number of blocks that are mixed.
    seed
        Of the random order.
    rank, world_size
        Number of this process, and number of processes.

    Raises
    ------
    InvalidSplitError
        If there are fewer cells than processes.
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
                f"{n_cells} cells cannot be shared by {world_size} processes, each of which needs "
                "one or more. Use fewer devices, or other shares of training and validation cells."
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
        """Choose the order of this epoch; Lightning calls it."""
        self.epoch = epoch

    def buffers(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield what is read at a time: positions, and the places at which batches begin and end.

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
        """Blocks in their order (first and last place in ``indices``), and where each one ends."""
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


def _ends_of_batches(n_cells: int, n_batches: int, batch_size: int) -> np.ndarray:
    """Full batches and the rest, but no empty batch, which then takes a cell of the one before."""
    ends = np.append(np.arange(n_batches) * batch_size, n_cells)
    return np.minimum(ends, n_cells - np.arange(n_batches, -1, -1))
