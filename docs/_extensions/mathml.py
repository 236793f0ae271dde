"""Formulas as MathML, which browsers lay out themselves: no script, no fonts, no network.

MathJax and KaTeX are scripts that Sphinx links from a content delivery network, and packaged copies
of them are old (sphinx-mathjax-offline is of 2022). Sphinx's own images need LaTeX. latex2mathml is
pure Python and still released, and Chromium, Firefox and Safari all draw MathML since 2023.
"""

from __future__ import annotations

from html import escape

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.math import get_node_equation_number
from sphinx.writers.html5 import HTML5Translator


def inline(self: HTML5Translator, node: nodes.math) -> None:
    """Draw a formula within a line."""
    self.body.append(f'<span class="formula">{convert(node.astext())}</span>')
    raise nodes.SkipNode


def block(self: HTML5Translator, node: nodes.math_block) -> None:
    """Draw a formula of its own line; it scrolls where the page is too narrow."""
    number = ""
    if node.get("number"):
        number = f'<span class="eqno">({escape(get_node_equation_number(self, node))})</span>'
    anchor = f' id="equation-{escape(node["label"])}"' if node.get("label") else ""
    formula = convert(node.astext(), display="block")
    self.body.append(f'<div class="formula-block"{anchor}>{number}{formula}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Offer the renderer ``mathml`` for ``html_math_renderer``."""
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
