"""The cells of an experiment, and which of their columns say what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import anndata as ad
import joblib
import numpy as np

from scvi_sams import datasets, evaluation
from scvi_sams.exceptions import MissingKeyError

SIMULATED: dict[str, Any] = {
    "n_genes": 200,
    "n_controls": 200,
    "n_perturbations": 12,
    "cells_per_perturbation": 40,
    "n_combinations": 8,
    "cells_per_combination": 40,
    "n_latent": 8,
}
"""Small: to see that everything runs."""


@dataclass(frozen=True, eq=False)
class Screen:
    """Counts with the columns of obs that ``setup_anndata`` and ``observed_ate`` ask for."""

    adata: ad.AnnData
    perturbation_key: str = "perturbation"
    control: tuple[str, ...] = ("control",)
    delimiter: str | None = "+"
    layer: str | None = None
    batch_key: str | None = None
    size_factor_key: str | None = None

    @property
    def labels(self) -> np.ndarray:
        """Canonical label of every cell."""
        if self.perturbation_key not in self.adata.obs:
            raise MissingKeyError(
                f"obs has no column {self.perturbation_key!r}; its columns are "
                f"{', '.join(map(repr, self.adata.obs.columns))}. Name one: --perturbation-key."
            )
        return evaluation.canonical_labels(
            self.adata.obs[self.perturbation_key], control=self.control, delimiter=self.delimiter
        )

    @property
    def registration(self) -> dict[str, Any]:
        """Arguments of ``setup_anndata``."""
        return {
            name: list(value) if name == "control" else value
            for name, value in vars(self).items()
            if name != "adata"
        }

    def fingerprint(self) -> str:
        """Hash of all that a result depends on."""
        counts = self.adata.X if self.layer is None else self.adata.layers[self.layer]
        keys = [self.perturbation_key, self.batch_key, self.size_factor_key]
        columns = [self.adata.obs[key].to_numpy() for key in keys if key is not None]
        return joblib.hash([counts, list(self.adata.var_names), columns, self.registration])

    def observed_ate(self, labels: Sequence[str], cells: np.ndarray | None = None) -> ad.AnnData:
        """Average treatment effects that some cells (``None``: all) show."""
        columns = {k: v for k, v in self.registration.items() if k != "batch_key"}
        return evaluation.observed_ate(self.adata, perturbations=labels, indices=cells, **columns)


def load_cells(source: str) -> tuple[ad.AnnData, str | None]:
    """Read a file, or a data set of this package by name; also return its size factor, if any."""
    if source == "simulated":
        return datasets.simulate_screen(**SIMULATED), None
    if source in ("norman19_subset", "papalexi21"):
        # Panels of genes: their sum is no library size.
        return getattr(datasets, source)(), "total_counts"
    return ad.read_h5ad(source), None
