"""Predicted against observed average treatment effects."""

from __future__ import annotations

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from scvi_sams._checks import check_axes, check_integer
from scvi_sams.metrics._ate import align_ate, effect_metrics
from scvi_sams.plotting._point_names import FONT_SIZE, label_points

_MANY = 3000
"""From this many points on they hide each other, and counts per hexagon are drawn instead."""


def ate_scatter(
    predicted: ad.AnnData,
    observed: ad.AnnData,
    *,
    label_top: int = 8,
    delimiter: str | None = "+",
    ax: Axes | None = None,
) -> Axes:
    """Predicted against observed effect of every gene and perturbation, with the identity line.

    Parameters
    ----------
    predicted, observed
        ATE tables, as for :func:`scvi_sams.evaluation.compare_ate`. Failed predictions are drawn,
        and scored, as no effect, and their number is written into the axes.
    label_top
        Number of entries with the largest absolute observed effect to name; those that find no
        free place are left out.
    delimiter
        What joins the perturbations of a combination.
    ax
        Axes to draw on; ``None`` makes a figure.

    Returns
    -------
    The axes, both directions in the same units and limits. The annotated Pearson correlation is
    that of the row ``"all"`` of :func:`scvi_sams.evaluation.compare_ate`.

    Raises
    ------
    SAMSError, MissingKeyError
        If the tables cannot be compared.

    Examples
    --------
    >>> observed = scvi_sams.evaluation.observed_ate(adata)
    >>> predicted = model.predict_ate(list(observed.obs_names), n_samples=200)
    >>> ax = scvi_sams.pl.ate_scatter(predicted, observed)
    >>> ax.figure.savefig("ate.png")
    """
    check_integer(at_least=0, label_top=label_top)
    check_axes(ax=ax)
    predicted_effects, observed_effects, missing = align_ate(
        predicted, observed, delimiter=delimiter
    )
    x, y = observed_effects.ravel(), predicted_effects.ravel()
    if ax is None:
        _, ax = plt.subplots(figsize=(5.6, 4.8), layout="constrained")

    extreme = 1.08 * max(np.abs(x).max(), np.abs(y).max()) or 1.0
    _draw_points(ax, x, y, extreme)
    ax.axline((0, 0), slope=1, color="0.35", linewidth=0.8, linestyle="--", zorder=3)
    ax.set(xlim=(-extreme, extreme), ylim=(-extreme, extreme), aspect="equal")
    ax.set(xlabel="observed effect", ylabel="predicted effect")
    ax.set_title(observed.uns["ate"].get("units", ""), fontsize=FONT_SIZE)
    summary = ax.text(
        0.03,
        0.97,
        _summary(effect_metrics(y, x)["pearson"], observed, int(missing.sum())),
        transform=ax.transAxes,
        va="top",
        fontsize=FONT_SIZE + 1,
    )

    strongest = np.argsort(-np.abs(x), kind="stable")[:label_top]
    ax.figure.canvas.figure.draw_without_rendering()  # places of names need the final layout
    label_points(
        ax,
        np.column_stack([x, y]),
        strongest,
        [_entry_name(observed, position) for position in strongest],
        taken=[summary.get_window_extent()],
    )
    return ax


def _draw_points(ax: Axes, x: np.ndarray, y: np.ndarray, extreme: float) -> None:
    for draw_line in (ax.axhline, ax.axvline):
        draw_line(0, color="0.85", linewidth=0.8, zorder=0)
    if len(x) < _MANY:
        ax.scatter(x, y, s=10, alpha=0.5, color="#0072B2", linewidths=0)
        return
    hexagons = ax.hexbin(
        x,
        y,
        gridsize=70,
        extent=(-extreme, extreme, -extreme, extreme),
        bins="log",
        mincnt=1,
        cmap="viridis",
        linewidths=0.1,
    )
    ax.figure.colorbar(hexagons, ax=ax, label="gene-perturbation pairs", shrink=0.6)


def _summary(pearson: float, observed: ad.AnnData, n_missing: int) -> str:
    lines = [
        f"Pearson {pearson:.3f}",
        f"{observed.n_obs:,} perturbation{'s' * (observed.n_obs != 1)}, {observed.n_vars:,} genes",
    ]
    if n_missing:
        lines.append(f"{n_missing:,} not predicted (drawn at 0)")
    return "\n".join(lines)


def _entry_name(observed: ad.AnnData, position: int) -> str:
    row, column = divmod(int(position), observed.n_vars)
    gene = observed.var_names[column]
    return gene if observed.n_obs == 1 else f"{gene} ({observed.obs_names[row]})"
