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


def dosed_model() -> scvi_sams.SAMSVAE:
    """Train on doses of 0.5, 1 and 2."""
    adata = scvi_sams.datasets.simulate_screen(n_genes=50, dosages=[0.5, 1.0, 2.0])
    scvi_sams.SAMSVAE.setup_anndata(adata, dosage_key="dosage")
    model = scvi_sams.SAMSVAE(adata, n_latent=5, n_hidden=16)
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    return model


def small_benchmark() -> scvi_sams.evaluation.BenchmarkResult:
    """Compare two baselines on held-out pairs."""
    adata = small_screen()
    split = scvi_sams.evaluation.combination_hold_out(adata.obs["perturbation"])
    methods = ["additive", "matching mean"]
    return scvi_sams.evaluation.benchmark(
        adata, methods=methods, split=split, seeds=[0], progress_bar=False
    )


@pytest.fixture(scope="session")
def trained() -> scvi_sams.SAMSVAE:
    """Train once for all examples that a process runs."""
    scvi.settings.seed = 0
    return trained_model(small_screen())


@pytest.fixture
def names_of_few(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What takes some seconds more, for the examples that name it."""
    source = "".join(example.source for example in request.node.dtest.examples)
    names: dict[str, Any] = {}
    if "dosed_model" in source:
        names["dosed_model"] = dosed_model()
    if "benchmark.s" in source:
        names["benchmark"] = small_benchmark()
    return names


@pytest.fixture(autouse=True)
def names_in_examples(
    trained: scvi_sams.SAMSVAE,
    names_of_few: dict[str, Any],
    doctest_namespace: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[None]:
    """Names, a folder to write to, and no log messages among the output."""
    doctest_namespace.update(
        model=trained,
        adata=trained.adata,
        scvi_sams=scvi_sams,
        AnnData=AnnData,
        np=np,
        pd=pd,
        **names_of_few,
    )
    monkeypatch.chdir(tmp_path)
    # Trainings of an epoch end with a warning that masks say nothing yet.
    caplog.set_level(logging.ERROR, logger="scvi")
    # Examples share the model, not what others of them drew at random.
    scvi.settings.seed = 0
    with plt.rc_context({"backend": "agg"}):
        yield
    plt.close("all")
