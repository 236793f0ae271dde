"""What the examples in docstrings find in place: a small screen and a model trained on it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scvi
from anndata import AnnData

import scvi_sams


def small_screen() -> AnnData:
    """8 perturbations and 6 pairs of them, 860 cells x 100 genes."""
    return scvi_sams.datasets.simulate_screen(
        n_genes=100,
        n_controls=200,
        n_perturbations=8,
        cells_per_perturbation=60,
        n_combinations=6,
        cells_per_combination=30,
        n_latent=4,
        mask_probability=0.3,
    )


def trained_model(adata: AnnData) -> scvi_sams.SAMSVAE:
    """Train for some seconds: enough to have something to show."""
    scvi_sams.SAMSVAE.setup_anndata(adata)
    model = scvi_sams.SAMSVAE(adata, n_latent=6, n_hidden=64)
    model.train(max_epochs=30, batch_size=128, accelerator="cpu", enable_progress_bar=False)
    return model


@pytest.fixture(scope="session")
def trained() -> scvi_sams.SAMSVAE:
    """Train once for all examples that a process runs."""
    scvi.settings.seed = 0
    return trained_model(small_screen())


@pytest.fixture(autouse=True)
def names_in_examples(
    trained: scvi_sams.SAMSVAE,
    doctest_namespace: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[None]:
    """Names, a folder to write to, and no log messages among the output."""
    doctest_namespace.update(
        model=trained, adata=trained.adata, scvi_sams=scvi_sams, np=np, pd=pd, plt=plt
    )
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.WARNING, logger="scvi")
    # Examples share the model, not what others of them drew at random.
    scvi.settings.seed = 0
    with plt.rc_context({"backend": "agg"}):
        yield
    plt.close("all")
