"""Figures of a benchmark: methods compared with the controls."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from scvi_sams._checks import check_integer
from scvi_sams.exceptions import SAMSError
from scvi_sams.labels._names import check_has
from scvi_sams.plotting._labels import label_points
from scvi_sams.plotting._style import (
    COLOURS,
    GREY,
    SHADE,
    TEXT,
    finish,
    legend_below,
    literal,
    new_axes,
    tidy,
)

_CONTROLS = ("control mean", "mean of perturbations", "half of the test cells")
_NEGATIVE, _POSITIVE = _CONTROLS[1:]
_METHOD_COLOUR = "#0072B2"
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def benchmark_metric(
    summary: pd.DataFrame,
    metric: str,
    *,
    mode: str | None = None,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Axes:
    """One metric of every method, with intervals, chance level and controls.

    Parameters
    ----------
    summary
        Result of :meth:`scvi_sams.evaluation.BenchmarkResult.summary`.
    metric, mode
        Metric to draw; the mode is required only if several modes have a metric of this name. If a
        metric is both averaged over perturbations and flattened, the flattened one is drawn.
    ax
        Axes to draw on; ``None`` makes a figure.
    figsize
        Width and height of the new figure in inches; ``None`` for a size that fits.
    save
        File to write the figure to, in the format of its suffix.

    Returns
    -------
    The axes. Bars are 95 % intervals over perturbations; if there is one value for all, they are
    one SD over seeds. Methods with failures have hollow markers at the mean of the successful
    predictions, with the number of failures.

    Raises
    ------
    SAMSError
        If the summary has no such metric.

    Examples
    --------
    >>> ax = scvi_sams.pl.benchmark_metric(benchmark.summary(), "rmse_average")
    """
    rows = _rows_of(summary, metric, mode).iloc[::-1]
    ax = new_axes(ax, 4.2, 0.6 + 0.25 * len(rows), figsize, save)
    places = np.arange(len(rows))
    low = rows["low"].fillna(rows["mean"] - rows["sd_over_seeds"]).to_numpy()
    high = rows["high"].fillna(rows["mean"] + rows["sd_over_seeds"]).to_numpy()
    for place, start, end, (_, row) in zip(places, low, high, rows.iterrows(), strict=True):
        is_control = row["method"] in _CONTROLS
        colour = GREY if is_control else _METHOD_COLOUR
        ax.plot([start, end], [place, place], color=colour, linewidth=1.4, zorder=2)
        ax.plot(
            row["shown"],
            place,
            marker="D" if is_control else "o",
            markersize=5,
            color=colour,
            markerfacecolor=ax.get_facecolor() if np.isnan(row["mean"]) else colour,
            zorder=3,
        )
        if row["n_failed"]:
            _note_failures(ax, float(place), row)
    _draw_references(ax, rows)
    ax.set_yticks(places, rows["method"].map(literal))
    ax.set_ylim(-0.7, len(rows) - 0.3)
    direction = "higher" if rows["higher_is_better"].iloc[0] else "lower"
    # Two lines, because a single line can be wider than the axes of a narrow figure.
    ax.set_xlabel(f"{_name(rows)}\n({direction} is better)")
    tidy(ax)
    finish(ax, save)
    return ax


def benchmark_specificity(
    summary: pd.DataFrame,
    fit: str = "rmse_average",
    specificity: str = "rank_rmse_average",
    *,
    mode: str | None = "perturbench",
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Fit against specificity: a method that does not distinguish perturbations is on the line.

    Parameters
    ----------
    fit, specificity
        Metrics of the two axes.
    summary, mode
        As for :func:`benchmark_metric`; the mode applies to both metrics.
    ax
        Axes to draw on; ``None`` makes a figure.
    figsize
        Width and height of the new figure in inches; ``None`` for a size that fits.
    save
        File to write the figure to, in the format of its suffix.

    Returns
    -------
    The axes, both directed so that better is right and up. Bars are 95 % intervals. Methods with
    failures have hollow markers at the mean of the successful predictions.

    Raises
    ------
    SAMSError
        If the summary has no such metrics.

    Examples
    --------
    >>> ax = scvi_sams.pl.benchmark_specificity(benchmark.summary())
    """
    x_rows = _rows_of(summary, fit, mode).set_index("method")
    y_rows = _rows_of(summary, specificity, mode).set_index("method").reindex(x_rows.index)
    ax = new_axes(ax, 4.2, 4.6, figsize, save)
    colours, markers = cycle(COLOURS), cycle(_MARKERS)
    for (method, x), (_, y) in zip(x_rows.iterrows(), y_rows.iterrows(), strict=True):
        is_control = method in _CONTROLS
        colour = GREY if is_control else next(colours)
        marker = "dh*"[_CONTROLS.index(str(method))] if is_control else next(markers)
        hollow = bool(x["n_failed"])
        place = (x["shown"], y["shown"])
        ax.plot([x["low"], x["high"]], [place[1]] * 2, color=colour, linewidth=0.8, zorder=2)
        ax.plot([place[0]] * 2, [y["low"], y["high"]], color=colour, linewidth=0.8, zorder=2)
        ax.plot(
            *place,
            linestyle="none",
            marker=marker,
            markersize=7,
            color=colour,
            markerfacecolor=ax.get_facecolor() if hollow else colour,
            alpha=0.85,
            label=literal(f"{method} ({x['n_failed']} failed)" if hollow else method),
            zorder=3,
        )
    chance = y_rows["chance"].mean()
    if np.isfinite(chance):
        label = "chance: perturbations not distinguished"
        ax.axhline(chance, color=GREY, linestyle=":", linewidth=1, zorder=1, label=label)
    for axis, rows in ((ax.xaxis, x_rows), (ax.yaxis, y_rows)):
        # Better is right and up, whatever the metric's direction.
        axis.set_inverted(not rows["higher_is_better"].iloc[0])
        axis.set_label_text(f"{_name(rows)}\n(better \N{RIGHTWARDS ARROW})")
    tidy(ax)
    legend_below(ax)
    finish(ax, save)
    return ax


