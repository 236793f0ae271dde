"""Lets held-out cells decide when a stage of training ends, and keeps the best weights."""

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
    "Held-out cells cannot decide when training ends, as the split has no validation cells. Pass a "
    "`train_size` below 1, or `max_epochs` with another `lr_schedule`."
)
_SCORE = ("reconstruction_loss_validation", "kl_z_basal_validation", "kl_responses_validation")
"""Minus a bound on the log-likelihood of a cell, given what was learned. Without the global
divergences that are in ``elbo_validation``: held-out cells owe no share of them."""
_KEY = "scvi_sams_held_out"


class HeldOutCells:
    """What validation cells have said so far in a training, and the weights that they liked best.

    Parameters
    ----------
    module
        That is trained.
    trainer
        Whose ``max_epochs`` is the ceiling, and whose data module has validation cells.
    first
        Stage that training begins with.

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
        """Whether there is a score that was not judged yet; not all epochs need to have one."""

    def judge(self, module: nn.Module, trainer: Trainer) -> Stage | None:
        """Take the score of this epoch; returns the stage that ends with it, if one does.

        The module then has the best weights again, and the trainer stops if it was the last stage.
        """
        if not self.is_scored:
            return None
        self.is_scored = False
        score = float(sum(trainer.callback_metrics.get(name, 0) for name in _SCORE))
        # All processes must come to the same decision.
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
        """Hold the present weights for the best ones, until there is a better score."""
        self._best.keep(module, epoch)

    def restore_best(self, module: nn.Module) -> None:
        """Give the module its best weights again, if any score was a number so far."""
        if self._best.epoch is not None:
            self._best.restore(module)

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Add the state to a checkpoint."""
        checkpoint[_KEY] = {"length": asdict(self.length), "best": vars(self._best)}

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the state in a checkpoint."""
        self.length = TrainingLength(**checkpoint[_KEY]["length"])
        vars(self._best).update(checkpoint[_KEY]["best"])
