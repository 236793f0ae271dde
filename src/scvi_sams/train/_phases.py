"""Scores of the dense phase are no measure for the phase with masks, which have a price."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.optim.lr_scheduler import ReduceLROnPlateau


def forget_stopping_score(trainer: Trainer) -> None:
    """Make early stopping begin anew: no best score, no epochs waited for a better one."""
    for callback in _callbacks(trainer):
        if isinstance(callback, EarlyStopping):
            worst = float("inf") if callback.mode == "min" else -float("inf")
            callback.best_score = torch.tensor(worst)
            callback.wait_count = 0


def forget_best_states(trainer: Trainer) -> None:
    """Make checkpoints, and a schedule that waits for a better score, begin anew.

    Checkpoints of the dense phase stay on disk, but none of them is the best any more.
    """
    for callback in _callbacks(trainer):
        if isinstance(callback, ModelCheckpoint):
            callback.best_k_models = {}
            callback.kth_best_model_path = callback.best_model_path = ""
            callback.best_model_score = None
    for configuration in trainer.lr_scheduler_configs:
        schedule = configuration.scheduler
        if isinstance(schedule, ReduceLROnPlateau):
            schedule.best = schedule.mode_worse
            schedule.num_bad_epochs = 0


def _callbacks(trainer: Trainer) -> list[Callback]:
    # Lightning sets it outside of the class, where type checkers do not see it.
    return trainer.callbacks  # type: ignore[attr-defined]
