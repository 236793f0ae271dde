"""Distances between the distributions of predicted and observed cells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import scanpy as sc
from scipy import sparse
from sklearn.metrics import pairwise_distances_chunked

from scvi_sams._checks import (
    as_matrix,
    as_numbers,
    check_bool,
    check_choice,
    check_integer,
    check_matrix,
    check_same_columns,
)
from scvi_sams.exceptions import SAMSError
from scvi_sams.metrics._comparison import Comparison, Metric
from scvi_sams.metrics._profiles import Matrix, stack

_MEGABYTES_AT_ONCE = 64


def energy_distance(
    predicted: Matrix,
    observed: Matrix,
    *,
    metric: Literal["sqeuclidean", "euclidean"] = "sqeuclidean",
    unbiased: bool = True,
) -> float:
    """Energy distance (E-distance), ``2 E d(x, y) - E d(x, x') - E d(y, y')``.

    Parameters
    ----------
    predicted, observed
        Cells x genes (or principal components), dense or sparse.
    metric
        ``"sqeuclidean"`` is the E-distance of scPerturb (Peidli et al., Nature Methods 2024), twice
        the squared distance of the means: it ignores all other aspects of the distributions.
        ``"euclidean"`` is the energy distance of Szekely and Rizzo, which is 0 only for equal
        distributions.
    unbiased
        Average over pairs of different cells (``n (n - 1)``, scPerturb's correction); ``False``
        counts each cell's distance of 0 to itself (``n^2``).

    Returns
    -------
    Distance in the units of the input (squared for ``"sqeuclidean"``); 0 is best. An unbiased
    estimate may be negative. NaN if unbiased and one side has a single cell.

    Raises
    ------
    SAMSError
        If ``metric`` is unknown.

    Examples
    --------
    Two pairs of cells, one unit apart:

    >>> left, right = np.array([[0.0], [0.0]]), np.array([[1.0], [1.0]])
    >>> scvi_sams.evaluation.energy_distance(left, right)
    2.0
    """
    predicted, observed = _checked_cells(predicted, observed, unbiased)
    functions: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "sqeuclidean": np.square,
        "euclidean": np.asarray,
    }
    check_choice("metric", metric, list(functions))
    return 2 * _between(predicted, observed, functions[metric]) - sum(
        _within(cells, functions[metric], unbiased) for cells in (predicted, observed)
    )


def mmd(
    predicted: Matrix,
    observed: Matrix,
    *,
    bandwidth: float | Sequence[float] | None = None,
    unbiased: bool = True,
) -> float:
    """Squared maximum mean discrepancy (MMD) with a Gaussian kernel.

    ``E k(x, x') + E k(y, y') - 2 E k(x, y)`` with ``k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2))``
    (Gretton et al., JMLR 2012).

    Parameters
    ----------
    predicted, observed, unbiased
        As for :func:`energy_distance`.
    bandwidth
        Bandwidth of the kernel, in the units of the input; for several values, kernels are
        averaged. ``None`` uses the median distance between observed cells
        (:func:`median_bandwidth`), which does not depend on the prediction.

    Returns
    -------
    From 0, the best, to 2; an unbiased estimate may be negative. NaN if unbiased and one side has
    a single cell.

    Raises
    ------
    SAMSError
        If a bandwidth is not positive.

    Examples
    --------
    >>> cells = np.arange(6.0).reshape(-1, 1)
    >>> scvi_sams.evaluation.mmd(cells, cells, unbiased=False)
    0.0
    """
    predicted, observed = _checked_cells(predicted, observed, unbiased)
    bandwidths = (
        np.array([median_bandwidth(observed)])
        if bandwidth is None
        else np.atleast_1d(as_numbers("bandwidth", bandwidth))
    )
    if not (bandwidths > 0).all():
        raise SAMSError(
            f"The bandwidth of the kernel must be positive, not {bandwidths.min():g}. The median "
            "distance is 0 if most cells are identical; pass `bandwidth`."
        )

    def kernel(distance: np.ndarray) -> np.ndarray:
        total = np.zeros_like(distance)
        for width in bandwidths:
            total += np.exp(-0.5 * (distance / width) ** 2)
        return total / len(bandwidths)

    within = sum(_within(cells, kernel, unbiased) for cells in (predicted, observed))
    return within - 2 * _between(predicted, observed, kernel)


def median_bandwidth(cells: Matrix, *, max_cells: int = 2000, seed: int = 0) -> float:
    """Median Euclidean distance between different cells, a common bandwidth of a kernel.

    Parameters
    ----------
    cells
        Cells x genes, dense or sparse.
    max_cells
        If there are more cells, a random subset of this size is used.
    seed
        Seed of the subset.

    Returns
    -------
    Median distance, in the units of the input.

    Raises
    ------
    SAMSError
        If there are fewer than two cells.

    Examples
    --------
    >>> scvi_sams.evaluation.median_bandwidth(np.array([[0.0], [1.0], [3.0]]))  # of 1, 2 and 3
    2.0
    """
    check_matrix(cells=cells)
    cells = as_matrix(cells)
    check_integer(at_least=2, max_cells=max_cells)
    check_integer(at_least=0, seed=seed)
    n_cells = cells.shape[0]
    if n_cells < 2:
        raise SAMSError("The median distance needs at least two cells; pass `bandwidth`.")
    if n_cells > max_cells:
        cells = cells[np.random.default_rng(seed).choice(n_cells, max_cells, replace=False)]
    distances = np.concatenate(list(_chunks(cells, None)))
    return float(np.median(distances[np.triu_indices_from(distances, k=1)]))


def principal_axes(cells: Matrix, n_components: int, *, seed: int = 0) -> np.ndarray:
    """Directions of the largest variance (:func:`scanpy.pp.pca`), genes x components.

    ``cells @ axes`` are principal components up to the mean, which does not affect distances. With
    fewer cells or genes than components there are fewer of them.
    """
    n_components = min(n_components, min(cells.shape) - 1)
    _, axes, _, _ = sc.pp.pca(
        sparse.csr_matrix(cells) if sparse.issparse(cells) else np.asarray(cells, np.float64),
        n_comps=n_components,
        return_info=True,
        random_state=seed,
        dtype="float64",
    )
    return axes.T


def _checked_cells(predicted: Matrix, observed: Matrix, unbiased: bool) -> tuple[Matrix, Matrix]:
    check_same_columns(predicted=predicted, observed=observed)
    check_bool(unbiased=unbiased)
    return as_matrix(predicted), as_matrix(observed)


def _between(x: Matrix, y: Matrix, function: Callable[[np.ndarray], np.ndarray]) -> float:
    total = sum(float(function(distances).sum()) for distances in _chunks(x, y))
    return total / (x.shape[0] * y.shape[0])


def _within(x: Matrix, function: Callable[[np.ndarray], np.ndarray], unbiased: bool) -> float:
    n = x.shape[0]
    total = sum(float(function(distances).sum()) for distances in _chunks(x, None))
    if not unbiased:
        return total / n**2
    if n < 2:
        return np.nan
    return (total - n * float(function(np.zeros(1))[0])) / (n * (n - 1))


def _chunks(x: Matrix, y: Matrix | None) -> Iterator[np.ndarray]:
    """Euclidean distances in chunks of rows, so that memory is linear in the number of cells."""
    x = x.astype(np.float64)
    y = None if y is None else y.astype(np.float64)
    return pairwise_distances_chunked(x, y, metric="euclidean", working_memory=_MEGABYTES_AT_ONCE)


def _components(group: Comparison) -> tuple[list[Matrix], list[Matrix], float]:
    """Predicted and observed cells in principal components, and the bandwidth of a kernel."""
    options = group.options
    observed = stack(group.observed_cells)
    sides = [group.predicted_cells, group.observed_cells]
    if options.n_components is not None:
        axes = principal_axes(observed, options.n_components, seed=options.seed)
        observed = observed @ axes
        sides = [[cells @ axes for cells in side] for side in sides]
    return sides[0], sides[1], median_bandwidth(observed, seed=options.seed)


def _over_cells(
    distance: Callable[[Matrix, Matrix, float], float],
) -> Callable[[Comparison], np.ndarray]:
    def score(group: Comparison) -> np.ndarray:
        predicted, observed, bandwidth = group.once(_components)
        values = np.full(len(group.perturbations), np.nan)
        for row in np.flatnonzero(group.succeeded):
            values[row] = distance(predicted[row], observed[row], bandwidth)
        return values

    return score


_MODE, _AXIS = "distances", "distribution"

METRICS = (
    Metric(
        _MODE, "energy_distance_squared", _AXIS, "2 E|x - y|^2 - E|x - x'|^2 - E|y - y'|^2 over "
        "cells, n (n - 1) pairs within a side: twice the squared distance of the means",
        "scPerturb, Peidli et al., Nature Methods 2024",
        False, _over_cells(lambda x, y, _: energy_distance(x, y)), needs="cells",
    ),
    Metric(
        _MODE, "energy_distance", _AXIS, "2 E|x - y| - E|x - x'| - E|y - y'| over cells, n (n - 1) "
        "pairs within a side: 0 only for equal distributions",
        "Szekely and Rizzo, J. Stat. Plan. Inference 2013",
        False, _over_cells(lambda x, y, _: energy_distance(x, y, metric="euclidean")),
        needs="cells", is_headline=True,
    ),
    Metric(
        _MODE, "mmd", _AXIS, "squared maximum mean discrepancy, Gaussian kernel whose bandwidth is "
        "the median distance of observed cells, n (n - 1) pairs within a side",
        "Gretton et al., JMLR 2012",
        False, _over_cells(lambda x, y, bandwidth: mmd(x, y, bandwidth=bandwidth)),
        needs="cells", is_headline=True,
    ),
)  # fmt: skip
