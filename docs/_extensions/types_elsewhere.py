"""Types of other packages by the names under which those packages document them.

Annotations are resolved to the module that defines a class, and docstrings use its short name;
intersphinx finds neither.
"""

from __future__ import annotations

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

PUBLIC_NAMES = {
    "AnnData": "anndata.AnnData",
    "AnnDataManager": "scvi.data.AnnDataManager",
    "Axes": "matplotlib.axes.Axes",
    "DataFrame": "pandas.DataFrame",
    "LightningDataModule": "lightning.pytorch.core.LightningDataModule",
    "Series": "pandas.Series",
    "anndata._core.anndata.AnnData": "anndata.AnnData",
    "matplotlib.axes._axes.Axes": "matplotlib.axes.Axes",
    "ndarray": "numpy.ndarray",
    "np.ndarray": "numpy.ndarray",
    "pandas.core.frame.DataFrame": "pandas.DataFrame",
    "pandas.core.series.Series": "pandas.Series",
    "pd.DataFrame": "pandas.DataFrame",
    "scipy.sparse._csr.csr_array": "scipy.sparse.csr_array",
    "scipy.sparse._csr.csr_matrix": "scipy.sparse.csr_matrix",
}


def name_publicly(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> None:
    """Change the target of a reference that was not found here, before intersphinx looks for it."""
    if node.get("refdomain") == "py":
        node["reftarget"] = PUBLIC_NAMES.get(node["reftarget"], node["reftarget"])


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect ahead of intersphinx."""
    app.connect("missing-reference", name_publicly, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
