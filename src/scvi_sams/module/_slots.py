"""Which perturbations a mini-batch needs, and where each cell finds its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def perturbations_of_batch(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Find the perturbations that occur in a mini-batch, so that only they are computed.

    Parameters
    ----------
    codes
        ``(B, K)``, -1 where a slot is empty.

    Returns
    -------
    rows
        The distinct perturbations, ascending, ``(R,)``.
    slots
        Position of every code in ``rows``, ``(B, K)``; R where a slot is empty.
    """
    rows = torch.unique(codes[codes >= 0])
    return rows, positions_in(rows, codes)


def positions_in(rows: Tensor, codes: Tensor) -> Tensor:
    """Position of every code in ascending ``rows``; ``len(rows)`` where a slot is empty."""
    slots = torch.searchsorted(rows, codes.clamp(min=0))
    return torch.where(codes < 0, len(rows), slots)


def sum_over_slots(table: Tensor, slots: Tensor, weights: Tensor | None = None) -> Tensor:
    """Add up rows for every cell: ``out[p, b] = sum_k weights[b, k] table[p, slots[b, k]]``.

    Parameters
    ----------
    table
        ``(P, R, D)``.
    slots
        ``(B, K)``; a value of R stands for an empty slot and adds nothing.
    weights
        ``(B, K)``, for example dosages.

    Returns
    -------
    ``(P, B, D)``.
    """
    padded = functional.pad(table, (0, 0, 0, 1))
    rows = padded[:, slots]
    if weights is not None:
        rows = rows * weights[..., None]
    return rows.sum(dim=2)
