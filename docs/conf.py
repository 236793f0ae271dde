"""Configuration of the documentation, for ``make docs``. Nothing is fetched while building."""

import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

import scvi_sams

# Tutorials lie at the top of the repository; Sphinx reads only what is below this folder.
shutil.rmtree(Path(__file__).parent / "tutorials", ignore_errors=True)
shutil.copytree(Path(__file__).parents[1] / "tutorials", Path(__file__).parent / "tutorials")

project = "scvi_sams"
author = "scvi_sams developers"
copyright = author
version = release = scvi_sams.__version__

extensions = [
    "docstrings",
    "mathml",
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

# Pages and notebooks. Notebooks are committed with their outputs and shown as they are.
nb_execution_mode = "off"
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
html_math_renderer = "mathml"

# API. Signatures show defaults; types stand with the parameters.
autosummary_generate = True
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_ivar = True
add_module_names = False
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True

html_theme = "sphinx_book_theme"
html_title = "scvi_sams"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "navbar_persistent": [],  # the search field is in the sidebar
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def link_within_the_site(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turn links that lead out of ``docs`` in the repository into links between pages."""
    for path, page in (
        ("../benchmarks/RECORD.md", "benchmarks.md"),
        ("../CHANGELOG.md", "changelog.md"),
    ):
        source[0] = source[0].replace(f"({path})", f"({page})")
    source[0] = source[0].replace("(../tutorials/", "(tutorials/")


def setup(app: Sphinx) -> None:
    """Connect what is defined here."""
    app.connect("source-read", link_within_the_site)
