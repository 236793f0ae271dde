"""Names of the rows and columns of a heatmap, as many as fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis

FONT_SIZE = 7


def label_rows_and_columns(ax: Axes, rows: pd.Index, columns: pd.Index) -> None:
    """Name rows and columns of an image, thinned where names would not fit.

    The figure must have been drawn before: what fits depends on the final layout.
    """
    box = ax.get_window_extent()
    points_per_pixel = 72 / ax.figure.dpi
    line = 1.3 * FONT_SIZE
    _set_ticks(ax.yaxis, rows, box.height * points_per_pixel / line)

    # Names longer than a number stand upright and need one line each.
    longest = max((len(str(name)) for name in columns), default=0)
    upright = longest > 3
    width = line if upright else max(line, 0.8 * FONT_SIZE * longest)
    _set_ticks(ax.xaxis, columns, box.width * points_per_pixel / width)
    ax.tick_params(axis="x", labelrotation=90 if upright else 0)
    ax.tick_params(labelsize=FONT_SIZE, length=2)


def _set_ticks(axis: Axis, names: Sequence[object] | pd.Index, n_fitting: float) -> None:
    step = max(1, int(np.ceil(len(names) / max(1, n_fitting))))
    positions = range(0, len(names), step)
    axis.set_ticks(list(positions), labels=[str(names[position]) for position in positions])
