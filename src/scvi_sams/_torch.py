"""What depends on the device, and random numbers that leave the user's random state alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from scvi_sams.exceptions import SAMSError


def is_accelerator(device: torch.device) -> bool:
    """Whether work should be few large operations whose sizes are known without asking the device.

    On a CPU small pieces that stay in its cache, and loops compiled for them, are faster.
    """
    return device.type != "cpu"


def check_single_precision() -> None:
    """Raise an error if new tensors would be of another precision than the models compute in."""
    if torch.get_default_dtype() != torch.float32:
        raise SAMSError(
            f"torch.get_default_dtype() is {torch.get_default_dtype()}, and models compute in "
            "single precision. Call torch.set_default_dtype(torch.float32)."
        )


class _Source:
    """Generators of one seed, one per device."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


# A context variable has a value of its own in every thread.
_SOURCE: ContextVar[_Source | None] = ContextVar("source of random numbers", default=None)


def generator(device: torch.device) -> torch.Generator | None:
    """What random numbers are drawn from: that of :func:`fixed_seed`, or else the global one."""
    source = _SOURCE.get()
    return None if source is None else source.on(device)


@contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """Draw from generators of a seed inside the block, wherever :func:`generator` is asked for.

    The global generator, which other threads draw from, is left alone.
    """
    token = _SOURCE.set(_Source(seed))
    try:
        yield
    finally:
        _SOURCE.reset(token)


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Seed the global generator inside the block, and restore it; for what asks for no other."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
