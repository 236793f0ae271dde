"""Whether inclusion probabilities mean what they say."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from scvi_sams._checks import check_integer, check_matrix
from scvi_sams._fdr import active_at_fdr, check_probabilities
from scvi_sams.exceptions import SAMSError
from scvi_sams.metrics._alignment import aligned_rows
from scvi_sams.metrics._recovery import match_latents
from scvi_sams.metrics._similarity import ratio

_NOMINAL_RATES = (0.01, 0.05, 0.1, 0.2)


class Calibration(NamedTuple):
    """What inclusion probabilities promise and what they keep, on simulated truth.

    Attributes
    ----------
    bins
        Reliability: one row per bin of inclusion probability with its bounds ``lower`` and
        ``upper``, mean probability ``predicted``, share of truly active entries ``observed`` (both
        NaN in an empty bin) and ``n_entries``.
    expected_calibration_error
        Mean over entries of ``|predicted - observed|`` of their bin.
    fdr
        One row per nominal false discovery rate: ``false_discovery_proportion`` realised,
        ``n_active`` entries called active, and ``recall`` of the truly active ones (proportion and
        recall are 0 where there is nothing to divide by).
    """

    bins: pd.DataFrame
    expected_calibration_error: float
    fdr: pd.DataFrame


def mask_calibration(
    masks: pd.DataFrame | np.ndarray,
    true_masks: pd.DataFrame | np.ndarray,
    *,
    n_bins: int = 10,
) -> Calibration:
    """Compare inclusion probabilities with the true masks of simulated data.

    Latent dimensions are first matched one to one (:func:`match_latents`). Entries of estimated
    dimensions without a partner are truly inactive; active entries of true dimensions without a
    partner are in no bin, but are missed in the recall. Of all matchings the best one is taken, so
    what is reported is slightly optimistic.

    Parameters
    ----------
    masks
        Perturbations x latent: posterior inclusion probabilities.
    true_masks
        Perturbations x true latent: 0 and 1. The numbers of dimensions may differ. Rows are
        aligned by name where both are DataFrames, else by position.
    n_bins
        Number of bins of equal width; each holds its lower bound, the last one 1 too.

    Returns
    -------
    Reliability bins, expected calibration error, and the false discoveries at nominal rates of 1,
    5, 10 and 20 % (:func:`active_at_fdr`).

    Raises
    ------
    UnknownPerturbationError
        If a perturbation is in one DataFrame only.
    SAMSError
        If the numbers of perturbations differ, ``masks`` holds no probabilities, ``true_masks``
        other values than 0 and 1, or there is no bin.

    Notes
    -----
    Expected calibration error: Naeini, Cooper and Hauskrecht (2015), AAAI.

    Examples
    --------
    Of two entries with a probability of .9 both are true, of two with .2 none:

    >>> masks = np.array([[0.9, 0.2], [0.2, 0.9]])
    >>> calibration = scvi_sams.evaluation.mask_calibration(masks, np.eye(2))
    >>> round(calibration.expected_calibration_error, 3)
    0.15
    """
    check_matrix(masks=masks, true_masks=true_masks)
    check_integer(n_bins=n_bins)
    if n_bins < 1:
        raise SAMSError(f"`n_bins` must be at least 1, not {n_bins}.")
    estimate, true = aligned_rows(masks, true_masks)
    probability = estimate.astype(np.float64)
    check_probabilities(probability)
    if not np.isin(true, (0, 1)).all():
        raise SAMSError(
            "The true masks hold values other than 0 and 1. Pass masks, not effects or "
            "probabilities."
        )
    rows, columns = match_latents(probability, true)
    truth = np.zeros(probability.shape, dtype=bool)
    truth[:, rows] = true[:, columns]

    bins = _reliability(probability.ravel(), truth.ravel(), n_bins)
    gaps = (bins["predicted"] - bins["observed"]).abs().fillna(0)
    error = ratio((gaps * bins["n_entries"]).sum(), truth.size)
    return Calibration(bins, error, _false_discoveries(probability, truth, true.sum()))


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
