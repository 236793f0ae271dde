"""All results of a trained model as tables."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from scvi_sams._constants import RESULT_KEYS
from scvi_sams.data._guides import registered_guides
from scvi_sams.exceptions import MissingKeyError
from scvi_sams.interpretation._calls import entry_q_values
from scvi_sams.interpretation._cell_counts import cell_counts
from scvi_sams.interpretation._contexts import context_effects
from scvi_sams.interpretation._guides import guide_efficacy
from scvi_sams.interpretation._perturbations import perturbation_hits
from scvi_sams.interpretation._targets import target_knockdown
from scvi_sams.model._additive import AdditiveMixin
from scvi_sams.model._direct_effects import DirectEffectTables
from scvi_sams.model._mechanisms import LatentShiftMixin, MaskMixin

if TYPE_CHECKING:
    from scvi_sams.model._perturbation_model import PerturbationModel

logger = logging.getLogger("scvi.sams")

MEANINGS = {
    "hits": "one row per perturbation: whether it is a hit, and its effects",
    "differential_genes": "genes that each perturbation changes, most certain first",
    "masks": "probability that each perturbation shifts each latent dimension",
    "mask_q_values": "smallest false discovery rate at which each entry is called",
    "effects_mean": "effect of each perturbation on each latent dimension",
    "effects_sd": "posterior standard deviations of these effects",
    "programs": "change of the expression of each gene per unit of each latent dimension",
    "direct_effects": "direct effects on single genes of certain sign, besides the latent shift",
    "knockdown": "change of the target gene of each perturbation",
    "guides": "efficacy of each guide",
    "contexts": "contexts in which each perturbation acts, and where its effect differs",
    "cells": "number of cells of each perturbation, and of its rarest guide",
    "settings": "settings of the model, registration, trainings and versions",
}
"""Names of the tables, in the order in which they are written, and their content."""
_AT_ONCE = 100
"""Perturbations compared with control cells in one call. The table of all genes for all
perturbations of a large screen would take gigabytes."""
_SURE_SIGN = 0.05
"""Local false sign rate below which a direct effect is listed, as in ``pl.direct_effects``."""
_OF_GENES = {
    "lfc_mean": "log_fc",
    "lfc_std": "log_fc_sd",
    "lfc_error": "log_fc_error",
    "proba_de": "proba_de",
    "adj_p_value": "adj_p_value",
    "scale1": "mean_perturbed",
    "scale2": "mean_control",
}


class Sampling(NamedTuple):
    """Numbers of samples, and the false discovery rate of calls."""

    fdr: float = 0.05
    n_genes: int = 50
    n_samples: int = 5000
    n_posterior_samples: int = 500


def result_tables(
    model: PerturbationModel, sampling: Sampling, *, keep: bool = False
) -> dict[str, pd.DataFrame]:
    """Return the tables that apply to a model, by the names in :data:`MEANINGS`.

    ``keep`` also writes each result into its slot of the training data.
    """
    filled = dict(_filled(model, sampling, keep))
    return {name: filled[name] for name in MEANINGS if name in filled}


def _filled(
    model: PerturbationModel, sampling: Sampling, keep: bool
) -> Iterator[tuple[str, pd.DataFrame]]:
    def key(name: str) -> str | None:
        return name if keep else None

    draws: dict[str, Any] = {
        "n_samples": sampling.n_samples,
        "n_posterior_samples": sampling.n_posterior_samples,
    }
    yield "settings", settings_table(model.provenance)
    yield "cells", cell_counts(model)
    hits = perturbation_hits(model, fdr=sampling.fdr, **draws, key_added=key(RESULT_KEYS.HITS))
    yield "hits", hits
    yield from _of_latents(model, key)
    if model.module.likelihood.is_count_likelihood:
        yield "differential_genes", differential_genes(model, sampling)
    if isinstance(model, AdditiveMixin) and model.module.fits_direct_effects:
        direct = model.get_direct_effects(key_added=key(RESULT_KEYS.DIRECT_EFFECTS))
        yield "direct_effects", sure_direct_effects(direct)
    try:
        yield "knockdown", target_knockdown(model, **draws, key_added=key(RESULT_KEYS.TARGETS))
    except MissingKeyError:  # drugs, or a panel without the genes
        logger.info("No perturbation has the name of a measured gene: no table of knock-downs.")
    if registered_guides(model.adata_manager) is not None:
        guides = guide_efficacy(model, fdr=sampling.fdr, **draws, key_added=key(RESULT_KEYS.GUIDES))
        yield "guides", guides
    if model.contexts:
        place = key(RESULT_KEYS.CONTEXT_EFFECTS)
        yield "contexts", context_effects(model, fdr=sampling.fdr, key_added=place)


def _of_latents(
    model: PerturbationModel, key: Callable[[str], str | None]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Masks, effects and programs, if the model has them."""
    if isinstance(model, MaskMixin):
        masks = model.get_perturbation_masks(key_added=key(RESULT_KEYS.MASKS))
        tests = model.test_perturbations(key_added=key(RESULT_KEYS.TESTS))
        place = key(RESULT_KEYS.Q_VALUES)
        yield "masks", masks
        yield "mask_q_values", entry_q_values(model, masks=masks, tests=tests, key_added=place)
    if isinstance(model, LatentShiftMixin):
        effects = model.get_perturbation_effects(key_added=key(RESULT_KEYS.EFFECTS))
        yield "effects_mean", effects.mean
        yield "effects_sd", effects.sd
        yield "programs", model.get_latent_programs(key_added=key(RESULT_KEYS.PROGRAMS))


def differential_genes(model: PerturbationModel, sampling: Sampling) -> pd.DataFrame:
    """Called genes for each perturbation, at most ``n_genes`` of each."""
    called = f"is_de_fdr_{sampling.fdr}"
    names = model.perturbations
    tables = []
    for start in range(0, len(names), _AT_ONCE):
        genes = model.differential_expression(
            group1=names[start : start + _AT_ONCE],
            fdr_target=sampling.fdr,
            all_stats=False,
            n_samples=sampling.n_samples,
        )
        tables.append(genes[genes[called]].groupby("group1", sort=False).head(sampling.n_genes))
    found = pd.concat(tables)
    rank = found.groupby("group1", sort=False).cumcount() + 1
    table = pd.DataFrame({"perturbation": found["group1"], "rank": rank, "gene": found.index})
    return table.assign(**{new: found[old] for old, new in _OF_GENES.items()}).reset_index(
        drop=True
    )


def sure_direct_effects(direct: DirectEffectTables) -> pd.DataFrame:
    """List the direct effects whose sign is certain, grouped by perturbation."""
    lfsr = direct.lfsr.to_numpy()
    rows, columns = np.nonzero(lfsr < _SURE_SIGN)
    order = np.lexsort((-np.abs(direct.mean.to_numpy()[rows, columns]), rows))
    rows, columns = rows[order], columns[order]
    return pd.DataFrame(
        {
            "perturbation": direct.mean.index[rows],
            "gene": direct.mean.columns[columns],
            **{name: t.to_numpy()[rows, columns] for name, t in direct._asdict().items()},
        }
    )


def settings_table(provenance: Mapping[str, Any]) -> pd.DataFrame:
    """One row per setting: nested names are joined by dots, trainings counted from 1."""
    return pd.DataFrame(_leaves(provenance, ()), columns=["setting", "value"])


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(inner, (*path, str(name)))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for number, inner in enumerate(value, start=1):
            yield from _leaves(inner, (*path, str(number)))
    else:
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        yield ".".join(path), text
