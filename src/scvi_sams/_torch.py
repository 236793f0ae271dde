"""What depends on the device, and random numbers that leave the user's random state alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
