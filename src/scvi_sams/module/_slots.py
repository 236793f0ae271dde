"""Which perturbations a mini-batch needs, and where each cell finds its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from scvi_sams import _torch as _devices


def perturbations_of_batch(codes: Tensor, n_perturbations: int) -> tuple[Tensor, Tensor]:
    """Find the perturbations that occur in a mini-batch, so that only they are computed.

    Parameters
    ----------
    codes
        ``(B, K)``, -1 where a slot is empty.
    n_perturbations
        T.

    Returns
    -------
    rows
        The distinct perturbations, ascending, ``(R,)``. An accelerator would have to be waited for
        to learn their number: there ``R`` is the most that there can be, ``min(T, B K)``, and rows
        that no cell asks for fill the end.
    slots
        Position of every code in ``rows``, ``(B, K)``; R where a slot is empty.
    """
    if not _devices.is_accelerator(codes.device):
        rows = torch.unique(codes[codes >= 0])
        return rows, positions_in(rows, codes)
    if n_perturbations <= codes.numel():
        rows = torch.arange(n_perturbations, device=codes.device)
        return rows, torch.where(codes < 0, n_perturbations, codes)
    return _padded_perturbations(codes, n_perturbations)


def _padded_perturbations(codes: Tensor, n_perturbations: int) -> tuple[Tensor, Tensor]:
    """Both for more perturbations than there are slots: as many rows as slots."""
    is_empty = codes < 0
    # Empty slots come last, as if they held one more perturbation, whose row nobody reads.
    ordered, order = torch.where(is_empty, n_perturbations, codes).flatten().sort()
    is_first = torch.ones_like(ordered)
    is_first[1:] = ordered[1:] != ordered[:-1]
    place = is_first.cumsum(0) - 1
    # Equal codes write the same number to the same place.
    rows = torch.zeros_like(ordered).scatter_(0, place, ordered).clamp_(max=n_perturbations - 1)
    slots = torch.empty_like(place).scatter_(0, order, place).view_as(codes)
    return rows, slots.masked_fill_(is_empty, len(rows))


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
