"""Names with dollar signs are names, and no formulas."""

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from scvi_sams import plotting
from scvi_sams.evaluation import BenchmarkResult, mask_calibration
from scvi_sams.interpretation import perturbation_similarity
from scvi_sams.model._direct_effects import DirectEffectTables

NAME = "a$_$b"
NAMES = [NAME, "A", "B", "c$^$d"]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def table() -> pd.DataFrame:
    return pd.DataFrame(np.random.default_rng(0).random((4, 4)), index=NAMES, columns=NAMES)


def effects() -> ad.AnnData:
    adata = ad.AnnData(
        np.diag([5.0, 9.0, -9.0, -5.0]),
        obs=pd.DataFrame({"perturbation": NAME, "dosage": np.arange(4.0)}, index=NAMES),
        var=pd.DataFrame(index=NAMES),
        uns={"ate": {"method": "lognorm", "target_sum": 1e4, "units": "log2 $_$"}},
    )
    adata.obs["is_measured_range"] = True
    adata.layers["standard_error"] = np.full((4, 4), 0.01)
    adata.layers["interval_low"], adata.layers["interval_high"] = adata.X - 1, adata.X + 1
    return adata


def direct_effects() -> DirectEffectTables:
    return DirectEffectTables(table() + 1, table(), table() * 0)


def cells() -> ad.AnnData:
    return ad.AnnData(
        obs=pd.DataFrame({NAME: NAMES * 10}, index=map(str, range(40))),
        obsm={NAME: np.random.default_rng(0).normal(size=(40, 3))},
    )


def scores() -> pd.DataFrame:
    columns = ["method", "perturbation", "metric", "value", "higher_is_better", "chance"]
    rows = [
        (method, name, metric, np.random.default_rng(0).random(), False, 0.5)
        for method in (NAME, "mean of perturbations")
        for metric in ("rmse_average", "rank_rmse_average")
        for name in NAMES
    ]
    others = {"seed": 0, "mode": "perturbench", "n_cells": 9, "status": "ok", "message": ""}
    return pd.DataFrame(rows, columns=columns).assign(**others)


def summary() -> pd.DataFrame:
    return BenchmarkResult(scores(), pd.DataFrame(), {}).summary()


def curve() -> pd.DataFrame:
    others = {"cells_per_perturbation": [10, 20], "n_cells": [10.0, 20.0], "pearson": [0.5, 0.7]}
    return pd.DataFrame({"method": NAME, **others, "seed": 0})


def pairs() -> pd.DataFrame:
    names = [f"{NAME}+A", f"{NAME}+B", "A+B"]
    return pd.DataFrame({"score": [1.0, -1.0, 0.5]}, index=names)


def guides() -> pd.DataFrame:
    bounds = dict.fromkeys(["rate_low", "rate_high", "effect_low", "effect_high"], 0.5)
    flags = {"acts": True, "does_nothing": False, "differs_from_siblings": False}
    values = {"perturbation": NAME, "response_rate": 0.5, "effect_size": 0.5}
    return pd.DataFrame(values | bounds | flags, index=[f"{NAME}1", f"{NAME}2"])


def contexts() -> pd.DataFrame:
    flags = {"is_measured": True, "acts": True, "differs": True, "effect": 1.0}
    names = {"perturbation": "A", "context": [NAME, "T"], "pattern": f"only in: {NAME}"}
    return pd.DataFrame(names | flags)


def importance() -> pd.DataFrame:
    names = {"feature": [NAME, "T"], "latent": "latent_0", "part": "effect"}
    return pd.DataFrame(names | {"weight": [1.0, -2.0], "lfsr": 0.0})


DRAWINGS = {
    "masks": lambda: plotting.masks(table()),
    "direct_effects": lambda: plotting.direct_effects(direct_effects()),
    "feature_importance": lambda: plotting.feature_importance(importance()),
    "ate_scatter": lambda: plotting.ate_scatter(effects(), effects(), label_top=4),
    "effect_volcano": lambda: plotting.effect_volcano(effects(), NAME),
    "dose_response": lambda: plotting.dose_response(effects(), NAME),
    "program_genes": lambda: plotting.program_genes(table(), "A"),
    "similarity": lambda: plotting.similarity(perturbation_similarity(table() - 0.5)),
    "context_effects": lambda: plotting.context_effects(contexts()),
    "guide_efficacy": lambda: plotting.guide_efficacy(guides()),
    "interaction_matrix": lambda: plotting.interaction_matrix(pairs()),
    "benchmark_metric": lambda: plotting.benchmark_metric(summary(), "rmse_average"),
    "benchmark_specificity": lambda: plotting.benchmark_specificity(summary()),
    "benchmark_perturbations": lambda: plotting.benchmark_perturbations(scores(), NAME),
    "learning_curve": lambda: plotting.learning_curve(curve()),
    "mask_calibration": lambda: plotting.mask_calibration(
        {NAME: mask_calibration(table(), table() > 0.5)}
    ),
    "latent": lambda: plotting.latent(cells(), color=NAME, basis=[NAME])[0],
}


def test_every_drawing_with_names_is_covered():
    assert set(DRAWINGS) == set(plotting.__all__) - {"training_curves"}


@pytest.mark.parametrize("name", DRAWINGS)
def test_dollar_signs_are_drawn_as_they_are(name):
    ax = DRAWINGS[name]()
    ax.figure.canvas.draw()  # where a formula would be read
    texts = [text.get_text() for text in ax.figure.findobj(Text)]
    assert any(NAME.replace("$", r"\$") in text for text in texts)
    assert not any(NAME in text for text in texts)
