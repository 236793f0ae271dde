"""Which mask entries to call active, and whether their probabilities mean what they say."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import numpy as np
import pandas as pd

from scvi_sams._argument_types import as_numbers, refuse_other_than_matrix
from scvi_sams._arguments import refuse_other_than_number, refuse_other_than_whole
from scvi_sams.evaluation.metrics._alignment import aligned_rows
from scvi_sams.evaluation.metrics._recovery import match_latents
from scvi_sams.evaluation.metrics._similarity import ratio
from scvi_sams.exceptions import SAMSError

_NOMINAL_RATES = (0.01, 0.05, 0.1, 0.2)
_ROUNDING = 1e-7
"""Inclusion probabilities are of single precision: 1 - 0.95 may come out above 0.05."""

Table = TypeVar("Table", pd.DataFrame, np.ndarray)


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


def active_at_fdr(masks: Table, fdr: float = 0.05) -> Table:
    """Call as many mask entries active as the false discovery rate allows.

    Entries are taken in the order of their inclusion probability as long as the mean of
    ``1 - probability`` over all that were taken, the expected share of false discoveries, is at
    most ``fdr``. Equal probabilities are called alike.

    Parameters
    ----------
    masks
        Posterior inclusion probabilities of any shape, such as perturbations x latent.
    fdr
        Bound on the posterior expected false discovery rate over all entries of ``masks``.

    Returns
    -------
    Booleans of the shape (and, for a DataFrame, with the names) of ``masks``.

    Raises
    ------
    SAMSError
        If ``fdr`` is not between 0 and 1, or an entry is NaN or no probability.

    Notes
    -----
    Newton, Noueiry, Sarkar and Ahlquist (2004), Biostatistics 5, 155-176; Mueller, Parmigiani and
    Rice (2006), Bayesian Statistics 8. The rate holds if the probabilities are calibrated
    (:func:`mask_calibration`).

    Examples
    --------
    The mean of ``1 - probability`` over the first three is .04, over all four .28:

    >>> masks = np.array([0.99, 0.97, 0.92, 0.01])
    >>> scvi_sams.evaluation.active_at_fdr(masks, fdr=0.05).tolist()
    [True, True, True, False]
    >>> scvi_sams.evaluation.active_at_fdr(masks, fdr=0.03).tolist()
    [True, True, False, False]
    """
    refuse_other_than_number(fdr=fdr, above=0, below=1)
    probability = as_numbers("masks", masks)
    _refuse_no_probabilities(probability)
    levels, counts = np.unique(-probability, return_counts=True)
    levels = -levels
    expected_false = np.cumsum(counts * (1 - levels))
    allowed = levels[expected_false <= (fdr + _ROUNDING) * np.cumsum(counts)]
    active = probability >= allowed.min(initial=np.inf)
    if isinstance(masks, pd.DataFrame):
        return pd.DataFrame(active, index=masks.index, columns=masks.columns)
    return active


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
    refuse_other_than_matrix(masks=masks, true_masks=true_masks)
    refuse_other_than_whole(n_bins=n_bins)
    if n_bins < 1:
        raise SAMSError(f"`n_bins` must be at least 1, not {n_bins}.")
    estimate, true = aligned_rows(masks, true_masks)
    probability = estimate.astype(np.float64)
    _refuse_no_probabilities(probability)
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


def _refuse_no_probabilities(values: np.ndarray) -> None:
    bad = ~((values >= 0) & (values <= 1))
    if bad.any():
        raise SAMSError(
            f"{bad.sum()} of {values.size} entries are no probabilities, for example "
            f"{values[bad][0]:g}. Pass inclusion probabilities (get_perturbation_masks), not "
            "effects; NaN means that training diverged."
        )


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
