"""Results of all runs as one table, the paper's numbers beside ours."""

from __future__ import annotations

import pandas as pd
from experiment import Experiment, Published

_KEYS = ["model", "fraction"]
_OURS = {
    "iwelbo": ("IWELBO, test", "ours"),
    "iwelbo_difference": ("IWELBO - reference", "ours"),
    "ate_pearson_all_cells": ("ATE Pearson", "all cells"),
    "ate_pearson_held_out_cells": ("ATE Pearson", "held-out"),
}


def table(results: pd.DataFrame, experiment: Experiment) -> pd.DataFrame:
    """Average over seeds.

    Parameters
    ----------
    results
        One row per run: ``model``, ``fraction``, ``seed``, ``iwelbo`` and effects' scores.
    experiment
        What was run.

    Returns
    -------
    One row per model and fraction, in the order of ``results``; ``sd`` over seeds is NaN for one.
    """
    results = _with_named_fractions(
        results.assign(iwelbo_difference=_difference(results, experiment.reference))
    )
    by_run = results.groupby(_KEYS, sort=False)
    mean, deviation = by_run.mean(numeric_only=True), by_run.std(numeric_only=True)
    columns = {("seeds", ""): by_run.size()}
    for key, name in _OURS.items():
        if mean[key].notna().any():
            columns[name] = mean[key]
            columns[name[0], "sd" if name[1] == "ours" else f"{name[1]} sd"] = deviation[key]
    published = pd.DataFrame(experiment.published, columns=list(Published.__annotations__))
    paper = _with_named_fractions(published).set_index(_KEYS).reindex(mean.index).astype(float)
    of_iwelbo = "IWELBO, test" if experiment.reference is None else "IWELBO - reference"
    columns[of_iwelbo, "paper"] = paper["iwelbo"]
    columns["ATE Pearson", "paper"] = paper["ate_pearson"]
    together = pd.DataFrame(columns)
    order = list(dict.fromkeys(name for name, _ in columns))
    return together[order].dropna(axis="columns", how="all")


def _with_named_fractions(rows: pd.DataFrame) -> pd.DataFrame:
    """Say "all" where an experiment has no fractions: missing values find no partner."""
    fraction = rows["fraction"].astype(object)
    return rows.assign(fraction=fraction.where(fraction.notna(), "all"))


def _difference(results: pd.DataFrame, reference: tuple[str, float] | None) -> pd.Series:
    """IWELBO minus that of the reference with the same seed; NaN where that was not run."""
    if reference is None:
        return pd.Series(float("nan"), index=results.index)
    model, fraction = reference
    is_reference = (results["model"] == model) & (results["fraction"] == fraction)
    by_seed = results[is_reference].set_index("seed")["iwelbo"]
    return results["iwelbo"] - results["seed"].map(by_seed)
