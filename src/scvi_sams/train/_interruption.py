"""Ctrl-C ends training as early stopping does."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

logger = logging.getLogger("scvi.sams")


class StopOnInterrupt(Callback):
    """End training after the running step at the first Ctrl-C; at a second one, at once.

    Lightning itself would end the whole program, and ignore Ctrl-C in what comes after. Where
    several processes train, which would have to stop at the same step, or Ctrl-C has another
    meaning already, it is left as it is.
    """

    def __init__(self) -> None:
        self._before: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take over Ctrl-C."""
        if (
            trainer.world_size > 1
            or threading.current_thread() is not threading.main_thread()
            or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        ):
            return

        def stop(number: int, frame: FrameType | None) -> None:
            trainer.should_stop = pl_module.is_interrupted = True
            signal.signal(signal.SIGINT, signal.default_int_handler)
            logger.warning(
                f"Interrupted: training ends in epoch {trainer.current_epoch + 1} of "
                f"{trainer.max_epochs}, with the weights as they are. Interrupt again to end at "
                "once, with those before this training."
            )

        self._before = signal.signal(signal.SIGINT, stop)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give Ctrl-C its meaning back."""
        self._give_back()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give Ctrl-C its meaning back."""
        self._give_back()

    def _give_back(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None
