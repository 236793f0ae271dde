"""Common style of figures: sizes, colours, new axes, labels of points and heatmaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.patheffects import withStroke
from matplotlib.text import Text

from scvi_sams.exceptions import SAMSError

FONT_SIZE = 7
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, suitable for colour-blind readers; shapes or line styles differ too."""
_ADJUSTMENT = {
    "expand": (1.25, 1.8),
    "force_static": 0.1,
    "force_text": 0.2,
    "force_explode": 1.0,
    "min_arrow_len": 0,  # a line for every name
    "iter_lim": 300,  # instead of a time limit, so that figures are the same on any machine
    "arrowprops": {"arrowstyle": "-", "color": "0.4", "linewidth": 0.5},
}


def new_axes(ax: Axes | None, width: float, height: float) -> Axes:
    """Axes of a new figure of this size in inches, unless axes are given."""
    return plt.subplots(figsize=(width, height), layout="constrained")[1] if ax is None else ax


def new_panels(
    axes: Sequence[Axes] | np.ndarray | None,
    names: Sequence[str],
    what: str,
    *,
    size: tuple[float, float],
    n_columns: int,
) -> list[Axes]:
    """One axes per name, of a new figure unless there are some; an error if there are others."""
    n = len(names)
    if axes is None:
        n_rows = -(-n // n_columns)
        figure, grid = plt.subplots(
            n_rows, n_columns, figsize=size, layout="constrained", squeeze=False
        )
        axes = grid.ravel()[:n]
        for unused in grid.ravel()[n:]:
            figure.delaxes(unused)
    panels = list(np.ravel(np.asarray(axes, dtype=object)))
    if len(panels) != n:
        raise SAMSError(f"{n} {what} need as many axes, not {len(panels)}.")
    return panels


def literal(name: object) -> str:
    """Escape the dollar signs of a name, which matplotlib would parse as a formula."""
    return str(name).replace("$", r"\$")


def lay_out(ax: Axes) -> None:
    """Finish the layout of the figure, on which positions of labels depend."""
    ax.figure.canvas.figure.draw_without_rendering()


def tidy(ax: Axes, font_size: int = FONT_SIZE) -> None:
    """Small ticks, and no frame at the top and on the right."""
    ax.tick_params(labelsize=font_size, length=2)
    ax.spines[["top", "right"]].set_visible(False)


def label_points(
    ax: Axes, x: np.ndarray, y: np.ndarray, names: Mapping[int, str], *, avoid: Sequence[Text] = ()
) -> None:
    """Label points by their positions, beside them and away from other points and texts.

    A label without free space, inside the axes and without crossing earlier labels, is omitted.
    """
    if not names:
        return
    lay_out(ax)
    texts = [
        ax.annotate(
            literal(name),
            (x[place], y[place]),
            xytext=(x[place], y[place]),
            ha="center",
            va="center",
            fontsize=FONT_SIZE,
            path_effects=[withStroke(linewidth=2, foreground="white")],
        )
        for place, name in names.items()
    ]
    boxes = [text.get_window_extent() for text in avoid]
    unit = ax.figure.dpi / 72
    # One of several points at the same position is enough to keep away from.
    squares = ax.transData.transform(np.column_stack([x, y])) // (6 * unit)
    _, distinct = np.unique(squares, axis=0, return_index=True)
    _, lines = adjust_text(
        texts,
        x[distinct],
        y[distinct],
        objects=[box.transformed(ax.transData.inverted()) for box in boxes] or None,
        ax=ax,
        explode_radius=75 * unit,
        max_move=20 * unit,
        **_ADJUSTMENT,
    )
    inside = ax.get_window_extent().padded(1)
    for text, line in zip(texts, lines, strict=True):
        box = text.get_window_extent()
        fits = all(inside.contains(*corner) for corner in (box.min, box.max))
        if not fits or any(box.overlaps(other) for other in boxes):
            text.remove()
            line.remove()
        else:
            boxes.append(box)


def label_rows_and_columns(ax: Axes, rows: pd.Index, columns: pd.Index) -> None:
    """Label rows and columns of an image, thinned if labels do not fit."""
    lay_out(ax)
    box = ax.get_window_extent()
    points_per_pixel = 72 / ax.figure.dpi
    line = 1.3 * FONT_SIZE
    _set_ticks(ax.yaxis, rows, box.height * points_per_pixel / line)
    # Names longer than a number are vertical and need one line each.
    longest = max((len(str(name)) for name in columns), default=0)
    upright = longest > 3
    width = line if upright else max(line, 0.8 * FONT_SIZE * longest)
    _set_ticks(ax.xaxis, columns, box.width * points_per_pixel / width)
    ax.tick_params(axis="x", labelrotation=90 if upright else 0)
    ax.tick_params(labelsize=FONT_SIZE, length=2)


def _set_ticks(axis: Axis, names: pd.Index, n_fitting: float) -> None:
    step = max(1, int(np.ceil(len(names) / max(1, n_fitting))))
    positions = range(0, len(names), step)
    axis.set_ticks(list(positions), labels=[literal(names[place]) for place in positions])
