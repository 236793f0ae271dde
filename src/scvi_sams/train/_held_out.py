"""Use held-out cells to decide when a stage of training ends, and keep the best weights."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from scvi_sams.exceptions import InvalidSplitError
from scvi_sams.train._interruption import GoodWeights
from scvi_sams.train._length import Stage, TrainingLength

logger = logging.getLogger("scvi.sams")

NO_HELD_OUT_CELLS = (
    "Held-out cells cannot decide when training ends, because the split has no validation cells. "
    "Pass a `train_size` below 1, or `max_epochs` with another `lr_schedule`."
)
_SCORE = ("reconstruction_loss_validation", "kl_z_basal_validation", "kl_responses_validation")
"""Minus a bound on the log-likelihood of a cell, given the learned posterior. The global
divergences in ``elbo_validation`` are excluded, because training cells pay for them."""
_KEY = "scvi_sams_held_out"


class HeldOutCells:
    """Scores of validation cells so far in a training, and the weights with the best score.

    Parameters
    ----------
    module
        Module that is trained.
    trainer
        Its ``max_epochs`` is the upper limit, and its data module has validation cells.
    first
        First stage of training.

    Raises
    ------
    InvalidSplitError
        If there are no validation cells.
    """

    def __init__(self, module: nn.Module, trainer: Any, first: Stage) -> None:
        cells = getattr(trainer.datamodule, "val_idx", None)
        if cells is None or len(cells) == 0:
            raise InvalidSplitError(NO_HELD_OUT_CELLS)
        has_responses = getattr(module, "responses", None) is not None
        self.length = TrainingLength(int(trainer.max_epochs or 0), first, has_responses)
        self._best = GoodWeights(module)
        self.is_scored = False
        """Whether there is a new score to judge; not all epochs need to have one."""

    def judge(self, module: nn.Module, trainer: Trainer) -> Stage | None:
        """Take the score of this epoch; returns the stage that ends with it, if any.

        The module then has the best weights again, and training stops after the last stage.
        """
        if not self.is_scored:
            return None
        self.is_scored = False
        score = float(sum(trainer.callback_metrics.get(name, 0) for name in _SCORE))
        # All processes must make the same decision.
        score = trainer.strategy.broadcast(score)
        epoch = trainer.current_epoch
        outcome = self.length.observe(score, epoch + 1, trainer.global_step)
        if outcome.is_best:
            self._best.keep(module, epoch)
        if outcome.ended is not None:
            logger.info(self.length.reasons[-1])
            self.restore_best(module)
            trainer.should_stop |= self.length.stage == "over"
        return outcome.ended

    def begin_with(self, module: nn.Module, epoch: int) -> None:
        """Use the current weights as the best ones, until there is a better score."""
        self._best.keep(module, epoch)

    def restore_best(self, module: nn.Module) -> None:
        """Restore the best weights of the module, if any score was finite so far."""
        if self._best.epoch is not None:
            self._best.restore(module)

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Add the state to a checkpoint."""
        checkpoint[_KEY] = {"length": asdict(self.length), "best": vars(self._best)}

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Continue from the state in a checkpoint."""
        self.length = TrainingLength(**checkpoint[_KEY]["length"])
        vars(self._best).update(checkpoint[_KEY]["best"])
