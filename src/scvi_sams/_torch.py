"""Device-dependent choices, and random numbers that do not change the user's random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from scvi_sams.exceptions import SAMSError


def is_accelerator(device: torch.device) -> bool:
    """Whether to use few large operations whose sizes are known without synchronisation.

    On a CPU small pieces that fit into its cache, and compiled loops, are faster.
    """
    return device.type != "cpu"


def check_single_precision() -> None:
    """Raise if new tensors would not have the precision in which models compute."""
    if torch.get_default_dtype() != torch.float32:
        raise SAMSError(
            f"torch.get_default_dtype() is {torch.get_default_dtype()}, but models compute in "
            "single precision. Call torch.set_default_dtype(torch.float32)."
        )


class _Source:
    """Generators with the same seed, one per device."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


# A context variable has a separate value in every thread.
_SOURCE: ContextVar[_Source | None] = ContextVar("source of random numbers", default=None)


def generator(device: torch.device) -> torch.Generator | None:
    """Source of random numbers: that of :func:`fixed_seed`, otherwise the global generator."""
    source = _SOURCE.get()
    return None if source is None else source.on(device)


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Use generators with this seed inside the block, wherever :func:`generator` is called.

    The global generator, which other threads use, is not changed.
    """
    token = _SOURCE.set(_Source(seed))
    try:
        yield
    finally:
        _SOURCE.reset(token)


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed the global generator inside the block, and restore it; for code that requires it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
