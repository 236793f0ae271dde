"""Perturbations that nobody measured: how much of their effects do features tell?

``simulated``: 200 perturbations of 40 cells each, 400 genes, 30 perturbations hidden; features that
explain half of masks and effects, among 50 of noise. They are of one of two kinds:

- ``causes``: 30 features, of which effects and liabilities of masks are dense linear maps. A latent
  moves only where its mask is on, in ``--mask-probability`` of all: little of it can be learned.
- ``annotations``: one column for each latent's masks and one for its effects, with noise of the
  same variance: what a database knows of a mechanism, and half of it wrong.

Effects are compared with those of the true model (``datasets.simulated_ate``), ``log2(1 + 1e4 * x /
size)``: Pearson correlation over 30 x 400 entries, and root mean squared error. ``measured`` is
what cells of the hidden perturbations say themselves, had they not been hidden. Of the model are
printed coverage of 95 % intervals, correlation of effects of measured perturbations, and CPU
seconds of training, also without features and with shuffled ones.

``papalexi21``, ``norman19``: each gene in turn is left out with all of its cells, in combinations
too; features are those of a file. Effects are compared with those of the hidden cells, relative to
half of the control cells, on which no method is trained; printed are means over labels for each
seed. ``measured`` are the hidden cells relative to the other controls.

    python benchmarks/unmeasured.py simulated [--seeds 0 1 2] [--share 0.5]
        [--features-are causes] [--mask-probability 0.3] [--models]
    python benchmarks/unmeasured.py papalexi21 --features FILE.csv [--seeds 0 1 2] [--models]

``FILE.csv``: perturbations x features, names in the first column. ``--models`` trains ``SAMSVAE``
with these features as well, once per seed, or per gene.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path

import numpy as np
import pandas as pd
import scanpy as sc
import scvi
from anndata import AnnData

from _common import print_conditions
from scvi_sams import SAMSVAE, datasets, evaluation
from scvi_sams.evaluation import FeatureNeighbours, FeatureRidge
from scvi_sams.features._table import as_feature_table

SCREEN = {
    "n_genes": 400,
    "n_perturbations": 200,
    "cells_per_perturbation": 40,
    "n_combinations": 0,
    "n_features": 30,
    "n_noise_features": 50,
}
SHARE_HIDDEN = 0.15
TRAINING = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
REAL = {"papalexi21": datasets.papalexi21, "norman19": datasets.norman19_subset}


def takes_features() -> bool:
    """Whether the model predicts perturbations without cells."""
    return getattr(SAMSVAE, "_takes_features", False)


def normalised(counts: AnnData) -> AnnData:
    """``log(1 + 1e4 * x / size)`` of counts."""
    cells = counts.copy()
    sc.pp.normalize_total(cells, target_sum=1e4)
    sc.pp.log1p(cells)
    return cells


def by_baselines(
    cells: AnnData, split: evaluation.Split, table: pd.DataFrame, seed: int
) -> dict[str, np.ndarray]:
    """Predict effects of hidden perturbations without a model, natural logarithm."""
    hidden = list(split.held_out)
    train = cells[np.concatenate([split.train, split.validation])].copy()
    methods = {
        "mean of perturbations": evaluation.PerturbationMean(),
        "feature ridge": FeatureRidge(table),
        "feature neighbours": FeatureNeighbours(table),
        "shuffled features": FeatureRidge(table, shuffled=True, seed=seed),
    }
    no_change = evaluation.ControlMean().fit(train).predict(hidden).X
    predicted = {
        name: method.fit(train).predict(hidden).X - no_change for name, method in methods.items()
    }
    measured = evaluation.TrainingMean().fit(cells)
    return predicted | {"measured": measured.predict(hidden).X - measured.control_mean}


def annotated(counts: AnnData, share: float, seed: int) -> pd.DataFrame:
    """Columns for masks and effects of each latent, of which a share of the variance is right."""
    truth = counts.uns["simulation"]
    rng = np.random.default_rng(100 + seed)
    known = np.hstack([truth["true_masks"].astype(float), truth["true_effects"]])
    known = (known - known.mean(axis=0)) / known.std(axis=0)
    known = np.sqrt(share) * known + np.sqrt(1 - share) * rng.normal(size=known.shape)
    values = np.hstack([known, rng.normal(size=(len(known), SCREEN["n_noise_features"]))])
    columns = [f"feature_{number}" for number in range(values.shape[1])]
    return pd.DataFrame(values, index=list(truth["perturbations"]), columns=columns)


def scores(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Correlation and root mean squared error."""
    return {
        "r": np.corrcoef(predicted.ravel(), truth.ravel())[0, 1],
        "RMSE": np.sqrt(np.square(predicted - truth).mean()),
    }


def trained(
    counts: AnnData, split: evaluation.Split, table: pd.DataFrame | None, seed: int, **setup: str
) -> SAMSVAE:
    """Train a model with the default settings."""
    cells = counts[np.concatenate([split.train, split.validation])].copy()
    SAMSVAE.setup_anndata(cells, **setup)
    scvi.settings.seed = seed
    model = SAMSVAE(cells, perturbation_features=table)
    model.train(
        **TRAINING,
        datasplitter_kwargs={
            "external_indexing": np.split(np.arange(cells.n_obs), [len(split.train)])
        },
    )
    return model


