"""A file from which training goes on after its process was killed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from scvi_sams.exceptions import InvalidArgumentError

_STATE_KEY = "scvi_sams"


class ResumableCheckpoint(Checkpoint):
    """Write the state of training after each epoch, and remove the file when training has ended.

    Parameters
    ----------
    path
        Of the file. It is replaced as a whole: killed while writing, the one before is there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the state, unless the epoch was cut short."""
        if pl_module.is_interrupted:
            return
        scratch = self.path.with_name(self.path.name + ".part")
        trainer.save_checkpoint(scratch)
        if trainer.is_global_zero:
            scratch.replace(self.path)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the file: another training is not to go on from it."""
        if trainer.is_global_zero and not pl_module.is_interrupted:
            self.path.unlink(missing_ok=True)


def keep_state(checkpoint: dict[str, Any], trainer: Trainer, rotation_epoch: int | None) -> None:
    """Add to a checkpoint of Lightning what it lacks: the phase, and the random states."""
    checkpoint[_STATE_KEY] = {
        "rotation_epoch": rotation_epoch,
        "random_states": _of_all_processes(torch.get_rng_state(), trainer),
        "planned": _planned(trainer),
    }
    if torch.cuda.is_available():
        checkpoint[_STATE_KEY]["cuda_random_states"] = _of_all_processes(
            torch.cuda.get_rng_state_all(), trainer
        )


def restore_state(checkpoint: dict[str, Any], trainer: Trainer) -> int | None:
    """Take the random state from a checkpoint; returns the epoch of the rotation, if it is to come.

    Raises
    ------
    InvalidArgumentError
        If the checkpoint is of a training with other epochs, cells or processes.
    """
    state = checkpoint.get(_STATE_KEY, {})
    if state.get("planned") != _planned(trainer):
        raise InvalidArgumentError(
            f"The checkpoint is of another training ({state.get('planned')}) than this one "
            f"({_planned(trainer)}). Train with the same data and arguments, or remove the file."
        )
    rank = trainer.global_rank
    torch.set_rng_state(state["random_states"][rank].cpu())
    if torch.cuda.is_available() and "cuda_random_states" in state:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda_random_states"][rank]])
    return state["rotation_epoch"]


def _of_all_processes(random_state: Any, trainer: Trainer) -> list[Any]:
    """Collect the random states of all processes, each of which draws numbers of its own."""
    states = [random_state] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(states, random_state)
    return states


def _planned(trainer: Any) -> dict[str, int]:
    # A schedule of the learning rate, and phases, are laid out over these.
    return {
        "max_epochs": int(trainer.max_epochs or 0),
        "n_training_cells": len(trainer.datamodule.train_idx),
        "sum_of_their_positions": int(sum(trainer.datamodule.train_idx)),
        "n_processes": int(trainer.world_size),
    }
