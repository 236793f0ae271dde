"""Metrics of Systema (Vinas Torne et al., Nature Biotechnology 2025), as computed by its code.

Perturbed cells differ from controls in a way that is common to most perturbations. These metrics
measure what is specific to each perturbation.
"""

from __future__ import annotations

import numpy as np
from scipy.spatial.distance import cdist

from scvi_sams._checks import check_same_columns
from scvi_sams._plurals import counted
from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.metrics._comparison import Comparison, Metric
from scvi_sams.metrics._profiles import largest, not_finite, own_positions, pearson


def perturbed_centroid(profiles: np.ndarray) -> np.ndarray:
    """Mean of the mean profiles of all perturbations: each perturbation counts once.

    Parameters
    ----------
    profiles
        Mean expression, perturbations x genes. Systema uses the training perturbations.

    Returns
    -------
    Mean expression, genes.

    Examples
    --------
    >>> scvi_sams.evaluation.perturbed_centroid(np.array([[0.0, 2.0], [4.0, 2.0]])).tolist()
    [2.0, 2.0]
    """
    return profiles.mean(axis=0)


def pearson_delta(predicted: np.ndarray, observed: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Pearson correlation over genes of ``predicted - reference`` with ``observed - reference``.

    Parameters
    ----------
    predicted, observed
        Mean expression, perturbations x genes.
    reference
        Mean expression, genes: the perturbed centroid (:func:`perturbed_centroid`), not the control
        cells that other metrics use.

    Returns
    -------
    One correlation per perturbation; 0 if a side has no variation, such as a prediction equal to
    the reference.

    Examples
    --------
    >>> observed = np.array([[1.0, 2.0, 4.0]])
    >>> reference = np.array([1.0, 1.0, 1.0])
    >>> scvi_sams.evaluation.pearson_delta(observed, observed, reference).round(6).tolist()
    [1.0]
    """
    return pearson(predicted - reference, observed - reference)


def pearson_delta_top(
    predicted: np.ndarray,
    observed: np.ndarray,
    reference: np.ndarray,
    control_mean: np.ndarray,
    *,
    n_genes: int = 20,
) -> np.ndarray:
    """:func:`pearson_delta` over the genes with the largest ``|observed - control_mean|``."""
    top = largest(observed - control_mean, n_genes)
    deltas = (
        np.take_along_axis(profiles - reference, top, axis=1) for profiles in (predicted, observed)
    )
    return pearson(*deltas)


def centroid_accuracy(predicted: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Proportion of other perturbations whose observed centroid is farther from the prediction.

    Parameters
    ----------
    predicted, observed
        Mean expression, perturbations x genes, in the same order. A row of ``predicted`` with NaN
        is a failed prediction: its accuracy is 0.

    Returns
    -------
    One proportion per perturbation, by Euclidean distance: 1 if its own centroid is the nearest;
    chance is 0.5. NaN for a single perturbation.

    Notes
    -----
    Ties count half; Systema counts them against the prediction.

    Examples
    --------
    >>> observed = np.array([[0.0], [1.0], [5.0]])
    >>> scvi_sams.evaluation.centroid_accuracy(observed, observed).tolist()
    [1.0, 1.0, 1.0]
    """
    check_same_columns(predicted=predicted, observed=observed)
    predicted, observed = np.asarray(predicted), np.asarray(observed)
    if len(predicted) != len(observed):
        raise InvalidArgumentError(
            f"`predicted` has {counted(len(predicted), 'row')} and `observed` {len(observed)}: "
            "they must be the same perturbations, in the same order."
        )
    n = len(observed)
    if n == 1:
        return np.full(1, np.nan)
    return 1 - own_positions(cdist(observed, predicted), not_finite(predicted)) / (n - 1)


def _reference(group: Comparison) -> np.ndarray:
    given = group.options.perturbed_centroid
    return perturbed_centroid(group.observed) if given is None else given


_MODE, _SOURCE = "systema", "Systema, Vinas Torne et al., Nature Biotechnology 2025"

METRICS = (
    Metric(
        _MODE, "pearson_delta", "specificity", "Pearson correlation of the differences from the "
        "perturbed centroid, the mean over perturbations of their means", _SOURCE,
        True, lambda group: pearson_delta(group.predicted, group.observed, _reference(group)),
        is_headline=True,
    ),
    Metric(
        _MODE, "pearson_delta_top", "specificity", "pearson_delta over the genes with the largest "
        "|observed - control| (20 by default)", _SOURCE,
        True, lambda group: pearson_delta_top(
            group.predicted, group.observed, _reference(group), group.control_mean,
            n_genes=group.options.n_top_genes,
        ),
    ),
    Metric(
        _MODE, "centroid_accuracy", "specificity", "proportion of other perturbations whose "
        "observed centroid is farther from the prediction than its own; ties count half",
        _SOURCE, True, lambda group: centroid_accuracy(group.predicted, group.observed),
        chance=0.5, worst_if_failed=True, is_headline=True,
    ),
)  # fmt: skip
