"""How well is simulated truth recovered? 20,000 cells x 2,000 genes, 10 pairs never trained on.

Default settings unless named: what a user gets. The first line of the table is the figure that the
authors' implementation reached on a screen of the same make (about 1,700 steps).

    python benchmarks/simulated_screen.py [--seeds 0 1 2] [--effects mean-field]
        [--reliability FILE.png]
"""

from __future__ import annotations

import argparse
import time
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scvi
from anndata import AnnData

import scvi_sams
from _common import print_conditions
from scvi_sams import datasets, evaluation

AUTHORS = {
    "IWELBO, test": -3119.2,
    "IWELBO, test, minus log p(x | true z)": -93.7,
    "IWELBO, held-out pairs": -2998.4,
    "mask precision": 0.17,
    "mask recall": 0.75,
    "mask F1": 0.28,
    "ATE Pearson, seen": 0.799,
    "ATE Pearson, seen, top 20": 0.919,
    "ATE Pearson, held-out pairs": 0.816,
    "ATE Pearson, held-out pairs, top 20": 0.957,
    "ATE Pearson, held-out pairs, additive baseline": 0.937,
    "CPU seconds of training": 2690.0,
}
QUICK_SCREEN: dict[str, Any] = {
    "n_genes": 300,
    "n_controls": 200,
    "n_perturbations": 20,
    "cells_per_perturbation": 40,
    "n_combinations": 16,
    "cells_per_combination": 30,
    "n_latent": 8,
}
"""Of ``--quick``, with two epochs: it shows that everything runs, not how good anything is."""
QUICK_EPOCHS = 2


class Fitted(NamedTuple):
    """A model trained on one screen, and the cells it was not trained on."""

    model: scvi_sams.SAMSVAE | scvi_sams.CPAVAE
    adata: AnnData
    split: dict[str, np.ndarray]
    held_out: list[str]
    seconds: float


def fit(
    seed: int,
    settings: dict[str, Any],
    epochs: int | None = None,
    *,
    screen: dict[str, Any] | None = None,
    plan: dict[str, Any] | None = None,
    model_class: type[scvi_sams.SAMSVAE] | type[scvi_sams.CPAVAE] = scvi_sams.SAMSVAE,
) -> Fitted:
    """Simulate a screen (``screen``: arguments of the simulator), hold out pairs, train."""
    adata = datasets.simulate_benchmark_screen(seed, **(screen or {}))
    labels = adata.obs["perturbation"]
    held_out = evaluation.hold_out_combinations(labels, 10, seed=seed)
    split = evaluation.split_cells(labels, held_out, seed=seed)
    scvi.settings.seed = seed
    model_class.setup_anndata(adata)
    model = model_class(adata, **settings)
    unseen = np.concatenate([split["test"], split["held_out"]])
    started = time.process_time()
    model.train(
        max_epochs=epochs,
        plan_kwargs=plan,
        enable_progress_bar=False,
        datasplitter_kwargs={"external_indexing": [split["train"], split["validation"], unseen]},
    )
    return Fitted(model, adata, split, held_out, time.process_time() - started)


