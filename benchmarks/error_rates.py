"""How many mask entries and hits are false? Screens that do nothing, decoys, and known truth.

Defaults of ``SAMSVAE`` on every screen, three seeds:

- ``mcfaline23``: nine CRISPRi targets in three cell lines, none of which changes a gene.
  ``mcfaline23 permuted``: the same with labels permuted within cell lines.
- ``hill18``: 29 targets, 28 genes; nearly nothing changes.
- ``papalexi21``: half of the control cells carry the labels of eight targets that do not exist;
  with ``, strong`` only the 11 strongest targets beside them, with ``, few controls`` a fifth of
  the control cells that are left.
- ``svae``: the simulation of Lopez et al. (2022), section 5: strong effects.
- ``40x50x60`` and its like: perturbations x cells x genes of ``simulate_screen``.

    python benchmarks/error_rates.py [--screens mcfaline23 svae] [--seeds 0 1 2] [--half-epochs]
        [--fdr 0.05 0.01]
"""

from __future__ import annotations

import logging
import os
import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd
import scvi
from anndata import AnnData
from scipy.sparse import csr_matrix

import scvi_sams
from _common import print_conditions
from scvi_sams import datasets, evaluation, tl

N_FAKES, CELLS_PER_FAKE = 8, 150
NATURAL_NULLS = ["ATF2", "CAV1", "CD86", "ETV7", "IRF7", "MARCH8", "PDCD1LG2", "STAT5A"]
RECEPTORS = ["IFNGR1", "IFNGR2", "JAK2", "STAT1"]
STRONG = [*RECEPTORS, "BRD4", "CUL3", "IRF1", "MYC", "SMAD4", "SPI1", "STAT2"]


class Screen(NamedTuple):
    """A screen, how to register it, and what is known of its perturbations."""

    adata: AnnData
    setup: dict[str, Any]
    nulls: list[str]
    """Perturbations that do nothing."""


def _shared_file(name: str) -> AnnData:
    return anndata.read_h5ad(Path(os.environ["SCVI_SAMS_DATA_DIR"]) / name)


def mcfaline23(seed: int, *, permuted: bool = False) -> Screen:
    """Counts of the cells of McFaline-Figueroa et al. (2024) in PerturBench's file."""
    published = _shared_file("perturbench_devel.h5ad")
    published = published[(published.obs["dataset"] == "mcfaline23").to_numpy()]
    shares = np.expm1(published.X.toarray())
    smallest = np.where(shares > 0, shares, np.inf).min(axis=1, keepdims=True)
    obs = published.obs[["perturbation", "cell_type", "ncounts"]].copy()
    obs["perturbation"] = obs["perturbation"].astype(str)
    if permuted:
        rng = np.random.default_rng(seed)
        obs["perturbation"] = obs.groupby("cell_type", observed=True)["perturbation"].transform(
            rng.permutation
        )
    counts = csr_matrix(np.round(shares / smallest).astype(np.float32))
    adata = AnnData(counts, obs=obs, var=published.var[[]])
    names = sorted(set(obs["perturbation"]) - {"control"})
    covariates = ["cell_type"]
    setup = {"size_factor_key": "ncounts", "categorical_covariate_keys": covariates}
    return Screen(adata, setup, names)


def hill18(seed: int) -> Screen:
    """Cells of Hill et al. (2018) with a known guide, and a count in one of the 28 genes."""
    adata = _shared_file("hill18_mcf10a.h5ad")
    is_used = (adata.obs["perturbation"] != "unassigned").to_numpy()
    adata = adata[is_used & (np.asarray(adata.X.sum(axis=1)).ravel() > 0)].copy()
    return Screen(adata, {"size_factor_key": "nUMI"}, [])


