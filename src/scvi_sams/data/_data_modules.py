"""Data modules for ``model.train(datamodule=...)``: cells from disk, or on the device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from scvi.data import AnnDataManager

from scvi_sams._checks import check_integer
from scvi_sams.data._block_loader import BlockLoader, BlockOrder, registered_expression
from scvi_sams.data._resident import ResidentCells, ResidentLoader
from scvi_sams.data._splitting import default_seed, parts_of_split, training_split

_RESIDENT_BLOCK_SIZE = 64
"""Block of neighbouring cells that stay in one process for an epoch, if there are several;
within a process all cells are mixed."""


class ScreenDataModule(LightningDataModule):
    """Loads the training, validation and test cells of a registered screen.

    For parameters see :class:`ResidentDataModule`.
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
        super().__init__()
        self.adata_manager = adata_manager
        self.n_obs = adata_manager.adata.n_obs
        split = external_indexing
        if split is None:
            split = training_split(
                adata_manager, train_size, validation_size, shuffle=shuffle_set_split
            )
        self.train_idx, self.val_idx, self.test_idx = parts_of_split(split, self.n_obs)
        self.n_train, self.n_val = len(self.train_idx), len(self.val_idx)
        self.seed = default_seed() if seed is None else seed
        check_integer(batch_size=batch_size)
        self._batch_size = int(batch_size)
        self._drop_last = drop_last

    @abstractmethod
    def loader(self, indices: np.ndarray, **order: Any) -> Iterable[dict[str, torch.Tensor]]:
        """Return a loader of some cells; ``order`` goes to the loader's ``BlockOrder``."""

    def train_dataloader(self) -> Iterable[dict[str, torch.Tensor]]:
        """Return a loader of the training cells, in another order in each epoch."""
        return self._loader(self.train_idx, shuffle=True, drop_last=self._drop_last)

    def val_dataloader(self) -> Iterable[dict[str, torch.Tensor]] | None:
        """Return a loader of the validation cells, in order; ``None`` if there are none."""
        return self._loader(self.val_idx) if len(self.val_idx) else None

    def test_dataloader(self) -> Iterable[dict[str, torch.Tensor]] | None:
        """Return a loader of the test cells, in order; ``None`` if there are none."""
        return self._loader(self.test_idx) if len(self.test_idx) else None

    def _loader(self, indices: np.ndarray, **order: Any) -> Iterable[dict[str, torch.Tensor]]:
        if self.trainer is not None:
            order |= {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}
        return self.loader(indices, seed=self.seed, **order)


class StreamingDataModule(ScreenDataModule):
    """Streams mini-batches from a file on disk, for ``model.train(datamodule=...)``.

    ``model.train()`` creates one automatically if the expression is on disk; create it yourself to
    set how it reads. The split is that of training in memory with the same seed. With several
    processes (``strategy="ddp"``) each reads its own part of every epoch.

    Parameters
    ----------
    adata_manager
        Manager of the registered screen: ``model.adata_manager``.
    load_sparse_tensor
        Move sparse mini-batches to the device and make them dense there.
    pin_memory
        Whether batches are in page-locked memory, for faster copies to a GPU.
    block_size
        Number of neighbouring cells read at a time. More is faster (above all for zarr), fewer is
        better mixed.
    blocks_per_buffer
        Number of blocks that are mixed. ``block_size * blocks_per_buffer`` cells are in memory,
        temporarily up to three times, as stored (sparse or dense).
    **kwargs
        ``train_size``, ``validation_size``, ``shuffle_set_split``, ``external_indexing``,
        ``batch_size``, ``drop_last`` and ``seed``, as in :class:`ResidentDataModule`.

    Raises
    ------
    InvalidSplitError
        If the split has no training cells, or a cell twice.
    UnreadableDataError
        While reading, with the rows that cannot be read.

    Examples
    --------
    >>> import scvi_sams
    >>> scvi_sams.datasets.simulate_screen(n_genes=50).write_zarr("screen.zarr")
    >>> adata = scvi_sams.data.open_screen("screen.zarr")
    >>> scvi_sams.SAMSVAE.setup_anndata(adata)
    >>> model = scvi_sams.SAMSVAE(adata, n_latent=5, n_hidden=16)
    >>> stream = scvi_sams.data.StreamingDataModule(model.adata_manager, blocks_per_buffer=128)
    >>> model.train(max_epochs=1, datamodule=stream, enable_progress_bar=False)
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        *,
        load_sparse_tensor: bool = False,
        pin_memory: bool = False,
        block_size: int = 512,
        blocks_per_buffer: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(adata_manager, **kwargs)
        self._loading: dict[str, Any] = {
            "load_sparse_tensor": load_sparse_tensor,
            "pin_memory": pin_memory,
            "block_size": block_size,
            "blocks_per_buffer": blocks_per_buffer,
            "reader": registered_expression(adata_manager),
        }

    def loader(self, indices: np.ndarray, **order: Any) -> BlockLoader:
        """Return a loader that reads in blocks."""
        return BlockLoader(self.adata_manager, indices, self._batch_size, **order, **self._loading)

    def on_after_batch_transfer(
        self, batch: dict[str, torch.Tensor], dataloader_idx: int
    ) -> dict[str, torch.Tensor]:
        """Make sparse tensors dense, on the device."""
        return {
            key: value.to_dense() if value.layout is torch.sparse_csr else value
            for key, value in batch.items()
        }


class ResidentDataModule(ScreenDataModule):
    """Keeps the cells in the memory of the training device, for ``model.train(datamodule=...)``.

    A GPU trains faster than a CPU can extract mini-batches from a sparse matrix and transfer them.
    Here cells are transferred once, as stored, and mini-batches are made dense on the device. They
    are read in blocks, so a screen from :func:`~scvi_sams.data.open_screen` may be larger than the
    memory of the host. ``model.train(data_on_device=True)`` creates one of these. The split is that
    of other training with the same seed; with several processes each holds all cells and trains on
    its part.

    Memory: for each non-zero value 2 bytes for its gene (4 with more than 32,768 genes) and 1, 2 or
    4 for the value, the smallest that is exact for all values; for a dense matrix 4 bytes per
    value. A million cells with 1,000 genes each take 3 GB.

    Parameters
    ----------
    adata_manager
        Manager of the registered screen: ``model.adata_manager``.
    train_size, validation_size, shuffle_set_split
        As in ``model.train()``.
    external_indexing
        Positions of training, validation and test cells, or booleans for all cells, instead of
        the split.
    batch_size
        Cells per step and process; the last batch of an epoch has the rest.
    drop_last
        Whether the last batch of an epoch is dropped if it is not full.
    seed
        Seed of the order of cells; ``None`` for ``scvi.settings.seed`` (0 if unset).

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

    _cells: ResidentCells | None = None

    def loader(self, indices: np.ndarray, **order: Any) -> ResidentLoader:
        """Return a loader of cells on the device; the first call transfers them."""
        trains_on = None if self.trainer is None else self.trainer.strategy.root_device
        device = trains_on or torch.device("cpu")
        if self._cells is None or self._cells.device != device:
            self._cells = ResidentCells(self.adata_manager, device)
        order |= {"block_size": _RESIDENT_BLOCK_SIZE, "blocks_per_buffer": len(indices)}
        return ResidentLoader(self._cells, BlockOrder(indices, self._batch_size, **order))

    def teardown(self, stage: str) -> None:
        """Free the memory of the device when training has ended."""
        self._cells = None
