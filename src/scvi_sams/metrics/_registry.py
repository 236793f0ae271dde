"""Every metric of :func:`score_predictions`, by mode and name."""

from __future__ import annotations

import pandas as pd

from scvi_sams.metrics import _ate, _cell_eval, _distances, _perturbench, _systema
from scvi_sams.metrics._comparison import Metric

METRICS: dict[tuple[str, str], Metric] = {
    (metric.mode, metric.metric): metric
    for metric in (
        *_ate.METRICS,
        *_perturbench.METRICS,
        *_cell_eval.METRICS,
        *_systema.METRICS,
        *_distances.METRICS,
    )
}
"""In the order of tables. A new metric is declared in a file of its own and added here."""


def metrics_by_mode() -> dict[str, list[Metric]]:
    """Metrics of every mode."""
    modes: dict[str, list[Metric]] = {}
    for metric in METRICS.values():
        modes.setdefault(metric.mode, []).append(metric)
    return modes


def describe_metrics() -> pd.DataFrame:
    """Describe every metric of :func:`score_predictions`.

    Returns
    -------
    One row per metric: ``mode``, ``metric``, ``definition`` (``x`` is the prediction, ``y`` the
    observation), ``source``, ``higher_is_better``, and ``chance``, the value of predicting the same
    for all perturbations where it does not depend on the data (NaN elsewhere; for many
    perturbations, :func:`score_predictions` states the exact one).

    Examples
    --------
    >>> metrics = scvi_sams.evaluation.describe_metrics()
    >>> metrics["mode"].unique().tolist()
    ['sams', 'perturbench', 'cell-eval', 'systema', 'distances']
    """
    columns = ["mode", "metric", "definition", "source", "higher_is_better", "chance"]
    return pd.DataFrame([vars(metric) for metric in METRICS.values()])[columns]