def score(fitted: Fitted) -> dict[str, float]:
    """Compare with the truth of the screen."""
    model, adata, split, held_out, seconds = fitted
    observed = evaluation.observed_ate(adata)
    seen = [label for label in observed.obs_names if label not in held_out]
    predicted = model.predict_ate(list(observed.obs_names), n_samples=1000, key_added=None)
    compared = {
        "seen": evaluation.compare_ate(predicted[seen], observed[seen]).loc["all"],
        "held-out pairs": evaluation.compare_ate(predicted[held_out], observed[held_out]).loc[
            "all"
        ],
    }
    trained = evaluation.observed_ate(
        adata, indices=np.concatenate([split["train"], split["validation"]])
    )
    additive = evaluation.compare_ate(
        evaluation.additive_ate(trained, held_out), observed[held_out]
    ).loc["all"]
    unseen = np.concatenate([split["test"], split["held_out"]])
    leakage = evaluation.basal_leakage(model, indices=unseen).loc["all"]
    iwelbo = model.get_iwelbo(indices=split["test"], key_added=None)
    result = {
        "-ELBO, validation": float(model.history["elbo_validation"].iloc[-1, 0]),
        "IWELBO, test": iwelbo,
        "IWELBO, test, minus log p(x | true z)": iwelbo
        - datasets.simulated_log_likelihood(adata[split["test"]]).mean(),
        "IWELBO, held-out pairs": model.get_iwelbo(indices=split["held_out"], key_added=None),
        **mask_scores(fitted),
        "AUC perturbed vs control, basal": leakage["auc_basal"],
        "AUC perturbed vs control, all": leakage["auc_total"],
    }
    for name, likeness in compared.items():
        result |= {
            f"ATE Pearson, {name}": likeness["pearson"],
            f"ATE Pearson, {name}, top 20": likeness["pearson_top"],
            f"ATE R2, {name}": likeness["r2"],
            f"ATE slope, {name}": likeness["slope"],
        }
    result["ATE Pearson, held-out pairs, additive baseline"] = additive["pearson"]
    result["CPU seconds of training"] = seconds
    return result


def mask_scores(fitted: Fitted) -> dict[str, float]:
    """How well masks (where there are some) and thresholded effects recover the true masks."""
    model, true_masks = fitted.model, true_masks_of(fitted.adata)
    effects = model.get_perturbation_effects(key_added=None).mean
    by_size = max(
        evaluation.mask_recovery(effects.abs(), true_masks, threshold=size)["f1"]
        for size in np.arange(0.1, 1.5, 0.05)
    )
    scores = {"mask F1, best threshold on effects": by_size}
    if isinstance(model, scvi_sams.CPAVAE):
        return scores
    masks = model.get_perturbation_masks(key_added=None)
    recovery = evaluation.mask_recovery(masks, true_masks)
    calibration = evaluation.mask_calibration(masks, true_masks)
    discoveries = calibration.fdr.loc[0.05]
    return {
        "mask precision": recovery["precision"],
        "mask recall": recovery["recall"],
        "mask F1": recovery["f1"],
        "mask density": recovery["density"],
        **scores,
        "expected calibration error": calibration.expected_calibration_error,
        "false discoveries at 5 % FDR": discoveries["false_discovery_proportion"],
        "recall at 5 % FDR": discoveries["recall"],
    }


def true_masks_of(adata: AnnData) -> pd.DataFrame:
    truth = adata.uns["simulation"]
    return pd.DataFrame(truth["true_masks"], index=truth["perturbations"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--effects", choices=("default", "mean-field", "correlated"))
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--quick", action="store_true", help="a small screen and few epochs")
    parser.add_argument("--reliability", help="draw the reliability diagram into this file")
    arguments = parser.parse_args()
    print_conditions()
    settings = {}
    if arguments.effects in ("mean-field", "correlated"):
        settings["correlated_effects"] = arguments.effects == "correlated"
    results = {"authors": AUTHORS}
    calibrations = {}
    for seed in arguments.seeds:
        quick = {"epochs": QUICK_EPOCHS, "screen": QUICK_SCREEN} if arguments.quick else {}
        fitted = fit(seed, settings, **({"epochs": arguments.epochs} | quick))
        results[f"seed {seed}"] = score(fitted)
        calibrations[f"screen {seed}"] = evaluation.mask_calibration(
            fitted.model.get_perturbation_masks(key_added=None), true_masks_of(fitted.adata)
        )
    print(pd.DataFrame(results).round(3).to_string())
    if arguments.reliability:
        ax = scvi_sams.pl.mask_calibration(calibrations)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12)}
        ax.legend(frameon=False, **below)  # three curves leave no free corner
        ax.figure.savefig(arguments.reliability, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
