"""The data module that trains from disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scvi.data import AnnDataManager

from scvi_sams.data._block_loader import BlockLoader, registered_expression
from scvi_sams.data._data_module import ScreenDataModule


class StreamingDataModule(ScreenDataModule):
    """Streams mini-batches from a file on disk, for ``model.train(datamodule=...)``.

    ``model.train()`` makes one of these itself where the expression is on disk; make it yourself to
    choose how it reads. The split is that of training in memory with the same seed. On several
    processes (``strategy="ddp"``) each reads its own part of every epoch.

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
    load_sparse_tensor
        Move sparse mini-batches to the device and densify them there.
    pin_memory
        Whether batches are in page-locked memory, for faster copies to a GPU.
    block_size
        Neighbouring cells that are read at a time. Reading is faster with more (above all from
        zarr), mixing is better with fewer.
    blocks_per_buffer
        Blocks whose cells are mixed. ``block_size * blocks_per_buffer`` cells are in memory, up to
        three times for a moment, as they are stored (sparse or dense).
    seed
        Of the order of cells; ``None`` for ``scvi.settings.seed`` (0 if unset).

    Raises
    ------
    InvalidSplitError
        If the split has no training cells, or a cell twice.
    UnreadableDataError
        While reading, naming the rows that cannot be read.

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
        train_size: float | None = None,
        validation_size: float | None = None,
        shuffle_set_split: bool = True,
        external_indexing: Sequence[np.ndarray | None] | None = None,
        batch_size: int = 512,
        drop_last: bool = False,
        load_sparse_tensor: bool = False,
        pin_memory: bool = False,
        block_size: int = 512,
        blocks_per_buffer: int = 32,
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
        self._loading: dict[str, Any] = {
            "batch_size": batch_size,
            "load_sparse_tensor": load_sparse_tensor,
            "pin_memory": pin_memory,
            "block_size": block_size,
            "blocks_per_buffer": blocks_per_buffer,
            "reader": registered_expression(adata_manager),
        }

    def loader(self, indices: np.ndarray, **order: Any) -> BlockLoader:
        """Return a loader that reads in blocks."""
        return BlockLoader(self.adata_manager, indices, **order, **self._loading)

    def on_after_batch_transfer(
        self, batch: dict[str, torch.Tensor], dataloader_idx: int
    ) -> dict[str, torch.Tensor]:
        """Densify sparse tensors, on the device."""
        return {
            key: value.to_dense() if value.layout is torch.sparse_csr else value
            for key, value in batch.items()
        }
