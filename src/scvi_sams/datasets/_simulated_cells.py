"""Additions to the model of SAMS-VAE: own genes, guides, cell types, escaped cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from scvi_sams._checks import as_numbers, check_integer, check_number
from scvi_sams._plurals import counted
from scvi_sams.datasets._simulated_truth import CONTROL
from scvi_sams.exceptions import InvalidArgumentError

_SIZES = ("n_genes", "n_perturbations", "cells_per_perturbation", "n_latent", "n_hidden")
_COUNTS = ("n_controls", "n_combinations", "cells_per_combination")
_POSITIVE = ("library_size", "inverse_dispersion")
_SCALES = ("effect_scale", "library_log_sd", "inverse_dispersion_log_sd", "gene_bias_sd")
_NOT_NEGATIVE = (*_SCALES, "decoder_scale")


def check_options(settings: Mapping[str, Any]) -> None:
    """Raise if options are invalid or contradict each other."""
    n_perturbations = settings["n_perturbations"]
    check_integer(**{name: settings[name] for name in _SIZES})
    check_integer(at_least=0, **{name: settings[name] for name in _COUNTS})
    check_integer(at_least=0, seed=settings.get("seed", 0))
    check_number(above=0, **{name: settings[name] for name in _POSITIVE})
    check_number(at_least=0, **{name: settings[name] for name in _NOT_NEGATIVE})
    check_integer(at_least=0, n_null_perturbations=settings["n_null_perturbations"])
    check_integer(n_cell_types=settings["n_cell_types"])
    if np.ndim(settings["escape_rate"]):
        _check_range("escape_rate", settings["escape_rate"], below=1)
    else:
        check_number(at_least=0, below=1, escape_rate=settings["escape_rate"])
    check_number(
        at_least=0, at_most=1, cell_type_specific_share=settings["cell_type_specific_share"]
    )
    check_number(at_least=0, cell_type_log_sd=settings["cell_type_log_sd"])
    n_features = {name: settings[name] for name in ("n_features", "n_noise_features")}
    check_integer(at_least=0, **n_features)
    check_number(at_least=0, at_most=1, feature_share=settings["feature_share"])
    if n_features["n_noise_features"] and not n_features["n_features"]:
        raise InvalidArgumentError(
            "`n_noise_features` are in addition to other features: set `n_features`, with a "
            "`feature_share` of 0 if none is informative."
        )
    if settings["n_null_perturbations"] > n_perturbations:
        raise InvalidArgumentError(
            f"`n_null_perturbations` is {settings['n_null_perturbations']}, more than "
            f"{counted(n_perturbations, 'perturbation')}."
        )
    if settings["cell_type_specific_share"] > 0 and settings["n_cell_types"] == 1:
        raise InvalidArgumentError(
            "`cell_type_specific_share` needs several cell types: raise `n_cell_types`."
        )
    if "knockdown" in settings:
        _check_range("knockdown", settings["knockdown"], below=1)
        if n_perturbations > settings["n_genes"]:
            raise InvalidArgumentError(
                f"With `knockdown` every perturbation has a gene, but there are {n_perturbations} "
                f"perturbations and {settings['n_genes']} genes. Simulate more genes; you can "
                "remove genes that your panel does not measure afterwards."
            )
    if "guides_per_perturbation" in settings:
        check_integer(guides_per_perturbation=settings["guides_per_perturbation"])
    if "guide_efficacy" in settings:
        _check_range("guide_efficacy", settings["guide_efficacy"])
        if "guides_per_perturbation" not in settings:
            raise InvalidArgumentError(
                "`guide_efficacy` needs guides: set their number with `guides_per_perturbation`."
            )


def _check_range(name: str, values: object, below: float | None = None) -> None:
    """Check the two ends of a range of proportions."""
    numbers = as_numbers(name, values)
    if numbers.shape != (2,) or numbers[0] > numbers[1]:
        raise InvalidArgumentError(
            f"`{name}` must be a smallest and a largest fraction, such as (0.7, 0.95), not "
            f"{values!r}."
        )
    for number in numbers:
        check_number(at_least=0, below=below, **{name: float(number)})


def numbered(prefix: str, n: int, digits: int) -> list[str]:
    """Names whose alphabetical order is that of their numbers."""
    return [f"{prefix}{i:0{max(digits, len(str(n)))}d}" for i in range(1, n + 1)]


def draw_targets(
    rng: np.random.Generator, settings: Mapping[str, Any], genes: pd.Index, masks: np.ndarray
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Names of the perturbations, and the effect of each on the gene of its name."""
    if "knockdown" not in settings:
        return numbered("P", len(masks), 3), {}
    targets = np.sort(rng.choice(len(genes), size=len(masks), replace=False))
    low, high = settings["knockdown"]
    effects = np.log1p(-rng.uniform(low, high, size=len(masks)))
    return genes[targets].tolist(), {
        "true_own_gene_effects": np.where(masks.any(axis=1), effects, 0.0)
    }


