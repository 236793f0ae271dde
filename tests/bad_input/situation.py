"""What a row of the table works with: a small screen, a trained model, an empty folder."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from scvi_sams import SAMSVAE

LABELS = ["control", "A", "B", "B+A"] * 6
SIZES: dict[str, Any] = {"n_latent": 3, "n_hidden": 8, "effect_n_hidden": 4}
TRAINING: dict[str, Any] = {
    "max_epochs": 2,
    "train_size": 1.0,
    "batch_size": 8,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}
TRAINED: dict[str, Any] = {
    "dosage_key": "dose",
    "batch_key": "batch",
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["age"],
    "size_factor_key": "size",
}
"""How the data of the trained model are registered."""


def screen(labels: Sequence = LABELS, n_genes: int = 4, **obs: Sequence) -> AnnData:
    """24 cells with counts from 1 up."""
    counts = 1 + np.random.default_rng(0).poisson(3, (len(labels), n_genes))
    return AnnData(
        sparse.csr_matrix(counts, dtype=np.float32),
        obs=pd.DataFrame(
            {"perturbation": labels, **obs}, index=[f"c{i}" for i in range(len(labels))]
        ),
        var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]),
    )


def full_screen() -> AnnData:
    """The same with doses, batches, covariates and size factors."""
    return screen(
        dose=[0.0, 0.5, 1.0, 2.0] * 6,
        batch=["x", "y"] * 12,
        donor=["p", "q", "r"] * 8,
        age=np.linspace(-1, 1, 24),
        size=np.linspace(5, 20, 24),
    )


class Situation:
    """A row's own data and folder, and the model that all rows share and none may change."""

    def __init__(self, adata: AnnData, shared: Any, reference_elbo: float, folder: Path) -> None:
        self.adata = adata
        self.shared = shared
        """Trained on :func:`full_screen`."""
        self.reference_elbo = reference_elbo
        """Of a model that was trained on :func:`screen`."""
        self.folder = folder
        self.built: Any = None
        self.built_state: dict[str, torch.Tensor] = {}
        self.is_registered = False

    def register(self, **setup: Any) -> None:
        SAMSVAE.setup_anndata(self.adata, **setup)
        self.is_registered = True

    def build(self, setup: dict[str, Any] | None = None, **settings: Any) -> Any:
        self.register(**(setup or {}))
        torch.manual_seed(0)
        self.built = SAMSVAE(self.adata, **(SIZES | settings))
        self.built_state = state_of(self.built)
        return self.built

    def train(
        self, setup: dict[str, Any] | None = None, settings: dict | None = None, **training: Any
    ) -> Any:
        model = self.build(setup, **(settings or {}))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="scvi|lightning")
            model.train(**(TRAINING | training))
        return model


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def elbo(model: Any, adata: AnnData | None = None) -> float:
    torch.manual_seed(1)
    return model.get_elbo(adata, key_added=None)


def trains(situation: Situation, model: Any) -> None:
    assert model.is_trained
    assert np.isfinite(elbo(model))


def trains_alike(situation: Situation, model: Any) -> None:
    """The numbers are those of the same cells, written in the usual way."""
    assert elbo(model) == pytest.approx(situation.reference_elbo, rel=1e-5)
