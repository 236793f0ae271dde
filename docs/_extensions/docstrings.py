"""Bring docstrings into the form that napoleon reads, and leave scvi-tools' own methods out."""

from __future__ import annotations

import inspect
import re
from typing import Any

from sphinx.application import Sphinx

_SCVI_METHODS = {"load", "save"}
"""The inherited methods that users of every model meet; the others are in scvi-tools' own docs."""


def name_what_is_returned(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Put the annotated type above prose under "Returns".

    Our docstrings leave the type to the annotation. numpydoc reads the first line as a type, and
    every other line at the margin as a further one.
    """
    starts = [i for i, line in enumerate(lines[:-1]) if _is_heading(lines, i, "Returns")]
    if not starts:
        return
    first = starts[0] + 2
    last = next((i for i in range(first, len(lines)) if _is_heading(lines, i)), len(lines))
    body = lines[first:last]
    if len(body) > 1 and body[1].startswith("    ") and not body[0].endswith((".", ",", ":")):
        return  # a type and its description already
    lines[first:last] = [_returned_type(obj), *(f"    {line}".rstrip() for line in body)]


def _is_heading(lines: list[str], i: int, title: str = r"\w[\w ]*") -> bool:
    return (
        i + 1 < len(lines)
        and re.fullmatch(title, lines[i]) is not None
        and re.fullmatch(r"-{3,}", lines[i + 1]) is not None
    )


def _returned_type(obj: Any) -> str:
    try:
        annotation = inspect.signature(obj).return_annotation
    except (TypeError, ValueError):
        return "result"
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "result")
    return text.replace("ad.", "").replace("pd.", "").replace("np.", "").strip("'")


def leave_out_scvi(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Skip members that are not defined here, but for those that every user needs."""
    function = obj.fget if isinstance(obj, property) else obj
    module = getattr(function, "__module__", None) or ""
    if module.startswith("scvi_sams") or name in _SCVI_METHODS:
        return None
    return True if module.startswith(("scvi.", "lightning", "torch")) else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect both, the first before napoleon reads the docstring."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("autodoc-process-docstring", name_what_is_returned, priority=400)
    app.connect("autodoc-skip-member", leave_out_scvi)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