def by_model(
    counts: AnnData,
    split: evaluation.Split,
    table: pd.DataFrame | None,
    seed: int,
    truth: pd.DataFrame,
) -> dict[str, float]:
    """Scores of a model with features of hidden perturbations, and of measured ones."""
    start = time.process_time()
    model = trained(counts, split, table, seed)
    found = {"CPU s": time.process_time() - start}
    seen = model.predict_ate(n_samples=500).to_df()
    found["r, measured"] = scores(seen.to_numpy(), truth.loc[seen.index].to_numpy())["r"]
    if table is None:
        return found
    ate = model.predict_ate(list(split.held_out))
    hidden = truth.loc[list(split.held_out)].to_numpy()
    inside = (ate.layers["interval_low"] <= hidden) & (hidden <= ate.layers["interval_high"])
    return found | scores(ate.X, hidden) | {"coverage": inside.mean()}


def simulated(
    seeds: list[int], *, kind: str, share: float, mask_probability: float, models: bool
) -> pd.DataFrame:
    """Correlation and error, (method, seed) x measure."""
    rows = {}
    for seed in seeds:
        counts = datasets.simulate_screen(
            **SCREEN, feature_share=share, mask_probability=mask_probability, seed=seed
        )
        table = counts.uns["perturbation_features"]
        if kind == "annotations":
            table = annotated(counts, share, seed)
        split = evaluation.perturbation_hold_out(
            counts.obs["perturbation"], fraction=SHARE_HIDDEN, seed=seed
        )
        library_size = float(np.median(counts.obs["library_size"]))
        names = list(counts.uns["simulation"]["perturbations"])
        truth = datasets.simulated_ate(
            counts, names, n_samples=1000, library_size=library_size
        ).to_df()
        hidden = truth.loc[list(split.held_out)].to_numpy()
        predicted = by_baselines(normalised(counts), split, table, seed)
        for name, effects in predicted.items():
            rows[name, seed] = scores(effects / np.log(2), hidden)
        shuffled = as_feature_table(table).shuffled(seed).to_frame()
        tables = {"SAMSVAE": table, "SAMSVAE, shuffled": shuffled, "SAMSVAE, no features": None}
        for name, features in tables.items() if models else ():
            rows[name, seed] = by_model(counts, split, features, seed, truth)
            print(f"seed {seed}, {name}: {rows[name, seed]}", flush=True)
    return pd.DataFrame(rows).T.rename_axis(["method", "seed"])


def real(name: str, table: pd.DataFrame, seeds: list[int], *, models: bool) -> pd.DataFrame:
    """Correlation and error, (method, seed) x measure; means over labels of genes left out in turn.

    Half of the control cells are the reference of observed effects, and no method is trained on
    them: an error of control cells that both sides share would count as a correct prediction.
    """
    adata = REAL[name]()
    labels = adata.obs["perturbation"].astype(str)
    genes = sorted(
        {gene for label in labels.unique() for gene in label.split("+")} & set(table.index)
    )
    print(f"{name}: {len(genes)} genes in turn, {table.shape[1]} features")
    rows = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        order = rng.permutation(adata.n_obs)
        is_control = labels.to_numpy()[order] == "control"
        apart = order[is_control][::2]
        compared = np.concatenate([order[~is_control], apart])
        truth = evaluation.observed_ate(
            adata, size_factor_key="total_counts", indices=compared
        ).to_df()
        remaining = adata[np.setdiff1d(np.arange(adata.n_obs), apart)].copy()
        logged = remaining.copy()
        logged.X = np.log1p(1e4 * logged.X.toarray() / logged.obs[["total_counts"]].to_numpy())
        for number, gene in enumerate(genes):
            split = evaluation.perturbation_hold_out(
                remaining.obs["perturbation"], [gene], seed=seed
            )
            hidden = truth.loc[list(split.held_out)]
            predicted = by_baselines(logged, split, table, seed * len(genes) + number)
            predicted = {key: value / np.log(2) for key, value in predicted.items()}
            if models:
                model = trained(remaining, split, table, seed, size_factor_key="total_counts")
                predicted["SAMSVAE"] = model.predict_ate(list(split.held_out), target_sum=1e4).X
            for label, effects in hidden.iterrows():
                nothing = {"r": np.nan, "RMSE": np.sqrt(np.square(effects).mean())}
                rows.append({"method": "no change", "seed": seed, "label": label} | nothing)
            for method, effects in predicted.items():
                for label, own in zip(hidden.index, effects, strict=True):
                    found = scores(own, hidden.loc[label].to_numpy())
                    rows.append({"method": method, "seed": seed, "label": label} | found)
    found = pd.DataFrame(rows)
    return found.groupby(["method", "seed"], sort=False)[["r", "RMSE"]].mean()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("screen", choices=["simulated", *REAL])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--features-are", choices=["causes", "annotations"], default="causes")
    parser.add_argument("--mask-probability", type=float, default=0.3)
    parser.add_argument("--features", type=Path, help="CSV, for a published screen")
    parser.add_argument("--models", action="store_true")
    arguments = parser.parse_args()
    if arguments.models and not takes_features():
        parser.error("SAMSVAE of this version takes no features: leave --models out.")
    logging.getLogger("scvi.sams").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print_conditions()
    if arguments.screen == "simulated":
        table = simulated(
            arguments.seeds,
            kind=arguments.features_are,
            share=arguments.share,
            mask_probability=arguments.mask_probability,
            models=arguments.models,
        )
    elif arguments.features is None:
        parser.error("Pass the features of its genes: --features FILE.csv")
    else:
        features = pd.read_csv(arguments.features, index_col=0)
        table = real(arguments.screen, features, arguments.seeds, models=arguments.models)
    print(table.unstack("seed").round(3).to_string())
    print(table.groupby("method", sort=False).mean().round(3).to_string())


if __name__ == "__main__":
    main()
