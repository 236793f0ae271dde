"""Direct effects on genes, and stacking: both in closed form.

The effect of perturbation t on gene g in its cells is ``observed``, that of its shift ``of_model``,
both on the scale on which effects are compared. Estimates on this scale are then converted to
changes of the decoder's logits.

- A direct effect is the residual ``observed - of_model``, shrunken under a scale mixture of normals
  with a point mass at 0 (Stephens 2017): 0 except for genes with sufficient evidence.
- Predictions of means are an average of three estimates of the effect (``_stacking.py``).
- For a measured combination, the difference from the sum of its perturbations is shrunken: if it
  has few cells, or these agree with the sum, the sum remains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from scvi_sams._shrinkage import NormalMixture
from scvi_sams.data._contexts import registered_contexts
from scvi_sams.data._field import registered_labels
from scvi_sams.module._direct_effects import DirectEffects, Residuals
from scvi_sams.module._perturbation_module import PerturbationModule
from scvi_sams.train._compared_scale import Scale
from scvi_sams.train._expected_rates import (
    Total,
    expected_rates,
    over_processes,
    states_of_contexts,
)
from scvi_sams.train._feature_effects import fit_to_features
from scvi_sams.train._gene_sums import (
    Cells,
    GeneSums,
    cells_of,
    gene_sums,
    total_over_processes,
)
from scvi_sams.train._observed_effects import Block, ObservedEffects, Reference
from scvi_sams.train._residuals import residuals
from scvi_sams.train._shared_cells import effects_of_others, together_only
from scvi_sams.train._stacking import (
    PRIOR_INFLATION,
    Components,
    Priors,
    Scored,
    Start,
    components,
    equal_weights,
    inflation_of_variance,
    stacked,
    stacking_weights,
)
from scvi_sams.train._unmeasured import Elsewhere, keep_for_unmeasured

_Fitted = tuple[ObservedEffects, tuple[ObservedEffects, ObservedEffects] | None]
"""Effects in all cells, in training cells and in held-out cells."""

_MOST_ENTRIES_OF_OWN_PRIORS = 2_000_000
"""Perturbations x genes up to which each perturbation has its own prior: beyond, fitting them would
take longer than a part of training, and a prior fitted to some of the rows is used for all."""


@torch.no_grad()
def fit_direct_effects_of(module: PerturbationModule, trainer: Any) -> None:
    """Fit direct effects to the training and validation cells of a trainer, over all processes."""
    if module.direct is None:
        return
    data = trainer.datamodule
    labels = registered_labels(data.adata_manager)[data.train_idx]
    contexts = registered_contexts(data.adata_manager)
    of_cells = None if contexts is None else contexts.codes[data.train_idx]
    module.direct.measure(
        torch.tensor(labels.codes),
        torch.tensor(labels.doses),
        *_pairs_to_measure(module, labels.codes, of_cells),
    )
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
            n_contexts=module.effect_rows.n_contexts,
        )
        for loader in loaders
    ]
    states = states_of_contexts(module, cells_of(module, trainer, data.train_dataloader()))
    total = partial(total_over_processes, trainer=trainer)
    for part in sums:
        for values in part.totals():
            values.copy_(total(values))
    total_of_all = total if trainer.world_size > 1 else None
    fit_direct_effects(module, *sums, states=states, total=total_of_all)
    for tables in (module.direct, module.unmeasured):
        for values in () if tables is None else tables.buffers():
            values.copy_(trainer.strategy.broadcast(values))


def _pairs_to_measure(
    module: PerturbationModule, codes: np.ndarray, contexts: np.ndarray | None
) -> list[torch.Tensor]:
    """Rows of effects in contexts with control cells, -1 in others; ``None`` without any."""
    if contexts is None:
        return []
    has_controls = np.isin(contexts, contexts[(codes < 0).all(axis=1)])
    where = torch.tensor(contexts)
    rows = module.effect_rows.of_cells(torch.tensor(codes).long(), where)
    return [torch.where(torch.as_tensor(has_controls)[:, None], rows, -1)]


def fit_direct_effects(
    module: PerturbationModule,
    training: GeneSums,
    held_out: GeneSums | None = None,
    *,
    states: torch.Tensor | None = None,
    total: Total | None = None,
) -> None:
    """Fill the tables of ``module.direct`` from training cells, and held-out ones if there are any.

    Weights are fitted to effects in training cells, scored on held-out cells; effects are then
    estimated from all cells. With several processes, ``total`` adds up their numbers: sums are over
    all, the cells themselves those of the own process. ``states`` are those of contexts.
    all, the cells themselves those of the own process. ``states`` are those of contexts.
    """
    tables = module.direct
    if tables is None:
        return
    everything = training if held_out is None else training + held_out
    expected = expected_rates(module, everything.cells, tables, states)
    if total is not None:
        expected = over_processes(expected, everything.cells, total)

    responding = _responding(module, tables)
    sizes = module.cell_sizes.double().cpu().numpy()
    is_count = module.likelihood.is_count_likelihood
    # With few held-out cells, these may include combinations of which singles were not held out.
    are_scored = held_out is not None and bool(held_out.n.any()) and tables.estimates_weights

    def effects_of(chosen: torch.Tensor, context: int | None) -> _Fitted:
        """Effects of some rows in all cells; in training cells, and in held-out cells."""

        def effects_in(sums: GeneSums, scale: Scale | None = None) -> ObservedEffects:
            return ObservedEffects(
                sums.of(chosen, context),
                expected.of(chosen.numpy(), context),
                sizes,
                module.likelihood,
                None if responding is None else responding[chosen.numpy()],
                # Those in a context are compared with its control cells only.
                Reference.of(sums, expected, is_count) if context is None else None,
                scale,
            )

        in_all, halves = effects_in(everything), None
        if are_scored and held_out is not None:
            # Without a Laplace transform the scale depends on the counts of these cells.
            scale = in_all.scale if module.likelihood.has_laplace_transform else None
            halves = effects_in(training, scale), effects_in(held_out, scale)
        return in_all, halves

    keep_for_unmeasured(module, everything.cells, tables.n_rows, states)
    n_rows = tables.n_perturbations + len(tables.combinations)
    observed, halves = effects_of(torch.arange(n_rows), None)

    def fit_rows(
        rows: range,
        start_of: Callable[[Block, Scale], Start],
        of_singles: torch.Tensor | None = None,
    ) -> tuple[Residuals, torch.Tensor]:
        part = RowsToFit(observed, halves, rows, start_of)
        (found,), weights = fit_parts(
            tables,
            [part],
            fits_direct=module.fits_direct_effects,
            of_singles=None if of_singles is None else of_singles.double().cpu().numpy(),
        )
        return found, weights

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
    found = [singles]
    own_weights = None
    if len(tables.combinations):
        # The part that estimates of perturbations, now in the tables, do not explain.
        combinations, own_weights = fit_rows(
            range(tables.n_perturbations, n_rows), partial(_sums_of_perturbations, tables), weights
        )
        found.append(combinations)
    if len(tables.pairs):
        found.append(_fit_pairs(module, tables, effects_of))
    if len(found) > 1:
        tables.fill(_joined(found), weights, own_weights)
    fit_to_features(module, observed)


def _fit_pairs(
    module: PerturbationModule,
    tables: DirectEffects,
    effects_of: Callable[[torch.Tensor, int | None], _Fitted],
) -> Residuals:
    """Estimate perturbations in contexts: their difference from all contexts together."""
    per_perturbation = module.effect_rows.per_perturbation
    contexts = (tables.pairs % per_perturbation).cpu()
    owners = (tables.pairs // per_perturbation).cpu()
    first = tables.n_rows - len(tables.pairs)
    elsewhere = Elsewhere(owners.numpy(), module.effect_rows.n_contexts, tables.n_genes)
    parts, places = [], []
    for context in contexts.unique().tolist():
        chosen = (contexts == context).nonzero(as_tuple=True)[0]
        start_of = partial(_of_all_contexts, tables, owners[chosen])
        fitted = effects_of(first + chosen, context)
        parts.append(RowsToFit(*fitted, range(len(chosen)), start_of))
        places.append(chosen)
    fits_direct = module.fits_direct_effects

    def keep(part: int, block: Block, whole: np.ndarray) -> None:
        rows = owners[places[part]][block.rows].numpy()
        elsewhere.add(rows, parts[part].observed.scale.slope * whole)

    found, weights = fit_parts(tables, parts, fits_direct=fits_direct, has_contexts=True, keep=keep)
    if module.unmeasured is not None and module.unmeasured.is_fitted:
        elsewhere.keep(module.unmeasured)
    tables.context_weights.copy_(weights)
    order = torch.cat(places).argsort()
    return Residuals(*(values[order] for values in _joined(found)))


def _of_all_contexts(
    tables: DirectEffects, owners: torch.Tensor, block: Block, scale: Scale
) -> Start:
    """Estimates of perturbations over all contexts, for a block of them in one.

    Shared effects need not hold in each context, at least not fully: held-out cells decide.
    """
    rows = owners[block.rows].to(tables.weights.device)
    direct, correction, uncertainty = (
        block.dose * tables.of_rows(rows, name).double().cpu().numpy()
        for name in ("mean", "correction", "uncertainty")
    )
    squared = tables.spread[rows].square().double().cpu().numpy()[:, None]
    holds = _holds(block, scale, direct)
    direct, correction = direct * holds, correction * holds
    shared = np.asarray(_start(block, scale, direct, correction, squared).centre)
    variance = np.square(scale.relative_slope(scale.log_change(shared)) * uncertainty)
    return Start(direct, elsewhere=(shared, variance))


def _holds(block: Block, scale: Scale, direct: np.ndarray) -> np.ndarray:
    """Whether direct effects are more likely than not in the cells of a row, ``(rows, 1)``.

    All of a row or none: a perturbation without an effect in a context has none there.
    """
    of_model = scale.compared(block.of_model)
    lacking, expected = (
        block.observed - of_model,
        scale.compared(block.of_model + direct) - of_model,
    )
    known = np.isfinite(block.error) & (direct != 0)
    error = np.where(known, block.error, 1)
    gain = np.where(known, expected * (lacking - expected / 2) / error**2, 0)
    return gain.sum(axis=1, keepdims=True) >= 0


def _joined(parts: list[Residuals]) -> Residuals:
    return Residuals(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _responding(module: PerturbationModule, tables: DirectEffects) -> np.ndarray | None:
    """Proportion of responding cells of each row of the tables, ``(R,)``."""
    if module.responses is None or not module.has_branches:
        return None
    rates = module.responses.rates
    of_combinations = module.responses.rates_of(tables.combinations)
    of_pairs = rates[module.effect_rows.perturbation_of(tables.pairs)]
    return torch.cat([rates, of_combinations, of_pairs]).double().cpu().numpy()


class RowsToFit(NamedTuple):
    """Rows whose cells are compared with the same control cells."""

    observed: ObservedEffects
    halves: tuple[ObservedEffects, ObservedEffects] | None
    """Effects in training and in held-out cells."""
    rows: range
    start_of: Callable[[Block, Scale], Start]

    def components(self, priors: Priors | None, fits_direct: bool) -> Callable[[Block], Components]:
        """Components of predictions, for a block."""

        def of_block(block: Block) -> Components:
            scale = self.observed.scale
            start = self.start_of(block, scale)
            return components(block, start, scale, priors, fits_direct=fits_direct)

        return of_block


def fit_parts(
    tables: DirectEffects,
    parts: Sequence[RowsToFit],
    *,
    fits_direct: bool,
    has_contexts: bool = False,
    of_singles: np.ndarray | None = None,
    keep: Callable[[int, Block, np.ndarray], None] | None = None,
) -> tuple[list[Residuals], torch.Tensor]:
    """Estimate rows of the tables, and the weights of the :data:`COMPONENTS` that all share.

    Weights ``of_singles`` are the prior of those of combinations. ``keep`` receives the number of a
    part, a block of it, and the total effects of the block.
    """
    of_blocks = [
        part.components(
            _shared_priors(tables, part.observed, part.rows, part.start_of), fits_direct
        )
        for part in parts
    ]
    scored = [
        Scored(*part.halves, part.rows, of_block)
        for part, of_block in zip(parts, of_blocks, strict=True)
        if part.halves is not None
    ]
    weights, inflation = equal_weights(has_contexts), PRIOR_INFLATION
    if scored:
        weights = stacking_weights(scored, has_contexts=has_contexts, of_singles=of_singles)
        inflation = inflation_of_variance(scored, weights)
    found = []
    for number, (part, of_block) in enumerate(zip(parts, of_blocks, strict=True)):
        scale, blocks = part.observed.scale, []
        for block in part.observed.blocks(part.rows):
            estimates = of_block(block)
            whole, variance = stacked(estimates, weights)
            if keep is not None:
                keep(number, block, whole / block.dose)
            start = part.start_of(block, scale)
            blocks.append(
                residuals(tables, scale, block, start, estimates, whole, inflation * variance)
            )
        found.append(_joined(blocks))
    return found, torch.as_tensor(weights, dtype=torch.float32)


def _in_the_same_cells(
    tables: DirectEffects, observed: ObservedEffects, cells: Cells, together: np.ndarray
) -> dict[int, np.ndarray]:
    """Additions of others to the logits, for perturbations without cells of their own."""
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
    """Sums of single perturbations for a block of combinations, from the tables."""
    rows = slice(*(end - tables.n_perturbations for end in (block.rows.start, block.rows.stop)))
    codes, doses = (part[rows] for part in tables.measured)
    direct, correction = (
        tables.summed(codes, doses, name).double().cpu().numpy() for name in ("mean", "correction")
    )
    carried = (codes >= 0).float()
    spreads = tables.spread[codes.clamp(min=0)].square() * carried
    squared = (spreads.sum(dim=1) / carried.sum(dim=1)).double().cpu().numpy()[:, None]
    return _start(block, scale, direct, correction, squared)


def _start(
    block: Block, scale: Scale, direct: np.ndarray, correction: np.ndarray, squared: np.ndarray
) -> Start:
    """Starting point of a block from known direct effects and corrections."""
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
