"""Steps between the dense phase of training and the phase with masks.

1. The origin of the latent space moves to the control cells.
2. The space is rotated so that effects are sparsest.
3. If all perturbations share an effect that held-out cells do not confirm, the origin moves by it.
4. Masks are initialised from the evidence for each effect.
5. Curved latent dimensions are switched off.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from scipy.stats import norm
from torch import Tensor

from scvi_sams._plurals import counted, plural
from scvi_sams._torch import fixed_seed, generator
from scvi_sams.module._curvature import LatentSurvey
from scvi_sams.module._minibatch import CellBatch, positions_in, sum_over_slots
from scvi_sams.module._perturbation_module import PerturbationModule
from scvi_sams.module._sams_vae import SAMSVAEModule
from scvi_sams.train._gene_sums import cells_of, total_over_processes

logger = logging.getLogger("scvi.sams")

_FEWEST = 5
"""Smallest number of perturbations for which shared effects are tested."""
_MOST = 0.8
"""Proportion of perturbations with a shared effect: between half and twice the median."""
_SMALL_OFFSET = 0.2
"""In SD of basal states: a smaller shared effect cannot switch masks on."""
_SIZE = 1e-3
"""Significance level for a shared effect to be confirmed as real rather than due to the decoder."""
_N_SAMPLES = 4
"""Importance samples of the basal state of a cell for the test."""
_SEED = 7411
_CELLS_FOR_CURVATURE = 20_000
"""Number of cells: enough to distinguish a proportion of a fifth from none, and fast to read."""
_CELLS_FOR_OFFSETS = 4_000


def end_dense_phase(module: PerturbationModule, trainer: Any, max_curvature: float | None) -> None:
    """Change from the dense phase to masks; all processes make the same decisions.

    Modules with other masks than those of SAMS-VAE find their axes and do the rest themselves.
    """
    if not isinstance(module, SAMSVAEModule):
        module.find_sparse_axes()
        return
    origin = origin_of_controls(module, trainer)
    if origin is not None:
        module.translate(origin)
    module.find_sparse_axes()
    with all_responding(module):
        module.translate(unconfirmed_offsets(module, trainer))
    module.start_masks(variance_of_states(module, trainer))
    if max_curvature is not None:
        _switch_off_curved(module, trainer, max_curvature)


@torch.no_grad()
def origin_of_controls(module: SAMSVAEModule, trainer: Any) -> Tensor | None:
    """Mean of the basal states of training control cells, ``(n_latent,)``.

    The prior of basal states puts the origin at the mean of all cells. If few cells are controls
    they may be away from it, and all perturbations would seem to have an effect.
    """
    total = torch.zeros(module.n_latent + 1, dtype=torch.float64)
    loader = trainer.datamodule.train_dataloader()
    for cells, shift in _shifted(module, cells_of(module, trainer, loader)):
        states = module.encode(cells.x, shift, cells.covariates).loc[0]
        states = states[_n_perturbations(cells) == 0].double().cpu()
        total += torch.cat([states.sum(dim=0), torch.tensor([len(states)])])
    total = total_over_processes(total, trainer)
    return (total[:-1] / total[-1]).to(module.masks.logits) if total[-1] else None


@torch.no_grad()
def variance_of_states(module: SAMSVAEModule, trainer: Any) -> Tensor:
    """Mean posterior variance of the basal states of training cells, ``(n_latent,)``."""
    total = torch.zeros(module.n_latent + 1, dtype=torch.float64)
    for cells, shift in _shifted(module, _training_cells(module, trainer)):
        variance = module.encode(cells.x, shift, cells.covariates).variance[0].double().cpu()
        total += torch.cat([variance.sum(dim=0), torch.tensor([len(variance)])])
    total = total_over_processes(total, trainer)
    return (total[:-1] / total[-1]).to(module.masks.logits)


@torch.no_grad()
def unconfirmed_offsets(module: SAMSVAEModule, trainer: Any) -> Tensor:
    """Effects that nearly all perturbations share, and that validation cells do not confirm.

    Control cells are few. Any chance difference between the training control cells and all other
    cells can be worth a latent dimension to the decoder, on which all perturbations then have the
    same effect. Validation cells reveal this. Each with one perturbation is scored with its shift
    with and without the shared effect, each control cell with the shared effect and with none. If
    there is no such effect, both kinds of cells gain the same, however wrong the model is (a swap
    test).

    Returns
    -------
    Median effect over perturbations in the dimensions where it is not confirmed, otherwise 0,
    ``(n_latent,)``. With fewer than five perturbations or without validation cells of both kinds,
    nothing counts as unconfirmed.
    """
    effects = module.full_effects().loc[0]
    offsets = effects.median(dim=0).values
    unconfirmed = torch.zeros_like(offsets)
    if len(effects) < _FEWEST or not len(trainer.datamodule.val_idx):
        return unconfirmed
    is_large = _are_shared(effects, offsets) & (offsets.abs() > _SMALL_OFFSET)
    large = is_large.nonzero()[:, 0].tolist()
    loader = trainer.datamodule.val_dataloader()
    sums = torch.zeros(module.n_latent, 2, 3, dtype=torch.float64)
    held_out = _shifted(module, cells_of(module, trainer, loader))
    for number, (cells, shift) in enumerate(held_out):
        n_carried = _n_perturbations(cells)
        direction = torch.where(n_carried == 0, 1.0, -1.0)[:, None]
        before = _bound(module, cells, shift, number)
        for latent in large:
            moved = shift.clone()
            moved[..., latent] += (direction * offsets[latent]).T
            gain = -direction[:, 0] * (before - _bound(module, cells, moved, number))
            for place in range(2):
                gains = gain[n_carried == 1 - place].double().cpu()
                sums[latent, place] += torch.stack(
                    [torch.ones_like(gains), gains, gains.square()], dim=1
                ).sum(dim=0)
        if (number + 1) * len(cells.x) >= _CELLS_FOR_OFFSETS:
            break
    sums = total_over_processes(sums, trainer)
    for latent in large:
        score = _score(sums[latent])
        if not math.isnan(score) and norm.sf(score) > _SIZE / len(large):
            unconfirmed[latent] = offsets[latent]
    return unconfirmed


@contextmanager
def all_responding(module: PerturbationModule) -> Iterator[None]:
    """Treat all cells as responding, which the swap test requires for control cells."""
    was_on = module.has_branches
    if module.responses is not None:
        module.responses.switch_on(False)
    try:
        yield
    finally:
        if module.responses is not None:
            module.responses.switch_on(was_on)


def _are_shared(effects: Tensor, offsets: Tensor) -> Tensor:
    """Whether nearly all perturbations have a similar effect on a dimension, ``(L,)``."""
    ratio = effects / torch.where(offsets == 0, 1.0, offsets)
    return ((ratio > 0.5) & (ratio < 2)).double().mean(dim=0) >= _MOST


def _score(sums: Tensor) -> float:
    """Welch's statistic of the mean gain, perturbed minus controls; NaN if unknown."""
    number = sums[:, 0]
    if (number < 2).any():
        return math.nan
    mean = sums[:, 1] / number
    variance = (sums[:, 2] / number - mean.square()).clamp(min=0) / (number - 1)
    return float((mean[0] - mean[1]) / variance.sum().sqrt().clamp(min=1e-12))


