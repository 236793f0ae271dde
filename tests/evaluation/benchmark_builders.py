"""A small screen with pairs, its splits, and methods that say what they did."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np

from scvi_sams import evaluation
from scvi_sams.benchmark import _store
from scvi_sams.datasets import simulate_screen

LOG = "BENCHMARK_TEST_LOG"


def small_screen() -> ad.AnnData:
    adata = simulate_screen(
        n_genes=50,
        n_controls=60,
        n_perturbations=8,
        cells_per_perturbation=24,
        n_combinations=12,
        cells_per_combination=20,
        n_latent=4,
        library_size=2000.0,
        mask_probability=0.5,
        decoder_scale=1.5,
        seed=2,
    )
    # Shuffled, so that a mix-up of rows shows.
    return adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()


class PairSplit:
    """Split by seed; a class, so that worker processes can be sent it."""

    def __init__(self, adata: ad.AnnData) -> None:
        self.labels = adata.obs["perturbation"].astype(str).to_numpy()

    def __call__(self, seed: int) -> evaluation.Split:
        return evaluation.norman_ood(self.labels, 0.5, seed=seed)


def run(screen: ad.AnnData, methods: dict[str, Any], **changes: Any) -> evaluation.BenchmarkResult:
    """Run a benchmark of one seed and mode, unless told otherwise."""
    arguments = {
        "split": PairSplit(screen),
        "seeds": (0,),
        "modes": ("perturbench",),
        "progress_bar": False,
    }
    return evaluation.benchmark(screen, methods=methods, **(arguments | changes))


def additive(train: ad.AnnData, perturbations: Sequence[str]) -> ad.AnnData:
    return evaluation.Additive().fit(train).predict(perturbations)


def collapsed(train: ad.AnnData, perturbations: Sequence[str]) -> ad.AnnData:
    """Predict the mean of all perturbed cells, whatever is asked for."""
    perturbed = train[(train.obs["perturbation"] != "control").to_numpy()]
    mean = np.asarray(perturbed.X.mean(axis=0)).ravel()
    prediction = ad.AnnData(np.tile(mean, (len(perturbations), 1)), var=train.var)
    prediction.obs["perturbation"] = list(perturbations)
    return prediction


def logged(train: ad.AnnData, perturbations: Sequence[str]) -> ad.AnnData:
    """Predict additively; write the seed of every fit to the log."""
    with Path(os.environ[LOG]).open("a") as log:
        log.write(f"{train.uns['benchmark']['seed']}\n")
    return additive(train, perturbations)


def broken(train: ad.AnnData, perturbations: Sequence[str]) -> ad.AnnData:
    raise RuntimeError("it does not converge")


class FailsForOne:
    """An estimator that cannot predict the first of the tested labels."""

    def fit(self, train: ad.AnnData) -> FailsForOne:
        self.baseline = evaluation.Additive().fit(train)
        return self

    def predict(self, perturbations: Sequence[str]) -> ad.AnnData:
        prediction = self.baseline.predict(perturbations)
        if "P001" in perturbations[0]:
            raise KeyError(perturbations[0])
        return prediction


class FakeModel:
    """Predicts 0 or 8 counts of the first gene in turn, and 2 of the second."""

    seen: Any = None

    @classmethod
    def setup_anndata(cls, adata: ad.AnnData, **arguments: Any) -> None:
        cls.seen = adata.obs_names
        cls.arguments = arguments

    def __init__(self, adata: ad.AnnData) -> None:
        self.adata = adata

    def train(self, datasplitter_kwargs: dict[str, Any], **arguments: Any) -> None:
        type(self).split = datasplitter_kwargs["external_indexing"]

    def predict(self, perturbations: Sequence[str], indices: np.ndarray, output: str) -> ad.AnnData:
        assert output == "counts"
        labels = self.adata.obs["perturbation"].iloc[indices]
        assert set(labels) == {"control"}
        counts = np.zeros((len(indices), self.adata.n_vars), np.float32)
        counts[::2, 0] = 8
        counts[:, 1] = 2
        return ad.AnnData(counts)


def run_until_killed(folder: str) -> None:
    """Run the benchmark; the process is killed while it writes the second fit of ``logged``."""
    write = _store.write_h5ad
    written = []

    def write_or_die(adata: ad.AnnData, path: Path, **arguments: Any) -> None:
        write(adata, path, **arguments)
        written.append(path)
        if len(written) == 6:  # two controls of two seeds each, then the method
            with Path(path).open("r+b") as file:
                file.truncate(100)
            os.kill(os.getpid(), signal.SIGKILL)

    _store.write_h5ad = write_or_die
    adata = small_screen()
    evaluation.benchmark(
        adata,
        methods={"logged": logged},
        split=PairSplit(adata),
        seeds=(0, 1),
        modes=("perturbench",),
        folder=folder,
        progress_bar=False,
    )
