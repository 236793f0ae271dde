"""Common style of figures: sizes, colours, new axes, ticks, legends, files.

Sizes of text are those of matplotlib's ``rcParams``, and sizes of new figures scale with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import FixedLocator, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from scvi_sams._checks import as_list, as_path, check_number
from scvi_sams._files import write_whole
from scvi_sams.exceptions import InvalidArgumentError, SAMSError

TEXT = "small"
"""Size of text within axes, relative to ``rcParams["font.size"]``."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, suitable for colour-blind readers; shapes or line styles differ too."""
GREY = "0.5"
"""Reference lines and notes: visible on white and on black."""
SHADE: dict[str, Any] = {"color": "0.5", "alpha": 0.13, "linewidth": 0}
"""Areas behind points, on white and on black."""
ROW = 0.16
"""Height of a line of names in a new figure, in inches for text of 8 points."""
_DESIGNED_FOR = 8
"""Size of text in points to which the sizes of new figures refer."""
_LEAST_DPI = 150
_LONGEST_LABEL = 1.2
"""Length of a label, relative to its axis, from which on it is shrunk."""
_LEAST_SIZE = 0.6
"""Smallest size of a label that is shrunk, relative to the usual one."""
_ABOVE_LEGEND = 0.05
"""Inches between the label of an axis and the legend below it."""


def points(size: str | float) -> float:
    """Size of a font in points."""
    return FontProperties(size=size).get_size_in_points()


def new_axes(
    ax: Axes | None,
    width: float,
    height: float,
    figsize: tuple[float, float] | None,
    save: str | Path | None,
) -> Axes:
    """Axes of a new figure, unless axes are given, after a check of the arguments.

    The size in inches is that for text of 8 points, and is scaled for other text.
    """
    (ax,) = new_panels(None if ax is None else [ax], [""], "", (width, height), figsize, save)
    return ax


def new_panels(
    axes: Sequence[Axes] | np.ndarray | None,
    names: Sequence[str],
    what: str,
    size: tuple[float, float],
    figsize: tuple[float, float] | None,
    save: str | Path | None,
    *,
    n_columns: int = 1,
) -> list[Axes]:
    """One axes per name, of a new figure unless there are some; an error if there are others."""
    n = len(names)
    if figsize is not None:
        _check_size(figsize, axes)
    if save is not None:
        _file(save)
    if axes is None:
        scale = points("medium") / _DESIGNED_FOR
        figure, grid = plt.subplots(
            -(-n // n_columns),
            n_columns,
            figsize=figsize or (size[0] * scale, size[1] * scale),
            layout="constrained",
            squeeze=False,
        )
        axes = grid.ravel()[:n]
        for unused in grid.ravel()[n:]:
            figure.delaxes(unused)
    panels = list(np.ravel(np.asarray(axes, dtype=object)))
    if len(panels) != n:
        raise SAMSError(f"{n} {what} need as many axes, not {len(panels)}.")
    return panels


def _check_size(figsize: object, axes: object) -> None:
    sides = as_list("figsize", figsize, "width and height in inches")
    if len(sides) != 2:
        raise InvalidArgumentError(
            f"`figsize` must be width and height in inches, not {len(sides)} values."
        )
    for side in sides:
        check_number(above=0, figsize=side)
    if axes is not None:
        raise InvalidArgumentError(
            "`figsize` is the size of a new figure, but there are axes: set the size of theirs."
        )


def _file(save: object) -> Path:
    path = as_path("save", save)
    if path.suffix.lower().lstrip(".") not in Figure().canvas.get_supported_filetypes():
        raise InvalidArgumentError(
            f"`save` must end with an image format, such as '.png' or '.pdf', not {str(save)!r}."
        )
    return path


def finish(axes: Axes | Sequence[Axes], save: str | Path | None) -> None:
    """Mend tick labels that collide, and write the figure if there is a file to write."""
    panels = [axes] if isinstance(axes, Axes) else list(axes)
    for _ in range(2):  # what is mended changes the layout
        lay_out(panels[0])
        for ax in panels:
            for axis, length in zip((ax.xaxis, ax.yaxis), ax.get_window_extent().size, strict=True):
                _fit(axis)
                _fit_label(axis, length)
    if save is None:
        return
    figure = panels[0].figure.canvas.figure
    wanted = mpl.rcParams["savefig.dpi"]
    dpi = max(_LEAST_DPI, figure.dpi if wanted == "figure" else float(wanted))
    write_whole(_file(save), partial(figure.savefig, dpi=dpi, bbox_inches="tight"))


def _fit(axis: Axis) -> None:
    """Thin numbers and shrink names until labels of ticks do not collide."""
    if isinstance(axis.get_major_locator(), FixedLocator):
        if (room := _room(axis)) < 1:
            axis.set_tick_params(labelsize=room * points(axis.get_ticklabels()[0].get_fontsize()))
        return
    for n_bins in (6, 5, 4, 3, 2, 1):
        if not isinstance(axis.get_major_locator(), MaxNLocator) or _room(axis) >= 1:
            return
        axis.set_major_locator(MaxNLocator(n_bins, steps=[1, 2, 2.5, 5, 10]))


def _fit_label(axis: Axis, length: float) -> None:
    """Shrink the label of an axis that is much longer than the axis."""
    box = axis.label.get_window_extent()
    occupied = box.width if isinstance(axis, XAxis) else box.height
    if occupied > _LONGEST_LABEL * length:
        factor = max(_LONGEST_LABEL * length / occupied, _LEAST_SIZE)
        axis.label.set_fontsize(factor * points(axis.label.get_fontsize()))


def _room(axis: Axis) -> float:
    """Smallest distance of neighbouring labels of ticks, relative to the labels."""
    side = 0 if isinstance(axis, XAxis) else 1
    labels = [label for label in axis.get_ticklabels() if label.get_text()]
    boxes = [label.get_window_extent() for label in labels]
    gap = (0.5 if side == 0 else 0.0) * points("medium") * axis.axes.figure.dpi / 72
    lengths = np.array([box.size[side] + gap for box in boxes])
    middles = np.array([(box.min[side] + box.max[side]) / 2 for box in boxes])
    if len(boxes) < 2:
        return 1.0
    needed = (lengths[1:] + lengths[:-1]) / 2
    return float((np.abs(np.diff(middles)) / needed).min())


def literal(name: object) -> str:
    """Escape the dollar signs of a name, which matplotlib would parse as a formula."""
    return str(name).replace("$", r"\$")


def lay_out(ax: Axes) -> None:
    """Finish the layout of the figure, on which positions of labels depend."""
    ax.figure.canvas.figure.draw_without_rendering()


def tidy(ax: Axes) -> None:
    """No frame at the top and on the right."""
    ax.spines[["top", "right"]].set_visible(False)


def legend_below(ax: Axes, **legend: Any) -> None:
    """Legend below the label of the axis, in two columns if they are not wider than the axes."""
    lay_out(ax)
    around = ax.get_tightbbox()
    assert around is not None  # only of invisible axes
    below = (around.y0 - ax.get_window_extent().y0) / ax.figure.dpi - _ABOVE_LEGEND
    for n_columns in (2, 1):
        drawn = ax.legend(
            frameon=False,
            ncols=n_columns,
            loc="upper center",
            bbox_to_anchor=(0.45, 0),
            bbox_transform=ax.transAxes + ScaledTranslation(0, below, ax.figure.dpi_scale_trans),
            borderaxespad=0,
            columnspacing=1,
            handletextpad=0.4,
            **legend,
        )
        if drawn.get_window_extent().width <= around.width:
            break
