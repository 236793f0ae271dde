"""The three experiments of the SAMS-VAE paper, on data that you bring.

    python benchmarks/paper/run.py norman-ood --data norman.h5ad --out norman_ood.csv
    python benchmarks/paper/run.py replogle-filtered --data replogle.h5ad --seeds 0
    python benchmarks/paper/run.py norman-ood --data simulated --quick

Data: an .h5ad with raw counts, or norman19_subset, papalexi21 or simulated. Settings are in the
file of each experiment beside this one and in experiment.py. Every run is kept (--results) and not
repeated: an interrupted command goes on where it was. --quick takes 5 steps and few samples, to see
that everything works; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import joblib
import pandas as pd
import pooch
from experiment import Experiment, Scoring
from norman_data_efficiency import EXPERIMENT as NORMAN_DATA_EFFICIENCY
from norman_ood import EXPERIMENT as NORMAN_OOD
from replogle_filtered import EXPERIMENT as REPLOGLE_FILTERED
from scoring import baseline_scores, fit_and_score
from screen import Screen, load_cells
from table import table

import scvi_sams

EXPERIMENTS = {
    "replogle-filtered": REPLOGLE_FILTERED,
    "norman-ood": NORMAN_OOD,
    "norman-data-efficiency": NORMAN_DATA_EFFICIENCY,
}
_QUICK_STEPS = 5
_QUICK_SCORING = Scoring(n_importance_samples=10, n_ate_draws=200)

# Notes for developers of the libraries underneath.
warnings.filterwarnings("ignore", module=r"(anndata|lightning)(\.|$)")
for name in ("lightning.pytorch", "lightning.fabric", "scvi"):
    logging.getLogger(name).setLevel(logging.ERROR)


def run(experiment: Experiment, screen: Screen, memory: joblib.Memory) -> Iterator[dict]:
    """Yield the scores of every baseline and model, from ``memory`` where they are known."""
    remembered = memory.cache(fit_and_score, ignore=["screen"])
    fingerprint = f"{screen.fingerprint()} {scvi_sams.__version__}"
    for seed in experiment.seeds:
        for fraction in experiment.fractions or (None,):
            split = experiment.split(
                screen.labels,
                seed=seed,
                control=screen.control,
                delimiter=screen.delimiter,
                **({} if fraction is None else {"fraction": fraction}),
            )
            run = {"fraction": fraction, "seed": seed, "n_train": len(split.train)}
            for name, scores in baseline_scores(screen, split).items():
                yield {"model": name, **run, **scores}
            for name, model in experiment.models.items():
                scores = remembered(
                    screen, fingerprint, split, model, experiment.n_steps, experiment.scoring, seed
                )
                yield {"model": name, **run, **scores}


def chosen(arguments: argparse.Namespace) -> Experiment:
    """Return the experiment with what the command line changes."""
    experiment = EXPERIMENTS[arguments.experiment]
    steps = arguments.steps
    if arguments.quick:
        steps = steps or _QUICK_STEPS
        experiment = replace(experiment, seeds=experiment.seeds[:1], scoring=_QUICK_SCORING)
        if experiment.fractions is not None:
            ends = (experiment.fractions[0], experiment.fractions[-1])
            experiment = replace(experiment, fractions=ends)
    if steps is not None:
        experiment = replace(experiment, n_steps=steps)
    if arguments.seeds:
        experiment = replace(experiment, seeds=tuple(arguments.seeds))
    if arguments.fractions:
        experiment = replace(experiment, fractions=tuple(arguments.fractions))
    if arguments.models:
        models = {name: experiment.models[name] for name in arguments.models}
        experiment = replace(experiment, models=models)
    return experiment


def read_screen(arguments: argparse.Namespace, delimiter: str | None) -> Screen:
    """Read the cells and note their columns."""
    adata, size_factor_key = load_cells(arguments.data)
    return Screen(
        adata,
        perturbation_key=arguments.perturbation_key,
        control=tuple(arguments.control),
        delimiter=delimiter if arguments.delimiter is None else arguments.delimiter or None,
        layer=arguments.layer,
        batch_key=arguments.batch_key,
        size_factor_key=arguments.size_factor_key or size_factor_key,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; refuse what the experiment does not have."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--data", required=True, help=".h5ad file, or the name of a data set")
    parser.add_argument("--steps", type=int, help="training steps (default: the paper's)")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="as in the experiment's file")
    parser.add_argument("--fractions", type=float, nargs="+", help="Norman experiments only")
    parser.add_argument("--quick", action="store_true", help="only see that everything works")
    parser.add_argument("--out", type=Path, help="CSV with a row per run, written after each")
    parser.add_argument(
        "--results",
        type=Path,
        default=Path(pooch.os_cache("scvi_sams")) / "paper",
        help="folder that keeps finished runs; delete it to run them anew (default: %(default)s)",
    )
    columns = parser.add_argument_group("columns of the data")
    columns.add_argument("--perturbation-key", default="perturbation", help="default: %(default)s")
    columns.add_argument("--control", nargs="+", default=["control"], help="default: control")
    columns.add_argument(
        "--delimiter", help="of combinations; '' for none (default: '+' for Norman, else none)"
    )
    columns.add_argument("--layer", help="with raw counts (default: X)")
    columns.add_argument("--batch-key")
    columns.add_argument("--size-factor-key", help="default: the sum of a cell's counts")
    arguments = parser.parse_args(argv)
    experiment = EXPERIMENTS[arguments.experiment]
    unknown = sorted(set(arguments.models or ()) - set(experiment.models))
    if unknown:
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(experiment.models)}")
    if arguments.fractions and experiment.fractions is None:
        parser.error(f"{arguments.experiment} has no fractions")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for and print the table."""
    arguments = parse(argv)
    experiment = chosen(arguments)
    screen = read_screen(arguments, experiment.delimiter)
    memory = joblib.Memory(arguments.results, verbose=0)
    rows: list[dict] = []
    for row in run(experiment, screen, memory):
        rows.append(row)
        print(
            f"{row['model']}, fraction {row['fraction']}, seed {row['seed']}: "
            f"ATE Pearson {row['ate_pearson_held_out_cells']:.3f}",
            flush=True,
        )
        if arguments.out is not None:
            pd.DataFrame(rows).to_csv(arguments.out, index=False)
    with pd.option_context("display.width", 200):
        print(table(pd.DataFrame(rows), experiment).round(3).to_string(na_rep="-"))


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))
    from _common import print_conditions

    print_conditions(threads=None)
    main()
