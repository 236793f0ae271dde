"""Pages whose text lies elsewhere in the repository, and links that lead out of ``docs``."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

_INCLUDED = re.compile(r"```\{include\} \.\./(\S+)\n```")
_LINK = re.compile(r"\]\(([^)\s:#]+)(#[^)\s]*)?\)")


def take_in(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the text of a file above ``docs`` in place of its include, and mend links.

    A link to a file that has a page leads to the page, one to any other file above ``docs`` to the
    repository. Links within ``docs`` stay.
    """
    docs = Path(app.srcdir)
    origin = docs / docname
    included = _INCLUDED.fullmatch(source[0].strip())
    if included:
        origin = docs.parent / included[1]
        source[0] = origin.read_text(encoding="utf-8")

    def mended(link: re.Match[str]) -> str:
        target = (origin.parent / link[1]).resolve()
        if not target.exists() or (docs in target.parents and not included):
            return link[0]
        path = target.relative_to(docs.parent).as_posix()
        page = _page(path, app.config.repository_pages)
        address = f"/{page}" if page else f"{app.config.repository_files}/{path}"
        return f"]({address}{link[2] or ''})"

    source[0] = _LINK.sub(mended, source[0])


def _page(path: str, pages: dict[str, str]) -> str | None:
    """The page of a file, by its path in the repository."""
    if path.startswith("docs/") and path.endswith(".md"):
        return path.removeprefix("docs/")
    return path if path.startswith("tutorials/") else pages.get(path)


def setup(app: Sphinx) -> dict[str, bool]:
    """Offer ``repository_pages`` (file: page) and ``repository_files`` (address of the others)."""
    app.add_config_value("repository_pages", {}, "env", types=[dict])
    app.add_config_value("repository_files", "", "env", types=[str])
    app.connect("source-read", take_in)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
