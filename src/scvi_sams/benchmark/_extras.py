"""What only some methods have: likelihoods of cells, and masks and latents to hold to the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from scvi_sams.benchmark._screen import SIMULATION, Fold
from scvi_sams.exceptions import SAMSError
from scvi_sams.metrics._recovery import mask_recovery, mean_correlation_coefficient

EFFECT_THRESHOLD = 0.5
"""An effect is called active from this size on, in standard deviations of basal states.

Fixed, because a threshold chosen by the truth is not to be had on real data.
"""
MASK_THRESHOLD = 0.5


@dataclass(frozen=True)
class Extra:
    """A score of a whole fit."""

    mode: str
    metric: str
    value: float
    n_cells: int
    status: str = "ok"
    message: str = ""


def likelihood_extras(
    model: Any, fold: Fold, cells: ad.AnnData, n_samples: int | None
) -> list[Extra]:
    """Score the importance-weighted bound per test cell, of seen and of held-out labels."""
    if n_samples is None or not hasattr(model, "get_iwelbo"):
        return []
    extras = []
    for metric, chosen in (
        ("iwelbo_seen", ~fold.is_held_out),
        ("iwelbo_held_out", fold.is_held_out),
    ):
        positions = np.flatnonzero(chosen)
        if len(positions):
            extras.append(
                _attempt(
                    "model",
                    metric,
                    len(positions),
                    partial(
                        model.get_iwelbo,
                        cells,
                        indices=positions,
                        n_samples=n_samples,
                        key_added=None,
                    ),
                )
            )
    return extras


def truth_extras(model: Any, cells: ad.AnnData) -> list[Extra]:
    """Score masks, effects and latents against the truth of a simulated screen."""
    truth = cells.uns.get(SIMULATION)
    if truth is None or "true_masks" not in truth:
        return []
    extras: list[Extra] = []
    true_masks = pd.DataFrame(
        np.asarray(truth["true_masks"]), index=[str(name) for name in truth["perturbations"]]
    )
    if hasattr(model, "get_perturbation_masks"):
        masks = model.get_perturbation_masks(key_added=None)
        extras += _recovery("mask", masks, true_masks, MASK_THRESHOLD)
    if hasattr(model, "get_perturbation_effects"):
        sizes = model.get_perturbation_effects(key_added=None).mean.abs()
        extras += _recovery("effect", sizes, true_masks, EFFECT_THRESHOLD)
    if hasattr(model, "get_latent_representation"):
        extras += _latents(model, cells)
    return extras


def _recovery(
    name: str, estimate: pd.DataFrame, true_masks: pd.DataFrame, threshold: float
) -> list[Extra]:
    # Combinations that are perturbations of their own have no true mask, and what was never
    # trained no estimate.
    shared = true_masks.index.intersection(estimate.index)
    if not len(shared):
        return []
    found = mask_recovery(estimate.loc[shared], true_masks.loc[shared], threshold=threshold)
    return [
        Extra("truth", f"{name}_{score}", float(found[score]), 0)
        for score in ("precision", "recall", "f1")
    ]


def _latents(model: Any, cells: ad.AnnData) -> list[Extra]:
    extras = []
    for metric, representation, key in (
        ("mcc_basal", "basal", "true_basal"),
        ("mcc_perturbed", "perturbed", "true_latent"),
    ):
        if key in cells.obsm:
            extras.append(
                _attempt(
                    "truth",
                    metric,
                    cells.n_obs,
                    partial(_latent_recovery, model, cells, representation, cells.obsm[key]),
                )
            )
    return extras


def _latent_recovery(
    model: Any, cells: ad.AnnData, representation: str, truth: np.ndarray
) -> float:
    latents = model.get_latent_representation(cells, representation=representation, key_added=None)
    return mean_correlation_coefficient(latents, truth)


def _attempt(mode: str, metric: str, n_cells: int, score: Callable[[], float]) -> Extra:
    try:
        return Extra(mode, metric, float(score()), n_cells)
    except SAMSError as error:  # the model has no such quantity, or cannot score these cells
        return Extra(mode, metric, np.nan, n_cells, "undefined", str(error))
    except Exception as error:  # noqa: BLE001 - whatever a model raises is a row
        return Extra(mode, metric, np.nan, n_cells, "failed", f"{type(error).__name__}: {error}")
