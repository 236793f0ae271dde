"""A mini-batch: its cells, the perturbations that occur in it, and chunks that fit into a cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from scvi_sams import _torch as _devices

_VALUES_PER_CHUNK = 2**19
"""Two megabytes in float32, the whole mini-batch of a small screen. Half of it was 4 to 8 % slower
in a whole training step, an eighth 10 to 20 %, because matrix products then have few rows."""


class CellBatch(NamedTuple):
    """A mini-batch of cells as input of the module."""

    x: Tensor
    """Expression, ``(B, G)``."""
    codes: Tensor
    """Perturbations, ``(B, K)``, -1 where a slot is empty."""
    doses: Tensor
    """Dosages, ``(B, K)``, 0 where a slot is empty."""
    covariates: Tensor | None
    """Batch and covariates, ``(B, C)``."""
    size: Tensor
    """Observed library size, or the registered size factor, ``(B,)``."""
    guides: Tensor | None = None
    """Guides, ``(B, K)``, -1 where a slot is empty; ``None`` if none are registered."""
    rows: Tensor | None = None
    """Rows of the effects of the perturbations in the cell's context, ``(B, K)``, -1 where a slot
    is empty; ``None`` if no contexts are registered."""
    contexts: Tensor | None = None
    """Context codes, ``(B,)``; ``None`` if none are registered."""

    @property
    def effects(self) -> Tensor:
        """Rows of effects (:class:`EffectRows`): without contexts the codes, ``(B, K)``."""
        return self.codes if self.rows is None else self.rows

    def carrying(self, carried: Tensor) -> CellBatch:
        """The same cells with only the ``carried`` perturbations, booleans ``(B, K)``."""
        return self._replace(
            codes=torch.where(carried, self.codes, -1),
            doses=self.doses * carried,
            rows=None if self.rows is None else torch.where(carried, self.rows, -1),
        )


class CovariateEncoding(nn.Module):
    """Batch and further covariates as one numeric vector per cell; a single batch adds nothing.

    ``n_categories`` are those of every categorical covariate. Contexts are a covariate too:
    otherwise latent dimensions encoded the cell type, and effects were curved along them. A context
    that is none of the ``n_contexts`` is the average of all.
    """

    def __init__(
        self, n_batch: int, n_categories: list[int], n_continuous: int, n_contexts: int = 0
    ) -> None:
        super().__init__()
        self.category_counts = ([n_batch] if n_batch > 1 else []) + list(n_categories)
        self.category_counts += [n_contexts] if n_contexts else []
        self.n_contexts = n_contexts
        self.uses_batch = n_batch > 1
        self.n_out = sum(self.category_counts) + n_continuous

    def forward(
        self,
        batch: Tensor,
        categorical: Tensor | None,
        continuous: Tensor | None,
        contexts: Tensor | None = None,
    ) -> Tensor | None:
        """Return ``(n_cells, n_out)``, or ``None`` without covariates."""
        if not self.n_out:
            return None
        columns = [batch] if self.uses_batch else []
        if categorical is not None:
            columns += list(torch.split(categorical, 1, dim=1))
        parts = [
            functional.one_hot(column.squeeze(1).long(), count).float()
            for column, count in zip(columns, self.category_counts, strict=False)
        ]
        if self.n_contexts:
            known = torch.eye(self.n_contexts + 1, self.n_contexts, device=batch.device)
            known[-1] = 1 / self.n_contexts
            if contexts is None:
                contexts = torch.full_like(batch, self.n_contexts)
            parts.append(known[contexts.long().squeeze(1)])
        if continuous is not None:
            parts.append(continuous.float())
        return torch.cat(parts, dim=1)

    def in_batch(self, covariates: Tensor | None, batch: int | None) -> Tensor | None:
        """Covariates of the same cells in one batch; ``None``: each cell in its own batch."""
        if batch is None or covariates is None or not self.uses_batch:
            return covariates
        n_batch = self.category_counts[0]
        moved = covariates.clone()
        moved[:, :n_batch] = functional.one_hot(torch.tensor(batch), n_batch).to(moved)
        return moved


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
        The distinct perturbations, ascending, ``(R,)``. On an accelerator, reading their number
        would require synchronisation: there ``R`` is the largest possible, ``min(T, B K)``, and
        unused rows fill the end.
    slots
        Position of every code in ``rows``, ``(B, K)``; R where a slot is empty.
    """
    if not _devices.is_accelerator(codes.device):
        rows = torch.unique(codes[codes >= 0])
        return rows, positions_in(rows, codes)
    if n_perturbations <= codes.numel():
        rows = torch.arange(n_perturbations, device=codes.device)
        return rows, torch.where(codes < 0, n_perturbations, codes)
    is_empty = codes < 0
    # Empty slots come last, like one more perturbation, whose row is never read.
    ordered, order = torch.where(is_empty, n_perturbations, codes).flatten().sort()
    is_first = torch.ones_like(ordered)
    is_first[1:] = ordered[1:] != ordered[:-1]
    place = is_first.cumsum(0) - 1
    # Equal codes write the same number to the same position.
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
        ``(B, K)``; R stands for an empty slot and adds nothing.
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
    """:func:`sum_over_slots` for rows ``(R, W)`` with all particles; returns ``(B, W)``."""
    if not len(rows):
        return rows.sum(0).expand(len(slots), -1)  # zeros that still depend on the rows
    is_empty = slots == len(rows)
    dtype = torch.promote_types(rows.dtype, weights.dtype)
    return functional.embedding_bag(
        slots.masked_fill(is_empty, 0),
        rows.to(dtype),
        per_sample_weights=weights.to(dtype).masked_fill(is_empty, 0),
        mode="sum",
    )


def chunks_of_cells(x: Tensor) -> Iterator[slice]:
    """Split the cells of ``x``, shape ``(n_cells, n_genes)``.

    Passes over such a chunk, which fits into a cache, take half of the time of passes over the
    whole array. On an accelerator everything is one chunk.
    """
    n_cells, n_genes = x.shape
    if _devices.is_accelerator(x.device):
        yield slice(0, n_cells)
        return
    n_rows = max(1, _VALUES_PER_CHUNK // n_genes)
    for start in range(0, n_cells, n_rows):
        yield slice(start, min(start + n_rows, n_cells))


def chunks_of_particles(n_particles: int, device: torch.device) -> Iterator[slice]:
    """Split the particles: one by one, or on an accelerator all at once."""
    if _devices.is_accelerator(device):
        yield slice(0, n_particles)
        return
    for particle in range(n_particles):
        yield slice(particle, particle + 1)
