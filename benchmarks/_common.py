"""What benchmarks share: how they print repeated measurements."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def with_spread(values: Iterable[float], digits: int = 2) -> str:
    """Median of repeated measurements, with the smallest and the largest of them."""
    found = np.asarray(list(values), dtype=float)
    middle, low, high = np.median(found), found.min(), found.max()
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def print_ratio(name: str, values: Iterable[float]) -> None:
    """Print a ratio on a line of its own, where ``all.py`` finds it."""
    print(f"ratio of {name}: {with_spread(values)}")