def papalexi21(
    seed: int, *, targets: list[str] | None = None, share_of_controls: float = 1
) -> Screen:
    """Some control cells get labels of eight targets that do not exist.

    ``targets`` are kept beside them, all by default, and a share of the other control cells.
    """
    adata = datasets.papalexi21()
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    rng = np.random.default_rng(1000 + seed)
    chosen = rng.permutation(np.flatnonzero(labels == "control"))[: N_FAKES * CELLS_PER_FAKE]
    fakes = [f"FAKE{number}" for number in range(1, N_FAKES + 1)]
    labels[chosen] = np.repeat(fakes, CELLS_PER_FAKE)
    adata.obs["perturbation"] = labels
    kept = (labels != "control") | (rng.random(len(labels)) < share_of_controls)
    if targets is not None:
        kept &= np.isin(labels, ["control", *targets, *fakes])
    setup = {"batch_key": "replicate", "size_factor_key": "total_counts"}
    nulls = fakes + ([] if targets is not None else NATURAL_NULLS)
    return Screen(adata[kept].copy(), setup, nulls)


def svae(seed: int) -> Screen:
    """15 latents, 100 perturbations of one to three of them, 100 cells each, 100 genes."""
    rng = np.random.default_rng(seed)
    n_latent, n_genes, n_perturbations, n_cells, n_controls = 15, 100, 100, 100, 1000
    masks = np.zeros((n_perturbations, n_latent))
    for row in masks:
        row[rng.choice(n_latent, rng.integers(1, 4), replace=False)] = 1
    shifts = masks * rng.choice([-1, 1], masks.shape) * rng.normal(5, 0.5, masks.shape)
    labels = np.repeat(np.arange(n_perturbations), n_cells)
    states = rng.normal(size=(n_controls + len(labels), n_latent))
    states[n_controls:] += shifts[labels]
    width = 64
    hidden = states @ rng.normal(size=(n_latent, width)) / n_latent**0.5
    hidden = np.where(hidden > 0, hidden, 0.2 * hidden)
    logits = hidden @ rng.normal(size=(width, n_genes)) / width**0.5 + rng.normal(size=n_genes)
    rates = np.exp(logits - logits.max(axis=1, keepdims=True))
    rates /= rates.sum(axis=1, keepdims=True)
    size = rng.lognormal(np.log(5000), 0.3, len(states))
    counts = rng.poisson(size[:, None] * rates).astype(np.float32)
    names = np.array([f"P{number:03d}" for number in range(1, n_perturbations + 1)])
    obs = pd.DataFrame({"perturbation": ["control"] * n_controls + names[labels].tolist()})
    obs.index = obs.index.map("cell_{}".format)
    adata = AnnData(csr_matrix(counts), obs=obs)
    adata.uns["simulation"] = {"true_masks": masks, "perturbations": names}
    return Screen(adata, {}, [])


def simulated(**settings: Any) -> Callable[[int], Screen]:
    """Draw a screen of :func:`scvi_sams.datasets.simulate_screen`, without pairs."""

    def draw(seed: int) -> Screen:
        adata = datasets.simulate_screen(n_combinations=0, seed=seed, **settings)
        masks = adata.uns["simulation"]["true_masks"]
        names = np.asarray(adata.uns["simulation"]["perturbations"])
        return Screen(adata, {}, names[~masks.any(axis=1)].tolist())

    return draw


def demo(seed: int) -> Screen:
    """What ``make demo`` trains on."""
    adata = datasets.simulate_screen(
        n_genes=800,
        n_controls=400,
        n_perturbations=32,
        cells_per_perturbation=80,
        n_combinations=20,
        cells_per_combination=60,
        n_latent=10,
        seed=seed,
    )
    return Screen(adata, {}, [])


def _size(perturbations: int, cells: int, genes: int) -> dict[str, int]:
    return {"n_perturbations": perturbations, "cells_per_perturbation": cells, "n_genes": genes}


SCREENS: dict[str, Callable[[int], Screen]] = {
    "mcfaline23": mcfaline23,
    "mcfaline23 permuted": lambda seed: mcfaline23(seed, permuted=True),
    "hill18": hill18,
    "papalexi21": papalexi21,
    "papalexi21, strong": lambda seed: papalexi21(seed, targets=STRONG),
    "papalexi21, few controls": lambda seed: papalexi21(seed, share_of_controls=0.2),
    "svae": svae,
    "40x50x60": simulated(**_size(40, 50, 60)),
    "300x80x60": simulated(**_size(300, 80, 60)),
    "40x50x400": simulated(**_size(40, 50, 400)),
    "300x20x1000, 60 mechanisms": simulated(**_size(300, 20, 1000), n_latent=60),
    "demo": demo,
    "300 controls, no effects": simulated(
        **_size(20, 60, 300), n_controls=300, n_null_perturbations=20
    ),
    "3000 controls, no effects": simulated(
        **_size(20, 60, 300), n_controls=3000, n_null_perturbations=20
    ),
}


