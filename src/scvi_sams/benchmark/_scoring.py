"""Scores of the predictions of one method on one fold, failures among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd

from scvi_sams.baselines._simple import PerturbationMean
from scvi_sams.benchmark._extras import Extra
from scvi_sams.benchmark._predictions import Predictions
from scvi_sams.benchmark._screen import Fold
from scvi_sams.metrics._scoring import score_predictions

DISTANCES = "distances"
CELL_METRIC = "de_overlap"
FAILURES = ("failed", "missing", "nan")


@dataclass(frozen=True)
class ScoreOptions:
    """Which scores; see :func:`scvi_sams.evaluation.score_predictions`."""

    modes: tuple[str, ...]
    target_genes: Mapping[str, str | Sequence[str]] | None
    n_top_genes: int

    @property
    def keep_cells(self) -> bool:
        """Whether predicted cells are scored as such."""
        return DISTANCES in self.modes


def score_fold(fold: Fold, predictions: Predictions, options: ScoreOptions) -> pd.DataFrame:
    """Score mean profiles, and cells where there are any; name what failed and why."""
    columns = fold.columns
    profile_modes = [mode for mode in options.modes if mode != DISTANCES]
    tables = []
    if profile_modes:
        tables.append((predictions.profiles, profile_modes))
    if predictions.cells is not None:
        cell_modes = [m for m in options.modes if m in (DISTANCES, "cell-eval")]
        tables.append((predictions.cells, cell_modes))
    scores = []
    for predicted, modes in tables:
        table = score_predictions(
            predicted,
            fold.observed,
            modes=modes,
            perturbation_key=columns.perturbation_key,
            control=columns.control,
            covariate_key=columns.covariate_key,
            delimiter=columns.delimiter,
            target_genes=options.target_genes,
            perturbed_centroid=_centroid(fold),
            n_top_genes=options.n_top_genes,
        )
        if predicted is predictions.cells:
            # Every method is compared by its profiles; cells add what needs cells.
            table = table[(table["mode"] == DISTANCES) | (table["metric"] == CELL_METRIC)]
        scores.append(table)
    if not scores:
        return pd.DataFrame()
    return _explained(pd.concat(scores, ignore_index=True), fold, predictions.messages)


def extra_rows(extras: Sequence[Extra]) -> pd.DataFrame:
    """Rows of the scores of a whole fit."""
    columns = [field.name for field in fields(Extra)]
    return pd.DataFrame([vars(extra) for extra in extras], columns=columns).assign(
        perturbation="all", higher_is_better=True, chance=np.nan
    )


def _centroid(fold: Fold) -> np.ndarray | None:
    """Mean over training perturbations of their means, the reference of Systema.

    By the baseline that predicts it, so that this baseline differs from it by nothing, not even by
    rounding, of which a correlation would make an effect.
    """
    if fold.columns.covariate_key is not None:
        return None
    baseline = PerturbationMean(
        perturbation_key=fold.columns.perturbation_key,
        control=fold.columns.control,
        delimiter=fold.columns.delimiter,
    )
    return np.asarray(baseline.fit(fold.train).predict(["any perturbation"]).X)[0]


def _explained(
    scores: pd.DataFrame, fold: Fold, messages: Mapping[tuple[str | None, str], str]
) -> pd.DataFrame:
    if fold.columns.covariate_key is None:
        keys = [(None, label) for label in scores["perturbation"]]
    else:
        keys = list(zip(scores["covariate"], scores["perturbation"], strict=True))
    message = pd.Series([messages.get(key, "") for key in keys], index=scores.index, dtype=object)
    failed = scores["status"].eq("missing") & message.ne("")
    scores["status"] = scores["status"].mask(failed, "failed")
    of_all = scores["perturbation"].eq("all") & scores["status"].isin(FAILURES)
    n_failed = len(messages)
    message[of_all] = (
        f"{n_failed} of {len(fold.perturbations)} predictions failed and count as no effect"
        if n_failed
        else "a prediction that is not finite counts as no effect"
    )
    not_finite = scores["status"].eq("nan") & message.eq("")
    message[not_finite] = "the prediction holds values that are not finite"
    return scores.assign(message=message)
