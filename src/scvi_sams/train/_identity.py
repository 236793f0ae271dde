"""Identity of a training: the settings and data that a checkpoint must match."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from scipy import sparse
from scvi.data import AnnDataManager

from scvi_sams._compat import FIELD_REGISTRIES_KEY, STATE_REGISTRY_KEY
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.data._block_loader import registered_expression
from scvi_sams.data._field import PerturbationField

_N_STRETCHES = 16
_CELLS_PER_STRETCH = 64
"""Number of cells whose counts are compared, which are fast to read."""
_MAX_SHOWN = 60

Identity = dict[str, Any]
"""Settings by name, as plain values; data as fingerprints."""


def data_identity(manager: AnnDataManager) -> Identity:
    """Fingerprints of registered data: genes, perturbations, labels, covariates, counts.

    Counts are from several blocks of cells; moments of all cells are in the module.
    """
    fields = manager.registry[FIELD_REGISTRIES_KEY]
    genes = fields[REGISTRY_KEYS.X][STATE_REGISTRY_KEY]["column_names"]
    vocabulary = fields[REGISTRY_KEYS.PERTURBATIONS][STATE_REGISTRY_KEY]
    others = [key for key in manager.data_registry if key != REGISTRY_KEYS.X]
    return {
        "data.genes": _fingerprint_of_names(genes),
        "data.names of perturbations": _fingerprint_of_names(
            vocabulary[PerturbationField.VOCABULARY_KEY]
        ),
        **{f"data.{key}": fingerprint(manager.get_from_registry(key)) for key in sorted(others)},
        "data.counts": _fingerprint_of_counts(manager),
    }


def fingerprint(*arrays: Any) -> str:
    """First half of the SHA-256 of the shapes and values of arrays of numbers."""
    digest = hashlib.sha256()
    for array in map(np.asarray, arrays):
        digest.update(repr(array.shape).encode())
        digest.update(np.ascontiguousarray(array, dtype=np.float64).tobytes())
    return f"sha256 {digest.hexdigest()[:32]}"


def _fingerprint_of_names(names: Iterable[Any]) -> str:
    text = "\0".join(map(str, names))
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _fingerprint_of_counts(manager: AnnDataManager) -> str:
    reader = registered_expression(manager)
    n_cells = min(_CELLS_PER_STRETCH, reader.n_rows)
    starts = np.linspace(0, reader.n_rows - n_cells, _N_STRETCHES).astype(int)
    rows = np.unique(starts[:, None] + np.arange(n_cells))
    counts = sparse.csr_matrix(reader.read_rows(rows, _CELLS_PER_STRETCH), dtype=np.float32)
    counts.sum_duplicates()
    counts.eliminate_zeros()
    return fingerprint(counts.shape, counts.indptr, counts.indices, counts.data)


def plain_settings(prefix: str, settings: Mapping[str, Any]) -> Identity:
    """Settings as plain values; nested names are joined with dots."""
    found: Identity = {}
    for name, value in settings.items():
        name = f"{prefix}.{name}"
        found |= (
            plain_settings(name, value) if isinstance(value, Mapping) else {name: _plain(value)}
        )
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return re.sub(r" at 0x[0-9a-f]+", "", value)  # in descriptions of objects
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def differences(theirs: Identity, ours: Identity) -> list[str]:
    """Describe differences of two trainings: names of data, names and values of settings."""
    told = []
    for name in {**theirs, **ours}:
        there, here = (_shown(name, identity) for identity in (theirs, ours))
        if theirs.get(name) == ours.get(name) and (name in theirs) == (name in ours):
            continue
        is_data = name.startswith("data.")
        told.append(f"other {name[5:]}" if is_data else f"{name} {there} there, {here} here")
    return told


def _shown(name: str, identity: Identity) -> str:
    return repr(identity[name])[:_MAX_SHOWN] if name in identity else "unknown"