def fit(
    screen: Screen, seed: int, epochs: int | None = None, *, half_epochs: bool = False
) -> scvi_sams.SAMSVAE:
    """Train with default settings, and then, if asked to, anew with half as many epochs.

    ``epochs`` is of the first training.
    """
    scvi_sams.SAMSVAE.setup_anndata(screen.adata, **screen.setup)

    def trained(max_epochs: int | None) -> scvi_sams.SAMSVAE:
        scvi.settings.seed = seed
        model = scvi_sams.SAMSVAE(screen.adata)
        model.train(max_epochs=max_epochs, enable_progress_bar=False)
        return model

    model = trained(epochs)
    if half_epochs:
        model = trained(model.provenance["trainings"][0]["n_epochs"] // 2)
    return model


def rates(screen: Screen, model: scvi_sams.SAMSVAE, fdr: float = 0.05) -> dict[str, float]:
    """Calls at an FDR by masks alone, and by masks and test; how many of them are false."""
    masks = model.get_perturbation_masks(key_added=None)
    called = tl.called_masks(model, fdr=fdr)
    found: dict[str, float] = {}
    truth = screen.adata.uns.get("simulation", {}).get("true_masks")
    for name, table in (("masks", evaluation.active_at_fdr(masks, fdr)), ("both", called)):
        targets = table.any(axis=1)
        found[f"entries, {name}"] = table.to_numpy().sum()
        found[f"targets, {name}"] = targets.sum()
        found[f"nulls, {name}"] = targets[screen.nulls].sum() if screen.nulls else np.nan
        if truth is not None and np.any(truth):
            names = screen.adata.uns["simulation"]["perturbations"]
            true_masks = pd.DataFrame(truth, index=names).reindex(masks.index)
            of_called = evaluation.mask_recovery(table.astype(float), true_masks)
            found[f"false, {name}"] = 1 - of_called["precision"]
            found[f"recall, {name}"] = of_called["recall"]
            found["F1, masks"] = evaluation.mask_recovery(masks, true_masks)["f1"]
    found["said"] = called.attrs["expected_false"]
    if set(RECEPTORS) <= set(called.index):
        found["receptors share"] = called.loc[RECEPTORS].all(axis=0).sum()
    return found


def parser_of(description: str | None, screens: list[str], seeds: list[int]) -> ArgumentParser:
    """Take ``--screens`` and ``--seeds``, with these defaults, and ``--epochs``."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--screens", nargs="+", choices=SCREENS, default=screens)
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--epochs", type=int, help="of every training; the default number if unset")
    return parser


def be_quiet() -> None:
    """Log errors only."""
    for logger in ("scvi", "scvi.sams", "lightning.pytorch"):
        logging.getLogger(logger).setLevel(logging.ERROR)


def main() -> None:
    """Print one line per training, then the means."""
    parser = parser_of(__doc__, list(SCREENS), [0, 1, 2])
    parser.add_argument("--half-epochs", action="store_true")
    parser.add_argument("--fdr", type=float, nargs="+", default=[0.05])
    arguments = parser.parse_args()
    be_quiet()
    print_conditions()
    rows = []
    for name in arguments.screens:
        for seed in arguments.seeds:
            screen = SCREENS[name](seed)
            started = time.process_time()
            model = fit(screen, seed, arguments.epochs, half_epochs=arguments.half_epochs)
            seconds = time.process_time() - started
            for fdr in arguments.fdr:
                row = {"screen": name, "FDR": fdr, "seed": seed, "CPU s": seconds}
                rows.append(row | rates(screen, model, fdr))
                print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False), flush=True)
    table = pd.DataFrame(rows).drop(columns="seed").groupby(["screen", "FDR"], sort=False).mean()
    print(table.round(3).to_string())


if __name__ == "__main__":
    main()
