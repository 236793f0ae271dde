"""Direct effects on genes, and how far to believe the model: both in closed form.

The effect of perturbation t on gene g in its cells is ``observed``, that of its shift ``of_model``,
both on the scale on which effects are compared. What is found there is then written as a change of
the decoder's logits.

- A direct effect is what the model lacks, ``observed - of_model``, shrunken under a scale mixture
  of normals with a point mass at 0 (Stephens 2017): 0 but for genes on which the cells insist.
- Predictions of means are an average of three estimates of the effect (``_stacking.py``).
- Of a combination that was measured, what is shrunken is by how much it differs from the sum of
  its perturbations: where its cells are few, or say nothing else, the sum remains.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from scvi_sams._shrinkage import NormalMixture
from scvi_sams.data._field import registered_labels
from scvi_sams.module._direct_effects import COMPONENTS, DirectEffects, Residuals
from scvi_sams.module._perturbation_module import PerturbationModule
from scvi_sams.train._compared_scale import Scale
from scvi_sams.train._gene_sums import (
    Cells,
    GeneSums,
    cells_of,
    gene_sums,
    total_over_processes,
)
from scvi_sams.train._observed_effects import (
    Block,
    ObservedEffects,
    Total,
    expected_rates,
    over_processes,
)
from scvi_sams.train._shared_cells import effects_of_others, together_only
from scvi_sams.train._stacking import (
    PRIOR_INFLATION,
    Components,
    Priors,
    Start,
    components,
    inflation_of_variance,
    stacked,
    stacking_weights,
)

_MOST_SIGN_ERRORS = 0.05
"""Local false sign rate above which a direct effect is none: of the cells the model has explained
such small ones by their basal states, and it scored held-out cells .8 nats lower with them."""
_MOST_ENTRIES_OF_OWN_PRIORS = 2_000_000
"""Perturbations x genes up to which each perturbation has a prior of its own: beyond, fitting them
takes longer than a part of training, and one fitted to some of the rows serves all."""


@torch.no_grad()
def fit_direct_effects_of(module: PerturbationModule, trainer: Any) -> None:
    """Fit direct effects to the training and validation cells of a trainer, over all processes."""
    if module.direct is None:
        return
    data = trainer.datamodule
    labels = registered_labels(data.adata_manager)[data.train_idx]
    module.direct.measure(torch.tensor(labels.codes), torch.tensor(labels.doses))
    codes = labels.codes
    alone = codes[(codes >= 0).sum(axis=1) == 1].max(axis=1, initial=-1)
    stands_alone = np.bincount(alone, minlength=module.direct.n_perturbations) > 0
    loaders = [data.train_dataloader()]
    if len(data.val_idx):
        loaders.append(data.val_dataloader())
    likelihood = module.likelihood
    sums = [
        gene_sums(
            cells_of(module, trainer, loader),
            module.direct,
            torch.as_tensor(stands_alone),
            is_count=likelihood.is_count_likelihood,
        )
        for loader in loaders
    ]
    total = partial(total_over_processes, trainer=trainer)
    for part in sums:
        for values in part.totals():
            values.copy_(total(values))
    fit_direct_effects(module, *sums, total=total if trainer.world_size > 1 else None)
    for values in module.direct.buffers():
        values.copy_(trainer.strategy.broadcast(values))


def fit_direct_effects(
    module: PerturbationModule,
    training: GeneSums,
    held_out: GeneSums | None = None,
    *,
    total: Total | None = None,
) -> None:
    """Fill the tables of ``module.direct`` from training cells, and held-out ones where there are.

    The weights come from the training cells alone, scored on the held-out ones; effects then from
    all cells. Where there are several processes, ``total`` adds up their numbers: sums are those of
    all, the cells themselves those of the own process.
    """
    tables = module.direct
    if tables is None:
        return
    everything = training if held_out is None else training + held_out
    expected = expected_rates(module, everything.cells, tables.n_rows + 1)
    if total is not None:
        expected = over_processes(expected, everything.cells, total)

    def effects_in(sums: GeneSums) -> ObservedEffects:
        return ObservedEffects(
            sums,
            expected,
            module.cell_sizes.double().cpu().numpy(),
            module.likelihood,
            _responding(module, tables),
        )

    observed, halves = effects_in(everything), None
    # Where few cells are held out, all may have combinations of what others have alone.
    if held_out is not None and held_out.n.any() and tables.estimates_weights:
        halves = effects_in(training), effects_in(held_out)
    fit_rows = partial(_fit_rows, tables, observed, halves, fits_direct=module.fits_direct_effects)
    rows = range(tables.n_perturbations)
    singles, weights = fit_rows(rows, lambda *_: Start())
    tables.fill(singles, weights)
    together = together_only(everything.cells, tables.n_perturbations)
    if together.any():
        others = _in_the_same_cells(tables, observed, everything.cells, together)
        for effects in (observed, *(halves or ())):
            effects.others = others
        singles, weights = fit_rows(rows, lambda *_: Start())
        tables.fill(singles, weights)
    if tables.n_rows > tables.n_perturbations:
        # What the estimates of perturbations, which now are in the tables, do not explain.
        combinations, own_weights = fit_rows(
            range(tables.n_perturbations, tables.n_rows), partial(_sums_of_perturbations, tables)
        )
        joined = Residuals(*(torch.cat(parts) for parts in zip(singles, combinations, strict=True)))
        tables.fill(joined, weights, own_weights)


def _responding(module: PerturbationModule, tables: DirectEffects) -> np.ndarray | None:
    """Proportion of the cells of each row of the tables that respond, ``(R,)``."""
    if module.responses is None or not module.has_branches:
        return None
    of_combinations = module.responses.rates_of(tables.combinations)
    return torch.cat([module.responses.rates, of_combinations]).double().cpu().numpy()


def _fit_rows(
    tables: DirectEffects,
    observed: ObservedEffects,
    halves: tuple[ObservedEffects, ObservedEffects] | None,
    rows: range,
    start_of: Callable[[Block, Scale], Start],
    *,
    fits_direct: bool,
) -> tuple[Residuals, torch.Tensor]:
    """Estimate rows of the tables, and the weights of the :data:`COMPONENTS`.

    ``halves`` are the effects in training and in held-out cells.
    """
    priors = _shared_priors(tables, observed, rows, start_of)

    def of_block(block: Block) -> Components:
        return components(
            block, start_of(block, observed.scale), observed.scale, priors, fits_direct=fits_direct
        )

    weights, inflation = np.full(len(COMPONENTS), 1 / len(COMPONENTS)), PRIOR_INFLATION
    if halves is not None:
        weights = stacking_weights(*halves, rows, of_block)
        inflation = inflation_of_variance(*halves, rows, of_block, weights)
    blocks = [
        _residuals(
            tables,
            observed.scale,
            weights,
            inflation,
            block,
            start_of(block, observed.scale),
            of_block(block),
        )
        for block in observed.blocks(rows)
    ]
    joined = Residuals(*(torch.cat(column) for column in zip(*blocks, strict=True)))
    return joined, torch.as_tensor(weights, dtype=torch.float32)


def _in_the_same_cells(
    tables: DirectEffects, observed: ObservedEffects, cells: Cells, together: np.ndarray
) -> dict[int, np.ndarray]:
    """What others add to the logits in the cells of perturbations without cells of their own."""
    rows = np.flatnonzero(together)
    lacking = [
        observed.scale.log_change(block.observed) - block.of_model
        for row in rows.tolist()
        for block in observed.blocks(range(row, row + 1))
    ]
    everything = torch.arange(tables.n_perturbations, device=tables.weights.device)
    added = tables.of_rows(everything, "mean") + tables.of_rows(everything, "correction")
    known = added.double().cpu().numpy()
    found = effects_of_others(cells, together, np.concatenate(lacking), known)
    return dict(zip(rows.tolist(), found, strict=True))


def _sums_of_perturbations(tables: DirectEffects, block: Block, scale: Scale) -> Start:
    """What tables of perturbations say of a block of combinations."""
    rows = slice(*(end - tables.n_perturbations for end in (block.rows.start, block.rows.stop)))
    codes, doses = (part[rows] for part in tables.measured)
    direct, correction = (
        tables.summed(codes, doses, name).double().cpu().numpy() for name in ("mean", "correction")
    )
    carried = (codes >= 0).float()
    spreads = tables.spread[codes.clamp(min=0)].square() * carried
    squared = (spreads.sum(dim=1) / carried.sum(dim=1)).double().cpu().numpy()[:, None]
    of_model = block.model_at_mean + squared * (block.of_model - block.model_at_mean)
    return Start(direct, scale.compared(of_model + direct + correction), squared)


def _shared_priors(
    tables: DirectEffects,
    observed: ObservedEffects,
    rows: range,
    start_of: Callable[[Block, Scale], Start],
) -> Priors | None:
    n_entries = len(rows) * tables.n_genes
    if n_entries <= _MOST_ENTRIES_OF_OWN_PRIORS:
        return None
    own, lacking, errors = [], [], []
    for block in observed.blocks(rows, step=-(-n_entries // _MOST_ENTRIES_OF_OWN_PRIORS)):
        start = start_of(block, observed.scale)
        own.append(block.observed - start.centre)
        of_model = observed.scale.compared(block.of_model + start.direct)
        lacking.append(block.observed - of_model)
        errors.append(block.error)
    error = np.concatenate(errors)
    return Priors(*(NormalMixture.fit(np.concatenate(part), error) for part in (own, lacking)))


def _share_of_variance(slope: np.ndarray, whole: np.ndarray, of_model: np.ndarray) -> np.ndarray:
    """Variance of whole effects per variance of the model's, as they are compared; at most 1."""
    total, part = ((np.square(slope) * v).sum(axis=1, keepdims=True) for v in (whole, of_model))
    return np.minimum(np.divide(total, part, out=np.ones_like(part), where=part > 0), 1)


