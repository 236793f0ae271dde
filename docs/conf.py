"""Configuration of the documentation, for ``make docs``. Nothing is fetched while building."""

import os
import sys
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

import imagesize

import scvi_sams

DOCS = Path(__file__).parent
_PROJECT = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = _PROJECT["urls"]["Source"]
# Where the site is built for readers, and there is a network.
PUBLISHED = os.environ.get("READTHEDOCS") == "True"

project = "scvi_sams"
author = _PROJECT["authors"][0]["name"]
copyright = author
version = release = scvi_sams.__version__

extensions = [
    "docstrings",
    "mathml",
    "myst_nb",
    "repository_pages",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
    "tutorials",
    "types_elsewhere",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "**.ipynb_checkpoints"]

# Pages and notebooks. Notebooks are committed with their outputs and shown as they are.
nb_execution_mode = "off"
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "tasklist"]
myst_heading_anchors = 3
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
html_math_renderer = "mathml"
repository_pages = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/RECORD.md": "benchmarks.md",
}
repository_files = f"{REPOSITORY}/blob/main"
# Which of the pictures of each notebook stands for it.
tutorial_thumbnails = {
    "combinations": 0,
    "contexts": 2,
    "evaluation": 1,
    "large_data": 3,
    "quickstart": 5,
    "responses": 3,
    "unmeasured": 0,
}

# API. Signatures show defaults; types stand with the parameters.
autosummary_generate = True
# Functions of `pl` that have a picture in the gallery, and widths that show two pixels as one.
autosummary_context = {
    "pictures": {
        path.stem.removeprefix("gallery_"): f"{imagesize.get(path)[0] // 2}px"
        for path in DOCS.glob("figures/gallery_*.png")
    }
}
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
html_baseurl = os.environ.get("READTHEDOCS_CANONICAL_URL", "")
html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_sidebars = {
    "**": [
        "navbar-logo.html",
        "version-switcher.html",
        "icon-links.html",
        "search-button-field.html",
        "sbt-sidebar-nav.html",
    ]
}
html_theme_options = {
    "extra_footer": f"scvi_sams {version}",
    "icon_links": [
        {"name": "Repository", "url": REPOSITORY, "icon": "fa-brands fa-github"},
        {"name": "Issues", "url": f"{REPOSITORY}/issues", "icon": "fa-solid fa-bug"},
        {"name": "Discussions", "url": f"{REPOSITORY}/discussions", "icon": "fa-solid fa-comments"},
    ],
    "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    "logo": {
        "alt_text": "scvi_sams",
        "image_dark": "_static/logo_dark.svg",
        "image_light": "_static/logo.svg",
        "text": "scvi_sams",
    },
    "navbar_persistent": [],  # the search field is in the sidebar
    # Of the notebooks, for Colab: they lie at the top of the repository.
    "path_to_docs": "",
    "repository_branch": "main",
    "repository_url": REPOSITORY,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "switcher": {
        "json_url": "_static/switcher.json",
        "version_match": os.environ.get("READTHEDOCS_VERSION", "latest"),
    },
    "use_fullscreen_button": False,
    "use_issues_button": True,
    "use_repository_button": True,
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# Types of other packages become links where their inventories can be fetched.
intersphinx_mapping = (
    {
        "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
        "lightning": ("https://lightning.ai/docs/pytorch/stable/", None),
        "matplotlib": ("https://matplotlib.org/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/docs/", None),
        "python": ("https://docs.python.org/3/", None),
        "scanpy": ("https://scanpy.readthedocs.io/en/stable/", None),
        "scipy": ("https://docs.scipy.org/doc/scipy/", None),
        "scvi-tools": ("https://docs.scvi-tools.org/en/stable/", None),
        "torch": ("https://docs.pytorch.org/docs/stable/", None),
    }
    if PUBLISHED
    else {}
)
