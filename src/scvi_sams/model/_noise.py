"""Random numbers of single cells or perturbations, independent of what else is requested."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from scvi_sams._torch import fixed_seed, generator, is_accelerator
from scvi_sams.module._effect_rows import EffectRows
from scvi_sams.module._likelihoods import Likelihood

_PERTURBATIONS_PER_BLOCK = 64
"""Rows of a block, which are always sampled together."""

# Constants of splitmix64 (Steele, Lea & Flood 2014): a step, and two factors that mix bits.
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_HALF = 2**32


def new_seed() -> int:
    """Sample the seed of a call, from the global generator or that of ``fixed_seed``."""
    return int(torch.randint(2**62, (), generator=generator(torch.device("cpu"))))


def derived_seed(seed: int, number: int) -> int:
    """Derive another seed, one for each number."""
    bits = (seed + (number + 1) * _STEP) % 2**64
    bits = (bits ^ (bits >> 30)) * _FIRST % 2**64
    bits = (bits ^ (bits >> 27)) * _SECOND % 2**64
    return (bits ^ (bits >> 31)) >> 2


def number_of(content: bytes) -> int:
    """A number for some content, the same in each process."""
    return int.from_bytes(hashlib.sha256(content).digest()[:7])


def by_blocks(
    draw: Callable[[Tensor], Sequence[Tensor]], rows: Tensor, table: EffectRows, seed: int
) -> list[Tensor]:
    """Sample ``rows`` of a table, ascending, independently of what else is requested.

    ``draw`` returns arrays ``(n_draws or 1, R, ...)`` for given perturbations. It is called for
    whole blocks, each with its own seed. All rows of a perturbation are in one block, so that
    contexts have the same samples of shared effects.
    """
    if not len(rows):
        return list(draw(rows))
    n_rows = _PERTURBATIONS_PER_BLOCK * table.per_perturbation
    block_of_row = rows // n_rows
    parts = []
    for block in torch.unique(block_of_row).tolist():
        start = block * n_rows
        stop = min(start + n_rows, len(table))
        with fixed_seed(derived_seed(seed, block)):
            drawn = draw(torch.arange(start, stop, device=rows.device))
        chosen = rows[block_of_row == block] - start
        parts.append([values[:, chosen] for values in drawn])
    return [torch.cat(values, dim=1) for values in zip(*parts, strict=True)]


def keys_of_cells(names: pd.Index, positions: np.ndarray) -> np.ndarray:
    """A number for each of some cells: from its name, and how often the name occurred before."""
    keys = pd.util.hash_array(np.asarray(names[positions], dtype=object))
    if not names.is_unique:
        keys = keys + pd.Series(names).groupby(names).cumcount().to_numpy(np.uint64)[positions]
    repeat = pd.Series(positions).groupby(positions).cumcount().to_numpy(np.uint64)
    return (keys + repeat * np.uint64(_SECOND)).view(np.int64)


class CellNoise:
    """Normal random numbers and seeds of cells, from a number of each.

    They are a hash of the seed, that number and the place in the result (a counter-based generator,
    as in Salmon et al. 2011), so that numbers of some cells can be computed at once, in any order,
    on any device.
    """

    def __init__(self, seed: int, keys: np.ndarray, device: torch.device) -> None:
        self._keys = _mixed(seed + torch.as_tensor(keys, device=device) * _signed(_STEP))

    def normals(self, place: np.ndarray, n_draws: int, n_columns: int, first: int = 0) -> Tensor:
        """Standard normals ``(n_draws, len(place), n_columns)``, starting at sample ``first``."""
        keys = self._keys[torch.as_tensor(place, device=self._keys.device)]
        numbers = torch.arange(
            1 + first * n_columns, 1 + (first + n_draws) * n_columns, device=keys.device
        ).view(n_draws, 1, n_columns)
        bits = _mixed(keys[:, None] + numbers * _signed(_STEP))
        # Box-Muller: one normal from two uniform numbers of 32 bits each.
        radius = ((bits >> 32) & (_HALF - 1)).float().add_(0.5).mul_(1 / _HALF).log_()
        angle = (bits & (_HALF - 1)).float().mul_(2 * math.pi / _HALF).cos_()
        return radius.mul_(-2).sqrt_().mul_(angle)

    def seeds(self, place: np.ndarray, number: int) -> list[int]:
        """Seeds of cells, different for each number."""
        keys = self._keys[torch.as_tensor(place, device=self._keys.device)]
        return (_mixed(keys + derived_seed(0, number)) & (2**62 - 1)).tolist()


def sample_of_cells(
    likelihood: Likelihood, logits: Tensor, size: Tensor, seeds: list[int]
) -> Tensor:
    """Sample expression ``(n_draws, n_cells, n_genes)``, cell by cell with separate seeds.

    An accelerator samples all cells at once, with the seed of the first.
    """
    if is_accelerator(logits.device):
        with fixed_seed(seeds[0]):
            return likelihood.sample(logits, size)
    drawn = []
    for cell, seed in enumerate(seeds):
        with fixed_seed(seed):
            drawn.append(likelihood.sample(logits[:, cell : cell + 1], size[cell : cell + 1]))
    return torch.cat(drawn, dim=1)


def _mixed(bits: Tensor) -> Tensor:
    """Mix 64 bits so that each of them depends on all, as splitmix64 does."""
    bits = (bits ^ _shifted(bits, 30)) * _signed(_FIRST)
    bits = (bits ^ _shifted(bits, 27)) * _signed(_SECOND)
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, n: int) -> Tensor:
    """Logical shift to the right; the sign bit is treated like any other bit."""
    return (bits >> n) & (2 ** (64 - n) - 1)


def _signed(bits: int) -> int:
    return bits - 2**64 if bits >= 2**63 else bits
