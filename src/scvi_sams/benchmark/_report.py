"""The report of a benchmark: one HTML file that needs nothing else."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scvi_sams.benchmark._definitions import AXES, HEADLINES, define_metrics
from scvi_sams.benchmark._methods import NEGATIVE_CONTROL, NO_CHANGE, POSITIVE_CONTROL
from scvi_sams.benchmark._report_style import STYLE
from scvi_sams.benchmark._store import write_whole

if TYPE_CHECKING:
    from scvi_sams.benchmark._result import BenchmarkResult

_CONTROLS = (NO_CHANGE, NEGATIVE_CONTROL, POSITIVE_CONTROL)
_MOST_FAILURES = 50
_NOTHING = "\N{EN DASH}"


def write_report(result: BenchmarkResult, path: str | Path, title: str) -> None:
    """Write the report of a result."""
    summary = result.summary()
    sections = [
        ("What was run", _what_was_run(result)),
        ("Summary", _summary_table(summary)),
        ("Fit against specificity", _specificity_figures(summary)),
        ("Every metric", _metric_figures(summary)),
        ("Every perturbation", _perturbation_figures(result.scores, summary)),
        ("Failures", _failures(result)),
        ("All numbers", _all_numbers(summary)),
        ("Definitions", _definitions(summary)),
    ]
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name, _ in sections)
    body = "".join(
        f'<section id="{_anchor(name)}"><h2>{escape(name)}</h2>{content}</section>'
        for name, content in sections
    )
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main><h1>{escape(title)}</h1>"
        f"<nav>{links}</nav>{body}</main></body></html>\n"
    )
    write_whole(Path(path), lambda partial: partial.write_text(page, encoding="utf-8"))


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _what_was_run(result: BenchmarkResult) -> str:
    settings = result.settings
    data = settings["data"]
    facts = {
        "Data": f"{data['n_cells']:,} cells \N{MULTIPLICATION SIGN} {data['n_genes']:,} genes, "
        f"{data['n_perturbations']:,} labels, {data['n_control_cells']:,} control cells; "
        f"fingerprint {data['fingerprint'][:16]}",
        "Normalisation": f"log(1 + x), total: {settings['target_sum']}",
        "Seeds": ", ".join(map(str, settings["seeds"])),
        "Metrics": ", ".join(settings["modes"]),
        "Versions": ", ".join(f"{name} {text}" for name, text in settings["versions"].items()),
    }
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items())
    splits = pd.DataFrame(
        [
            {
                "seed": seed,
                "split": split["name"],
                "settings": ", ".join(f"{k} = {v}" for k, v in split["settings"].items()),
                "train": f"{split['n_train']:,}",
                "validation": f"{split['n_validation']:,}",
                "test": f"{split['n_test']:,}",
                "held-out labels": len(split["held_out"]),
            }
            for seed, split in settings["splits"].items()
        ]
    )
    runs = result.runs.groupby("method", sort=False)["seconds"].mean()
    methods = pd.DataFrame(
        [
            {"method": name, "settings": text, "seconds per fit": f"{runs[name]:.1f}"}
            for name, text in settings["methods"].items()
        ]
    )
    return (
        f"<dl>{listed}</dl>{_table(splits)}"
        f"<details><summary>Methods and their settings</summary>{_table(methods, wrap=True)}"
        "</details>"
    )


def _summary_table(summary: pd.DataFrame) -> str:
    keys = pd.MultiIndex.from_frame(summary[["mode", "metric", "over"]])
    rows = summary.set_index(["method"]).assign(key=list(keys))
    methods = list(dict.fromkeys(summary["method"]))
    methods = [m for m in methods if m not in _CONTROLS] + [m for m in _CONTROLS if m in methods]
    columns: list[tuple[str, tuple[str, str, str]]] = []
    for axis in AXES:
        present = set(summary.loc[summary["axis"] == axis].index)
        of_axis = {keys[row] for row in present}
        columns += [(axis, key) for key in HEADLINES if key in of_axis]
    head = "".join(
        f'<th colspan="{n}" scope="colgroup">{escape(axis.capitalize())}</th>'
        for axis in AXES
        if (n := sum(a == axis for a, _ in columns))
    )
    names = "".join(f'<th scope="col">{_headline_name(summary, key)}</th>' for _, key in columns)
    body = ""
    for method in methods:
        own = rows.loc[[method]].set_index("key")
        cells = "".join(f"<td>{_cell(own, key)}</td>" for _, key in columns)
        kind = ' class="control"' if method in _CONTROLS else ""
        body += f'<tr{kind}><th scope="row">{escape(method)}</th>{cells}</tr>'
    chance = rows.groupby("key", sort=False)["chance"].mean()
    cells = "".join(f"<td>{_number(chance[key])}</td>" for _, key in columns)
    body += f'<tr class="control"><th scope="row">chance</th>{cells}</tr>'
    return (
        "<p>Mean over perturbations and seeds; below it the 95 % interval over perturbations (or "
        "\N{PLUS-MINUS SIGN} the standard deviation over seeds where there is one value for all). "
        "\N{UPWARDS ARROW} higher is better, \N{DOWNWARDS ARROW} lower is better. Read fit beside "
        "specificity: <em>mean of perturbations</em> predicts the same for every perturbation, so "
        "it fits and is at chance. <em>Half of the test cells</em> predicts the other half: "
        "what the test cells themselves can tell, which is noisy, and can be passed, where they "
        "are few.</p>"
        '<div class="wide" tabindex="0"><table class="summary"><thead><tr><th rowspan="2" '
        f'scope="col">Method</th>{head}</tr><tr>{names}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def _headline_name(summary: pd.DataFrame, key: tuple[str, str, str]) -> str:
    mode, metric, over = key
    row = summary[(summary["mode"] == mode) & (summary["metric"] == metric)].iloc[0]
    arrow = "\N{UPWARDS ARROW}" if row["higher_is_better"] else "\N{DOWNWARDS ARROW}"
    what = ", all at once" if over == "all" and mode == "sams" else ""
    return f"{escape(metric.replace('_', ' '))}{what} {arrow}<small>{escape(mode)}</small>"


def _cell(own: pd.DataFrame, key: tuple[str, str, str]) -> str:
    if key not in own.index:
        return _NOTHING
    row = own.loc[[key]].iloc[0]
    failed = ""
    if row["n_failed"]:
        what = "fits incomplete" if key[2] == "all" else "failed"
        failed = f'<small class="failed">{row["n_failed"]} of {row["n_values"]} {what}</small>'
    if np.isnan(row["mean"]):
        rest = row["mean_of_succeeded"]
        return f"{_NOTHING if np.isnan(rest) else f'({_number(rest)})'}{failed}"
    spread = ""
    if np.isfinite(row["low"]):
        spread = f"<small>{_number(row['low'])} to {_number(row['high'])}</small>"
    elif np.isfinite(row["sd_over_seeds"]):
        spread = f"<small>\N{PLUS-MINUS SIGN} {_number(row['sd_over_seeds'])}</small>"
    return f"{_number(row['mean'])}{spread}{failed}"


def _number(value: float) -> str:
    if not np.isfinite(value):
        return _NOTHING
    text = f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _specificity_figures(summary: pd.DataFrame) -> str:
    from scvi_sams import plotting

    figures = []
    for fit, specificity, mode in (
        ("rmse_average", "rank_rmse_average", "perturbench"),
        ("cosine_logfc", "rank_cosine_logfc", "perturbench"),
        ("mae", "discrimination_l1", "cell-eval"),
    ):
        present = set(summary.loc[summary["mode"] == mode, "metric"])
        if {fit, specificity} <= present:
            figures.append(
                _figure(
                    partial(plotting.benchmark_specificity, summary, fit, specificity, mode=mode),
                    (3.9, 5.0),
                    f"{fit} against {specificity} of every method",
                )
            )
    return (
        "<p>Better is right and up. Methods on the dotted line may fit, but predict much the same "
        "for every perturbation (mode collapse). Bars are 95 % intervals; hollow marks had "
        "failures.</p>" + _grid(figures)
    )


def _metric_figures(summary: pd.DataFrame) -> str:
    from scvi_sams import plotting

    known = summary[summary["mean_of_succeeded"].notna()]
    present = set(known[["mode", "metric", "over"]].itertuples(index=False, name=None))
    figures = []
    for key in HEADLINES:
        if key in present:
            mode, metric, _ = key
            n_methods = int((summary[["mode", "metric", "over"]] == list(key)).all(axis=1).sum())
            figures.append(
                _figure(
                    partial(plotting.benchmark_metric, summary, metric, mode=mode),
                    (3.9, 0.8 + 0.24 * n_methods),
                    f"{metric} ({mode}) of every method",
                )
            )
    return (
        "<p>Diamonds are controls; the grey band lies between the mean of perturbations and half "
        "of the test cells.</p>" + _grid(figures)
    )


def _perturbation_figures(scores: pd.DataFrame, summary: pd.DataFrame) -> str:
    from scvi_sams import plotting

    figures = []
    metrics = (("rmse_average", "perturbench"), ("mae", "cell-eval"), ("pearson", "sams"))
    present = set(summary[["metric", "mode"]].itertuples(index=False, name=None))
    metric, mode = next((key for key in metrics if key in present), (None, None))
    known = scores[(scores["metric"] == metric) & scores["value"].notna()]
    for method in dict.fromkeys(known["method"]):
        if metric is not None and method not in _CONTROLS:
            figures.append(
                _figure(
                    partial(plotting.benchmark_perturbations, scores, method, metric, mode=mode),
                    (3.0, 3.1),
                    f"{metric} of every perturbation, {method} against {NEGATIVE_CONTROL}",
                )
            )
    if not figures:
        return "<p>No method but the controls has a score of single perturbations.</p>"
    return (
        "<p>One point per perturbation, averaged over seeds; in the shaded half the method is "
        "better than the mean of perturbations. Named are those where it falls behind most.</p>"
        + _grid(figures, narrow=True)
    )


def _failures(result: BenchmarkResult) -> str:
    failures = result.failures
    if failures.empty:
        return "<p>None: every method predicted every perturbation.</p>"
    listed = [column for column in failures if column != "seed"]
    counted = failures.groupby(listed, sort=False).size().rename("seeds").reset_index()
    shown = _table(counted.head(_MOST_FAILURES), wrap=True)
    more = len(counted) - _MOST_FAILURES
    rest = f"<p>{more} more are in the table of scores.</p>" if more > 0 else ""
    return shown + rest


def _all_numbers(summary: pd.DataFrame) -> str:
    table = summary.drop(columns=["n_seeds", "higher_is_better"]).copy()
    for column in table.select_dtypes("float"):
        table[column] = table[column].map(_number)
    table.columns = [str(column).replace("_", " ") for column in table.columns]
    return f"<details><summary>Show the whole summary</summary>{_table(table)}</details>"


def _definitions(summary: pd.DataFrame) -> str:
    present = set(summary[["mode", "metric"]].itertuples(index=False, name=None))
    defined = define_metrics()
    used = [
        key in present for key in defined[["mode", "metric"]].itertuples(index=False, name=None)
    ]
    table = defined[used].drop(columns=["chance"])
    table["higher_is_better"] = table["higher_is_better"].map({True: "higher", False: "lower"})
    table = table.rename(columns={"higher_is_better": "better"})
    return "<p>x is the prediction, y the observation.</p>" + _table(table, wrap=True)


def _table(table: pd.DataFrame, *, wrap: bool = False) -> str:
    head = "".join(f'<th scope="col">{escape(str(column))}</th>' for column in table.columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(value))}</td>" for value in row) + "</tr>"
        for row in table.itertuples(index=False, name=None)
    )
    kind = ' class="wrap"' if wrap else ""
    return (
        f'<div class="wide" tabindex="0"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _grid(figures: list[str], *, narrow: bool = False) -> str:
    kind = "grid narrow" if narrow else "grid"
    return f'<div class="{kind}">{"".join(figures)}</div>'


def _figure(draw: Callable[..., Axes], size: tuple[float, float], description: str) -> str:
    """Draw into a page as SVG."""
    figure = Figure(figsize=size, layout="constrained")
    draw(ax=figure.subplots())
    buffer = io.StringIO()
    # Without metadata, which would refer to other places by address.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Inside HTML the names of the formats are known.
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg)
    label = f'<svg role="img" aria-label="{escape(description, quote=True)}"'
    return f"<figure>{svg.replace('<svg', label, 1)}</figure>"
