"""Result of a benchmark: scores, and their means over perturbations and seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scvi_sams._files import write_whole
from scvi_sams.benchmark._definitions import FAILURES, HEADLINES, axes_of, define_metrics
from scvi_sams.benchmark._methods import NEGATIVE_CONTROL, POSITIVE_CONTROL
from scvi_sams.benchmark._report import write_report
from scvi_sams.exceptions import SAMSError
from scvi_sams.metrics._scoring import position

_N_BOOTSTRAP = 2000
_INTERVAL = (0.025, 0.975)
_KEYS = ["mode", "metric", "over"]


def _statistics(group: pd.DataFrame) -> dict[str, float | int | bool]:
    """Statistics of one metric of one method.

    Values that are undefined for a perturbation are ignored; failures are not: if they have no
    worst value, there is no mean.
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

    Perturbations are resampled by name, with all their seeds: a perturbation that is tested in
    several seeds is not independent evidence.
    """
    n_names = values.shape[1]
    if n_names < 2:
        return np.nan, np.nan
    rng = np.random.default_rng(0)
    resampled = rng.multinomial(n_names, np.full(n_names, 1 / n_names), size=_N_BOOTSTRAP).T
    known = np.isfinite(values)
    sums = np.where(known, values, 0) @ resampled
    counts = known.astype(np.float64) @ resampled
    of_seeds = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    means = np.nanmean(of_seeds[:, np.isfinite(of_seeds).any(axis=0)], axis=0)
    low, high = np.quantile(means, _INTERVAL)
    return float(low), float(high)


def _ordered(table: pd.DataFrame, methods: list[str]) -> pd.DataFrame:
    """Headline metrics first, then in the order of the scores; methods in the given order."""
    keys = [tuple(key) for key in table[_KEYS].to_numpy()]
    places = {key: place for place, key in enumerate(dict.fromkeys([*HEADLINES, *keys]))}
    order = pd.DataFrame(
        {"metric": [places[key] for key in keys], "method": table["method"].map(methods.index)}
    )
    return table.loc[order.sort_values(["metric", "method"]).index].reset_index(drop=True)


@dataclass(frozen=True, eq=False)
class BenchmarkResult:
    """Scores of several methods on one screen.

    Attributes
    ----------
    scores
        Tidy table, one row per method, seed, perturbation and metric: ``method``, ``seed``,
        ``perturbation``, ``covariate`` (if there is one), ``mode``, ``metric``, ``value``,
        ``n_cells`` (observed test cells), ``higher_is_better``, ``chance``, ``status`` and
        ``message``. Perturbation ``"all"`` is in rows of mode ``"sams"`` that flatten
        perturbations x genes, and of modes ``"model"`` and ``"truth"``, which score a whole fit.
        ``status`` is that of :func:`score_predictions`, or ``"failed"`` if the method raised an
        error, whose text is the message.
    runs
        One row per method and seed: ``method``, ``seed``, ``status``, ``message``, ``seconds`` of
        fitting and predicting, and ``from_folder``, whether it was finished in an earlier call.
    settings
        ``versions``, ``data`` (size, fingerprint), ``splits`` (one per seed), ``seeds``, ``modes``,
        ``target_sum`` and ``methods`` (their settings as text).
    """

    scores: pd.DataFrame
    runs: pd.DataFrame
    settings: dict[str, Any]

    def summary(self, *, negative: str = NEGATIVE_CONTROL) -> pd.DataFrame:
        """Average over perturbations and seeds.

        Parameters
        ----------
        negative
            Method at which ``position`` is 0: ``"mean of perturbations"`` or ``"control mean"``.

        Returns
        -------
        One row per method and metric, headline metrics first:

        - ``method``, ``axis`` (``"fit"``, ``"specificity"``, ``"distribution"``, ``"truth"``),
          ``mode``, ``metric``, and ``over``: ``"perturbations"`` if averaged over them, ``"all"``
          if there is one value for all.
        - ``mean``: over seeds, of the mean over perturbations. NaN if a prediction failed and the
          metric has no worst value; ``mean_of_succeeded`` ignores failures.
        - ``low``, ``high``: 95 % bootstrap interval over perturbations (2,000 samples). NaN with
          ``over == "all"``.
        - ``sd_over_seeds``: SD of the means of seeds; NaN for one seed.
        - ``chance``; ``position``: 0 at the negative, 1 at the positive control (see
          :func:`position`), which is scored on half of the test cells.
        - ``higher_is_better``, ``n_seeds``, ``n_perturbations``, ``n_values``, ``n_failed``.

        Raises
        ------
        SAMSError
            If ``negative`` is not a method of the benchmark.
        """
        scores = self.scores
        methods = list(dict.fromkeys(scores["method"]))
        if negative not in methods:
            raise SAMSError(
                f"There is no method {negative!r} to use as negative control; methods are "
                f"{', '.join(map(repr, methods))}."
            )
        over = np.where(scores["perturbation"] == "all", "all", "perturbations")
        keys = ["method", *_KEYS]
        grouped = scores.assign(over=over).groupby(keys, sort=False)
        table = pd.DataFrame(
            [dict(zip(keys, key, strict=True)) | _statistics(group) for key, group in grouped]
        )
        table.insert(1, "axis", axes_of(table))
        for name, method in (("negative", negative), ("positive", POSITIVE_CONTROL)):
            means = table[table["method"] == method].set_index(_KEYS)["mean"]
            table[name] = means.reindex(pd.MultiIndex.from_frame(table[_KEYS])).to_numpy()
        table["position"] = position(table["mean"], table["negative"], table["positive"])
        return _ordered(table, methods).drop(columns=["negative", "positive"])

    @property
    def failures(self) -> pd.DataFrame:
        """Predictions that failed: method, seed, perturbation, status, message; one row each."""
        failed = self.scores[self.scores["status"].isin(FAILURES)]
        columns = ["method", "seed", "perturbation", "covariate", "status", "message"]
        columns = [column for column in columns if column in failed]
        # The rows for "all" only repeat those of perturbations.
        failed = failed[(failed["perturbation"] != "all") | (failed["mode"] == "model")]
        return failed[columns].drop_duplicates().reset_index(drop=True)

    @staticmethod
    def describe_metrics() -> pd.DataFrame:
        """Describe every metric: mode, metric, axis, definition, source, direction, chance."""
        return define_metrics()

    def to_csv(self, path: str | Path) -> None:
        """Write ``scores`` as CSV; a SavingError, and no file, if that fails."""
        write_whole(path, lambda partial: self.scores.to_csv(partial, index=False))

    def to_parquet(self, path: str | Path) -> None:
        """Write ``scores`` as Parquet; a SAMSError if pyarrow is not installed."""
        try:
            write_whole(
                path,
                lambda partial: self.scores.to_parquet(partial, engine="pyarrow", index=False),
            )
        except ImportError as error:
            raise SAMSError(
                "Parquet requires pyarrow, which is not installed: `pip install pyarrow`, or use "
                "to_csv."
            ) from error

    def to_html(self, path: str | Path, *, title: str = "Perturbation benchmark") -> None:
        """Write a report: one self-contained HTML file.

        It contains the settings, the summary with controls and chance levels, figures,
        failures, and the definition of every metric.

        Parameters
        ----------
        path
            Path of the file.
        title
            Heading of the report.
        """
        write_report(path, title, summary=self.summary(), failures=self.failures, **vars(self))
