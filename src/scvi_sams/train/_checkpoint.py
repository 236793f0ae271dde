"""Resume training after its process was killed: the checkpoint file and its checks."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from scvi_sams._files import UNREADABLE, cannot_write, check_archive
from scvi_sams.exceptions import InvalidArgumentError, UnreadableDataError
from scvi_sams.train._identity import Identity, differences, fingerprint

logger = logging.getLogger("scvi.sams")

_STATE_KEY = "scvi_sams"
_MOMENTS = ("input_mean", "input_sd", "cells_per_perturbation")
"""Moments of all training cells, as stored in the weights of a checkpoint."""
_TOLERANCE = 1e-4
"""Relative tolerance of moments: another machine adds in another order."""
_MAX_DIFFERENCES = 8


class ResumableCheckpoint(Checkpoint):
    """Write the state of training after each epoch, and remove the file when training has ended.

    The file is replaced atomically: if the process is killed while writing, the previous file
    remains. If the disk is full, training continues without checkpoints.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._is_told = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Write the state, unless the epoch was interrupted."""
        if pl_module.is_interrupted:
            return
        scratch = self.path.with_name(self.path.name + ".part")
        try:
            trainer.save_checkpoint(scratch)
            if trainer.is_global_zero:
                scratch.replace(self.path)
        except OSError as error:
            _remove_halves(scratch, error)
            problem = cannot_write(self.path, error)
            if trainer.world_size > 1:  # the other processes wait for this one
                raise problem from error
            if not self._is_told:
                self._is_told = True
                logger.warning(f"Training continues, but could not be resumed later: {problem}")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Remove the file, so that another training does not resume from it."""
        if trainer.is_global_zero and not pl_module.is_interrupted:
            self.path.unlink(missing_ok=True)


def _remove_halves(scratch: Path, error: OSError) -> None:
    """Remove partly written files, and those that Lightning could not move."""
    with suppress(OSError):
        scratch.unlink(missing_ok=True)
        if error.filename2 == str(scratch):
            Path(error.filename).unlink(missing_ok=True)


def check_checkpoint(path: Path) -> None:
    """Raise if a file is not a checkpoint of a training of this package, or is damaged."""
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)[_STATE_KEY]
        is_known = isinstance(state, dict)
    except UNREADABLE as error:
        raise _no_checkpoint(path, f"{type(error).__name__}: {error}") from error
    if not is_known:
        raise _no_checkpoint(path, "it contains no state of a training")


def _no_checkpoint(path: Path, reason: str) -> UnreadableDataError:
    return UnreadableDataError(
        f"{str(path)!r} is not a checkpoint of `train(checkpoint_path=...)`, or is damaged "
        f"({reason[:200]}). Remove it to train from the start, or name another file."
    )


def check_place_of_checkpoint(path: Path) -> None:
    """Raise if a file cannot be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError("you may not write to its folder")
    except OSError as error:
        raise cannot_write(path, error) from error


def keep_state(
    checkpoint: dict[str, Any], trainer: Trainer, rotation_epoch: int | None, identity: Identity
) -> None:
    """Add to a Lightning checkpoint the stage of training, random states, and its identity.

    ``identity`` describes settings and data; the planned length of training is added.
    """
    checkpoint[_STATE_KEY] = {
        "rotation_epoch": rotation_epoch,
        "random_states": _of_all_processes(torch.get_rng_state(), trainer),
        "identity": identity | _planned(trainer),
    }
    if torch.cuda.is_available():
        checkpoint[_STATE_KEY]["cuda_random_states"] = _of_all_processes(
            torch.cuda.get_rng_state_all(), trainer
        )


def restore_state(checkpoint: dict[str, Any], trainer: Trainer, identity: Identity) -> int | None:
    """Restore the random state from a checkpoint; returns the planned epoch of the rotation.

    A checkpoint of other data, settings or numbers of processes raises an error.
    """
    state = checkpoint.get(_STATE_KEY, {})
    found = differences(state.get("identity", {}), identity | _planned(trainer))
    plan: Any = trainer.lightning_module
    found = found or _other_moments(checkpoint["state_dict"], plan.module)
    if found:
        more = (
            [f"and {len(found) - _MAX_DIFFERENCES} more"] if len(found) > _MAX_DIFFERENCES else []
        )
        raise InvalidArgumentError(
            f"The checkpoint is of another training: {'; '.join(found[:_MAX_DIFFERENCES] + more)}. "
            "Train with the same data and arguments, or remove the file."
        )
    rank = trainer.global_rank
    torch.set_rng_state(state["random_states"][rank].cpu())
    if torch.cuda.is_available() and "cuda_random_states" in state:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda_random_states"][rank]])
    return state["rotation_epoch"]


def _other_moments(state: dict[str, Any], module: torch.nn.Module) -> list[str]:
    """Name the difference if the training cells have other moments than in the checkpoint."""
    theirs = [state[f"module.{name}"].cpu() for name in _MOMENTS]
    ours = [getattr(module, name).cpu() for name in _MOMENTS]
    same = [
        a.shape == b.shape and torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE)
        for a, b in zip(theirs, ours, strict=True)
    ]
    return [] if all(same) else ["other counts of training cells"]


def _of_all_processes(random_state: Any, trainer: Trainer) -> list[Any]:
    """Collect the random states of all processes, each of which has its own."""
    states = [random_state] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(states, random_state)
    return states


def _planned(trainer: Any) -> Identity:
    # The learning rate schedule and the stages depend on these.
    data = trainer.datamodule
    parts = [getattr(data, name, None) for name in ("train_idx", "val_idx")]
    return {
        "max_epochs": int(trainer.max_epochs or 0),
        "n_processes": int(trainer.world_size),
        "n_training_cells": len(data.train_idx),
        "data.training cells": fingerprint(*([] if part is None else part for part in parts)),
        **{
            name: getattr(trainer, name, None)
            for name in ("gradient_clip_val", "accumulate_grad_batches", "precision")
        },
    }