def benchmark_perturbations(
    scores: pd.DataFrame,
    method: str,
    metric: str = "rmse_average",
    *,
    mode: str | None = "perturbench",
    reference: str = _NEGATIVE,
    label_worst: int = 3,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Axes:
    """One metric for every perturbation: a method against a reference.

    Parameters
    ----------
    scores
        Tidy table of :class:`scvi_sams.evaluation.BenchmarkResult`.
    method, reference
        The two methods to compare.
    metric, mode
        Metric to draw.
    label_worst
        Number of perturbations to name: those where the method is worst relative to the reference.
        Names without free space are omitted.
    ax
        Axes to draw on; ``None`` makes a figure.
    figsize
        Width and height of the new figure in inches; ``None`` for a size that fits.
    save
        File to write the figure to, in the format of its suffix.

    Returns
    -------
    The axes, one point per perturbation, averaged over seeds; the method is better on the shaded
    side of the identity line.

    Raises
    ------
    SAMSError
        If the scores have no such metric or method.

    Examples
    --------
    >>> ax = scvi_sams.pl.benchmark_perturbations(benchmark.scores, "additive")
    """
    _check_columns("scores", scores)
    check_integer(at_least=0, label_worst=label_worst)
    chosen = scores[(scores["metric"] == metric) & (scores["perturbation"] != "all")]
    if mode is not None:
        chosen = chosen[chosen["mode"] == mode]
    names = (method, reference)
    check_has(f"There are no scores of {metric!r} for", names, chosen["method"].unique())
    means = chosen.pivot_table(
        index="perturbation", columns="method", values="value", aggfunc="mean", dropna=False
    )
    both = means[[reference, method]].dropna()
    ax = new_axes(ax, 3, 3.1, figsize, save)
    x, y = both[reference].to_numpy(), both[method].to_numpy()
    higher = bool(chosen["higher_is_better"].iloc[0])
    ends = np.array([0.0, 1.0])
    if len(both):
        lowest, highest = min(x.min(), y.min()), max(x.max(), y.max())
        margin = 0.06 * (highest - lowest) or 0.1
        ends = np.array([lowest - margin, highest + margin])
    ax.fill_between(ends, ends, ends[1] if higher else ends[0], color="#009E73", alpha=0.1, lw=0)
    ax.plot(ends, ends, color=GREY, linewidth=0.8, linestyle="--", zorder=1)
    ax.scatter(x, y, s=16, color=_METHOD_COLOUR, alpha=0.7, linewidths=0, zorder=2)
    behind = (x - y) if higher else (y - x)
    better = int((behind < 0).sum())
    ax.set_title(
        f"{literal(method)}: better in {better} of {len(both)}"
        + (f", {len(means) - len(both)} failed" if len(means) > len(both) else ""),
        fontsize=TEXT,
    )
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    ax.set_xlabel(literal(reference))
    ax.set_ylabel(literal(metric))
    worst = np.argsort(-behind, kind="stable")[:label_worst]
    worst = worst[behind[worst] > 0]
    label_points(ax, x, y, {place: both.index[place] for place in worst})
    finish(ax, save)
    return ax


def _check_columns(name: str, table: pd.DataFrame) -> None:
    columns = getattr(table, "columns", ())  # a whole BenchmarkResult has none
    advice = " Pass the table of a BenchmarkResult: .summary() or .scores."
    check_has(f"`{name}` has no column", ("method", "metric", "mode"), columns, advice)


def _rows_of(summary: pd.DataFrame, metric: str, mode: str | None) -> pd.DataFrame:
    _check_columns("summary", summary)
    chosen = summary if mode is None else summary[summary["mode"] == mode]
    of_mode = "" if mode is None else f" of mode {mode!r}"
    check_has(f"The summary{of_mode} has no metric", [metric], chosen["metric"].unique())
    rows = chosen[chosen["metric"] == metric]
    if rows["mode"].nunique() > 1:
        raise SAMSError(
            f"Several modes have a metric {metric!r}; pass `mode`, one of "
            f"{', '.join(map(repr, rows['mode'].unique()))}."
        )
    rows = rows.assign(shown=rows["mean"].fillna(rows["mean_of_succeeded"]))
    return rows[rows["over"] == "all"] if (rows["over"] == "all").any() else rows


def _name(rows: pd.DataFrame) -> str:
    row = rows.iloc[0]
    return literal(row["metric"]) + (", all at once" if row["over"] == "all" else "")


def _note_failures(ax: Axes, place: float, row: pd.Series) -> None:
    """Note failures beside the axes, so that no method is hidden."""
    what = "fits incomplete" if row["over"] == "all" else "failed"
    ax.annotate(
        f"{row['n_failed']} of {row['n_values']} {what}",
        (1.01, place),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=TEXT,
        color="#D55E00",
    )


def _draw_references(ax: Axes, rows: pd.DataFrame) -> None:
    chance = rows["chance"].mean()
    if np.isfinite(chance):
        ax.axvline(chance, color=GREY, linestyle=":", linewidth=1, zorder=1)
        ax.annotate(
            "chance",
            (chance, 1),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize=TEXT,
            color=GREY,
        )
    known = rows.set_index("method")["mean"]
    if {_NEGATIVE, _POSITIVE} <= set(known.index) and known[[_NEGATIVE, _POSITIVE]].notna().all():
        ax.axvspan(*sorted(known[[_NEGATIVE, _POSITIVE]]), zorder=0, **SHADE)
