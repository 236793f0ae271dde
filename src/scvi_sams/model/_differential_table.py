"""Result of ``differential_expression``, and its form for scanpy's functions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_sams._checks import check_key
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.model._differential import (
    Comparison,
    check_comparison,
    check_groups,
    check_none_of_cells,
    compare_cells,
    compare_perturbations,
    groups_of_cells,
    table_of_comparisons,
)

if TYPE_CHECKING:
    from scvi_sams.model._cell_model import CellModel

logger = logging.getLogger("scvi.sams")

_FIELDS = {
    "names": ("variable", object),
    "scores": ("lfc_z", np.float32),
    "logfoldchanges": ("log_fc", np.float32),
    "pvals": ("proba_not_de", np.float64),
    "pvals_adj": ("adj_p_value", np.float64),
}
"""Scanpy's name of a column, our name, and its type in scanpy."""
_REST = "rest"
_LARGEST_HEADER = 65_000
"""Largest description of a data set in an h5ad file, in bytes; it contains all group names."""


def differential_table(model: CellModel, asked: Mapping[str, Any]) -> pd.DataFrame:
    """Compare what is requested in the arguments of ``differential_expression``.

    ``of_cells`` are its further arguments, which scvi-tools uses for groups of cells.
    """
    groupby, idx1, mode = asked["groupby"], asked["idx1"], asked["mode"]
    fdr_target, key_added = asked["fdr_target"], asked["key_added"]
    settings = (asked["delta"], fdr_target, asked["pseudocounts"], asked["n_samples"])
    check_comparison(model.module.likelihood, mode, *settings)
    check_groups(groupby, asked["group1"], asked["group2"], idx1, asked["idx2"])
    check_can_be_ranked(key_added, mode, idx1)
    of_perturbations = groupby is None and idx1 is None
    if of_perturbations:
        batches = (asked["batch_correction"], asked["batchid1"], asked["batchid2"])
        check_none_of_cells(mode, *batches, asked["of_cells"])
    model._check_if_trained(warn=True)
    adata = model._validate_anndata(asked["adata"])
    found = (
        _of_perturbations(model, adata, asked)
        if of_perturbations
        else _of_cells(model, adata, asked)
    )
    manager = model.get_anndata_manager(adata, required=True)
    expression = manager.get_from_registry(REGISTRY_KEYS.X) if asked["all_stats"] else None
    table = table_of_comparisons(found, adata.var_names, expression, mode, fdr_target)
    if key_added is not None:
        keep_ranked_genes(model, adata, table, groupby, key_added)
    return table


def _of_perturbations(
    model: CellModel, adata: AnnData, asked: Mapping[str, Any]
) -> list[Comparison]:
    names = ("group1", "group2", "delta", "pseudocounts", "n_samples")
    return compare_perturbations(model, adata, *(asked[name] for name in names))


def _of_cells(model: CellModel, adata: AnnData, asked: Mapping[str, Any]) -> list[Comparison]:
    groups = groups_of_cells(
        adata, *(asked[name] for name in ("groupby", "group1", "group2", "idx1", "idx2"))
    )
    options = dict(asked["of_cells"])
    if asked["pseudocounts"] is not None:
        options["pseudocounts"] = asked["pseudocounts"]
    options |= {name: asked[name] for name in ("mode", "delta", "batchid1", "batchid2")}
    options["use_observed_batches"] = not asked["batch_correction"]
    return compare_cells(model, adata, groups, asked["batch_size"], options)


def check_can_be_ranked(key_added: str | None, mode: str, idx1: object) -> None:
    """Raise if a comparison to store has no named groups or no error rates."""
    check_key(key_added=key_added)
    if key_added is None:
        return
    if mode == "vanilla":
        raise InvalidArgumentError(
            "`key_added` requires mode='change': scanpy reads fold changes and adjusted p-values, "
            "which mode='vanilla' does not have."
        )
    if idx1 is not None:
        raise InvalidArgumentError(
            "`key_added` requires groups with names: pass a column of obs as `groupby`, not `idx1`."
        )


def keep_ranked_genes(
    model: CellModel, adata: AnnData, table: pd.DataFrame, groupby: str | None, key_added: str
) -> None:
    """Write a table of comparisons, each with all genes, to ``uns``."""
    of_perturbations = groupby is None
    setup = model._setup_arguments
    groups = {str(name): genes for name, genes in table.groupby("group1", sort=False)}
    _warn_of_many(groups, key_added)
    reference = table["group2"].iloc[0]
    params: dict[str, Any] = {
        "groupby": (setup["perturbation_key"] or "perturbation") if of_perturbations else groupby,
        "reference": _REST if reference == "Rest" else reference,
        "method": f"{type(model).__name__}, posterior errors instead of p-values",
        "use_raw": False,
        "layer": setup["layer"],
        "corr_method": "mean posterior error of all genes that are at least as likely",
    }
    records = {
        field: np.rec.fromarrays(
            [genes[column].to_numpy(kind) for genes in groups.values()],
            dtype=[(name, kind) for name in groups],
        )
        for field, (column, kind) in _FIELDS.items()
    }
    adata.uns[key_added] = {"params": params, **records}
    model.keep_provenance(adata, key_added)


def _warn_of_many(groups: Iterable[str], key_added: str) -> None:
    """Log a warning if there are too many groups for scanpy's form in an h5ad file."""
    names = list(groups)
    fields = np.dtype([(name, h5py.string_dtype()) for name in names])
    if len(h5py.h5t.py_create(fields, logical=True).encode()) > _LARGEST_HEADER:
        logger.warning(
            f"adata.uns[{key_added!r}] has {len(names)} groups, more than an h5ad file can store "
            "in scanpy's form: write_h5ad will fail. Compare fewer at a time "
            f"(`group1`), or delete it before (del adata.uns[{key_added!r}]) and keep the returned "
            "table."
        )
