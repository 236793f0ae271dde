"""How training ends early or goes on: Ctrl-C, divergence, checkpoints, the end of a phase."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from scvi_sams.exceptions import InvalidArgumentError, TrainingDivergedError

logger = logging.getLogger("scvi.sams")

_STATE_KEY = "scvi_sams"


class _Raise:
    """What Ctrl-C does in :func:`interrupts_raise`."""

    is_interrupted = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.is_interrupted = True
        raise KeyboardInterrupt


def _meaning_of_ctrl_c() -> Any:
    """Handler of Ctrl-C, Python's or ours; ``None`` if it has another or is not heard here."""
    if threading.current_thread() is not threading.main_thread():
        return None
    handler = signal.getsignal(signal.SIGINT)
    is_known = handler is signal.default_int_handler or isinstance(handler, _Raise)
    return handler if is_known else None


class StopOnInterrupt(Callback):
    """End training after the running step at the first Ctrl-C; at a second one, at once.

    Lightning itself would end the whole program, and ignore Ctrl-C in what comes after. Where
    several processes train, which would have to stop at the same step, or Ctrl-C has another
    meaning already, it is left as it is. In :func:`interrupts_raise` the program goes on where that
    block ends. (To raise an error in the running step could leave numba in the middle of compiling
    a loop, which then fails for as long as the process lives.)
    """

    def __init__(self) -> None:
        self._before: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take over Ctrl-C."""
        before = _meaning_of_ctrl_c()
        if trainer.world_size > 1 or before is None:
            return

        def stop(number: int, frame: FrameType | None) -> None:
            trainer.should_stop = pl_module.is_interrupted = True
            signal.signal(signal.SIGINT, before)
            where = f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
            if isinstance(before, _Raise):
                before.is_interrupted = True
                logger.warning(f"Interrupted: training stops in {where} and is not kept.")
                return
            logger.warning(
                f"Interrupted: training ends in {where}, with what was learned so far. Interrupt "
                "again to end at once, with the weights before this training."
            )

        self._before = signal.signal(signal.SIGINT, stop)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give Ctrl-C its meaning back."""
        before = self._before
        self._give_back()
        if isinstance(before, _Raise) and before.is_interrupted:
            raise KeyboardInterrupt

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give Ctrl-C its meaning back."""
        self._give_back()

    def _give_back(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None


@contextmanager
def interrupts_raise() -> Iterator[None]:
    """Let Ctrl-C end a block by ``KeyboardInterrupt``, after the running step of a training too.

    For loops over trainings: one that Ctrl-C has ended early is not to pass for a finished one, nor
    the loop to go on. Whatever is run may catch the interrupt (Lightning makes an exit of it) or
    turn it into an error of its own: it is raised again at the end of the block. In a
    thread that Ctrl-C does not reach, or where it has another meaning, nothing is changed.

    Examples
    --------
    >>> with scvi_sams.train.interrupts_raise():
    ...     for n_latent in (5, 10):
    ...         scvi_sams.SAMSVAE.setup_anndata(adata)
    ...         trained = scvi_sams.SAMSVAE(adata, n_latent=n_latent)
    ...         trained.train(max_epochs=1, enable_progress_bar=False)
    """
    before = _meaning_of_ctrl_c()
    if before is None:
        yield
        return
    interrupt = _Raise()
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except BaseException as error:
        if interrupt.is_interrupted and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning has Ctrl-C ignored from then on
    if interrupt.is_interrupted:
        raise KeyboardInterrupt


class GoodWeights:
    """The last state of a module that is known to be good, in the memory of the CPU."""

    def __init__(self, module: nn.Module) -> None:
        self.keep(module, None)

    def keep(self, module: nn.Module, epoch: int | None) -> None:
        """Take the present state for good: that after ``epoch`` (from 0), or before training."""
        state = module.state_dict()
        self._state = {name: value.detach().to("cpu", copy=True) for name, value in state.items()}
        self.epoch = epoch

    def restore(self, module: nn.Module) -> str:
        """Give the module that state again; returns which one it is, in words."""
        module.load_state_dict(self._state)
        if self.epoch is None:
            return "those before this training"
        return f"those at the end of epoch {self.epoch + 1}"


@contextmanager
def weights_kept_on_error(module: nn.Module) -> Iterator[None]:
    """Give a module the weights again that it had, if training fails.

    Half-trained weights would pass for those of a finished first phase. Where training diverged
    the module has its last good weights already.
    """
    before = GoodWeights(module)
    try:
        yield
    except TrainingDivergedError:
        module.eval()
        raise
    except BaseException:  # an interruption too
        before.restore(module)
        module.eval()
        raise


def diverged_weights(module: nn.Module) -> str | None:
    """Name of the first parameter that is not finite; ``None`` if all are."""
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            return name
    return None


class ResumableCheckpoint(Checkpoint):
    """Write the state of training after each epoch, and remove the file when training has ended.

    The file is replaced as a whole: killed while writing, the one before is there.
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

    A checkpoint of a training with other epochs, cells or processes is an error.
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


def _planned(trainer: Any) -> dict[str, int | str]:
    # A schedule of the learning rate, and phases, are laid out over these.
    return {
        "lr_schedule": str(trainer.lightning_module.lr_schedule),
        "max_epochs": int(trainer.max_epochs or 0),
        "n_training_cells": len(trainer.datamodule.train_idx),
        "sum_of_their_positions": int(sum(trainer.datamodule.train_idx)),
        "n_processes": int(trainer.world_size),
    }


def forget_stopping_score(trainer: Trainer) -> None:
    """Make early stopping begin anew: no best score, no epochs waited for a better one.

    Scores of the dense phase are no measure for the phase with masks, which have a price.
    """
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
