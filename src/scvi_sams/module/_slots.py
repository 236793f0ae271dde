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
        ``(B, K)``, for example dosages; 1 by default.

    Returns
    -------
    ``(P, B, D)``.
    """
    n_particles, n_rows, n_columns = table.shape
    rows = table.transpose(0, 1).reshape(n_rows, n_particles * n_columns)
    if weights is None:
        weights = torch.ones_like(slots, dtype=table.dtype)
    return sum_of_rows(rows, slots, weights).view(-1, n_particles, n_columns).transpose(0, 1)


def sum_of_rows(rows: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """:func:`sum_over_slots` for rows ``(R, W)`` that hold all particles; returns ``(B, W)``."""
    if not len(rows):
        return rows.sum(0).expand(len(slots), -1)  # zeros, and still a function of the rows
    is_empty = slots == len(rows)
    dtype = torch.promote_types(rows.dtype, weights.dtype)
    return functional.embedding_bag(
        slots.masked_fill(is_empty, 0),
        rows.to(dtype),
        per_sample_weights=weights.to(dtype).masked_fill(is_empty, 0),
        mode="sum",
    )
