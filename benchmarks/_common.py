"""What benchmarks share: the conditions they state, and how they print repeated measurements."""

from __future__ import annotations

import atexit
import os
import platform
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import scvi_sams

_PACKAGES = ("torch", "scvi-tools", "anndata", "numba")


def print_conditions(threads: int | None = 1) -> None:
    """Set the threads of torch (``None``: its default); print date, machine, versions and load.

    The load average is printed again when the process ends: timings of a busy machine are rough.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    print(
        f"{time.strftime('%Y-%m-%d %H:%M')}, {_processor()}, {os.cpu_count()} cores, "
        f"threads of torch: {torch.get_num_threads()}\n"
        f"Python {platform.python_version()}, scvi-sams {scvi_sams.__version__}, {versions}\n"
        f"load average at start: {_load()}",
        flush=True,
    )
    atexit.register(_print_end, time.perf_counter(), time.process_time())


def with_spread(values: Iterable[float], digits: int = 2) -> str:
    """Median of repeated measurements, with the smallest and the largest of them."""
    found = np.asarray(list(values), dtype=float)
    middle, low, high = np.median(found), found.min(), found.max()
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def print_ratio(name: str, values: Iterable[float]) -> None:
    """Print a ratio on a line of its own, where ``all.py`` finds it."""
    print(f"ratio of {name}: {with_spread(values)}")


def _print_end(started: float, cpu_started: float) -> None:
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu_started
    print(f"load average at end: {_load()}; {wall:.0f} s, {cpu:.0f} CPU s of this process")


def _load() -> str:
    return ", ".join(f"{load:.2f}" for load in os.getloadavg())


def _processor() -> str:
    """Name of the processor, which Linux alone tells in a file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
