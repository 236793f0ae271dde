"""What cells of each perturbation and combination say of genes, summed up in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from scvi_sams.module._direct_effects import DirectEffects
from scvi_sams.module._minibatch import CellBatch
from scvi_sams.module._perturbation_module import PerturbationModule

TARGET_SUM = 1e4
"""To which counts are scaled where their logarithms are averaged, as effects are reported."""


class Cells(NamedTuple):
    """What decoding needs to know of cells, one row per cell and group that it stands in."""

    group: Tensor
    """Row of the direct effects, or the number of rows for controls, ``(N,)``."""
    codes: Tensor
    doses: Tensor
    """``(N, K)``, those of the perturbation of the group first."""
    covariates: Tensor
    """``(N, C)``; without columns where there are none."""
    size: Tensor


@dataclass
class GeneSums:
    """Sums over the cells of each group: R rows of the direct effects, and last the controls.

    Attributes
    ----------
    cells
        Which they are.
    n
        Their number, ``(R + 1,)``.
    size
        Sum of their sizes, ``(R + 1,)``; of a normal likelihood their number.
    x, logged
        Sums of expression and of ``log2(1 + TARGET_SUM * x / size)``, ``(R + 1, G)``; the second
        without columns where expression is no count.
    products
        Sums of the products of expression, logged expression and size with one another, over all
        cells and over controls, ``(2, 3, 3, G)``.
    """

    cells: Cells
    n: Tensor
    size: Tensor
    x: Tensor
    logged: Tensor
    products: Tensor

    def __add__(self, other: GeneSums) -> GeneSums:
        """Sums over the cells of both."""
        sums = (mine + theirs for mine, theirs in zip(self.totals(), other.totals(), strict=True))
        return GeneSums(_joined([self.cells, other.cells]), *sums)

    def totals(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What adds up over cells, and over processes."""
        return self.n, self.size, self.x, self.logged, self.products

    @property
    def has_controls(self) -> bool:
        """Whether there are control cells to compare with."""
        return bool(self.n[-1] > 0)


def cells_of(
    module: PerturbationModule, trainer: Trainer, loader: Iterable[dict[str, Tensor]]
) -> Iterator[CellBatch]:
    """Read the cells of a data loader, on the device that trains."""
    for batch in loader:
        yield module.read_batch(trainer.strategy.batch_to_device(batch, device=module.device))


def total_over_processes(values: Tensor, trainer: Trainer) -> Tensor:
    """Sum over processes, on the CPU."""
    on_device = values.clone().to(trainer.strategy.root_device)
    return trainer.strategy.reduce(on_device, reduce_op="sum").cpu()


def gene_sums(
    batches: Iterable[CellBatch], tables: DirectEffects, stands_alone: Tensor, *, is_count: bool
) -> GeneSums:
    """Read cells and add up what they say.

    Parameters
    ----------
    batches
        Cells.
    tables
        Direct effects; its measured combinations have groups of their own.
    stands_alone
        Whether a perturbation has cells that carry nothing else, ``(T,)``. Such cells speak for it;
        otherwise all that carry it do.
    is_count
        Whether expression is counts.
    """
    n_groups, n_genes = tables.n_rows + 1, tables.n_genes
    n, size = torch.zeros(n_groups), torch.zeros(n_groups)
    x = torch.zeros(n_groups, n_genes)
    logged = torch.zeros(n_groups, n_genes if is_count else 0)
    products = torch.zeros(2, 3, 3, n_genes, dtype=torch.float64)
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
        triple = torch.stack([values, logs, sizes[:, None].expand_as(values)]).double()
        of_controls = triple[:, (batch.codes < 0).all(dim=1).cpu()]
        for place, some in enumerate((triple, of_controls)):
            products[place] += torch.einsum("ing,jng->ijg", some, some)
        kept.append(_described(batch, sizes, cells, groups, slots))
    return GeneSums(_joined(kept), n, size, x, logged, products)


def _members(
    batch: CellBatch, tables: DirectEffects, stands_alone: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cells and the groups in which they stand, and the slot that holds the perturbation."""
    carried = batch.codes >= 0
    counts = carried.sum(dim=1)
    alone = stands_alone.to(batch.codes.device)[batch.codes.clamp(min=0)]
    speaks = carried & ((counts == 1)[:, None] | ~alone)
    cells, slots = speaks.nonzero(as_tuple=True)
    combinations = tables.rows_of_cells(batch.codes, batch.doses, batch.codes)[0][:, 0]
    together = (combinations >= tables.n_perturbations).nonzero(as_tuple=True)[0]
    controls = (counts == 0).nonzero(as_tuple=True)[0]
    groups = [batch.codes[cells, slots], combinations[together]]
    return (
        torch.cat([cells, together, controls]),
        torch.cat([*groups, torch.full_like(controls, tables.n_rows)]),
        torch.cat([slots, torch.zeros_like(together), torch.zeros_like(controls)]),
    )


def _described(
    batch: CellBatch, sizes: Tensor, cells: Tensor, groups: Tensor, slots: Tensor
) -> Cells:
    codes, doses = batch.codes.cpu()[cells], batch.doses.cpu()[cells]
    rows = torch.arange(len(cells))
    for values in (codes, doses):  # the perturbation of the group comes first
        first = values[rows, slots].clone()
        values[rows, slots] = values[:, 0].clone()
        values[:, 0] = first
    covariates = codes.new_zeros(len(batch.x), 0) if batch.covariates is None else batch.covariates
    return Cells(groups, codes, doses, covariates.cpu()[cells], sizes[cells])


def _joined(parts: list[Cells]) -> Cells:
    return Cells(*(torch.cat(column) for column in zip(*parts, strict=True)))


def sample_of_groups(
    cells: Cells, n_groups: int, n_samples: int, generator: torch.Generator
) -> Iterator[tuple[int, Tensor]]:
    """Yield groups that have cells, and positions of cells drawn in proportion to their sizes."""
    order = cells.group.argsort(stable=True)
    counts = torch.bincount(cells.group, minlength=n_groups).tolist()
    start = 0
    for group, count in enumerate(counts):
        members = order[start : start + count]
        start += count
        if count:
            # Evenly spaced, so that no cell comes up twice as often as another of its size.
            ends = cells.size[members].double().cumsum(0)
            points = (torch.arange(n_samples) + 0.5) * (ends[-1] / n_samples)
            drawn = torch.searchsorted(ends, points)[torch.randperm(n_samples, generator=generator)]
            yield group, members[drawn]
