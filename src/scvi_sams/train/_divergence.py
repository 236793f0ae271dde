"""A clear stop where training diverges, with the last good weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from scvi_sams.exceptions import TrainingDivergedError


class GoodWeights:
    """The last state of a module that is known to be good, in the memory of the CPU."""

    def __init__(self, module: nn.Module) -> None:
        self.keep(module, None)

    def keep(self, module: nn.Module, epoch: int | None) -> None:
        """Take the present state for good: that at the end of ``epoch`` (from 0), if of one."""
        state = module.state_dict()
        self._state = {name: value.detach().to("cpu", copy=True) for name, value in state.items()}
        self._epoch = epoch

    def restore(self, module: nn.Module) -> str:
        """Give the module that state again; returns which one it is, in words."""
        module.load_state_dict(self._state)
        if self._epoch is None:
            return "those before this training"
        return f"those at the end of epoch {self._epoch + 1}"

    @property
    def are_of_an_epoch(self) -> bool:
        """Whether the state is one of this training, not the one before it."""
        return self._epoch is not None


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
