"""Performance of methods by the number of training cells."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from scvi_sams._checks import check_choice
from scvi_sams.exceptions import SAMSError
from scvi_sams.labels._names import check_has
from scvi_sams.plotting._style import COLOURS, GREY, finish, legend_below, literal, new_axes, tidy

_NAMES = {
    "pearson": "Pearson correlation of effects\n(higher is better)",
    "rmse": "RMSE of effects, log2 units\n(lower is better)",
    "mean_pearson": "mean Pearson correlation per perturbation\n(higher is better)",
    "rank": "rank of its own prediction, chance 0.5\n(lower is better)",
}
_CONTROLS = {
    "control mean": ":",
    "mean of perturbations": "-.",
    "half of the test cells": "--",
}
_STYLES = [(marker, line) for line in ("-", "--") for marker in ("o", "s", "^", "D", "v", "P")]


def learning_curve(
    curve: pd.DataFrame,
    metric: str = "pearson",
    *,
    ax: Axes | None = None,
    figsize: tuple[float, float] | None = None,
    save: str | Path | None = None,
) -> Axes:
    """Performance of methods by the number of training cells per perturbation.

    Parameters
    ----------
    curve
        Table of :func:`scvi_sams.evaluation.learning_curve`.
    metric
        ``"pearson"``, ``"rmse"``, ``"mean_pearson"`` or ``"rank"``.
    ax
        Axes to draw on; ``None`` makes a figure.
    figsize
        Width and height of the new figure in inches; ``None`` for a size that fits.
    save
        File to write the figure to, in the format of its suffix.

    Returns
    -------
    The axes: a line per method, through the means over seeds, and a band from the lowest to the
    highest seed; controls in grey. The logarithmic axis shows the median number of training cells
    over perturbations. Lines have gaps where predictions failed and a metric has no value.

    Raises
    ------
    SAMSError
        If there is no such metric, or the table has other columns or no rows.

    Examples
    --------
    >>> curve = scvi_sams.evaluation.learning_curve(
    ...     adata, ["training mean"], cells=(5, None), seeds=[0], progress_bar=False
    ... )
    >>> ax = scvi_sams.pl.learning_curve(curve, "rmse")
    """
    check_choice("metric", metric, list(_NAMES))
    wanted = ("method", "cells_per_perturbation", "n_cells", metric)
    columns = getattr(curve, "columns", ())
    check_has("`curve` has no column", wanted, columns, " Pass the table of learning_curve.")
    if curve.empty:
        raise SAMSError("`curve` has no rows: there is nothing to draw.")
    ax = new_axes(ax, 4.4, 4.0, figsize, save)
    asked = curve["cells_per_perturbation"].fillna(0)
    colours, styles = cycle(COLOURS), cycle(_STYLES)
    for method, of_method in curve.groupby("method", sort=False):
        points = of_method.groupby(asked).agg(
            x=("n_cells", "mean"),
            y=(metric, lambda seeds: seeds.mean(skipna=False)),
            low=(metric, lambda seeds: seeds.min(skipna=False)),
            high=(metric, lambda seeds: seeds.max(skipna=False)),
        )
        points = points.sort_values("x")
        is_control = method in _CONTROLS
        colour = GREY if is_control else next(colours)
        marker, line = ("", _CONTROLS[str(method)]) if is_control else next(styles)
        ax.plot(
            points["x"],
            points["y"],
            color=colour,
            marker=marker,
            markersize=4,
            linestyle=line,
            linewidth=1.0 if is_control else 1.4,
            label=literal(method),
            zorder=2 if is_control else 3,
        )
        ax.fill_between(
            points["x"], points["low"], points["high"], color=colour, alpha=0.15, linewidth=0
        )
    _name_the_numbers(ax, curve)
    ax.set_ylabel(_NAMES[metric])
    tidy(ax)
    legend_below(ax)
    finish(ax, save)
    return ax


def _name_the_numbers(ax: Axes, curve: pd.DataFrame) -> None:
    """Put ticks at the numbers of cells, and label all of them."""
    ax.set_xscale("log")
    is_all = curve["cells_per_perturbation"].isna().to_numpy()
    ticks = {
        float(cells): f"{cells:.0f}" for cells in np.unique(curve["n_cells"][~is_all].to_numpy())
    }
    if is_all.any():
        everything = float(curve["n_cells"][is_all].mean())
        ticks[everything] = f"all\n({everything:.0f})"
    ax.set_xticks(list(ticks), list(ticks.values()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("training cells per perturbation")
