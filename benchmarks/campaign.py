"""A campaign of screens: does choosing what to measure next beat choosing at random?

200 simulated perturbations of 30 cells each, 200 genes. 40 are measured first, 40 others are never
measured, and of the remaining 120 candidates 20 are measured in each round: those that
``model.rank_unmeasured`` puts first by each objective, or random ones. ``found`` is how many of
the 20 candidates with the largest true effects were measured by then (at random 20 * n / 120 are
expected), ``norm`` the mean true norm of those chosen, ``r`` the correlation of predicted with true
effects of the 40 that are never measured. Features are

- ``linear``: those of ``simulate_screen``, 30 that explain a share of effects and of liabilities
  of masks, and 50 columns of noise;
- ``copies``: for each latent its masks and its effects, as noisy copies that have that share of
  their variance in common with them, and 50 columns of noise.

Where features are uninformative, ``"uncertainty"`` cannot rank, and random ones are measured
(``?``).

    python benchmarks/campaign.py [--seeds 0] [--share 0.8] [--rounds 2] [--epochs 60]
    python benchmarks/campaign.py --pairs

``--pairs``: what ranking all pairs of 10,000 perturbations takes, by its parts, with 2,000 genes:
sums of all pairs, predictions of 1,000 perturbations, and of 2,000 pairs.
"""

from __future__ import annotations

import argparse
import logging
import time

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData

from _common import print_conditions
from scvi_sams import SAMSVAE, datasets
from scvi_sams.exceptions import SAMSError
from scvi_sams.model._strongest_sums import strongest_sums

SCREEN = {
    "n_genes": 200,
    "n_perturbations": 200,
    "cells_per_perturbation": 30,
    "n_combinations": 0,
    "n_features": 30,
    "n_noise_features": 50,
    "mask_probability": 0.3,
}
N_FIRST, N_NEVER, N_PER_ROUND, N_STRONGEST = 40, 40, 20, 20
OBJECTIVES = ["random", "effect", "novelty", "uncertainty"]


def noisy_copies(screen: AnnData, share: float, rng: np.random.Generator) -> pd.DataFrame:
    """Features that have a share of the variance of each mask and effect, among 50 of noise."""
    truth = screen.uns["simulation"]
    columns = np.concatenate([truth["true_masks"].astype(float), truth["true_effects"]], axis=1)
    columns = columns[:, columns.std(axis=0) > 0]
    columns = (columns - columns.mean(axis=0)) / columns.std(axis=0)
    noise = rng.normal(size=columns.shape)
    columns = np.sqrt(share) * columns + np.sqrt(1 - share) * noise
    values = np.concatenate([columns, rng.normal(size=(len(columns), 50))], axis=1)
    names = [f"feature_{number}" for number in range(values.shape[1])]
    return pd.DataFrame(values, index=list(truth["perturbations"]), columns=names)


def trained(screen: AnnData, measured: list[str], table: pd.DataFrame, epochs: int) -> SAMSVAE:
    """Train on control cells and those of the measured perturbations."""
    cells = screen[screen.obs["perturbation"].isin(["control", *measured])].copy()
    SAMSVAE.setup_anndata(cells)
    scvi.settings.seed = 0
    model = SAMSVAE(cells, n_latent=20, n_hidden=100, perturbation_features=table)
    model.train(max_epochs=epochs, accelerator="cpu", devices=1, enable_progress_bar=False)
    return model


def chosen_next(
    model: SAMSVAE, by: str, candidates: list[str], rng: np.random.Generator
) -> tuple[list[str], str]:
    """Candidates to measure, and a mark where the objective could not rank them."""
    if by != "random":
        try:
            ranking = model.rank_unmeasured(candidates, objective=by, top=N_PER_ROUND)
            return ranking["perturbation"].tolist(), ""
        except SAMSError as error:
            if "Features are uninformative" not in str(error):
                raise
    mark = "" if by == "random" else "?"
    return rng.choice(candidates, N_PER_ROUND, replace=False).tolist(), mark


