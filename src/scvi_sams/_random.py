"""Random numbers that do not depend on, nor disturb, the user's random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fixed_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a generator of a fixed seed inside the block; restore the global one after it."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        if devices:
            torch.manual_seed(seed)
        else:
            # torch.manual_seed keeps a stack trace for GPUs to come, in 2 ms each time.
            torch.default_generator.manual_seed(seed)
        yield
