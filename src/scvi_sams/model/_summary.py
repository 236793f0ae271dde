"""A short table of a model: its settings, how training ended, and what to check."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from scvi.model.base import BaseModelClass

from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams._plurals import counted
from scvi_sams.data._contexts import ContextField
from scvi_sams.data._field import PerturbationField
from scvi_sams.data._guides import GuideField
from scvi_sams.features._table import FeatureTable

_FEW_CELLS = 50
"""As ``min_cells`` in ``tl.perturbation_hits``: effects of fewer are shrunken, masks uncertain."""
_COLUMNS = {
    "labels": "perturbation_key",
    "labels (matrix)": "dosage_obsm_key",
    "doses": "dosage_key",
    "layer": "layer",
    "batches": "batch_key",
    "categorical covariates": "categorical_covariate_keys",
    "continuous covariates": "continuous_covariate_keys",
    "size factors": "size_factor_key",
}


def headline(model: BaseModelClass) -> str:
    """Describe a model in one line, as printed by scvi-tools."""
    sizes = model.summary_stats
    n_perturbations, n_genes = int(sizes.n_perturbations), int(sizes.n_vars)
    of_screen = f"{counted(n_perturbations, 'perturbation')}, {counted(n_genes, 'gene')}"
    return f"{type(model).__name__}: {of_screen}, likelihood {model.gene_likelihood}."


def summary_table(model: BaseModelClass) -> pd.DataFrame:
    """Return the lines of a summary, as described in ``summary``."""
    parts = {
        "screen": _screen(model),
        "model": _settings(model),
        "training": _trainings(model),
        "masks": _masks(model),
        "warnings": enumerate(_warnings(model), start=1),
    }
    rows = [(part, str(item), value) for part, lines in parts.items() for item, value in lines]
    table = pd.DataFrame(rows, columns=["part", "item", "value"])
    return table.set_index(["part", "item"])


def _screen(model: BaseModelClass) -> Iterator[tuple[str, str]]:
    sizes = model.summary_stats
    state = model._state(REGISTRY_KEYS.PERTURBATIONS)
    yield "cells", f"{sizes['n_cells']:,}"
    yield "genes", f"{sizes['n_vars']:,}"
    yield "control cells", f"{state[PerturbationField.N_CONTROL_KEY]:,}"
    counts = np.asarray(state[PerturbationField.CELLS_PER_PERTURBATION_KEY])
    spread = f"{counts.min():,} / {int(np.median(counts)):,} / {counts.max():,}"
    yield "perturbations", f"{len(counts):,} ({spread} cells, min / median / max)"
    yield "combinations", f"{state[PerturbationField.N_COMBINATIONS_KEY]:,}"
    if model.unmeasured:
        yield "perturbations without cells", f"{len(model.unmeasured):,}, with features"
    setup = model._setup_arguments
    for item, argument in _COLUMNS.items():
        if setup[argument]:
            yield item, _text(setup[argument])
    guides = model._state(REGISTRY_KEYS.GUIDES)
    if guides:
        yield "guides", f"{len(guides[GuideField.NAMES_KEY]):,} ({setup['guide_key']})"
    if model._state(REGISTRY_KEYS.CONTEXTS).get(ContextField.LEVELS_KEY) is not None:
        yield "contexts", f"{', '.join(model.contexts)} ({setup['context_key']})"


def _settings(model: BaseModelClass) -> Iterator[tuple[str, str]]:
    """Class, size and likelihood, and other settings that differ from the defaults."""
    yield "class", type(model).__name__
    yield "latent dimensions", str(model.module.n_latent)
    yield "likelihood", model.gene_likelihood
    defaults = inspect.signature(type(model).__init__).parameters
    for name, value in model.provenance["settings"].items():
        is_default = name in defaults and value == defaults[name].default
        if not is_default and name not in ("n_latent", "gene_likelihood"):
            yield name, _text(value)


def _trainings(model: BaseModelClass) -> Iterator[tuple[str, str]]:
    if not model.trainings_:
        yield "state", "trained by an earlier version" if model.is_trained else "not trained"
        return
    if len(model.trainings_) > 1:
        yield "trainings", f"{len(model.trainings_)}; the last is described here"
    last = model.trainings_[-1]
    yield "training cells", f"{last['n_training_cells']:,}"
    yield "epochs", str(last["n_epochs"])
    yield "ending", last.get("ending", "not recorded")
    yield "seed", "not set" if last["seed"] is None else str(last["seed"])
    for name, value in last["settings"].items():
        yield name, _text(value)


def _masks(model: BaseModelClass) -> Iterator[tuple[str, str]]:
    """Numbers of entries that are more likely on than off; empty for models without masks."""
    if not model.is_trained or not hasattr(model, "get_perturbation_masks"):
        return
    is_on = model.get_perturbation_masks(key_added=None).to_numpy() > 0.5
    yield "entries more likely on than off", f"{is_on.sum():,} of {is_on.size:,}"
    yield "latent dimensions in use", f"{is_on.any(axis=0).sum()} of {is_on.shape[1]}"
    yield "perturbations with an entry", f"{is_on.any(axis=1).sum():,} of {len(is_on):,}"


def _perturbations(number: int) -> str:
    """Begin a sentence about a number of perturbations."""
    return counted(number, "perturbation has", "perturbations have")


def _warnings(model: BaseModelClass) -> Iterator[str]:
    if not model.is_trained:
        yield "The model is not trained: its results are meaningless."
        return
    if model.trainings_ and "Interrupted." in model.trainings_[-1].get("ending", ""):
        yield "Training was interrupted: masks and effects may not have converged."
    counts = model.module.cells_per_perturbation.cpu().numpy()
    without, few = int((counts == 0).sum()), int(((counts > 0) & (counts < _FEW_CELLS)).sum())
    if without:
        yield f"{_perturbations(without)} no training cells: nothing is known about their effects."
    if few:
        yield (
            f"{_perturbations(few)} fewer than {_FEW_CELLS} training cells: effects are "
            "shrunken and masks uncertain."
        )
    share = model.module.diagnostics().get("active_masks")
    if share == 0:
        yield "All masks are off: the model has found no effect of any perturbation."
    elif share == 1:
        yield "All masks are on: they do not distinguish perturbations."


def _text(value: Any) -> str:
    if isinstance(value, FeatureTable):
        perturbations = counted(len(value), "perturbation")
        return f"{perturbations} x {counted(value.n_features, 'feature')}"
    if isinstance(value, dict):
        return ", ".join(f"{name} = {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple | np.ndarray):
        return ", ".join(map(str, value))
    return str(value)