def _bound(module: SAMSVAEModule, cells: CellBatch, shift: Tensor, number: int) -> Tensor:
    """Importance-weighted bound of cells given their shifts, with the same random numbers."""
    with fixed_seed(_SEED + number):
        device = cells.x.device
        shape = (_N_SAMPLES, len(cells.x), module.n_latent)
        noise = torch.randn(shape, generator=generator(device), device=device)
    weights = module.log_importance_weights(cells, shift, noise)
    return torch.logsumexp(weights, dim=0) - math.log(_N_SAMPLES)


def _n_perturbations(cells: CellBatch) -> Tensor:
    return (cells.codes >= 0).sum(dim=1)


def _shifted(
    module: SAMSVAEModule, batches: Iterable[CellBatch]
) -> Iterator[tuple[CellBatch, Tensor]]:
    """Cells, and their shifts by the mean effects, ``(1, B, L)``."""
    effects = module.full_effects().loc
    rows = module.effect_rows.measured
    for cells in batches:
        yield cells, sum_over_slots(effects, positions_in(rows, cells.effects), cells.doses)


def _switch_off_curved(module: SAMSVAEModule, trainer: Any, max_curvature: float) -> None:
    # Each process has seen other cells, but all must make the same decision.
    survey = LatentSurvey(
        *(
            trainer.strategy.reduce(values, reduce_op="mean")
            for values in module.survey_latents(_training_cells(module, trainer))
        )
    )
    curved = survey.curved(max_curvature)
    redundant = survey.redundant(curved)
    is_off = curved | redundant
    if not curved.any() or not survey.can_spare(is_off):
        return
    n_curved = int(curved.sum())
    logger.info(
        f"Switched off {counted(n_curved, 'latent dimension')} that "
        f"{plural(n_curved, 'is a curved function', 'are curved functions')} of the others, and "
        f"{int(redundant.sum())} that could replace {plural(n_curved, 'it', 'them')} (see "
        f"`max_curvature`); {counted(int((~is_off).sum()), 'stays', 'stay')} on."
    )
    module.switch_off_latents(is_off)


def _training_cells(module: SAMSVAEModule, trainer: Any) -> Iterator[CellBatch]:
    n_cells = 0
    for cells in cells_of(module, trainer, trainer.datamodule.train_dataloader()):
        yield cells
        n_cells += len(cells.x)
        if n_cells >= _CELLS_FOR_CURVATURE:
            return
