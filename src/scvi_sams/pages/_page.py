"""Templates, tables and figures of pages: one HTML file that needs nothing else."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scvi_sams._files import write_whole

NOTHING = "\N{EN DASH}"


def write_page(path: str | Path, room: str, template: str, **content: Any) -> None:
    """Fill a template that lies in a package, ``room``, and write the page.

    Parameters
    ----------
    template
        Name of its file. It extends ``page.html.jinja`` and takes pieces from ``parts.html.jinja``.
    **content
        What the template names, ``title`` among it.
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
    """Write a number with three decimals, or one where it is large; a dash where there is none."""
    if not np.isfinite(value):
        return NOTHING
    text = f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _as_table(frame: pd.DataFrame, wrap: bool) -> str:
    with pd.option_context("display.max_colwidth", None):
        # pandas escapes what is in the cells.
        return frame.to_html(
            index=False,
            border=0,
            justify="left",
            classes=["wrap"] * wrap,
            float_format=number,
            na_rep=NOTHING,
        )


def drawn(draw: Callable[..., Axes], size: tuple[float, float], description: str) -> dict[str, str]:
    """Draw on axes of a size in inches, as :func:`as_svg` shows them."""
    figure = Figure(figsize=size, layout="constrained")
    draw(ax=figure.subplots())
    return as_svg(figure, description)


def as_svg(figure: Figure, description: str) -> dict[str, str]:
    """Return a figure as SVG, from within its first tag on, and what it shows."""
    buffer = io.StringIO()
    # Without metadata, which would refer to other places by address.
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    svg = buffer.getvalue()
    # Inside HTML the names of the formats are known.
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") + 4 :])
    return {"description": description, "svg": svg}
