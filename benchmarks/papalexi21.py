"""Does the model find what is known of the knock-outs of Papalexi et al. 2021?

Trains with default settings on 80 % of the cells (size factor: whole-transcriptome library size)
and prints, beside what is known: likeness of ATE vectors within the interferon-gamma group, ATE
norms of natural nulls, STAT1 and PSMB9 under IFNGR2 knock-out, and the ATE of held-out cells.

    python benchmarks/papalexi21.py [--seeds 0 1 2] [--latent 20]
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData

import scvi_sams
from _common import print_conditions
from scvi_sams import evaluation, tl

PATHWAY = ["IFNGR1", "IFNGR2", "JAK2", "STAT1"]
NULLS = ["ATF2", "CAV1", "CD86", "ETV7", "IRF7", "MARCH8", "PDCD1LG2", "STAT5A"]


def cosines(table: AnnData) -> pd.DataFrame:
    unit = table.X / np.linalg.norm(table.X, axis=1, keepdims=True)
    return pd.DataFrame(unit @ unit.T, index=table.obs_names, columns=table.obs_names)


def run(seed: int, n_latent: int, epochs: int | None) -> tuple[scvi_sams.SAMSVAE, dict[str, float]]:
    adata = scvi_sams.datasets.papalexi21()
    scvi.settings.seed = seed
    split = evaluation.split_cells(adata.obs["perturbation"], [], seed=seed)
    scvi_sams.SAMSVAE.setup_anndata(adata, batch_key="replicate", size_factor_key="total_counts")
    model = scvi_sams.SAMSVAE(adata, n_latent=n_latent)
    started = time.process_time()
    model.train(
        epochs,
        enable_progress_bar=False,
        datasplitter_kwargs={
            "external_indexing": [split["train"], split["validation"], split["test"]]
        },
    )
    seconds = time.process_time() - started

    def observed(cells: np.ndarray) -> AnnData:
        return evaluation.observed_ate(adata, indices=cells, size_factor_key="total_counts")

    test, trained = observed(split["test"]), observed(split["train"])
    predicted = model.predict_ate(list(trained.obs_names))
    like = cosines(predicted)
    others = [name for name in like.index if name not in PATHWAY]
    norm = pd.Series(np.linalg.norm(predicted.X, axis=1), index=predicted.obs_names)
    within = like.loc[PATHWAY, PATHWAY].to_numpy()[np.triu_indices(len(PATHWAY), 1)]
    knocked_out = pd.Series(predicted["IFNGR2"].X[0], index=predicted.var_names)
    data = pd.Series(trained["IFNGR2"].X[0], index=trained.var_names)
    scores = {
        name: evaluation.compare_ate(table[test.obs_names], test).loc["all", "pearson"]
        for name, table in (
            ("SAMS-VAE", predicted),
            ("mean of perturbations", evaluation.mean_ate(trained, list(trained.obs_names))),
            ("training cells", trained),
        )
    }
    masks = model.get_perturbation_masks(key_added=None)
    called = tl.called_masks(model, masks=masks)
    return model, {
        "CPU seconds": seconds,
        "cosine within IFNGR1/IFNGR2/JAK2/STAT1, lowest": within.min(),
        "cosine of these to any other, highest": like.loc[PATHWAY, others].to_numpy().max(),
        "ATE norm of nulls / of the pathway (means)": norm[NULLS].mean() / norm[PATHWAY].mean(),
        "ATE norm, largest null / smallest of the pathway": norm[NULLS].max() / norm[PATHWAY].min(),
        "STAT1 under IFNGR2 knock-out": knocked_out["STAT1"],
        "  in training cells": data["STAT1"],
        "PSMB9 under IFNGR2 knock-out": knocked_out["PSMB9"],
        "  in training cells ": data["PSMB9"],
        **{f"ATE Pearson with held-out cells, {name}": value for name, value in scores.items()},
        "IWELBO, held-out cells": model.get_iwelbo(indices=split["test"], key_added=None),
        "active latents per pathway perturbation": (masks.loc[PATHWAY] > 0.5).sum(axis=1).mean(),
        "active latents per null": (masks.loc[NULLS] > 0.5).sum(axis=1).mean(),
        "called latents per null": called.loc[NULLS].sum(axis=1).mean(),
        "AUC perturbed vs control, basal": evaluation.basal_leakage(model).loc["all", "auc_basal"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--latent", type=int, default=20)
    parser.add_argument("--epochs", type=int, help="of every training; the default number if unset")
    arguments = parser.parse_args()
    print_conditions()
    runs = {
        f"seed {seed}": run(seed, arguments.latent, arguments.epochs) for seed in arguments.seeds
    }
    print(pd.DataFrame({name: scores for name, (_, scores) in runs.items()}).round(3).to_string())
    if len(runs) > 1:
        models = [model for model, _ in runs.values()]
        stability = evaluation.mask_stability(models)
        print(stability.pairs.round(3).to_string())
        support = evaluation.consensus_masks(models).support
        print((support > 0.5).sum(axis=1).rename("active in most runs").to_string())


if __name__ == "__main__":
    main()
