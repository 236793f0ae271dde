"""All models and baselines on the same cells: fit, specificity, likelihood and (simulated) truth.

``simulated``: held-out pairs of the benchmark screen, with its truth. ``papalexi21``: held-out
cells of perturbations seen in training. ``norman19``: held-out pairs of the small published subset.
Writes scores.csv, summary.csv and report.html into the folder, and keeps every fit there: started
again, it goes on where it stopped. ``--quick`` has few epochs and a small simulated screen: it
shows that everything runs, not how good anything is.

    python benchmarks/comparison.py FOLDER --data simulated [--seeds 0 1 2] [--jobs 1] [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import scvi_sams
from _common import print_conditions
from scvi_sams import datasets, evaluation
from simulated_screen import QUICK_SCREEN

MODELS: dict[str, tuple[type, dict[str, Any]]] = {
    "SAMS-VAE": (scvi_sams.SAMSVAE, {}),
    "CPA-VAE": (scvi_sams.CPAVAE, {}),
    "CPA-VAE, mean-field": (scvi_sams.CPAVAE, {"correlated_basal": False}),
    "SVAE+": (scvi_sams.SVAEPlus, {}),
    "conditional VAE": (scvi_sams.ConditionalVAE, {}),
}
BASELINES = (
    "EB-shrunken mean",
    "additive",
    "additive of shrunken singles",
    "matching mean",
    "ridge on principal components",
)
PRINTED = [
    "method", "axis", "metric", "over", "mean", "mean_of_succeeded", "low", "high", "position",
    "n_failed",
]  # fmt: skip


def simulated(quick: bool) -> dict[str, Any]:
    adata = datasets.simulate_benchmark_screen(0, **(QUICK_SCREEN if quick else {}))
    return {"adata": adata, "split": partial(held_out_pairs, adata.obs["perturbation"])}


def papalexi21(quick: bool) -> dict[str, Any]:
    adata = datasets.papalexi21()
    return {
        "adata": adata,
        "split": partial(held_out_cells, adata.obs["perturbation"]),
        "batch_key": "replicate",
        "size_factor_key": "total_counts",
    }


def norman19(quick: bool) -> dict[str, Any]:
    adata = datasets.norman19_subset()
    return {
        "adata": adata,
        "split": partial(held_out_pairs, adata.obs["perturbation"]),
        "size_factor_key": "total_counts",
    }


def held_out_pairs(labels: Any, seed: int) -> evaluation.Split:
    """Test pairs whose perturbations all have cells of their own to learn from."""
    n_held_out = max(2, len({label for label in labels if "+" in label}) // 5)
    held_out = evaluation.hold_out_combinations(labels, n_held_out, seed=seed)
    parts = evaluation.split_cells(labels, held_out, seed=seed, fractions=(0.8, 0.2, 0))
    return evaluation.make_split(
        labels,
        parts["train"],
        parts["validation"],
        parts["held_out"],
        held_out=held_out,
        name="held-out pairs",
        seed=seed,
        settings={"n_held_out": n_held_out},
    )


def held_out_cells(labels: Any, seed: int) -> evaluation.Split:
    return evaluation.random_cells(labels, seed=seed)


DATA: dict[str, Callable[[bool], dict[str, Any]]] = {
    "simulated": simulated,
    "papalexi21": papalexi21,
    "norman19": norman19,
}


def methods(data: str, quick: bool) -> dict[str, Any]:
    model_kwargs = {} if data == "simulated" else {"n_latent": 20}
    train_kwargs: dict[str, Any] = {"max_epochs": 2} if quick else {}
    samples = {"n_samples": 100, "n_posterior_samples": 10, "n_iwelbo_samples": 5} if quick else {}
    epochs = {"epochs": 2} if quick else {}
    models = {
        name: evaluation.ModelMethod(model, model_kwargs | own, train_kwargs, **samples)
        for name, (model, own) in MODELS.items()
    }
    networks = {
        "linear additive": evaluation.LinearAdditive(**epochs),
        "latent additive": evaluation.LatentAdditive(**epochs),
        "decoder only": evaluation.DecoderOnly(**epochs),
    }
    # Where pairs are held out there is no mean of training cells to predict, and ash-shrunken means
    # are the additive of shrunken singles.
    seen = ("training mean", "ash-shrunken mean") if data == "papalexi21" else ()
    return models | {name: name for name in (*seen, *BASELINES)} | networks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", choices=list(DATA), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--methods", nargs="+", help="names of some of the methods; all by default")
    arguments = parser.parse_args()
    print_conditions()
    chosen = methods(arguments.data, arguments.quick)
    result = evaluation.benchmark(
        **DATA[arguments.data](arguments.quick),
        methods={name: chosen[name] for name in arguments.methods or chosen},
        seeds=arguments.seeds,
        modes=("sams", "perturbench", "cell-eval", "systema", "distances"),
        folder=arguments.folder,
        n_jobs=arguments.jobs,
    )
    summary = result.summary()
    print(summary[PRINTED].round(3).to_string(index=False))
    result.to_csv(arguments.folder / "scores.csv")
    summary.to_csv(arguments.folder / "summary.csv", index=False)
    result.to_html(
        arguments.folder / "report.html", title=f"Perturbation benchmark: {arguments.data}"
    )


if __name__ == "__main__":
    main()
