"""Versions of the software that computes results, for provenance records."""

from __future__ import annotations

import platform
from importlib.metadata import version

__version__ = "0.1.0"

_PACKAGES = ("scvi-tools", "anndata", "torch", "numpy", "scipy", "scikit-learn")


def installed_versions() -> dict[str, str]:
    """Return the versions of this package, Python, and the packages that results depend on."""
    installed = {"scvi_sams": __version__, "python": platform.python_version()}
    return installed | {package: version(package) for package in _PACKAGES}
