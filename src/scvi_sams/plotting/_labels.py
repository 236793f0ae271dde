"""Names of points, rows and columns that do not touch each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import matplotlib as mpl
import numpy as np
import pandas as pd
from adjustText import adjust_text
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from scvi_sams.plotting._style import GREY, TEXT, lay_out, literal, points

_LETTER, _SPACE = 0.65, 0.8
"""Widths of a letter, at most, and of the space between names, in sizes of their font."""
_LINE = 1.2
"""Distance of names from which on they do not touch, in sizes of their font."""
_DISTANCES = (0.6, 1.2, 2, 3, 4.5)
"""Distances from points at which places are tried for names that collide, in heights of text."""
_DIRECTIONS = 16
_ADJUSTMENT = {
    "expand": (1.25, 1.8),
    "force_static": 0.1,
    "force_text": 0.2,
    "force_explode": 1.0,
    "iter_lim": 300,  # instead of a time limit, so that figures are the same on any machine
}


def label_points(
    ax: Axes, x: np.ndarray, y: np.ndarray, names: Mapping[int, str], *, avoid: Sequence[Text] = ()
) -> None:
    """Label points by their positions, beside them and away from other points and texts.

    A label without free space, inside the axes and without crossing earlier labels, is omitted.
    """
    if not names:
        return
    lay_out(ax)
    at = np.array(list(names))
    taken = [text.get_window_extent() for text in avoid]
    boxes = _free_places(ax, x, y, {place: literal(name) for place, name in names.items()}, taken)
    ends = ax.transData.transform(np.column_stack([x[at], y[at]]))
    inside = ax.get_window_extent().padded(-2 * ax.figure.dpi / 72)
    _untangle(boxes, ends)
    kept: list[int] = []
    for number in range(len(boxes)):
        for there in (boxes[number], *_around(ends[number], boxes[number])):
            boxes[number] = there
            fits = all(inside.contains(*corner) for corner in (there.min, there.max))
            is_free = not any(there.overlaps(other) for other in taken)
            if fits and is_free and not any(_collide(boxes, ends, number, one) for one in kept):
                kept.append(number)
                break
    for number in kept:
        ax.annotate(
            literal(names[at[number]]),
            (x[at[number]], y[at[number]]),
            xytext=tuple(ax.transData.inverted().transform(_middle(boxes[number]))),
            ha="center",
            va="center",
            fontsize=TEXT,
            arrowprops={
                "arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 1,
            },
            path_effects=[withStroke(linewidth=2, foreground=ax.get_facecolor())],
        )  # fmt: skip


def _free_places(
    ax: Axes, x: np.ndarray, y: np.ndarray, names: Mapping[int, str], taken: Sequence[Bbox]
) -> list[Bbox]:
    """Boxes of names beside their points, in pixels."""
    texts = [
        ax.text(x[place], y[place], name, ha="center", va="center", fontsize=TEXT)
        for place, name in names.items()
    ]
    unit = ax.figure.dpi / 72
    # One of several points at the same position is enough to keep away from.
    squares = ax.transData.transform(np.column_stack([x, y])) // (6 * unit)
    _, distinct = np.unique(squares, axis=0, return_index=True)
    adjust_text(
        texts,
        x[distinct],
        y[distinct],
        objects=[box.transformed(ax.transData.inverted()) for box in taken] or None,
        ax=ax,
        explode_radius=75 * unit,
        max_move=20 * unit,
        **_ADJUSTMENT,
    )
    boxes = [text.get_window_extent() for text in texts]
    for text in texts:
        text.remove()
    return boxes


def _around(end: np.ndarray, box: Bbox) -> list[Bbox]:
    """Boxes of the same size around a point, the nearest first."""
    angles = 2 * np.pi * np.arange(_DIRECTIONS) / _DIRECTIONS
    directions = np.column_stack([np.cos(angles), np.sin(angles)])
    shift = end - _middle(box)
    return [
        box.translated(*(shift + direction * (np.divide(box.size, 2) + distance * box.height)))
        for distance in _DISTANCES
        for direction in directions
    ]


def _untangle(boxes: list[Bbox], ends: np.ndarray) -> None:
    """Let names change places where that makes fewer of them collide."""
    order = range(len(boxes))

    def n_collisions(pair: tuple[int, int]) -> int:
        return sum(
            _collide(boxes, ends, one, other) for one in pair for other in order if other != one
        )

    for one, other in combinations(order, 2):
        if not _collide(boxes, ends, one, other):
            continue
        before, old = n_collisions((one, other)), (boxes[one], boxes[other])
        boxes[one], boxes[other] = _moved(old[0], old[1]), _moved(old[1], old[0])
        if n_collisions((one, other)) >= before:
            boxes[one], boxes[other] = old


def _moved(box: Bbox, target: Bbox) -> Bbox:
    """The box with the middle of another one."""
    return box.translated(*(_middle(target) - _middle(box)))


def _middle(box: Bbox) -> np.ndarray:
    return np.mean([box.min, box.max], axis=0)


def _collide(boxes: Sequence[Bbox], ends: np.ndarray, one: int, other: int) -> bool:
    """Whether names overlap, or the line of one crosses the other or its line."""
    if boxes[one].overlaps(boxes[other]):
        return True
    lines = [(_middle(boxes[number]), ends[number]) for number in (one, other)]
    return (
        _cross(*lines[0], *lines[1])
        or _crosses_box(*lines[0], boxes[other])
        or _crosses_box(*lines[1], boxes[one])
    )


def _cross(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> bool:
    """Whether the lines from a to b and from c to d cross."""

    def side(start: np.ndarray, end: np.ndarray, point: np.ndarray) -> float:
        (x, y), (u, v) = end - start, point - start
        return float(np.sign(x * v - y * u))

    return side(a, b, c) * side(a, b, d) < 0 and side(c, d, a) * side(c, d, b) < 0


def _crosses_box(a: np.ndarray, b: np.ndarray, box: Bbox) -> bool:
    (x0, y0), (x1, y1) = box.min, box.max
    corners = [np.array(corner) for corner in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))]
    return box.contains(*b) or any(_cross(a, b, corners[i], corners[i - 1]) for i in range(4))


def label_rows_and_columns(ax: Axes, rows: pd.Index, columns: pd.Index) -> None:
    """Label rows and columns of an image, thinned if labels do not fit."""
    lay_out(ax)
    box = ax.get_window_extent()
    points_per_pixel = 72 / ax.figure.dpi
    size_x = points(mpl.rcParams["xtick.labelsize"])
    size_y = points(mpl.rcParams["ytick.labelsize"])
    _set_ticks(ax.yaxis, rows, box.height * points_per_pixel / (_LINE * size_y))
    width = box.width * points_per_pixel / size_x
    longest = max((len(str(name)) for name in columns), default=0)
    upright = len(columns) * (_LETTER * longest + _SPACE) > width  # one line each
    _set_ticks(ax.xaxis, columns, width / (_LINE if upright else _LETTER * longest + _SPACE))
    ax.tick_params(axis="x", labelrotation=90 if upright else 0)


def _set_ticks(axis: Axis, names: pd.Index, n_fitting: float) -> None:
    step = max(1, int(np.ceil(len(names) / max(1, n_fitting))))
    positions = range(0, len(names), step)
    axis.set_ticks(list(positions), labels=[literal(names[place]) for place in positions])
