"""Screens whose expression stays on disk."""

from __future__ import annotations

import os
from typing import Any

import h5py
import zarr
from anndata import AnnData
from anndata.io import read_elem, sparse_dataset

from scvi_sams._checks import as_path
from scvi_sams.exceptions import UnreadableDataError


def open_screen(path: str | os.PathLike[str]) -> AnnData:
    """Open a screen that may be larger than memory.

    Cells and genes (``obs``, ``var``, ``obsm``, ``varm``, ``uns``) are read; ``X`` and all layers
    stay on disk and are read in blocks when needed. ``obsp``, ``varp`` and ``raw`` are omitted. The
    file is opened read-only: registrations and results stay in memory.

    Parameters
    ----------
    path
        An ``.h5ad`` file, or a folder in zarr format.

    Returns
    -------
    AnnData, cells x genes, for ``setup_anndata`` and the models. A view of it, such as
    ``adata[adata.obs["lane"] == "1"]``, reads the expression of its cells into memory.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    UnreadableDataError
        If the file has neither format, or is damaged.

    Examples
    --------
    Training and all results stream from disk:

    >>> import scvi_sams
    >>> scvi_sams.datasets.simulate_screen(n_genes=50).write_h5ad("screen.h5ad")
    >>> adata = scvi_sams.data.open_screen("screen.h5ad")
    >>> scvi_sams.SAMSVAE.setup_anndata(adata, "perturbation", control="control")
    >>> model = scvi_sams.SAMSVAE(adata, n_latent=5, n_hidden=16)
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.save("my_model")
    >>> adata = scvi_sams.data.open_screen("screen.h5ad")
    >>> model = scvi_sams.SAMSVAE.load("my_model", adata=adata)
    >>> model.get_latent_representation().shape
    (5000, 5)
    """
    path = as_path("path", path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file {str(path)!r}.")
    try:
        store: Any = zarr.open_group(str(path), mode="r") if path.is_dir() else h5py.File(path)
        slots = {slot: read_elem(store[slot]) for slot in ("obs", "var")}
        for slot in ("obsm", "varm", "uns"):
            if slot in store:
                slots[slot] = read_elem(store[slot])
        stored = store.get("layers", {})
        layers = {key: _left_on_disk(stored[key]) for key in stored}
        x = _left_on_disk(store["X"]) if "X" in store else None
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        raise UnreadableDataError(
            f"{str(path)!r} cannot be read as an h5ad file or a zarr folder: {error}. It is "
            "neither, or it is damaged or incomplete: copy or write it again."
        ) from error
    return AnnData(x, layers=layers, **slots)


def _left_on_disk(stored: Any) -> Any:
    """Placeholder for a matrix on disk; anything that is not a matrix is read."""
    is_group = isinstance(stored, h5py.Group | zarr.Group)
    if is_group and stored.attrs.get("encoding-type") in ("csr_matrix", "csc_matrix"):
        return sparse_dataset(stored)
    return read_elem(stored) if is_group or not stored.shape else stored
