"""The report of a benchmark: one self-contained HTML file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from scvi_sams.benchmark._definitions import AXES, HEADLINES, define_metrics
from scvi_sams.benchmark._methods import NEGATIVE_CONTROL, NO_CHANGE, POSITIVE_CONTROL
from scvi_sams.pages._page import drawn, write_page
from scvi_sams.plotting._benchmark import (
    benchmark_metric,
    benchmark_perturbations,
    benchmark_specificity,
)

_CONTROLS = (NO_CHANGE, NEGATIVE_CONTROL, POSITIVE_CONTROL)
_MOST_FAILURES = 50


def write_report(
    path: str | Path,
    title: str,
    *,
    scores: pd.DataFrame,
    runs: pd.DataFrame,
    settings: dict[str, Any],
    summary: pd.DataFrame,
    failures: pd.DataFrame,
) -> None:
    """Write the tables of a result into the template next to this file."""
    methods = list(dict.fromkeys(summary["method"]))
    write_page(
        path,
        "scvi_sams.benchmark",
        "report.html.jinja",
        title=title,
        settings=settings,
        seconds=runs.groupby("method")["seconds"].mean(),
        axes=_headlines(summary),
        ordered=[m for m in methods if m not in _CONTROLS] + [m for m in _CONTROLS if m in methods],
        controls=_CONTROLS,
        specificity_figures=_specificity_figures(summary),
        metric_figures=_metric_figures(summary),
        perturbation_figures=_perturbation_figures(scores, summary),
        failures=failures.groupby([c for c in failures if c != "seed"], sort=False)
        .size()
        .rename("seeds")
        .reset_index(),
        most_failures=_MOST_FAILURES,
        summary=summary.drop(columns=["n_seeds", "higher_is_better"]).rename(
            columns=lambda name: name.replace("_", " ")
        ),
        definitions=_definitions(summary),
    )


def _headlines(summary: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Columns of the summary table by axis: a metric, and the values of all methods."""
    groups = dict(list(summary.groupby(["axis", "mode", "metric", "over"], sort=False)))
    columns: dict[str, list[dict[str, Any]]] = {}
    for axis in AXES:
        for mode, metric, over in HEADLINES:
            if (axis, mode, metric, over) in groups:
                rows = groups[axis, mode, metric, over]
                columns.setdefault(axis, []).append(
                    {
                        "mode": mode,
                        "metric": metric,
                        "over": over,
                        "higher_is_better": rows["higher_is_better"].iloc[0],
                        "chance": rows["chance"].mean(),
                        "of_method": rows.set_index("method").to_dict("index"),
                    }
                )
    return columns


def _specificity_figures(summary: pd.DataFrame) -> list[dict[str, str]]:
    figures = []
    for fit, specificity, mode in (
        ("rmse_average", "rank_rmse_average", "perturbench"),
        ("cosine_logfc", "rank_cosine_logfc", "perturbench"),
        ("mae", "discrimination_l1", "cell-eval"),
    ):
        if {fit, specificity} <= set(summary.loc[summary["mode"] == mode, "metric"]):
            draw = partial(benchmark_specificity, summary, fit, specificity, mode=mode)
            figures.append(drawn(draw, (3.9, 5.0), f"{fit} against {specificity} of every method"))
    return figures


def _metric_figures(summary: pd.DataFrame) -> list[dict[str, str]]:
    known = summary.groupby(["mode", "metric", "over"])["mean_of_succeeded"]
    n_methods = known.size()[known.count() > 0]
    return [
        drawn(
            partial(benchmark_metric, summary, metric, mode=mode),
            (3.9, 0.8 + 0.24 * n_methods[mode, metric, over]),
            f"{metric} ({mode}) of every method",
        )
        for mode, metric, over in HEADLINES
        if (mode, metric, over) in n_methods
    ]


def _perturbation_figures(scores: pd.DataFrame, summary: pd.DataFrame) -> list[dict[str, str]]:
    present = set(summary[["metric", "mode"]].itertuples(index=False, name=None))
    keys = (("rmse_average", "perturbench"), ("mae", "cell-eval"), ("pearson", "sams"))
    metric, mode = next((key for key in keys if key in present), ("", None))
    known = scores[(scores["metric"] == metric) & scores["value"].notna()]
    return [
        drawn(
            partial(benchmark_perturbations, scores, method, metric, mode=mode),
            (3.0, 3.1),
            f"{metric} of every perturbation, {method} against {NEGATIVE_CONTROL}",
        )
        for method in dict.fromkeys(known["method"])
        if method not in _CONTROLS
    ]


def _definitions(summary: pd.DataFrame) -> pd.DataFrame:
    table = define_metrics().merge(summary[["mode", "metric"]].drop_duplicates())
    better = table["higher_is_better"].map({True: "higher", False: "lower"})
    return (
        table.assign(higher_is_better=better)
        .drop(columns="chance")
        .rename(columns={"higher_is_better": "better"})
    )