def campaign(kind: str, seed: int, share: float, rounds: int, epochs: int) -> pd.DataFrame:
    """One row per objective and round."""
    rng = np.random.default_rng(seed)
    screen = datasets.simulate_screen(**SCREEN, feature_share=share, seed=seed)
    table = screen.uns["perturbation_features"]
    if kind == "copies":
        table = noisy_copies(screen, share, rng)
    names = rng.permutation(table.index).tolist()
    first, never = names[:N_FIRST], names[N_FIRST : N_FIRST + N_NEVER]
    candidates = names[N_FIRST + N_NEVER :]
    size = float(np.median(screen.obs["library_size"]))
    truth = datasets.simulated_ate(screen, names, n_samples=500, library_size=size).to_df()
    norms = pd.Series(np.linalg.norm(truth, axis=1), index=names)
    strongest = norms[candidates].nlargest(N_STRONGEST).index

    def r_of(model: SAMSVAE) -> float:
        predicted = model.predict_ate(never, n_samples=500).X
        return float(np.corrcoef(predicted.ravel(), truth.loc[never].to_numpy().ravel())[0, 1])

    start = trained(screen, first, table, epochs)
    rows = [{"objective": "before", "round": 0, "r": r_of(start), "norm": norms[first].mean()}]
    for by in OBJECTIVES:
        model, measured = start, list(first)
        for number in range(1, rounds + 1):
            left = [name for name in candidates if name not in measured]
            chosen, mark = chosen_next(model, by, left, rng)
            measured += chosen
            model = trained(screen, measured, table, epochs)
            rows.append(
                {
                    "objective": by + mark,
                    "round": number,
                    "found": int(strongest.isin(measured).sum()),
                    "norm": norms[measured[N_FIRST:]].mean(),
                    "r": r_of(model),
                }
            )
            print(kind, seed, rows[-1], flush=True)
    return pd.DataFrame(rows).assign(features=kind, seed=seed)


def time_of_pairs() -> None:
    """Print what ranking all pairs of 10,000 perturbations takes."""
    rng = np.random.default_rng(0)
    n_unmeasured, top = 9_900, 100
    screen = datasets.simulate_screen(
        n_genes=2000,
        n_perturbations=100,
        cells_per_perturbation=20,
        n_combinations=0,
        n_features=50,
    )
    known = screen.uns["perturbation_features"]
    others = pd.DataFrame(rng.normal(size=(n_unmeasured, known.shape[1])), columns=known.columns)
    others.index = [f"Q{number:05d}" for number in range(n_unmeasured)]
    SAMSVAE.setup_anndata(screen)
    model = SAMSVAE(screen, perturbation_features=pd.concat([known, others]))
    model.train(max_epochs=3, accelerator="cpu", devices=1, enable_progress_bar=False)
    effects = rng.normal(size=(10_000, 2000)).astype(np.float32)
    start = time.process_time()
    strongest_sums(effects, 20 * top, np.empty((0, 2), dtype=int))
    print(f"sums of 10,000 x 10,000 pairs: {time.process_time() - start:.0f} CPU s", flush=True)
    start = time.process_time()
    model.rank_unmeasured(others.index[:1000])
    print(f"1,000 single perturbations: {time.process_time() - start:.0f} CPU s", flush=True)
    start = time.process_time()
    ranking = model.rank_unmeasured(others.index[:100], pairs=True, top=top)
    seconds = time.process_time() - start
    print(f"pairs of 100: {seconds:.0f} CPU s, {ranking.attrs}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--features", nargs="+", default=["linear", "copies"])
    parser.add_argument("--share", type=float, default=0.8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--pairs", action="store_true")
    arguments = parser.parse_args()
    for name in ("scvi.sams", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    print_conditions()
    if arguments.pairs:
        time_of_pairs()
        return
    settings = (arguments.share, arguments.rounds, arguments.epochs)
    found = pd.concat(
        campaign(kind, seed, *settings) for kind in arguments.features for seed in arguments.seeds
    )
    index = ["features", "objective", "round"]
    table = found.pivot_table(index=index, columns="seed", values=["found", "norm", "r"])
    print(table.round(3).to_string())


if __name__ == "__main__":
    main()
