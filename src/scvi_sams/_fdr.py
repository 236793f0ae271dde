"""Call mask entries at a false discovery rate."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pandas as pd

from scvi_sams._checks import as_numbers, check_number
from scvi_sams._plurals import plural
from scvi_sams.exceptions import SAMSError

_ROUNDING = 1e-7
"""Rounding error of single precision: 1 - 0.95 may exceed 0.05."""

Table = TypeVar("Table", pd.DataFrame, np.ndarray)


def active_at_fdr(masks: Table, fdr: float = 0.05) -> Table:
    """Call as many mask entries active as the false discovery rate allows.

    This uses the masks alone, which assumes that the model is correct;
    :func:`scvi_sams.tl.called_masks` also uses a test on the cells and should be reported.

    Entries are called in order of their inclusion probability as long as the mean of
    ``1 - probability`` over all called entries, the expected proportion of false discoveries, is at
    most ``fdr``. Entries with equal probabilities are all called or all not called.

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
        If ``fdr`` is not between 0 and 1, or an entry is NaN or not a probability.

    Notes
    -----
    Newton, Noueiry, Sarkar and Ahlquist (2004), Biostatistics 5, 155-176; Mueller, Parmigiani and
    Rice (2006), Bayesian Statistics 8. The rate holds if the probabilities are calibrated
    (:func:`mask_calibration`).

    Examples
    --------
    The mean of ``1 - probability`` over the first three is 0.04, over all four 0.28:

    >>> masks = np.array([0.99, 0.97, 0.92, 0.01])
    >>> scvi_sams.evaluation.active_at_fdr(masks, fdr=0.05).tolist()
    [True, True, True, False]
    >>> scvi_sams.evaluation.active_at_fdr(masks, fdr=0.03).tolist()
    [True, True, False, False]
    """
    check_number(fdr=fdr, above=0, below=1)
    active = within(mask_q_values(as_numbers("masks", masks)), fdr)
    if isinstance(masks, pd.DataFrame):
        return pd.DataFrame(active, index=masks.index, columns=masks.columns)
    return active


def mask_q_values(probability: np.ndarray) -> np.ndarray:
    """Smallest false discovery rate at which :func:`active_at_fdr` calls each entry.

    The expected proportion of false entries among all that are at least as probable.
    """
    check_probabilities(probability)
    levels, place, counts = np.unique(-probability, return_inverse=True, return_counts=True)
    expected_false = np.cumsum(counts * (1 + levels)) / np.cumsum(counts)
    return expected_false[place].reshape(probability.shape)


def within(q_values: np.ndarray, fdr: float) -> np.ndarray:
    """Whether q-values are at most ``fdr``, up to rounding."""
    return q_values <= fdr + _ROUNDING


def check_probabilities(values: np.ndarray) -> None:
    """Raise if an entry is NaN or outside of 0 to 1."""
    bad = ~((values >= 0) & (values <= 1))
    if bad.any():
        raise SAMSError(
            f"{bad.sum()} of {values.size} entries "
            f"{plural(bad.sum(), 'is not a probability', 'are not probabilities')}, for example "
            f"{values[bad][0]:g}. Pass inclusion probabilities (get_perturbation_masks), not "
            "effects; NaN means that training diverged."
        )
