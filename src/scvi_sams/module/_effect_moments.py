"""Moments of masked effects with a network of the mask as posterior, computed once per weights.

The network is evaluated for sampled masks, only once for each distinct mask of a perturbation:
after training most masks are nearly certain, and a perturbation has few distinct ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scvi_sams.module._networks import EffectPosterior

_ROWS_PER_CHUNK = 32
"""Perturbations with samples in memory at once: 13 MB for 500 samples and 200 hidden units."""
_BITS_PER_WORD = 62


def moments_over_masks(
    effects: EffectPosterior, rows: Tensor, on: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """First and second moment of m * e, ``(R, L)`` each, in double precision.

    Masks are on where ``uniform``, ``(n_samples, 1, L)``, is below ``on``, ``(R, L)``.
    """
    chunks = zip(rows.split(_ROWS_PER_CHUNK), on.split(_ROWS_PER_CHUNK), strict=True)
    moments = [_of_chunk(effects, some, of_some, uniform) for some, of_some in chunks]
    mean, second = (torch.cat(parts) for parts in zip(*moments, strict=True))
    return mean, second


def _of_chunk(
    effects: EffectPosterior, rows: Tensor, on: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    drawn = (uniform < on).transpose(0, 1)
    place, sample, weight = _distinct(drawn)
    m = drawn[place, sample].to(on.dtype)
    q_e = effects(rows[place], m[None])
    # If an effect is large relative to its error, its variance is a small difference.
    loc, variance = q_e.loc[0].double(), q_e.variance[0].double()
    weighted = m * (weight / len(uniform))[:, None].double()
    mean, second = torch.zeros((2, *on.shape), dtype=torch.float64, device=on.device)
    mean.index_add_(0, place, weighted * loc)
    second.index_add_(0, place, weighted * (loc.square() + variance))
    return mean, second


def _distinct(masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, sample and number of each distinct mask in rows of ``(R, n_samples, L)`` booleans."""
    n_rows, n_samples, _ = masks.shape
    words = [
        (part.long() << torch.arange(part.shape[-1], device=masks.device)).sum(dim=-1)
        for part in masks.split(_BITS_PER_WORD, dim=-1)
    ]
    group = torch.arange(n_rows, device=masks.device)[:, None].expand(-1, n_samples).flatten()
    for word in words:
        # Combines the number of equal prefixes and this word into one number.
        of_word = word.flatten().unique(return_inverse=True)[1]
        group = (group * len(of_word) + of_word).unique(return_inverse=True)[1]
    counts = torch.bincount(group)
    where = torch.zeros_like(counts)
    where[group] = torch.arange(len(group), device=masks.device)
    return where // n_samples, where % n_samples, counts


class MomentsOfWeights:
    """Moments of requested perturbations, stored as long as the weights do not change.

    Weights are compared by value, with a copy: after any change, by training, loading or hand,
    moments are computed again. Copies of this object, including pickled ones, are empty.
    """

    def __init__(self) -> None:
        self._weights: list[Tensor] = []
        self._moments: tuple[Tensor, Tensor] | None = None
        self._is_known = torch.zeros(0, dtype=torch.bool)
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[MomentsOfWeights], tuple[Any, ...]]:
        """Copies are empty."""
        return type(self), ()

    def of(
        self,
        rows: Tensor,
        weights: Sequence[Tensor],
        like: Tensor,
        compute: Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return moments of ``rows`` of a table of the shape of ``like``.

        ``compute`` returns those of rows that are not stored for these ``weights``.
        """
        # Tensors made in inference mode could not be used outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if not self._are_same(weights):
                self._weights = [values.detach().clone() for values in weights]
                mean, second = torch.zeros((2, *like.shape), dtype=torch.float64).to(like.device)
                self._moments = mean, second
                self._is_known = torch.zeros(len(like), dtype=torch.bool, device=like.device)
            assert self._moments is not None
            new = rows[~self._is_known[rows]].unique()
            if len(new):
                for table, values in zip(self._moments, compute(new), strict=True):
                    table[new] = values
                self._is_known[new] = True
            mean, second = (table[rows] for table in self._moments)
            return mean, second

    def _are_same(self, weights: Sequence[Tensor]) -> bool:
        return len(weights) == len(self._weights) and all(
            now.device == before.device and torch.equal(now, before)
            for now, before in zip(weights, self._weights, strict=True)
        )
