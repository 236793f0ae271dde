"""The only place that touches private names of scvi-tools or differs by its version."""

# view_anndata_setup of scvi-tools 1.4.2 uses rich.pretty without importing it, which fails from
# rich 15 on.
import rich.pretty  # noqa: F401
from scvi.data._constants import _SETUP_ARGS_KEY as SETUP_ARGUMENTS_KEY

__all__ = ["SETUP_ARGUMENTS_KEY"]
