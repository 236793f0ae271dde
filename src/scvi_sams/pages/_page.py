"""Templates, tables and figures of pages: one self-contained HTML file each."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scvi_sams._files import write_whole

NOTHING = "\N{EN DASH}"
SMALL_TEXT: dict[Any, Any] = {"font.size": 8}
"""Settings of matplotlib for figures of pages."""


def write_page(path: str | Path, room: str, template: str, **content: Any) -> None:
    """Fill a template of a package, ``room``, and write the page.

    Parameters
    ----------
    template
        Name of its file. It extends ``page.html.jinja`` and takes pieces from ``parts.html.jinja``.
    **content
        Values for the template, including ``title``.
    """
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(room, "."), PackageLoader("scvi_sams.pages", ".")]),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "anchor": lambda name: name.lower().replace(" ", "-"),
        "as_table": _as_table,
        "number": number,
    }
    environment.tests["finite"] = math.isfinite
    page = environment.get_template(template).render(**content)
    write_whole(Path(path), lambda partial: partial.write_text(page, encoding="utf-8"))


def number(value: float) -> str:
    """Write a number with three decimals, or one if it is large; a dash if it is missing."""
    if not np.isfinite(value):
        return NOTHING
    text = f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _as_table(frame: pd.DataFrame, wrap: bool) -> str:
    with pd.option_context("display.max_colwidth", None):
        # pandas escapes the content of cells.
        return frame.to_html(
            index=False,
            border=0,
            justify="left",
            classes=["wrap"] * wrap,
            float_format=number,
            na_rep=NOTHING,
        )


def drawn(draw: Callable[..., Axes], size: tuple[float, float], description: str) -> dict[str, str]:
    """Draw on axes of a size in inches, and return the result of :func:`as_svg`."""
    with mpl.rc_context(SMALL_TEXT):
        figure = Figure(figsize=size, layout="constrained")
        draw(ax=figure.subplots())
    return as_svg(figure, description)


def as_svg(figure: Figure, description: str) -> dict[str, str]:
    """Return a figure as SVG, without the XML declaration, and its description."""
    buffer = io.StringIO()
    # Without metadata, which would contain addresses of other places.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    svg = buffer.getvalue()
    # HTML does not require names of the formats.
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") + 4 :])
    return {"description": description, "svg": svg}
