"""Sums of expression over the cells of each perturbation and combination, in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from scvi_sams.module._combinations import Combinations
from scvi_sams.module._direct_effects import DirectEffects
from scvi_sams.module._minibatch import CellBatch
from scvi_sams.module._perturbation_module import PerturbationModule

TARGET_SUM = 1e4
"""Total to which counts are scaled where their logarithms are averaged, as in reported effects."""


class Cells(NamedTuple):
    """Input for decoding cells: one row per cell and group that contains it."""

    group: Tensor
    """Row of the direct effects, or of controls beyond them, ``(N,)``."""
    codes: Tensor
    effects: Tensor
    """Rows of effects, ``(N, K)``, as for the next: those of the group's perturbation first."""
    doses: Tensor
    contexts: Tensor
    """``(N,)``; zeros if none are registered."""
    covariates: Tensor
    """``(N, C)``; without columns if there are none."""
    size: Tensor


@dataclass
class GeneSums:
    """Sums over the cells of each group: R rows of the direct effects, and then the controls.

    Controls are all of them, and with C contexts those of each context.

    Attributes
    ----------
    n_rows
        R.
    cells
        The cells.
    n
        Their number, ``(R + 1 + C,)``.
    size
        Sum of their sizes, ``(R + 1 + C,)``; for a normal likelihood their number.
    x, logged
        Sums of expression and of ``log2(1 + TARGET_SUM * x / size)``, ``(R + 1 + C, G)``; the
        second without columns if expression is not counts.
    products
        Sums of the products of expression, logged expression and size with each other, over all
        cells, over controls, and over those of each context, ``(2 + C, 3, 3, G)``.
    """

    n_rows: int
    cells: Cells
    n: Tensor
    size: Tensor
    x: Tensor
    logged: Tensor
    products: Tensor

    def __add__(self, other: GeneSums) -> GeneSums:
        """Sums over the cells of both."""
        sums = (mine + theirs for mine, theirs in zip(self.totals(), other.totals(), strict=True))
        return GeneSums(self.n_rows, _joined([self.cells, other.cells]), *sums)

    def totals(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Numbers that add up over cells, and over processes."""
        return self.n, self.size, self.x, self.logged, self.products

    @property
    def has_controls(self) -> bool:
        """Whether there are control cells to compare with."""
        return bool(self.n[self.n_rows] > 0)

    def of(self, rows: Tensor, context: int | None) -> GeneSums:
        """Sums of some rows, and of all controls or those of a context."""
        control = 0 if context is None else 1 + context
        chosen = torch.cat([rows, torch.tensor([self.n_rows + control])])
        n, size, x, logged = (v[chosen] for v in (self.n, self.size, self.x, self.logged))
        products = self.products[[0, 1 + control]]
        return GeneSums(len(rows), self.cells, n, size, x, logged, products)


def cells_of(
    module: PerturbationModule, trainer: Trainer, loader: Iterable[dict[str, Tensor]]
) -> Iterator[CellBatch]:
    """Read the cells of a data loader, on the training device."""
    for batch in loader:
        yield module.read_batch(trainer.strategy.batch_to_device(batch, device=module.device))


def total_over_processes(values: Tensor, trainer: Trainer) -> Tensor:
    """Sum over processes, on the CPU."""
    on_device = values.clone().to(trainer.strategy.root_device)
    return trainer.strategy.reduce(on_device, reduce_op="sum").cpu()


def gene_sums(
    batches: Iterable[CellBatch],
    tables: DirectEffects,
    stands_alone: Tensor,
    *,
    is_count: bool,
    n_contexts: int = 0,
) -> GeneSums:
    """Read cells and compute their sums.

    Parameters
    ----------
    batches
        Cells.
    tables
        Direct effects; measured combinations, and perturbations in contexts, are groups.
    stands_alone
        Whether a perturbation has cells with it alone, ``(T,)``. If so only these are used,
        otherwise all cells with it.
    is_count
        Whether expression is counts.
    n_contexts
        C.
    """
    n_groups, n_genes = tables.n_rows + 1 + n_contexts, tables.n_genes
    n, size = torch.zeros(n_groups), torch.zeros(n_groups)
    x = torch.zeros(n_groups, n_genes)
    logged = torch.zeros(n_groups, n_genes if is_count else 0)
    products = torch.zeros(2 + n_contexts, 3, 3, n_genes, dtype=torch.float64)
    kept = []
    for batch in batches:
        cells, groups, slots = (part.cpu() for part in _members(batch, tables, stands_alone))
        values = batch.x.cpu()
        sizes = batch.size.cpu() if is_count else torch.ones(len(values))
        logs = torch.log2(1 + values * (TARGET_SUM / sizes[:, None])) if is_count else values
        n.index_add_(0, groups, torch.ones(len(groups)))
        size.index_add_(0, groups, sizes[cells])
        x.index_add_(0, groups, values[cells])
        if is_count:
            logged.index_add_(0, groups, logs[cells])
        cell = values.double(), logs.double(), sizes.double()
        is_control = (batch.codes < 0).all(dim=1).cpu()
        products[0] += _products(*cell)
        products[1] += _products(*(part[is_control] for part in cell))
        if batch.contexts is not None:
            where = torch.where(is_control, batch.contexts.cpu(), -1)
            for context in where[is_control].unique().tolist():
                products[2 + context] += _products(*(part[where == context] for part in cell))
        kept.append(_described(batch, sizes, cells, groups, slots))
    return GeneSums(tables.n_rows, _joined(kept), n, size, x, logged, products)


def _products(x: Tensor, logged: Tensor, size: Tensor) -> Tensor:
    """Sums over cells of products of pairs of ``x``, ``logged`` and ``size``, ``(3, 3, G)``.

    Each pair once: ``einsum`` over the three stacked takes more than twice as long.
    """
    sums = x.new_empty(3, 3, x.shape[1])
    sums[0, 0] = (x * x).sum(dim=0)
    sums[1, 1] = (logged * logged).sum(dim=0)
    sums[2, 2] = size @ size
    sums[0, 1] = sums[1, 0] = (x * logged).sum(dim=0)
    sums[0, 2] = sums[2, 0] = size @ x
    sums[1, 2] = sums[2, 1] = size @ logged
    return sums


def _members(
    batch: CellBatch, tables: DirectEffects, stands_alone: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cells and the groups that contain them, and the slot of the perturbation."""
    carried = batch.codes >= 0
    counts = carried.sum(dim=1)
    alone = stands_alone.to(batch.codes.device)[batch.codes.clamp(min=0)]
    speaks = carried & ((counts == 1)[:, None] | ~alone)
    cells, slots = speaks.nonzero(as_tuple=True)
    combinations = tables.measured.rows_of(Combinations.of_cells(batch.codes, batch.doses))
    combinations = combinations.to(batch.codes)
    together = (combinations >= 0).nonzero(as_tuple=True)[0]
    controls = (counts == 0).nonzero(as_tuple=True)[0]
    members = [
        (cells, batch.codes[cells, slots], slots),
        (together, tables.n_perturbations + combinations[together], torch.zeros_like(together)),
        (controls, torch.full_like(controls, tables.n_rows), torch.zeros_like(controls)),
    ]
    if batch.contexts is not None:
        pairs = tables.rows_of_pairs(batch.effects)
        within, place = ((pairs >= 0) & (counts == 1)[:, None]).nonzero(as_tuple=True)
        members.append((within, pairs[within, place], place))
        of_contexts = tables.n_rows + 1 + batch.contexts[controls]
        members.append((controls, of_contexts, torch.zeros_like(controls)))
    found, groups, places = (torch.cat(column) for column in zip(*members, strict=True))
    return found, groups, places


def _described(
    batch: CellBatch, sizes: Tensor, cells: Tensor, groups: Tensor, slots: Tensor
) -> Cells:
    codes, effects, doses = (
        values.cpu()[cells] for values in (batch.codes, batch.effects, batch.doses)
    )
    rows = torch.arange(len(cells))
    for values in (codes, effects, doses):  # the perturbation of the group comes first
        first = values[rows, slots].clone()
        values[rows, slots] = values[:, 0].clone()
        values[:, 0] = first
    covariates = codes.new_zeros(len(batch.x), 0) if batch.covariates is None else batch.covariates
    contexts = torch.zeros_like(cells) if batch.contexts is None else batch.contexts.cpu()[cells]
    return Cells(groups, codes, effects, doses, contexts, covariates.cpu()[cells], sizes[cells])


def _joined(parts: list[Cells]) -> Cells:
    return Cells(*(torch.cat(column) for column in zip(*parts, strict=True)))


def evenly_in_group(cells: Cells, group: int, n_samples: int) -> Tensor:
    """Positions of cells of a group, evenly spaced; of all cells if it has none."""
    used = (cells.group == group).nonzero(as_tuple=True)[0]
    used = used if len(used) else torch.arange(len(cells.group))
    return used[torch.linspace(0, len(used) - 1, n_samples).long()]


def sample_of_groups(
    cells: Cells, n_groups: int, n_samples: int, generator: torch.Generator
) -> Iterator[tuple[int, Tensor]]:
    """Yield groups with cells, and positions of cells sampled in proportion to their sizes."""
    order = cells.group.argsort(stable=True)
    counts = torch.bincount(cells.group, minlength=n_groups).tolist()
    start = 0
    for group, count in enumerate(counts):
        members = order[start : start + count]
        start += count
        if count:
            # Evenly spaced, so that cells of the same size are used equally often.
            ends = cells.size[members].double().cumsum(0)
            points = (torch.arange(n_samples) + 0.5) * (ends[-1] / n_samples)
            drawn = torch.searchsorted(ends, points)[torch.randperm(n_samples, generator=generator)]
            yield group, members[drawn]