def doses_that_act(
    rngs: Sequence[np.random.Generator],
    settings: Mapping[str, Any],
    names: Sequence[str],
    masks: np.ndarray,
    obs: pd.DataFrame,
    doses: csr_matrix,
) -> tuple[csr_matrix, dict[str, Any]]:
    """Multiply doses by the effects of guide, cell type and escape; cells x perturbations.

    Adds columns to ``obs`` and also returns the truth to store in ``uns``.
    """
    of_guides, of_cell_types, of_escape = rngs
    cells = np.repeat(np.arange(len(obs)), np.diff(doses.indptr))
    truth: dict[str, Any] = {}
    acting = doses.copy()
    guides = None
    if "guides_per_perturbation" in settings:
        truth |= _draw_guides(of_guides, settings, names)
        guides = of_guides.integers(settings["guides_per_perturbation"], size=doses.nnz)
        acting.data = acting.data * truth["true_guide_efficacy"][doses.indices, guides]
        written = truth["guides"][doses.indices, guides].tolist()
        obs["guide"] = pd.Categorical(
            ["+".join(written[i:j]) or CONTROL for i, j in pairwise(doses.indptr.tolist())]
        )
    if settings["n_cell_types"] > 1:
        codes = of_cell_types.integers(settings["n_cell_types"], size=len(obs))
        truth |= _draw_cell_types(of_cell_types, settings, masks)
        acting.data = acting.data * truth["true_response"][doses.indices, codes[cells]]
        obs["cell_type"] = pd.Categorical.from_codes(codes, truth["cell_types"])
    if np.any(np.asarray(settings["escape_rate"]) > 0):
        uniform = of_escape.random(len(obs))
        rate = settings["escape_rate"]
        if np.ndim(rate):
            rate, truth["true_escape_rate"] = _draw_escape_rates(of_escape, settings, doses, guides)
        escaped = uniform < rate
        obs["true_escaped"] = escaped & (obs["n_perturbations"] > 0).to_numpy()
        acting.data = acting.data * ~escaped[cells]
    return acting, truth


def _draw_escape_rates(
    rng: np.random.Generator,
    settings: Mapping[str, Any],
    doses: csr_matrix,
    guides: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Probability that each cell escapes, and that of perturbations, or of their guides.

    ``guides`` are those of the entries of ``doses``, cells x perturbations.
    """
    n_perturbations = doses.shape[1]
    shape: tuple[int, ...] = (n_perturbations,)
    if guides is not None:
        shape = (n_perturbations, settings["guides_per_perturbation"])
    low, high = settings["escape_rate"]
    rates = rng.uniform(low, high, size=shape)
    of_entries = rates[doses.indices] if guides is None else rates[doses.indices, guides]
    of_cells = csr_matrix((of_entries, doses.indices, doses.indptr), shape=doses.shape)
    n_carried = np.maximum(np.diff(doses.indptr), 1)
    return np.asarray(of_cells.sum(axis=1)).ravel() / n_carried, rates


def _draw_guides(
    rng: np.random.Generator, settings: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Names of the guides and the proportion of the effect of each, perturbations x guides."""
    n_guides = settings["guides_per_perturbation"]
    guides = [numbered(f"{name}g", n_guides, 1) for name in names]
    low, high = settings.get("guide_efficacy", (1.0, 1.0))
    return {
        "guides": np.array(guides, dtype=object),
        "true_guide_efficacy": rng.uniform(low, high, size=(len(names), n_guides)),
    }


def _draw_cell_types(
    rng: np.random.Generator, settings: Mapping[str, Any], masks: np.ndarray
) -> dict[str, Any]:
    """Names of the types, and where each perturbation has an effect, perturbations x types."""
    n_types = settings["n_cell_types"]
    response = np.ones((len(masks), n_types), dtype=bool)
    has_effect = np.flatnonzero(masks.any(axis=1))
    n_specific = round(settings["cell_type_specific_share"] * len(has_effect))
    specific = rng.choice(has_effect, size=n_specific, replace=False)
    response[specific] = np.arange(n_types) == rng.integers(n_types, size=(n_specific, 1))
    return {
        "cell_types": np.array(numbered("type_", n_types, 1), dtype=object),
        "true_response": response,
    }


def draw_cell_type_bias(
    rng: np.random.Generator, settings: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Effect of each type on log expression, types x genes, as a part of the decoder."""
    if settings["n_cell_types"] == 1:
        return {}
    shape = settings["n_cell_types"], settings["n_genes"]
    return {"cell_type_bias": rng.normal(scale=settings["cell_type_log_sd"], size=shape)}
