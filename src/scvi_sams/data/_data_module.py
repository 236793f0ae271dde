"""What the data modules of this package share: the split, and loaders of its parts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from scvi.data import AnnDataManager

from scvi_sams.data._splitting import check_positions, default_seed, split_cells


class ScreenDataModule(LightningDataModule):
    """Loads the training, validation and test cells of a registered screen.

    Parameters
    ----------
    adata_manager, train_size, validation_size, shuffle_set_split, external_indexing
        See :class:`~scvi_sams.data.StreamingDataModule`.
    drop_last, seed
        See there.
    """

    def __init__(
        self,
        adata_manager: AnnDataManager,
        *,
        train_size: float | None,
        validation_size: float | None,
        shuffle_set_split: bool,
        external_indexing: Sequence[np.ndarray | None] | None,
        drop_last: bool,
        seed: int | None,
    ) -> None:
        super().__init__()
        self.adata_manager = adata_manager
        self.n_obs = adata_manager.adata.n_obs
        split = external_indexing
        if split is None:
            split = split_cells(
                adata_manager, train_size, validation_size, shuffle=shuffle_set_split
            )
        check_positions(split, self.n_obs)
        given = [*split, None, None][:3]
        self.train_idx, self.val_idx, self.test_idx = (
            np.asarray([] if part is None else part, dtype=np.int64) for part in given
        )
        self.n_train, self.n_val = len(self.train_idx), len(self.val_idx)
        self.seed = default_seed() if seed is None else seed
        self._drop_last = drop_last

    @abstractmethod
    def loader(self, indices: np.ndarray, **order: Any) -> Iterable[dict[str, torch.Tensor]]:
        """Return a loader of some cells; ``order`` goes to :class:`~scvi_sams.data.BlockOrder`."""

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
