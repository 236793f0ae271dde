"""Means over perturbations and seeds, with intervals, between the controls."""

from __future__ import annotations

import numpy as np
import pandas as pd

from scvi_sams.benchmark._definitions import FAILURES, HEADLINES, axis_of
from scvi_sams.benchmark._methods import NEGATIVE_CONTROL, POSITIVE_CONTROL
from scvi_sams.exceptions import SAMSError
from scvi_sams.metrics._scoring import position

_N_BOOTSTRAP = 2000
_INTERVAL = (0.025, 0.975)
_KEYS = ["mode", "metric", "over"]


def summarise(scores: pd.DataFrame, *, negative: str = NEGATIVE_CONTROL) -> pd.DataFrame:
    """Summarise the tidy table; see :meth:`BenchmarkResult.summary`."""
    methods = list(dict.fromkeys(scores["method"]))
    if negative not in methods:
        raise SAMSError(
            f"There is no method {negative!r} to be the negative control; methods are "
            f"{', '.join(map(repr, methods))}."
        )
    over = np.where(scores["perturbation"] == "all", "all", "perturbations")
    rows = []
    grouped = scores.assign(over=over).groupby(["method", *_KEYS], sort=False)
    for key, group in grouped:
        method, mode, metric, what = key
        rows.append(
            {
                "method": method,
                "axis": axis_of(str(mode), str(metric)),
                "mode": mode,
                "metric": metric,
                "over": what,
                **_statistics(group),
            }
        )
    table = pd.DataFrame(rows)
    for name, method in (("negative", negative), ("positive", POSITIVE_CONTROL)):
        means = table[table["method"] == method].set_index(_KEYS)["mean"]
        table[name] = means.reindex(pd.MultiIndex.from_frame(table[_KEYS])).to_numpy()
    table["position"] = position(table["mean"], table["negative"], table["positive"])
    return _ordered(table, methods).drop(columns=["negative", "positive"])


def _statistics(group: pd.DataFrame) -> dict[str, float | int | bool]:
    """Statistics of one metric of one method.

    A value that is not defined for a perturbation says nothing about the method and is left out; a
    failure is not: where it has no worst value, there is no mean.
    """
    defined = group[group["status"] != "undefined"]
    names = defined["perturbation"]
    if "covariate" in defined:
        names = names + "\n" + defined["covariate"]
    values = pd.DataFrame(
        {"seed": defined["seed"], "name": names, "value": defined["value"]}
    ).pivot(index="seed", columns="name", values="value")
    failed = defined["status"].isin(FAILURES)
    is_mean_known = len(values) > 0 and not (failed & defined["value"].isna()).any()
    of_seeds = values.mean(axis=1)
    low, high = _bootstrap(values.to_numpy(np.float64)) if is_mean_known else (np.nan, np.nan)
    return {
        "mean": of_seeds.mean() if is_mean_known else np.nan,
        "low": low,
        "high": high,
        "sd_over_seeds": of_seeds.std() if is_mean_known else np.nan,
        "mean_of_succeeded": of_seeds.mean(),
        "chance": group["chance"].mean(),
        "higher_is_better": bool(group["higher_is_better"].iloc[0]),
        "n_seeds": values.shape[0],
        "n_perturbations": values.shape[1],
        "n_values": len(defined),
        "n_failed": int(failed.sum()),
    }


def _bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Interval of the mean over seeds of the mean over perturbations (seeds x perturbations).

    Perturbations are drawn again by name, with all their seeds: one that is tested in several seeds
    is not evidence several times over.
    """
    n_names = values.shape[1]
    if n_names < 2:
        return np.nan, np.nan
    rng = np.random.default_rng(0)
    draws = rng.multinomial(n_names, np.full(n_names, 1 / n_names), size=_N_BOOTSTRAP).T
    known = np.isfinite(values)
    sums = np.where(known, values, 0) @ draws
    counts = known.astype(np.float64) @ draws
    of_seeds = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    n_seeds = np.isfinite(of_seeds).sum(axis=0)
    totals = np.nansum(of_seeds, axis=0)
    means = totals[n_seeds > 0] / n_seeds[n_seeds > 0]
    low, high = np.quantile(means, _INTERVAL)
    return float(low), float(high)


def _ordered(table: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    """Headline metrics first, then in the order of the scores; methods as they were given."""
    headline = {key: place for place, key in enumerate(HEADLINES)}
    keys = [tuple(key) for key in table[_KEYS].to_numpy()]
    first_seen = {key: place for place, key in reversed(list(enumerate(keys)))}
    order = pd.DataFrame(
        {
            "headline": [headline.get(key, len(headline)) for key in keys],
            "seen": [first_seen[key] for key in keys],
            "method": table["method"].map(methods.index),
        }
    )
    chosen = order.sort_values(["headline", "seen", "method"]).index
    return table.loc[chosen].reset_index(drop=True)
