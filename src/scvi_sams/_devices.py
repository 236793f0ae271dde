"""What a device is good at."""

from __future__ import annotations

import torch


def is_accelerator(device: torch.device) -> bool:
    """Whether work should be few large operations whose sizes are known without asking the device.

    On a processor small pieces that stay in its cache, and loops compiled for them, are faster.
    """
    return device.type != "cpu"
