"""What a benchmark returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from scvi_sams.benchmark._definitions import define_metrics
from scvi_sams.benchmark._methods import NEGATIVE_CONTROL
from scvi_sams.benchmark._report import write_report
from scvi_sams.benchmark._scoring import FAILURES
from scvi_sams.benchmark._summary import summarise
from scvi_sams.exceptions import SAMSError


@dataclass(frozen=True, eq=False)
class BenchmarkResult:
    """Scores of several methods on one screen.

    Attributes
    ----------
    scores
        Tidy table, one row per method, seed, perturbation and metric: ``method``, ``seed``,
        ``perturbation``, ``covariate`` (if there is one), ``mode``, ``metric``, ``value``,
        ``n_cells`` (observed test cells), ``higher_is_better``, ``chance``, ``status`` and
        ``message``. Perturbation ``"all"`` stands in rows of mode ``"sams"`` that flatten
        perturbations x genes, and of modes ``"model"`` and ``"truth"``, which score a whole fit.
        ``status`` is that of :func:`score_predictions`, or ``"failed"`` where the method
        raised an error, whose text is the message.
    runs
        One row per method and seed: ``method``, ``seed``, ``status``, ``message``, ``seconds`` of
        fitting and predicting, and ``from_folder``, whether an earlier call had finished it.
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
            Method to measure ``position`` from: ``"mean of perturbations"`` or ``"control mean"``.

        Returns
        -------
        One row per method and metric, headline metrics first:

        - ``method``, ``axis`` (``"fit"``, ``"specificity"``, ``"distribution"``, ``"truth"``),
          ``mode``, ``metric``, and ``over``: ``"perturbations"`` if averaged over them, ``"all"``
          if there is one value for all.
        - ``mean``: over seeds, of the mean over perturbations. NaN where a prediction failed and
          the metric has no worst value; ``mean_of_succeeded`` leaves failures out.
        - ``low``, ``high``: 95 % interval, perturbations drawn again by name (2,000 times). NaN
          with ``over == "all"``.
        - ``sd_over_seeds``: spread of the means of seeds; NaN for one seed.
        - ``chance``; ``position``: 0 at the negative, 1 at the positive control (see
          :func:`position`), which is scored on half of the test cells.
        - ``higher_is_better``, ``n_seeds``, ``n_perturbations``, ``n_values``, ``n_failed``.

        Raises
        ------
        SAMSError
            If ``negative`` is no method of the benchmark.
        """
        return summarise(self.scores, negative=negative)

    @property
    def failures(self) -> pd.DataFrame:
        """Predictions that failed: method, seed, perturbation, status, message; one row each."""
        failed = self.scores[self.scores["status"].isin(FAILURES)]
        columns = ["method", "seed", "perturbation", "covariate", "status", "message"]
        columns = [column for column in columns if column in failed]
        # The rows for "all" only repeat what the perturbations say.
        failed = failed[(failed["perturbation"] != "all") | (failed["mode"] == "model")]
        return failed[columns].drop_duplicates().reset_index(drop=True)

    @staticmethod
    def describe_metrics() -> pd.DataFrame:
        """Describe every metric: mode, metric, axis, definition, source, direction, chance."""
        return define_metrics()

    def to_csv(self, path: str | Path) -> None:
        """Write ``scores`` as CSV."""
        self.scores.to_csv(path, index=False)

    def to_parquet(self, path: str | Path) -> None:
        """Write ``scores`` as Parquet.

        Raises
        ------
        SAMSError
            If pyarrow is not installed.
        """
        try:
            self.scores.to_parquet(path, engine="pyarrow", index=False)
        except ImportError as error:
            raise SAMSError(
                "Parquet needs pyarrow, which is not installed: `pip install pyarrow`, or use "
                "to_csv."
            ) from error

    def to_html(self, path: str | Path, *, title: str = "Perturbation benchmark") -> None:
        """Write a report: one HTML file that refers to nothing outside itself.

        It says what was run, and has the summary with controls and chance levels, figures,
        failures, and the definition of every metric.

        Parameters
        ----------
        path
            Of the file.
        title
            Heading of the report.
        """
        write_report(
            path,
            title,
            scores=self.scores,
            runs=self.runs,
            settings=self.settings,
            summary=self.summary(),
            failures=self.failures,
        )
