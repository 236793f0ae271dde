"""Effects of perturbations on latent dimensions, in one context or over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scvi_sams._checks import as_names, check_key
from scvi_sams.labels._names import check_known
from scvi_sams.model._basal_states import check_context
from scvi_sams.model._cell_model import CellModel


def codes_of(model: CellModel, perturbations: Sequence[str] | None) -> Tensor:
    """Codes of some perturbations, measured or unmeasured; ``None``: all measured ones."""
    if perturbations is None:
        return torch.arange(len(model.perturbations), device=model.module.device)
    names = as_names("perturbations", perturbations)
    known = {name: c for c, name in enumerate([*model.perturbations, *model.unmeasured])}
    check_known(names, known, model._spelling.control_label)
    codes = [known[name] for name in names]
    return torch.tensor(codes, dtype=torch.int64, device=model.module.device)


def moments_of_perturbations(
    model: CellModel, codes: Tensor, context: str | None
) -> tuple[Tensor, Tensor]:
    """Posterior mean and SD of the shifts of perturbations, each ``(R, S)``.

    In a context, or without one averaged over the training cells of the perturbation.
    """
    module = model.module
    if context is not None:
        return module.shift_moments(rows_in_context(model, codes, context))
    if not model.contexts:
        return module.shift_moments(codes)
    every = torch.arange(len(model.perturbations), device=module.device)
    is_new = codes >= len(every)
    if bool(is_new.any()):
        # Not measured in any context.
        mean, sd = module.shift_moments(module.effect_rows.of_cells(codes[:, None], None)[:, 0])
        measured = moments_of_perturbations(model, codes[~is_new], None)
        mean[~is_new], sd[~is_new] = measured
        return mean, sd
    rows = module.effect_rows.measured
    perturbations = module.effect_rows.perturbation_of(rows)
    counts = module.contexts.cells_of(rows)
    # The shared part does not average out; context-specific parts do in part.
    shared_mean, shared_sd = module.shared_moments(every)
    own_mean, own_variance = module.contexts.moments(rows)
    total = torch.zeros(len(every), device=module.device).index_add_(0, perturbations, counts)
    weights = (counts / total.clamp(min=1)[perturbations])[:, None]
    mean = shared_mean.index_add(0, perturbations, weights * own_mean)
    variance = shared_sd.square().index_add(0, perturbations, weights.square() * own_variance)
    return mean[codes], variance.sqrt()[codes]


def chances_of_effects(model: CellModel, codes: Tensor, context: str | None) -> Tensor:
    """Posterior probability that perturbations shift latent dimensions, ``(R, L)``.

    In a context, or without one the largest over contexts in which the perturbation was measured.
    """
    module = model.module
    if context is not None:
        return module.chance_of_effect(rows_in_context(model, codes, context))
    if not model.contexts:
        has_features = len(model.unmeasured) > 0
        return (
            module.chance_of_effect(codes)
            if has_features
            else module.masks.inclusion_probability[codes]
        )
    rows = module.effect_rows.measured
    found = module.chance_of_effect(rows)
    owners = module.effect_rows.perturbation_of(rows)[:, None].expand_as(found)
    largest = found.new_zeros(len(model.perturbations), found.shape[1])
    largest.scatter_reduce_(0, owners, found, "amax")
    is_new = codes >= len(largest)
    if not bool(is_new.any()):
        return largest[codes]
    # Not measured in any context.
    of_codes = module.chance_of_effect(module.effect_rows.of_cells(codes[:, None], None)[:, 0])
    of_codes[~is_new] = largest[codes[~is_new]]
    return of_codes


def rows_in_context(model: CellModel, codes: Tensor, context: str) -> Tensor:
    """Rows of the effects of perturbations in a context."""
    check_key(context=context)
    check_context(model, context)
    where = torch.full_like(codes, model.contexts.index(context))
    return model.module.effect_rows.of_cells(codes[:, None], where)[:, 0]


class PairEffects(NamedTuple):
    """Effects of T perturbations in each of C contexts, with their context-specific parts."""

    n_cells: np.ndarray
    """Number of training cells, ``(T, C)``."""
    is_measured: np.ndarray
    """Whether registered cells have the perturbation in the context, ``(T, C)``."""
    p_acts: np.ndarray
    """Posterior probability of an effect on some latent dimension, ``(T, C)``."""
    p_differs: np.ndarray
    """Posterior probability of a context-specific effect, ``(T, C)``."""
    own_masks: np.ndarray
    """Posterior probability of the same on each latent dimension, ``(T, C, L)``."""
    mean: np.ndarray
    """Posterior mean of the effect, ``(T, C, L)``."""
    own_mean: np.ndarray
    """Posterior mean of the context-specific part, ``(T, C, L)``."""


def effects_of_pairs(model: CellModel) -> PairEffects:
    """Effects of all perturbations in all contexts; those of the prior if there are no cells.

    The probability of an effect on some latent dimension is the largest over dimensions. One minus
    the product over dimensions would add up prior probabilities that a factorised posterior keeps
    where cells are not informative: 0.01 or 0.02 per dimension, a third over twenty.
    """
    module = model.module
    rows = module.effect_rows
    every = torch.arange(rows.n_perturbations * rows.per_perturbation, device=module.device)
    every = every.reshape(-1, rows.per_perturbation)
    every = every[:, : rows.n_contexts].reshape(-1)

    def table(values: Tensor) -> np.ndarray:
        return values.cpu().double().numpy().reshape(-1, rows.n_contexts, *values.shape[1:])

    is_measured = rows.places(every) >= 0
    own_masks = module.contexts.inclusion_probability(every)
    n_in_use = int((~module.masks.is_excluded).sum())
    a_priori = module.contexts.prior.chance_of_any(n_in_use)
    p_differs = torch.where(is_measured, own_masks.amax(dim=-1), a_priori)
    shared = module.masks.inclusion_probability[rows.perturbation_of(every)].amax(dim=-1)
    p_acts = torch.where(
        is_measured,
        module.chance_of_effect(every).amax(dim=-1),
        1 - (1 - shared) * (1 - a_priori),
    )
    return PairEffects(
        table(module.contexts.cells_of(every)).astype(int),
        table(is_measured).astype(bool),
        table(p_acts),
        table(p_differs),
        table(own_masks),
        table(module.shift_moments(every)[0]),
        table(module.contexts.moments(every)[0]),
    )
