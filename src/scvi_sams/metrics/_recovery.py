"""Recovery of simulated truth: masks, latent dimensions, and calibration of probabilities."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata

from scvi_sams._checks import check_choice, check_integer, check_matrix, check_number
from scvi_sams._fdr import active_at_fdr, check_probabilities
from scvi_sams.exceptions import SAMSError, UnknownPerturbationError
from scvi_sams.metrics._profiles import centred, ratio

Table: TypeAlias = pd.DataFrame | np.ndarray
"""Perturbations x latent, or observations x latent; rows have names in a DataFrame."""

_NOMINAL_RATES = (0.01, 0.05, 0.1, 0.2)


def mask_recovery(masks: Table, true_masks: Table, *, threshold: float = 0.5) -> pd.Series:
    """Compare estimated masks with the true masks of simulated data.

    Latent dimensions have no order, so they are first matched one to one
    (:func:`match_latents`). Active entries of unmatched estimated dimensions are false positives;
    those of unmatched true dimensions are false negatives.

    Parameters
    ----------
    masks
        Perturbations x latent: posterior inclusion probabilities (or binary masks).
    true_masks
        Perturbations x true latent: 0 and 1. The numbers of dimensions may differ. Rows are
        aligned by name if both are DataFrames, otherwise by position.
    threshold
        An estimated entry is active if it is greater than this; a true entry if it is not 0.

    Returns
    -------
    ``precision``, ``recall`` and ``f1`` of the active entries (0 if nothing is active), and
    ``density`` and ``true_density``, the proportion of active entries of ``masks`` and
    ``true_masks``.

    Raises
    ------
    UnknownPerturbationError
        If a perturbation is in one DataFrame only.
    SAMSError
        If the numbers of perturbations differ.

    Examples
    --------
    The same masks with latent dimensions in another order:

    >>> true_masks = np.array([[1, 0, 0], [0, 1, 1]])
    >>> recovery = scvi_sams.evaluation.mask_recovery(true_masks[:, [2, 0, 1]], true_masks)
    >>> recovery[["precision", "recall", "f1"]].tolist()
    [1.0, 1.0, 1.0]
    """
    check_matrix(masks=masks, true_masks=true_masks)
    check_number(threshold=threshold)
    estimated, true = _aligned_rows(masks, true_masks)
    estimate, truth = estimated > threshold, true != 0
    rows, columns = match_latents(estimate, truth)
    true_positives = np.sum(estimate[:, rows] & truth[:, columns])
    return pd.Series(
        {
            "precision": ratio(true_positives, estimate.sum()),
            "recall": ratio(true_positives, truth.sum()),
            "f1": ratio(2 * true_positives, estimate.sum() + truth.sum()),
            "density": estimate.mean(),
            "true_density": truth.mean(),
        }
    )


def match_latents(masks: Table, true_masks: Table) -> tuple[np.ndarray, np.ndarray]:
    """Match estimated with true latent dimensions one to one.

    The matching has the largest number of true positives (expected number, if ``masks`` are
    probabilities), by the Hungarian algorithm.

    Parameters
    ----------
    masks, true_masks
        As for :func:`mask_recovery`.

    Returns
    -------
    Positions in the columns of ``masks``, ascending, and of their matches in the columns of
    ``true_masks``; as many as the smaller number of dimensions.

    Raises
    ------
    UnknownPerturbationError, SAMSError
        As for :func:`mask_recovery`.

    Examples
    --------
    >>> true_masks = np.array([[1, 0], [0, 1]])
    >>> estimated, true = scvi_sams.evaluation.match_latents(true_masks[:, ::-1], true_masks)
    >>> estimated.tolist(), true.tolist()
    ([0, 1], [1, 0])
    """
    check_matrix(masks=masks, true_masks=true_masks)
    estimate, truth = _aligned_rows(masks, true_masks)
    true_positives = estimate.T.astype(np.float64) @ truth.astype(np.float64)
    return linear_sum_assignment(true_positives, maximize=True)


def mean_correlation_coefficient(
    latents: Table, true_latents: Table, *, method: Literal["pearson", "spearman"] = "pearson"
) -> float:
    """Mean correlation coefficient (MCC) of estimated with true latents of simulated data.

    Latents have no order and no sign: the one-to-one matching has the largest sum of absolute
    correlations, by the Hungarian algorithm.

    Parameters
    ----------
    latents
        Observations x latent: cells with their latent states, or perturbations with their effects.
    true_latents
        Observations x true latent, for the same observations. Rows are aligned by name if both
        are DataFrames, otherwise by position.
    method
        ``"spearman"`` correlates ranks: recovery up to a monotone function of each latent.

    Returns
    -------
    Mean over true latents of the absolute correlation with their match, from 0 to 1. A true
    latent without a match, or a constant latent, contributes 0.

    Raises
    ------
    UnknownPerturbationError
        If a row is in one DataFrame only.
    SAMSError
        If the numbers of rows differ, there are fewer than two, an entry is not finite, or
        ``method`` is unknown.

    Notes
    -----
    Hyvarinen and Morioka (2016), NeurIPS; Khemakhem, Kingma, Monti and Hyvarinen (2020), AISTATS.
    Chance is above 0: with few observations, some column correlates with every true latent.

    Examples
    --------
    >>> true_latents = np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 5.0]])
    >>> mirrored = -true_latents[:, ::-1]
    >>> round(scvi_sams.evaluation.mean_correlation_coefficient(mirrored, true_latents), 6)
    1.0
    """
    check_matrix(latents=latents, true_latents=true_latents)
    check_choice("method", method, ("pearson", "spearman"))
    tables = _aligned_rows(latents, true_latents, table="latents", what="observations")
    estimate, truth = (table.astype(np.float64) for table in tables)
    if len(truth) < 2:
        raise SAMSError(f"Correlations need at least two observations, not {len(truth)}.")
    if not (np.isfinite(estimate).all() and np.isfinite(truth).all()):
        raise SAMSError("Some latents are not finite: training diverged. There is no correlation.")
    if method == "spearman":
        estimate, truth = rankdata(estimate, axis=0), rankdata(truth, axis=0)
    correlation = np.abs(_unit_columns(estimate).T @ _unit_columns(truth))
    rows, columns = linear_sum_assignment(correlation, maximize=True)
    return ratio(correlation[rows, columns].sum(), truth.shape[1])


class Calibration(NamedTuple):
    """Inclusion probabilities compared with observed frequencies on simulated truth.

    Attributes
    ----------
    bins
        Reliability: one row per bin of inclusion probability with its bounds ``lower`` and
        ``upper``, mean probability ``predicted``, proportion of truly active entries ``observed``
        (both NaN in an empty bin) and ``n_entries``.
    expected_calibration_error
        Mean over entries of ``|predicted - observed|`` in their bin.
    fdr
        One row per nominal false discovery rate: the actual ``false_discovery_proportion``, the
        number ``n_active`` of entries called active, and the ``recall`` of truly active entries
        (proportion and recall are 0 if the denominator is 0).
    """

    bins: pd.DataFrame
    expected_calibration_error: float
    fdr: pd.DataFrame


def mask_calibration(masks: Table, true_masks: Table, *, n_bins: int = 10) -> Calibration:
    """Compare inclusion probabilities with the true masks of simulated data.

    Latent dimensions are first matched one to one (:func:`match_latents`). Entries of unmatched
    estimated dimensions are truly inactive; active entries of unmatched true dimensions are in no
    bin, but count as missed in the recall. Because the best matching is used, results are slightly
    optimistic.

    Parameters
    ----------
    masks, true_masks
        As for :func:`mask_recovery`; ``masks`` are posterior inclusion probabilities.
    n_bins
        Number of bins of equal width; each includes its lower bound, the last one also 1.

    Returns
    -------
    Reliability bins, expected calibration error, and the false discoveries at nominal rates of 1,
    5, 10 and 20 % (:func:`active_at_fdr`).

    Raises
    ------
    UnknownPerturbationError, SAMSError
        As for :func:`mask_recovery`, or if ``masks`` are not probabilities, ``true_masks`` has
        values other than 0 and 1, or there is no bin.

    Notes
    -----
    Expected calibration error: Naeini, Cooper and Hauskrecht (2015), AAAI.

    Examples
    --------
    Both entries with a probability of 0.9 are true, and none of the two with 0.2:

    >>> masks = np.array([[0.9, 0.2], [0.2, 0.9]])
    >>> calibration = scvi_sams.evaluation.mask_calibration(masks, np.eye(2))
    >>> round(calibration.expected_calibration_error, 3)
    0.15
    """
    check_matrix(masks=masks, true_masks=true_masks)
    check_integer(n_bins=n_bins)
    estimate, true = _aligned_rows(masks, true_masks)
    probability = estimate.astype(np.float64)
    check_probabilities(probability)
    if not np.isin(true, (0, 1)).all():
        raise SAMSError(
            "The true masks contain values other than 0 and 1. Pass masks, not effects or "
            "probabilities."
        )
    rows, columns = match_latents(probability, true)
    truth = np.zeros(probability.shape, dtype=bool)
    truth[:, rows] = true[:, columns]

    bins = _reliability(probability.ravel(), truth.ravel(), n_bins)
    gaps = (bins["predicted"] - bins["observed"]).abs().fillna(0)
    error = ratio((gaps * bins["n_entries"]).sum(), truth.size)
    return Calibration(bins, error, _false_discoveries(probability, truth, true.sum()))


def check_same_rows(first: pd.Index, second: pd.Index, sides: str, what: str) -> None:
    """Raise if a name is in one index only.

    The message contains ``sides`` (``"run 0 and run 1"``) and what a row is.
    """
    unshared = first.symmetric_difference(second)
    if len(unshared):
        raise UnknownPerturbationError(
            f"{', '.join(map(repr, unshared[:5]))} ({len(unshared)} in all) is in only one of "
            f"{sides}. Subset both to the same {what}."
        )


def _aligned_rows(
    estimated: Table, true: Table, *, table: str = "masks", what: str = "perturbations"
) -> tuple[np.ndarray, np.ndarray]:
    """Align the rows of an estimated table with the true one: by name if both have names."""
    if isinstance(estimated, pd.DataFrame) and isinstance(true, pd.DataFrame):
        sides = f"the estimated and the true {table}"
        check_same_rows(estimated.index, true.index, sides, what)
        estimated = estimated.loc[true.index]
    estimate, truth = np.asarray(estimated), np.asarray(true)
    if len(estimate) != len(truth):
        raise SAMSError(
            f"There are {len(estimate)} {what} in the estimated {table} and {len(truth)} in the "
            "true ones. Give both the same rows."
        )
    return estimate, truth


def _unit_columns(table: np.ndarray) -> np.ndarray:
    deviations = centred(table.T).T
    norms = np.linalg.norm(deviations, axis=0)
    return deviations / np.where(norms > 0, norms, 1)


def _reliability(probability: np.ndarray, truth: np.ndarray, n_bins: int) -> pd.DataFrame:
    bin_of_entry = np.minimum((probability * n_bins).astype(int), n_bins - 1)
    entries = pd.DataFrame({"predicted": probability, "observed": truth.astype(np.float64)})
    grouped = entries.groupby(bin_of_entry)
    bounds = np.linspace(0, 1, n_bins + 1)
    bins = pd.DataFrame({"lower": bounds[:-1], "upper": bounds[1:]})
    bins[["predicted", "observed"]] = grouped.mean().reindex(bins.index)
    bins["n_entries"] = np.bincount(bin_of_entry, minlength=n_bins)
    return bins.rename_axis("bin")


def _false_discoveries(probability: np.ndarray, truth: np.ndarray, n_true: int) -> pd.DataFrame:
    rows = []
    for rate in _NOMINAL_RATES:
        active = active_at_fdr(probability, rate)
        n_active, n_found = active.sum(), (active & truth).sum()
        rows.append(
            {
                "false_discovery_proportion": ratio(n_active - n_found, n_active),
                "n_active": n_active,
                "recall": ratio(n_found, n_true),
            }
        )
    return pd.DataFrame(rows, index=pd.Index(_NOMINAL_RATES, name="fdr"))
