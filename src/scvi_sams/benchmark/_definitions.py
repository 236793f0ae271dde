"""What the rows of a benchmark mean: axes, headline metrics, and those of models and truth."""

from __future__ import annotations

import numpy as np
import pandas as pd

from scvi_sams.metrics._registry import describe_metrics

AXES = ("fit", "specificity", "distribution", "truth")
"""Questions that a metric may answer. None of them alone says that a method is good."""

_SPECIFICITY = {
    ("perturbench", "rank_rmse_average"),
    ("perturbench", "rank_cosine_logfc"),
    ("cell-eval", "discrimination_l1"),
    ("systema", "pearson_delta"),
    ("systema", "pearson_delta_top"),
    ("systema", "centroid_accuracy"),
}

HEADLINES = (
    ("sams", "pearson", "all"),
    ("sams", "pearson_top", "all"),
    ("perturbench", "rmse_average", "perturbations"),
    ("perturbench", "cosine_logfc", "perturbations"),
    ("perturbench", "rank_rmse_average", "perturbations"),
    ("perturbench", "rank_cosine_logfc", "perturbations"),
    ("cell-eval", "discrimination_l1", "perturbations"),
    ("systema", "pearson_delta", "perturbations"),
    ("systema", "centroid_accuracy", "perturbations"),
    ("distances", "energy_distance", "perturbations"),
    ("distances", "mmd", "perturbations"),
    ("model", "iwelbo_seen", "all"),
    ("model", "iwelbo_held_out", "all"),
    ("truth", "mask_f1", "all"),
    ("truth", "effect_f1", "all"),
    ("truth", "mcc_basal", "all"),
    ("truth", "mcc_perturbed", "all"),
)
"""Mode, metric and what it is taken over, in the order of the tables."""

_BOUND = (
    "importance-weighted bound on log p(x) per test cell {which}, nats; for models of the same "
    "data only"
)
_PAPER = "Bereket and Karaletsos, NeurIPS 2023"
_RECOVERY = "{score} of active entries, {what}, after one to one matching of latent dimensions"
_MASK = "posterior inclusion probability > 0.5"
_EFFECT = (
    "|posterior mean effect| > 0.5 standard deviations of basal states (a fixed threshold: the "
    "best one needs the truth)"
)


def _own_definitions() -> list[tuple[str, str, str, str]]:
    rows = [
        ("model", "iwelbo_seen", _BOUND.format(which="whose label was in training"), _PAPER),
        ("model", "iwelbo_held_out", _BOUND.format(which="whose label was held out"), _PAPER),
    ]
    for name, what in (("mask", _MASK), ("effect", _EFFECT)):
        rows += [
            ("truth", f"{name}_{score}", _RECOVERY.format(score=score, what=what), _PAPER)
            for score in ("precision", "recall", "f1")
        ]
    correlation = (
        "mean absolute correlation of true latents of test cells with their matched partners, "
        "{} states"
    )
    rows += [
        ("truth", f"mcc_{states}", correlation.format(states), "Khemakhem et al., 2020")
        for states in ("basal", "perturbed")
    ]
    return rows


def define_metrics() -> pd.DataFrame:
    """Describe every metric of a benchmark; as :func:`describe_metrics`, with ``axis``."""
    own = pd.DataFrame(_own_definitions(), columns=["mode", "metric", "definition", "source"])
    own = own.assign(higher_is_better=True, chance=np.nan)
    table = pd.concat([describe_metrics(), own], ignore_index=True)
    axes = [axis_of(m, n) for m, n in zip(table["mode"], table["metric"], strict=True)]
    table.insert(2, "axis", axes)
    return table


def axis_of(mode: str, metric: str) -> str:
    """Return which question a metric answers."""
    if mode == "truth":
        return "truth"
    if mode in ("distances", "model"):
        return "distribution"
    return "specificity" if (mode, metric) in _SPECIFICITY else "fit"
