"""Select perturbations to which cells can respond, and estimate how many cells do."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scvi_sams._group_tests import (
    GroupTests,
    group_tests,
    normal_scores,
    q_values,
    without_linear,
)
from scvi_sams.data._field import registered_labels
from scvi_sams.labels._names import listing
from scvi_sams.module._minibatch import CellBatch, positions_in, sum_over_slots
from scvi_sams.module._perturbation_module import PerturbationModule
from scvi_sams.module._responses import CellsOfUnits, Responses
from scvi_sams.module._sams_vae import SAMSVAEModule
from scvi_sams.train._gene_sums import cells_of, total_over_processes

logger = logging.getLogger("scvi.sams")

_SIZE = 0.05
"""False discovery rate at which cells with a perturbation differ from cells without it."""
_TOLD_APART = 0.5
"""Distance of their means, in SD within groups, above which the two kinds of cells in an equal
mixture, twice as far apart, can be distinguished."""
_RARE = 0.1
"""Proportion of responding cells below which these may carry another guide: 20 of 21 cells that
"responded" to STAT2 in Papalexi et al. 2021 had counts of a guide of the interferon receptor."""
_SEED = 33023
_N_STEPS = 100
"""Steps of expectation-maximisation: log-odds are then within 0.001 of their mode, unlike after 50
steps if cells contain little information."""


@contextmanager
def same_order(module: PerturbationModule) -> Iterator[None]:
    """Read training cells in an order that does not depend on where training was resumed.

    A resumed training has sampled one number less at the beginning of an epoch, and its rounding
    errors would differ from those of an uninterrupted one.
    """
    if module.responses is None:
        yield
        return
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(_SEED)
    try:
        yield
    finally:
        torch.set_rng_state(state)


@torch.no_grad()
def begin_responses(module: PerturbationModule, trainer: Any) -> None:
    """Let cells respond or not from now on, if the module has responses.

    Effects have formed by then; from the start all perturbations would share an effect that arises
    from other differences between cells. For the same reason only perturbations that shift latent
    states far enough have responses, by the states that the encoder assigns without knowing the
    perturbation.
    """
    if module.responses is None or module.has_branches:
        return
    with same_order(module):
        tests = _tests_of_states(module, trainer)
    acts = torch.as_tensor(perturbations_that_act(tests), device=module.device)
    module.responses.acts.copy_(trainer.strategy.broadcast(acts))
    if not module.responses.acts.any():
        logger.warning(
            "The cells of no perturbation differ enough from cells without it to identify which of "
            "them respond: all are assumed to respond. This requires control cells of the same "
            "batch and categories."
        )
    module.responses.switch_on(True)


def perturbations_that_act(tests: GroupTests) -> np.ndarray:
    """Whether cells with each perturbation differ significantly, and by enough, ``(T,)``."""
    is_sure = np.nan_to_num(q_values(tests.p_value), nan=1.0) <= _SIZE
    return is_sure & (tests.squared_distance > _TOLD_APART**2)


def _tests_of_states(module: PerturbationModule, trainer: Any) -> GroupTests:
    """Test whether latent states differ; with several processes by the cells of each."""
    states, codes, doses, covariates = [], [], [], []
    for cells in cells_of(module, trainer, trainer.datamodule.train_dataloader()):
        nothing = torch.zeros(1, 1, module.n_shift, device=module.device)
        states.append(module.encode(cells.x, nothing, cells.covariates).loc[0].cpu())
        codes.append(cells.codes.cpu())
        doses.append(cells.doses.cpu())
        if cells.covariates is not None:
            covariates.append(cells.covariates.cpu())
    labels = replace(
        registered_labels(trainer.datamodule.adata_manager),
        codes=torch.cat(codes).numpy(),
        doses=torch.cat(doses).numpy(),
    )
    features = torch.cat(states).double().numpy()
    strata = np.zeros(len(labels), dtype=np.int64)
    if covariates:
        n_levels = sum(module.covariates.category_counts)
        levels, continuous = torch.cat(covariates).tensor_split([n_levels], dim=1)
        if n_levels:
            strata = torch.unique(levels, dim=0, return_inverse=True)[1].numpy()
        features = without_linear(features, continuous.double().numpy())
    # With few cells the test uses only the first features.
    most_variable = np.argsort(-features.var(axis=0), kind="stable")
    return group_tests(normal_scores(features[:, most_variable]), labels, strata)


@torch.no_grad()
def fit_responses_of(module: PerturbationModule, trainer: Any) -> None:
    """Fit proportions of responding cells to the training cells of all processes.

    The evidence of each cell is that of the trained model; log-odds are at their posterior mode.
    Perturbations with all masks off have no responses.
    """
    if module.responses is None or not module.has_branches:
        return
    if isinstance(module, SAMSVAEModule):
        module.responses.acts &= module.has_effects()
    loader = trainer.datamodule.train_dataloader()
    found = evidence_of_cells(module, module.responses, cells_of(module, trainer, loader))

    def total(sums: Tensor) -> Tensor:
        return total_over_processes(sums, trainer).to(module.device)

    for _ in range(_N_STEPS):
        module.responses.improve(found, total)
    module.responses.finish(found, total)
    warn_of_rare_responses(
        module.responses.rates, registered_labels(trainer.datamodule.adata_manager).vocabulary
    )


def evidence_of_cells(
    module: PerturbationModule, responses: Responses, batches: Iterable[CellBatch]
) -> CellsOfUnits:
    """Evidence of cells for responses, given the mean effects."""
    rows = module.effect_rows.measured
    means = module.shift_moments(rows)[0][None]
    codes, evidence, units = [], [], []
    for cells in batches:
        shift = sum_over_slots(means, positions_in(rows, cells.effects), cells.doses)
        codes.append(cells.codes)
        evidence.append(module.response_evidence(cells, shift))
        units.append(responses.units_of(cells))
    return CellsOfUnits(torch.cat(codes), torch.cat(evidence), torch.cat(units))


def warn_of_rare_responses(rates: Tensor, names: Sequence[str]) -> None:
    """Log a warning if hardly any cells of some perturbations respond, ``(T,)`` both."""
    rare = [names[code] for code in (rates < _RARE).nonzero()[:, 0].tolist()]
    if rare:
        logger.warning(
            f"Fewer than {_RARE:.0%} of the cells of {listing(rare)} seem to respond. These few "
            "may carry another guide as well, and predictions for responding cells describe these "
            "cells. Use among='all', or remove these cells."
        )
