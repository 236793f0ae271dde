"""Predicted against observed average treatment effects."""

from __future__ import annotations

from collections.abc import Sequence

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from scvi_sams.evaluation import align_ate, effect_metrics

_MANY = 3000
"""From this many points on they hide each other, and counts per hexagon are drawn instead."""
_FONT_SIZE = 7
_COST_OF_HIDING = 5
"""Points (1/72 inch) that a name moves further away rather than hide one occupied square more."""


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
    """
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
    ax.set_title(observed.uns["ate"].get("units", ""), fontsize=_FONT_SIZE)
    summary = ax.text(
        0.03,
        0.97,
        _summary(effect_metrics(y, x)["pearson"], observed, int(missing.sum())),
        transform=ax.transAxes,
        va="top",
        fontsize=_FONT_SIZE + 1,
    )

    strongest = np.argsort(-np.abs(x), kind="stable")[:label_top]
    ax.figure.canvas.figure.draw_without_rendering()  # places of names need the final layout
    _label_points(
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


def _label_points(
    ax: Axes, points: np.ndarray, chosen: np.ndarray, names: Sequence[str], *, taken: list[Bbox]
) -> None:
    """Name the chosen points, in their order, each at the best place that is still free.

    A place must be inside the axes, and neither the name nor the line to its point may cross other
    names. Of those, the one that is near the point and hides few points is taken. A name for which
    there is none is left out.
    """
    pixels = ax.transData.transform(points)
    occupied = _occupied_places(pixels)
    points_per_pixel = 72 / ax.figure.dpi
    taken = list(taken)
    leaders: list[Path] = []
    for position, name in zip(chosen, names, strict=True):
        anchor = pixels[position]
        size = _text_size(ax, name)
        places = []
        for offset in _offsets(size, unit=1 / points_per_pixel):
            low, high = anchor + offset - size / 2, anchor + offset + size / 2
            box = Bbox([low, high])
            leader = Path([anchor, anchor + offset])
            if _is_free(box, leader, taken, leaders, inside=ax.get_window_extent()):
                hidden = np.sum(((occupied > low - 2) & (occupied < high + 2)).all(axis=1))
                cost = np.hypot(*offset) * points_per_pixel + _COST_OF_HIDING * hidden
                places.append((cost, offset, box, leader))
        if not places:
            continue
        _, offset, box, leader = min(places, key=lambda place: place[0])
        taken.append(box)
        leaders.append(leader)
        ax.annotate(
            name,
            points[position],
            xytext=tuple(offset * points_per_pixel),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=_FONT_SIZE,
            path_effects=[withStroke(linewidth=2, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": "0.4", "linewidth": 0.5, "shrinkA": 0},
        )


def _text_size(ax: Axes, name: str) -> np.ndarray:
    """Return width and height in pixels."""
    text = ax.text(0, 0, name, fontsize=_FONT_SIZE)
    size = np.array(text.get_window_extent().size)
    text.remove()
    return size


def _is_free(box: Bbox, leader: Path, taken: list[Bbox], leaders: list[Path], inside: Bbox) -> bool:
    return (
        all(inside.contains(*corner) for corner in box.corners())
        and not any(box.overlaps(other) or leader.intersects_bbox(other) for other in taken)
        and not any(other.intersects_bbox(box) for other in leaders)
    )


def _occupied_places(pixels: np.ndarray, *, size: int = 4) -> np.ndarray:
    """Return the centres of the squares, ``size`` pixels wide, in which there are points."""
    return pd.DataFrame(pixels // size).drop_duplicates().to_numpy() * size + size / 2


def _offsets(size: np.ndarray, *, unit: float) -> list[np.ndarray]:
    """Return offsets of a text's centre that put it around its point at several distances."""
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    directions = np.column_stack([np.cos(angles), np.sin(angles)])
    # The text's half size, clipped to the direction, keeps its edge at the asked distance.
    half_sizes = np.clip(directions * 2, -1, 1) * size / 2
    return [
        half_size + direction * distance * unit
        for distance in (6, 12, 20, 30, 42, 56, 72)
        for direction, half_size in zip(directions, half_sizes, strict=True)
    ]
