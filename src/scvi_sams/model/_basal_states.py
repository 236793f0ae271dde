"""Basal states on which effects are compared: from the prior, or from cells, in their contexts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from scvi_sams._checks import check_choice
from scvi_sams._torch import generator
from scvi_sams.data._contexts import Contexts, registered_contexts
from scvi_sams.exceptions import InvalidArgumentError, MissingControlError, SAMSError
from scvi_sams.labels._names import check_has
from scvi_sams.model._cell_model import CellModel
from scvi_sams.model._cells import CellReader
from scvi_sams.model._descriptions import control_cells
from scvi_sams.model._noise import CellNoise, new_seed

Basal = Literal["prior", "control"]
"""Source of basal states."""


class CellsToCompare(NamedTuple):
    """Cells from which basal states, covariates and contexts are taken."""

    context: str | None = None
    """``None``: all contexts, with the frequencies of the cells."""
    indices: Sequence[int] | Sequence[bool] | None = None
    """Positions in the training data; ``None``: control cells, if there are any."""


ALL_CELLS = CellsToCompare()


class BasalStates(NamedTuple):
    """States to compare with and without treatment, ``n_basal`` for each posterior sample."""

    z_basal: Tensor
    """``(n_posterior, n_basal, n_latent)``."""
    covariates: Tensor | None
    """Their covariates, ``(n_posterior, n_basal, C)``, if there are any."""
    contexts: Tensor | None = None
    """Context of each, ``(n_posterior, n_basal)``; ``None`` if none are registered."""


def where_states_are_from(
    model: CellModel, basal: Basal | None, cells: CellsToCompare = ALL_CELLS
) -> Basal:
    """Check the source of basal states; by default cells if covariates or contexts matter."""
    if cells.context is not None:
        check_context(model, cells.context)
    if basal is None:
        of_cells = model.module.effect_rows.n_contexts or cells.indices is not None
        return "control" if of_cells else "prior"
    check_choice("basal", basal, get_args(Basal))
    if basal == "prior" and cells.indices is not None and not model.module.covariates.n_out:
        raise InvalidArgumentError(
            "`indices` are cells whose basal states are used, but basal='prior' uses none. Omit "
            "one of the two."
        )
    return basal


def basal_states(
    model: CellModel,
    basal: Basal,
    n_posterior: int,
    n_basal: int,
    cells: CellsToCompare = ALL_CELLS,
) -> BasalStates:
    """Sample basal states, with the covariates and contexts of their cells."""
    module = model.module
    n_draws = n_posterior * n_basal
    noise = CellNoise(new_seed(), np.arange(n_draws), module.device)
    z_basal = noise.normals(np.arange(n_draws), 1, module.n_latent)[0]
    shape = (n_posterior, n_basal, -1)
    has_contexts = bool(module.effect_rows.n_contexts)
    if basal == "prior" and not module.covariates.n_out:
        return BasalStates(z_basal.reshape(shape), None)
    model._check_has_data("context" if has_contexts else "basal")
    model._validate_anndata()
    contexts = registered_contexts(model.adata_manager)
    sources = _sources(model, basal, cells, contexts)
    chosen = sources[_chosen(contexts, sources, n_posterior, n_basal)]
    covariates = z_basal.new_empty(n_draws, module.covariates.n_out)
    reader = CellReader(model, model.adata, chosen, None)
    for place, read, _, qz, _ in reader.encoded(module.shift_moments(reader.effects)[0][None]):
        if basal == "control":
            z_basal[place] = qz.loc[0] + qz.scale[0] * z_basal[place]
        if read.covariates is not None:
            covariates[place] = read.covariates
    return BasalStates(
        z_basal.reshape(shape),
        covariates.reshape(shape) if module.covariates.n_out else None,
        None
        if contexts is None
        else torch.as_tensor(contexts.codes[chosen], device=module.device).reshape(shape[:2]),
    )


def _sources(
    model: CellModel, basal: Basal, cells: CellsToCompare, contexts: Contexts | None
) -> np.ndarray:
    """Positions of the cells from which basal states, covariates and contexts are taken."""
    context, indices = cells
    if indices is not None:
        found = model._read(None, indices, None).positions
        if not len(found):
            raise InvalidArgumentError("`indices` is empty: there are no cells to start from.")
    else:
        found = control_cells(model)
        if basal == "control" and not len(found) and not model.module.effect_rows.n_contexts:
            raise MissingControlError(
                "The data has no control cells to take basal states from. Use basal='prior'."
            )
        found = found if len(found) else np.arange(model.adata.n_obs)
    if contexts is None or context is None:
        return found
    is_there = contexts.codes == contexts.levels.index(context)
    within = found[is_there[found]]
    if indices is not None and not len(within):
        raise InvalidArgumentError(f"None of the cells of `indices` is of the context {context!r}.")
    # A context without control cells: its other cells, minus their effects.
    return within if len(within) else np.flatnonzero(is_there)


def _chosen(
    contexts: Contexts | None, sources: np.ndarray, n_posterior: int, n_basal: int
) -> np.ndarray:
    """Positions in ``sources``, ``(n_posterior * n_basal,)``."""
    source = generator(torch.device("cpu"))
    if contexts is None:
        return torch.randint(len(sources), (n_posterior * n_basal,), generator=source).numpy()
    # Evenly over the contexts, so that every posterior sample has the frequencies of the cells.
    tie = torch.rand(len(sources), generator=source, dtype=torch.float64).numpy()
    order = np.lexsort((tie, contexts.codes[sources]))
    first = torch.rand(n_posterior, 1, generator=source, dtype=torch.float64).numpy()
    at = (first + np.arange(n_basal)) / n_basal * len(sources)
    return order[np.minimum(at.astype(np.int64), len(sources) - 1).ravel()]


def check_context(model: CellModel, context: str) -> None:
    """Raise if a context is not in the training data."""
    if not model.contexts:
        raise SAMSError(
            "No contexts are registered. Name their column as `context_key` in setup_anndata, and "
            "train a model with it."
        )
    check_has("The training data have no context", [context], model.contexts)


def contexts_asked(model: CellModel, context: str | Sequence[str] | None) -> list[str] | None:
    """Requested contexts by name; ``None``: all together, weighted by their cells."""
    if context is None or (context == "mean" and "mean" not in model.contexts):
        if context is not None and not model.contexts:
            check_context(model, "mean")
        return None
    asked = [context] if isinstance(context, str) else list(context)
    if not asked:
        raise InvalidArgumentError("`context` is empty: name contexts, or omit it.")
    for name in asked:
        check_context(model, str(name))
    return [str(name) for name in asked]


def contexts_of_effects(model: CellModel, cells: CellsToCompare) -> dict[str, Any]:
    """Describe the context of effects, for ``uns``; empty if none are registered."""
    if not model.contexts:
        return {}
    return {"context": "mean" if cells.context is None else cells.context}
