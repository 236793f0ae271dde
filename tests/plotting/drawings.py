"""One figure of every public plotting function, on data without any randomness.

``PYTHONPATH=tests python tests/plotting/drawings.py`` draws the baseline images anew. Look at each
before you keep it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from unittest import mock

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scvi_sams import plotting
from scvi_sams.evaluation import BenchmarkResult, Calibration
from scvi_sams.interpretation import perturbation_similarity
from scvi_sams.model._direct_effects import DirectEffectTables
from scvi_sams.plotting import _latent

BASELINE = Path(__file__).parent / "baseline"
MATPLOTLIB = "3.11"
"""Version that drew the baseline. Others set letters elsewhere, which moves the whole layout."""
SIZE, DPI = (5.2, 4.4), 60
PERTURBATIONS = [f"P{number}" for number in range(8)]
GENES = [f"gene{number}" for number in range(30)]


def waves(n_rows: int, n_columns: int) -> np.ndarray:
    """Numbers between -1 and 1 that follow no simple order, and are the same everywhere."""
    return np.sin(1 + 2.3 * np.arange(n_rows)[:, None] + 1.7 * np.arange(n_columns) ** 1.5)


def masks_table() -> pd.DataFrame:
    return pd.DataFrame(np.clip(waves(8, 5), 0, 1), index=PERTURBATIONS)


def ate_table(scale: float = 1.0) -> ad.AnnData:
    effect = scale * 2 * waves(8, 30) ** 3
    return ad.AnnData(
        effect,
        obs=pd.DataFrame(index=PERTURBATIONS),
        var=pd.DataFrame(index=GENES),
        layers={"standard_error": np.full(effect.shape, 0.25)},
        uns={"ate": {"method": "lognorm", "target_sum": 1e4}},
    )


def masks(ax: Axes) -> None:
    effects = pd.DataFrame(3 * waves(8, 5), index=PERTURBATIONS)
    plotting.masks(masks_table(), effects=effects, threshold=0.5, ax=ax)


def direct_effects(ax: Axes) -> None:
    # An own gene of each perturbation goes down, and little else changes.
    mean = pd.DataFrame(0.4 * waves(8, 30) ** 5, index=PERTURBATIONS, columns=GENES)
    for row in range(8):
        mean.iloc[row, 3 * (row * 5 % 8) + 1] = -2 + 0.1 * row
    tables = DirectEffectTables(mean, mean * 0 + 0.1, (1 - mean.abs() * 2).clip(lower=0))
    plotting.direct_effects(tables, max_lfsr=0.25, ax=ax)


def importance_table() -> pd.DataFrame:
    """Six features in five dimensions, long."""
    features = [f"feature{number}" for number in range(6)]
    weight = (2 * waves(6, 5) ** 3).ravel()
    return pd.DataFrame(
        {
            "feature": np.repeat(features, 5),
            "latent": [f"latent_{number}" for number in range(5)] * 6,
            "part": "effect",
            "weight": weight,
            "sd": 0.2,
            "lfsr": 0.5 * np.exp(-np.abs(weight) * 8),
        }
    )


def feature_importance(ax: Axes) -> None:
    plotting.feature_importance(importance_table(), ax=ax)


def pairs_in_contexts() -> pd.DataFrame:
    """Eight perturbations in four contexts, of every pattern; one pair was not measured."""
    patterns = ["shared", "only in: K562", "shared", "differs in: T", "none", "unclear"]
    patterns += ["only in: K562", "shared"]
    acts = np.zeros((8, 4), dtype=bool)
    acts[[0, 2, 7]], acts[[1, 5, 6], 0], acts[3, :3] = True, True, True
    differs = np.zeros((8, 4), dtype=bool)
    differs[[1, 6], 0] = differs[3, [2, 3]] = True
    measured = np.ones((8, 4), dtype=bool)
    measured[2, 1] = acts[2, 1] = False
    return pd.DataFrame(
        {
            "perturbation": np.repeat(PERTURBATIONS, 4),
            "context": ["K562", "RPE1", "T", "monocyte"] * 8,
            "is_measured": measured.ravel(),
            "acts": acts.ravel(),
            "differs": differs.ravel(),
            "effect": np.abs(3 * waves(8, 4)).ravel(),
            "pattern": np.repeat(patterns, 4),
        }
    )


def context_effects(ax: Axes) -> None:
    plotting.context_effects(pairs_in_contexts(), ax=ax)


def guide_efficacy(ax: Axes) -> None:
    rate = 0.5 + 0.45 * waves(4, 3)
    rate[1, 0], rate[3] = 0.05, np.nan
    table = pd.DataFrame(
        {
            "perturbation": np.repeat(PERTURBATIONS[:4], 3),
            "acts": np.repeat([True, True, True, False], 3),
            "response_rate": rate.ravel(),
            "does_nothing": np.arange(12) == 3,
            "differs_from_siblings": np.arange(12) == 7,
        },
        index=[f"{name}g{guide}" for name in PERTURBATIONS[:4] for guide in (1, 2, 3)],
    )
    for value in ("rate", "effect"):
        table[f"{value}_low"] = table["response_rate"] - 0.04
        table[f"{value}_high"] = table["response_rate"] + 0.06
    table["effect_size"] = table["response_rate"]
    plotting.guide_efficacy(table, perturbations=PERTURBATIONS[:4], ax=ax)


def masks_of_many(ax: Axes) -> None:
    blocks = np.arange(700)[:, None] // 50 == np.arange(40) % 14
    table = pd.DataFrame(blocks * 0.9, index=[f"P{i}" for i in range(700)])
    plotting.masks(table, ax=ax, order=False)


def ate_scatter(ax: Axes) -> None:
    predicted = ate_table(0.8)
    predicted.X = predicted.X + 0.3 * waves(8, 30)[::-1]
    plotting.ate_scatter(predicted, ate_table(), label_top=3, ax=ax)


def effect_volcano(ax: Axes) -> None:
    plotting.effect_volcano(ate_table(), "P3", label_top=4, ax=ax)


def dose_response(ax: Axes) -> None:
    doses = np.linspace(0, 2, 9)
    effect = doses[:, None] * np.array([1.0, -0.5, 0.2])
    curves = ad.AnnData(
        effect,
        obs=pd.DataFrame(
            {"perturbation": "A", "dosage": doses, "is_measured_range": doses <= 1},
            index=[f"A_{dose:g}" for dose in doses],
        ),
        var=pd.DataFrame(index=GENES[:3]),
        layers={"interval_low": effect - 0.2, "interval_high": effect + 0.3},
        uns={"ate": {"method": "lognorm", "target_sum": 1e4}},
    )
    plotting.dose_response(curves, "A", ax=ax)


def program_genes(ax: Axes) -> None:
    programs = pd.DataFrame(waves(30, 2), index=GENES, columns=["latent_0", "latent_1"])
    plotting.program_genes(programs, "latent_1", n_genes=10, ax=ax)


def similarity(ax: Axes) -> None:
    plotting.similarity(
        perturbation_similarity(pd.DataFrame(waves(8, 12), index=PERTURBATIONS)), ax=ax
    )


def interaction_matrix(ax: Axes) -> None:
    pairs = [f"{a}+{b}" for a, b in combinations(PERTURBATIONS, 2)]
    scores = waves(len(pairs), 2)
    table = pd.DataFrame({"observed": scores[:, 0], "model": scores[:, 1] / 2}, index=pairs)
    # The last pair was not measured.
    plotting.interaction_matrix(table[:-1], "observed", lower="model", ax=ax)


def mask_calibration(ax: Axes) -> None:
    bounds = np.linspace(0, 1, 6)
    bins = pd.DataFrame(
        {
            "lower": bounds[:-1],
            "upper": bounds[1:],
            "predicted": [0.05, 0.3, 0.5, 0.7, 0.95],
            "observed": [0.02, 0.2, 0.45, 0.75, 0.9],
            "n_entries": [900, 40, 20, 30, 300],
        }
    )
    plotting.mask_calibration(Calibration(bins, 0.04, pd.DataFrame()), ax=ax)


def latent(ax: Axes) -> None:
    cells = ad.AnnData(
        obs=pd.DataFrame(
            {"perturbation": [f"P{i % 12}" for i in range(120)]},
            index=[f"c{i}" for i in range(120)],
        ),
        obsm={"X_sams": waves(120, 2)},
    )
    # The UMAP of scanpy is not what is tested, and differs a little between machines.
    with mock.patch.object(_latent, "_umap", lambda representation: representation):
        plotting.latent(cells, basis=["X_sams"], axes=[ax])


def training_curves(ax: Axes) -> None:
    epochs = pd.RangeIndex(20, name="epoch")
    curves = {
        "elbo_train": 700 + 80 * np.exp(-np.arange(20) / 3),
        "elbo_validation": 705 + 85 * np.exp(-np.arange(20) / 3),
        "dense_phase": (np.arange(20) < 10).astype(float),
    }
    history = {key: pd.DataFrame({key: value}, index=epochs) for key, value in curves.items()}
    plotting.training_curves(history, terms=["elbo"], axes=[ax])


def scores() -> pd.DataFrame:
    methods = ["control mean", "mean of perturbations", "A", "failing", "half of the test cells"]
    level = dict(zip(methods, (3.0, 2.0, 1.4, 2.5, 1.0), strict=True))
    rank = dict(zip(methods, (0.5, 0.5, 0.1, 0.4, 0.05), strict=True))
    rows = []
    for method in methods:
        for place, name in enumerate(PERTURBATIONS):
            failed = method == "failing" and place == 0
            offset = 0.9 * waves(8, 5)[place, methods.index(method)]
            both = {"rmse_average": level[method] + offset, "rank_rmse_average": rank[method]}
            for metric, value in both.items():
                rows.append(
                    {
                        "method": method,
                        "seed": 0,
                        "perturbation": name,
                        "mode": "perturbench",
                        "metric": metric,
                        "value": np.nan if failed else value,
                        "n_cells": 9,
                        "higher_is_better": False,
                        "chance": 0.5 if metric == "rank_rmse_average" else np.nan,
                        "status": "failed" if failed else "ok",
                        "message": "",
                    }
                )
    return pd.DataFrame(rows)


def summary() -> pd.DataFrame:
    return BenchmarkResult(scores(), pd.DataFrame(), {}).summary()


def benchmark_metric(ax: Axes) -> None:
    plotting.benchmark_metric(summary(), "rank_rmse_average", ax=ax)


def benchmark_specificity(ax: Axes) -> None:
    plotting.benchmark_specificity(summary(), ax=ax)


def benchmark_perturbations(ax: Axes) -> None:
    plotting.benchmark_perturbations(scores(), "A", label_worst=2, ax=ax)


def learning_curve(ax: Axes) -> None:
    level = {"control mean": 0.0, "A": 0.9, "B": 0.7, "half of the test cells": 0.95}
    rows = [
        {
            "method": method,
            "cells_per_perturbation": asked,
            "n_cells": cells,
            "seed": seed,
            "pearson": best - (method in "AB") * (0.5 + 0.1 * seed) / np.sqrt(cells / 10),
        }
        for asked, cells in ((10, 10.0), (50, 50.0), (None, 181.0))
        for method, best in level.items()
        for seed in range(3)
    ]
    table = pd.DataFrame(rows).astype({"cells_per_perturbation": "Int64"})
    plotting.learning_curve(table, ax=ax)


DRAWINGS: dict[str, Callable[[Axes], None]] = {
    function.__name__: function
    for function in (
        ate_scatter,
        benchmark_metric,
        benchmark_perturbations,
        benchmark_specificity,
        context_effects,
        direct_effects,
        dose_response,
        effect_volcano,
        feature_importance,
        guide_efficacy,
        interaction_matrix,
        latent,
        learning_curve,
        mask_calibration,
        masks,
        masks_of_many,
        program_genes,
        similarity,
        training_curves,
    )
}


def draw(name: str, path: Path) -> None:
    """Draw a figure into a file, whatever the settings of the user."""
    with mpl.rc_context(), mpl.style.context("default"):
        figure = Figure(figsize=SIZE, layout="constrained")
        DRAWINGS[name](figure.subplots())
        # Without the version of matplotlib, which would change the file.
        figure.savefig(path, dpi=DPI, metadata={"Software": None})


if __name__ == "__main__":
    BASELINE.mkdir(exist_ok=True)
    for drawing in DRAWINGS:
        draw(drawing, BASELINE / f"{drawing}.png")
