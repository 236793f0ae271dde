"""How much of the simulated truth was found: masks and latents."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata

from scvi_sams._checks import check_choice, check_matrix, check_number
from scvi_sams.exceptions import SAMSError
from scvi_sams.metrics._alignment import aligned_rows
from scvi_sams.metrics._similarity import centred, ratio


def mask_recovery(
    masks: pd.DataFrame | np.ndarray,
    true_masks: pd.DataFrame | np.ndarray,
    *,
    threshold: float = 0.5,
) -> pd.Series:
    """Score estimated masks against the true ones of simulated data.

    Latent dimensions have no order, so they are first matched one to one
    (:func:`match_latents`). Active entries of estimated dimensions without a partner are false
    positives, those of true dimensions without a partner false negatives.

    Parameters
    ----------
    masks
        Perturbations x latent: posterior inclusion probabilities (or masks of 0 and 1).
    true_masks
        Perturbations x true latent: 0 and 1. The numbers of dimensions may differ. Rows are
        aligned by name where both are DataFrames, else by position.
    threshold
        An entry is active where it is greater than this.

    Returns
    -------
    ``precision``, ``recall`` and ``f1`` of the active entries (0 where nothing is active), and
    ``density`` and ``true_density``, the share of active entries of ``masks`` and ``true_masks``.

    Raises
    ------
    UnknownPerturbationError
        If a perturbation is in one DataFrame only.
    SAMSError
        If the numbers of perturbations differ.

    Examples
    --------
    The same masks with the latents in another order:

    >>> true_masks = np.array([[1, 0, 0], [0, 1, 1]])
    >>> recovery = scvi_sams.evaluation.mask_recovery(true_masks[:, [2, 0, 1]], true_masks)
    >>> recovery[["precision", "recall", "f1"]].tolist()
    [1.0, 1.0, 1.0]
    """
    check_matrix(masks=masks, true_masks=true_masks)
    check_number(threshold=threshold)
    estimate, truth = (table > threshold for table in aligned_rows(masks, true_masks))
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


def match_latents(
    masks: pd.DataFrame | np.ndarray, true_masks: pd.DataFrame | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Match estimated with true latent dimensions one to one.

    Of all matchings it takes one with the largest number of true positives (their expected number,
    if ``masks`` holds probabilities), by the Hungarian algorithm.

    Parameters
    ----------
    masks
        Perturbations x latent: masks of 0 and 1, or inclusion probabilities.
    true_masks
        Perturbations x true latent: 0 and 1.

    Returns
    -------
    Positions in the columns of ``masks``, ascending, and of their partners in the columns of
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
    estimate, truth = aligned_rows(masks, true_masks)
    true_positives = estimate.T.astype(np.float64) @ truth.astype(np.float64)
    return linear_sum_assignment(true_positives, maximize=True)


def mean_correlation_coefficient(
    latents: pd.DataFrame | np.ndarray,
    true_latents: pd.DataFrame | np.ndarray,
    *,
    method: Literal["pearson", "spearman"] = "pearson",
) -> float:
    """Mean correlation coefficient (MCC) of estimated latents with the true ones of simulated data.

    Latents have no order and no sign: of all one to one matchings it takes the one with the
    largest sum of absolute correlations, by the Hungarian algorithm.

    Parameters
    ----------
    latents
        Observations x latent: cells with their latent states, or perturbations with their effects.
    true_latents
        Observations x true latent, of the same observations. Rows are aligned by name where both
        are DataFrames, else by position.
    method
        ``"spearman"`` correlates ranks: recovery up to a monotone map of each latent.

    Returns
    -------
    Mean over the true latents of the absolute correlation with their partner, from 0 to 1. A true
    latent without a partner, and a constant latent, contribute 0.

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
    Chance is not 0: with few observations some column correlates with every true latent.

    Examples
    --------
    >>> true_latents = np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 5.0]])
    >>> mirrored = -true_latents[:, ::-1]
    >>> round(scvi_sams.evaluation.mean_correlation_coefficient(mirrored, true_latents), 6)
    1.0
    """
    check_matrix(latents=latents, true_latents=true_latents)
    check_choice("method", method, ("pearson", "spearman"))
    tables = aligned_rows(latents, true_latents, table="latents", what="observations")
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


def _unit_columns(table: np.ndarray) -> np.ndarray:
    deviations = centred(table.T).T
    norms = np.linalg.norm(deviations, axis=0)
    return deviations / np.where(norms > 0, norms, 1)
