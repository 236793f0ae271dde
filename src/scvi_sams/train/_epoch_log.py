"""Logs means over an epoch with one call of Lightning's ``log`` per epoch, not one per step."""

from __future__ import annotations

from numbers import Number
from typing import Any

import torch
from scvi.train import TrainingPlan
from torch import Tensor

from scvi_sams._compat import ElboMetric
from scvi_sams._constants import REGISTRY_KEYS


class EpochLogPlan(TrainingPlan):
    """Training plan of scvi-tools that logs the same values, by the same names, at less cost.

    Each call of Lightning's ``log`` takes some 200 µs. Those of scvi-tools in every step were half
    of a step on few genes. Here what is averaged over the cells of an epoch is summed, and
    Lightning is given the sum in the first step of the epoch. It asks for the mean over all
    processes when the epoch ends. What is logged per step (``on_step=True``) goes to Lightning
    as it is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sums: dict[tuple[str, bool], ElboMetric] = {}
        self._logged_names: set[tuple[str, bool]] = set()
        self._n_cells: int | None = None

    def on_train_epoch_start(self) -> None:
        """Log every name anew."""
        super().on_train_epoch_start()
        self._logged_names.clear()

    def on_validation_epoch_start(self) -> None:
        """Log every name anew."""
        super().on_validation_epoch_start()
        self._logged_names.clear()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Take a step, which logs means over the cells of ``batch``."""
        self._n_cells = batch[REGISTRY_KEYS.X].shape[0]
        try:
            return super().training_step(batch, batch_idx)
        finally:
            self._n_cells = None

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score a mini-batch, which logs means over the cells of ``batch``."""
        self._n_cells = batch[REGISTRY_KEYS.X].shape[0]
        try:
            super().validation_step(batch, batch_idx)
        finally:
            self._n_cells = None

    def log(self, name: str, value: Any, **how: Any) -> None:
        """Log as Lightning does; a mean over the cells of an epoch once in the epoch."""
        # In a mini-batch, training and validation may log different values by the same name.
        key = name, self.training
        if self._n_cells is None:
            can_be_skipped = False
        elif name == "kl_weight":  # the same in all of an epoch, unless it rises with every step
            can_be_skipped = self.n_steps_kl_warmup is None
        else:
            can_be_skipped = _is_mean_over_epoch(how)
            if can_be_skipped and isinstance(value, Tensor | Number):
                value = self._summed(key, value, how.get("batch_size") or self._n_cells)
                how["metric_attribute"] = "_sums"
        if not (can_be_skipped and key in self._logged_names):
            super().log(name, value, **how)
            self._logged_names.add(key)

    def _summed(self, key: tuple[str, bool], mean: Any, n_cells: int) -> ElboMetric:
        """Add a mean over some cells to the sum of the epoch, and return that."""
        if key not in self._sums:
            mode = "train" if self.training else "validation"
            self._sums[key] = ElboMetric(key[0], mode, "obs").to(self.device)
        total = self._sums[key]
        of_cells = mean.detach() * n_cells if isinstance(mean, Tensor) else mean * n_cells
        total.update(**{key[0]: of_cells, "n_obs_minibatch": n_cells})
        return total


def _is_mean_over_epoch(how: dict[str, Any]) -> bool:
    reduction = how.get("reduce_fx", "mean")
    return (
        how.get("on_step") is False
        and how.get("on_epoch") is True
        and (reduction == "mean" or reduction is torch.mean)
    )
