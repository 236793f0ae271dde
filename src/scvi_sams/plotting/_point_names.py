"""Names beside the points of a scatter, where there is room for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

FONT_SIZE = 7
_COST_OF_HIDING = 5
"""Points (1/72 inch) that a name moves further away rather than hide one occupied square more."""


def label_points(
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
            fontsize=FONT_SIZE,
            path_effects=[withStroke(linewidth=2, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": "0.4", "linewidth": 0.5, "shrinkA": 0},
        )


def _text_size(ax: Axes, name: str) -> np.ndarray:
    """Return width and height in pixels."""
    text = ax.text(0, 0, name, fontsize=FONT_SIZE)
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
