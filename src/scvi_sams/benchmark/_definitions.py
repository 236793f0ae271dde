"""Definitions of benchmark results: axes, headline metrics, and those of models and truth."""

from __future__ import annotations

import pandas as pd

from scvi_sams.metrics._comparison import Metric
from scvi_sams.metrics._scoring import METRICS, describe_metrics

AXES = ("fit", "specificity", "distribution", "truth")
"""Questions that a metric may answer. A good method does well in all of them."""
FAILURES = ("failed", "missing", "nan")
"""Statuses of a failed prediction."""

_BOUND = (
    "importance-weighted bound on log p(x) per test cell {which}, nats; for models of the same "
    "data only"
)
_PAPER = "Bereket and Karaletsos, NeurIPS 2023"
_RECOVERY = "{score} of active entries, {what}, after one to one matching of latent dimensions"
_MASK = "posterior inclusion probability > 0.5 (masks alone)"
_CALLED = (
    "called at a false discovery rate of 5 % by masks and by a test on the cells "
    "(scvi_sams.tl.called_masks)"
)
_EFFECT = (
    "|posterior mean effect| > 0.5 standard deviations of basal states (a fixed threshold: the "
    "best one requires the truth)"
)


METRICS_OF_FITS = (
    *(
        Metric(
            "model", f"iwelbo_{name}", "distribution", _BOUND.format(which=which), _PAPER, True,
            is_headline=True,
        )
        for name, which in (
            ("seen", "whose label was in training"), ("held_out", "whose label was held out")
        )
    ),
    *(
        Metric(
            "truth", f"{name}_{score}", "truth", _RECOVERY.format(score=score, what=what), _PAPER,
            True, is_headline=score == headline,
        )
        for name, what, headline in (
            ("mask", _MASK, "f1"), ("called", _CALLED, "precision"), ("effect", _EFFECT, "f1")
        )
        for score in ("precision", "recall", "f1")
    ),
    *(
        Metric(
            "truth", f"mcc_{states}", "truth", "mean absolute correlation of true latents of test "
            f"cells with their matched partners, {states} states", "Khemakhem et al., 2020", True,
            is_headline=True,
        )
        for states in ("basal", "perturbed")
    ),
)  # fmt: skip
"""Metrics of a whole fit, scored in :mod:`scvi_sams.benchmark._model`."""

HEADLINES = tuple(
    (
        metric.mode,
        metric.metric,
        "perturbations" if metric.score is not None and metric.pooled is None else "all",
    )
    for metric in (*METRICS.values(), *METRICS_OF_FITS)
    if metric.is_headline
)
"""Mode, metric and what it is computed over, in the order of the tables."""


def define_metrics() -> pd.DataFrame:
    """Describe every metric of a benchmark; like :func:`describe_metrics`, with ``axis``."""
    described = describe_metrics()
    own = pd.DataFrame([vars(metric) for metric in METRICS_OF_FITS])[described.columns]
    table = pd.concat([described, own], ignore_index=True)
    table.insert(2, "axis", axes_of(table))
    return table


def axes_of(table: pd.DataFrame) -> list[str]:
    """Return the question that the metric of each row answers."""
    axes = {(own.mode, own.metric): own.axis for own in (*METRICS.values(), *METRICS_OF_FITS)}
    # A model whose own scores all failed has a row of mode "model" instead.
    rows = zip(table["mode"], table["metric"], strict=True)
    return [axes.get(row, "distribution") for row in rows]
