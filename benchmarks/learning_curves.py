"""Quality of predicted effects against the training cells of each perturbation, as a figure.

Two real screens, and simulated ones without and with effects of perturbations on their own genes.
Half of the cells of each perturbation may train; effects in the other half are predicted. Default
settings of the model, three seeds.

    python benchmarks/learning_curves.py FOLDER [--screens papalexi21 ...] [--figure FILE.png]
        [--reference test]

``--reference test``: observed effects are relative to control cells on which no method is trained.
Use another folder.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
from anndata import AnnData

from _common import print_conditions
from scvi_sams import SAMSVAE, datasets, evaluation, pl

METHODS = ["SAMSVAE", "training mean", "EB-shrunken mean", "ash-shrunken mean"]


class Screen(NamedTuple):
    """How to read or simulate a screen, its columns, and the numbers of cells to train on."""

    title: str
    read: Callable[[], AnnData]
    columns: dict[str, Any]
    cells: tuple[int | None, ...]


def simulated(*, own_genes: bool) -> AnnData:
    """40 perturbations, 300 genes."""
    return datasets.simulate_screen(
        n_genes=300,
        n_perturbations=40,
        cells_per_perturbation=200,
        n_combinations=0,
        knockdown=(0.7, 0.95) if own_genes else None,
        seed=5,
    )


SCREENS = {
    "papalexi21": Screen(
        "Papalexi et al. 2021",
        datasets.papalexi21,
        {"batch_key": "replicate", "size_factor_key": "total_counts"},
        (10, 20, 50, 100, None),
    ),
    "norman19": Screen(
        "Norman et al. 2019, subset",
        datasets.norman19_subset,
        {"size_factor_key": "total_counts"},
        (10, 20, None),
    ),
    "simulated": Screen("simulated", lambda: simulated(own_genes=False), {}, (10, 20, 50, None)),
    "own genes": Screen(
        "simulated, with target genes", lambda: simulated(own_genes=True), {}, (10, 20, 50, None)
    ),
}


def draw(curves: dict[str, pd.DataFrame], file: Path) -> None:
    """One column per screen: correlation above, error below."""
    figure, axes = plt.subplots(
        2, len(curves), figsize=(3.4 * len(curves), 6), layout="constrained", squeeze=False
    )
    for column, (name, curve) in zip(axes.T, curves.items(), strict=True):
        for ax, metric in zip(column, ("pearson", "rmse"), strict=True):
            pl.learning_curve(curve, metric, ax=ax)
            ax.get_legend().remove()
            if ax is not axes[0, 0] and ax is not axes[1, 0]:
                ax.set_ylabel("")
        column[0].set_title(SCREENS[name].title, fontsize=9)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Run what is not in the folder yet, print means over seeds, draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reference", choices=["all", "test"], default="all")
    parser.add_argument("--screens", nargs="+", choices=SCREENS, default=list(SCREENS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--epochs", type=int, help="of SAMSVAE; the default number if unset")
    parser.add_argument("--cells", type=int, nargs="+", help="numbers of cells to train on")
    arguments = parser.parse_args()
    print_conditions()
    for logger in ("scvi", "scvi.sams", "lightning.pytorch"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    methods: dict[str, Any] = {name: name for name in METHODS}
    if arguments.epochs is not None:
        limited = {"max_epochs": arguments.epochs}
        methods["SAMSVAE"] = evaluation.ModelMethod(SAMSVAE, train_kwargs=limited)
    curves = {}
    for name in arguments.screens:
        screen, file = SCREENS[name], arguments.folder / f"{name}.csv"
        if not file.exists():
            evaluation.learning_curve(
                screen.read(),
                methods,
                cells=arguments.cells or screen.cells,
                seeds=arguments.seeds,
                reference=arguments.reference,
                n_jobs=1,
                progress_bar=False,
                **screen.columns,
            ).to_csv(file, index=False)
        curves[name] = pd.read_csv(file)
        means = (
            curves[name]
            .groupby(["method", "n_cells"], sort=False)[["pearson", "rmse", "mean_pearson", "rank"]]
            .mean()
        )
        print(f"{screen.title}\n{means.round(3).to_string()}\n", flush=True)
    if arguments.figure is not None:
        draw(curves, arguments.figure)


if __name__ == "__main__":
    main()
