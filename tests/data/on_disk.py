"""Screens written to disk, in the forms that users have."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

from anndata import AnnData
from scipy import sparse

FORMS = ["h5ad csr", "h5ad dense", "zarr csr", "zarr dense"]


def write_screen(adata: AnnData, folder: Path, form: str = "h5ad csr", **options: object) -> Path:
    """Write a screen, X as the form says; ``options`` are for anndata."""
    suffix, storage = form.split()
    adata = adata.copy()
    counts = sparse.csr_matrix(adata.X)
    adata.X = {"csr": counts, "csc": counts.tocsc(), "dense": counts.toarray()}[storage]
    path = folder / f"screen.{suffix}"
    with warnings.catch_warnings():
        # anndata announces version 3 of the format.
        warnings.simplefilter("ignore")
        if suffix == "zarr":
            adata.write_zarr(path, **options)
        else:
            adata.write_h5ad(path, **options)
    return path


def fingerprint(path: Path) -> dict[str, str]:
    """Hash of every file of a screen."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()
    }
