"""Early ends of training: Ctrl-C, divergence, the end of a stage."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from scvi_sams.exceptions import TrainingDivergedError

logger = logging.getLogger("scvi.sams")


class _Raise:
    """Effect of Ctrl-C in :func:`interrupts_raise`."""

    is_interrupted = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.is_interrupted = True
        raise KeyboardInterrupt


def _meaning_of_ctrl_c() -> Any:
    """Handler of Ctrl-C, Python's or ours; ``None`` for other handlers or other threads."""
    if threading.current_thread() is not threading.main_thread():
        return None
    handler = signal.getsignal(signal.SIGINT)
    is_known = handler is signal.default_int_handler or isinstance(handler, _Raise)
    return handler if is_known else None


class StopOnInterrupt(Callback):
    """End training after the current step at the first Ctrl-C; immediately at the second.

    Lightning itself would exit the whole program, and ignore Ctrl-C afterwards. With several
    processes, which would have to stop at the same step, or if Ctrl-C has another handler, nothing
    is changed. In :func:`interrupts_raise` the program continues where that block ends. (Raising an
    error in the current step could interrupt numba while it compiles a loop, which would then fail
    until the process ends.)
    """

    def __init__(self) -> None:
        self._before: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Set the handler of Ctrl-C."""
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
                "again to end immediately, with the weights before this training."
            )

        self._before = signal.signal(signal.SIGINT, stop)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the handler of Ctrl-C."""
        before = self._before
        self._give_back()
        if isinstance(before, _Raise) and before.is_interrupted:
            raise KeyboardInterrupt

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restore the handler of Ctrl-C."""
        self._give_back()

    def _give_back(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None


@contextmanager
def interrupts_raise() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` at Ctrl-C in a block, in training after the current step.

    Use this for loops over trainings: an interrupted training must not count as finished, and the
    loop must end. Code in the block may catch the interrupt (Lightning turns it into an exit) or
    convert it to another error: it is raised again at the end of the block. In a thread that does
    not receive Ctrl-C, or with another handler, nothing is changed.

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
        signal.signal(signal.SIGINT, before)  # Lightning makes Ctrl-C ignored from then on
    if interrupt.is_interrupted:
        raise KeyboardInterrupt


class GoodWeights:
    """The last good state of a module, in CPU memory."""

    def __init__(self, module: nn.Module) -> None:
        self.keep(module, None)

    def keep(self, module: nn.Module, epoch: int | None) -> None:
        """Keep the current state as good: after ``epoch`` (from 0), or before training."""
        state = module.state_dict()
        self._state = {name: value.detach().to("cpu", copy=True) for name, value in state.items()}
        self.epoch = epoch

    def restore(self, module: nn.Module) -> str:
        """Restore that state; returns a description of it."""
        module.load_state_dict(self._state)
        if self.epoch is None:
            return "those before this training"
        return f"those at the end of epoch {self.epoch + 1}"


@contextmanager
def weights_kept_on_error(module: nn.Module) -> Iterator[None]:
    """Restore the previous weights of a module if training fails.

    Half-trained weights would look like those of a finished dense phase. If training diverged, the
    module already has its last good weights.
    """
    before = GoodWeights(module)
    try:
        yield
    except TrainingDivergedError:
        module.eval()
        raise
    except BaseException:  # including interrupts
        before.restore(module)
        module.eval()
        raise


def diverged_weights(module: nn.Module) -> str | None:
    """Name of the first parameter that is not finite; ``None`` if all are."""
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            return name
    return None


def forget_stopping_score(trainer: Trainer) -> None:
    """Reset early stopping: no best score, no epochs without improvement.

    Scores of the dense phase are not comparable with those of the phase with masks, which include
    the KL term of masks.
    """
    for callback in _callbacks(trainer):
        if isinstance(callback, EarlyStopping):
            worst = float("inf") if callback.mode == "min" else -float("inf")
            callback.best_score = torch.tensor(worst)
            callback.wait_count = 0


def forget_best_states(trainer: Trainer) -> None:
    """Reset checkpoints, and learning rate schedules that wait for a better score.

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