def _residuals(
    tables: DirectEffects,
    scale: Scale,
    weights: np.ndarray,
    inflation: float,
    block: Block,
    start: Start,
    found: Components,
) -> Residuals:
    """What is added to the model's effects on the logits, per unit dose, of genes that are kept."""
    has_cells = np.isfinite(block.error)
    whole, variance = stacked(found, weights)
    variance = inflation * variance
    # Predictions sample the model's effects, around their mean no wider than the whole varies; of
    # the variance the rest is missing. The mean of a rate depends on how wide.
    of_model = np.square(scale.relative_slope(block.of_model)) * block.variance_of_model
    squared = start.squared_spread
    if squared is None:
        squared = _share_of_variance(scale.slope, variance, of_model)
    on_logits = scale.log_change(whole)
    uncertainty = np.sqrt(np.maximum(variance - squared * of_model, 0))
    uncertainty = scale.log_sd(whole, uncertainty)
    # The shift, and with the direct effect, of which small ones are none.
    shift = block.model_at_mean + squared * (block.of_model - block.model_at_mean)
    without = block.of_model + start.direct
    with_direct = scale.log_change(scale.compared(without) + found.direct.mean)
    is_sure = (found.direct.lfsr < _MOST_SIGN_ERRORS) & (found.direct.mean != 0)
    direct = start.direct + np.where(is_sure, with_direct - without, 0)
    sd = scale.log_sd(scale.compared(with_direct), found.direct.sd)
    columns = [direct, sd, found.direct.lfsr, on_logits - shift - direct, uncertainty]
    for place in (0, 1, 3, 4):
        columns[place] = np.where(has_cells, columns[place] / block.dose, 0)
    columns[2] = np.where(has_cells, columns[2], 1)
    if tables.n_kept == tables.n_genes:
        genes = np.broadcast_to(np.arange(tables.n_genes), whole.shape)
    else:
        matters = scale.slope * (np.abs(columns[0] + columns[3]) + columns[-1])
        genes = np.argpartition(-matters, tables.n_kept, axis=1)[:, : tables.n_kept]
        genes = np.sort(genes, axis=1)
        columns = [np.take_along_axis(values, genes, axis=1) for values in columns]
    spread = np.where(has_cells.any(axis=1), np.sqrt(squared[:, 0]), 1)
    return Residuals(
        torch.as_tensor(spread.astype(np.float32)),
        torch.as_tensor(genes.astype(np.int32)),
        *(torch.as_tensor(values.astype(np.float32)) for values in columns),
    )
