"""Features of perturbations as a model takes them: rows it can use, standardised and few."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import sparse
from sklearn.utils.extmath import randomized_svd
from sklearn.utils.sparsefuncs import mean_variance_axis

from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.features._table import FeatureTable
from scvi_sams.labels._names import listing
from scvi_sams.labels._spelling import Spelling
from scvi_sams.model._registration import logger
from scvi_sams.module._feature_prior import MOST_FEATURES

_SEED = 5023
_SMALLEST_SD = 1e-12
"""Per mean of a column: a smaller one is an error of rounding."""


class FeaturesOfModel(NamedTuple):
    """Features of T measured perturbations and of U others, and what became of the columns."""

    unmeasured: list[str]
    """Names of the others, in the order of the table."""
    values: np.ndarray
    """``(T + U, D)``; zeros for measured perturbations that are not in the table."""
    columns: list[str]
    """The C columns that differ among measured perturbations."""
    projection: np.ndarray
    """``(C, D)``: ``values`` are standardised columns times this."""


def features_of_model(
    table: FeatureTable, perturbations: list[str], spelling: Spelling
) -> FeaturesOfModel:
    """Standardise the columns of a table by its measured perturbations.

    More than :data:`MOST_FEATURES` columns are reduced to as many by a singular value decomposition
    of the standardised columns of measured perturbations, at an average variance of 1. Measured
    perturbations without features are named in a warning, as are names that are combinations.

    Raises
    ------
    InvalidArgumentError
        If no measured perturbation has features, or these are the same for all.
    """
    known = [name for name in perturbations if name in table]
    if not known:
        raise InvalidArgumentError(
            f"`perturbation_features` has rows for {len(table)} perturbations, such as "
            f"{listing(table.names)}, and none of them was measured: there are "
            f"{listing(perturbations)}. Names must be spelled alike; features.match_genes matches "
            f"them by symbol and alias.{table.transposed_hint(perturbations)}"
        )
    missing = table.missing(perturbations)
    if missing:
        logger.warning(
            f"`perturbation_features` has no row for {len(missing)} of {len(perturbations)} "
            f"measured perturbations: {listing(missing)}. Their prior is that of average features."
        )
    others = [name for name in table.names if name not in set(perturbations)]
    others = [name for name in others if not spelling.is_control(name)]
    joint = [name for name in others if len(spelling.split(name)) > 1]
    if joint:
        logger.warning(
            f"`perturbation_features` are of single perturbations: {listing(joint)} "
            f"{'are combinations' if len(joint) > 1 else 'is a combination'} with "
            f"delimiter={spelling.delimiter!r}, and left out."
        )
        others = [name for name in others if name not in set(joint)]
    mean, sd = _moments(table.rows(known))
    used = np.flatnonzero(sd > _SMALLEST_SD * np.abs(mean))
    if not len(used):
        raise InvalidArgumentError(
            "`perturbation_features` are the same for all measured perturbations, and tell none "
            "from another."
        )
    projection = np.eye(len(used))
    if len(used) > MOST_FEATURES:
        projection = _principal_directions(_standardised(table.rows(known), mean, sd, used))
    values = np.zeros((len(perturbations) + len(others), projection.shape[1]))
    place = {name: row for row, name in enumerate([*perturbations, *others])}
    for names in (known, others):
        if names:
            rows = _projected(table.rows(names), mean, sd, used, projection)
            values[[place[name] for name in names]] = rows
    columns = [table.columns[column] for column in used]
    return FeaturesOfModel(others, values, columns, projection)


def _moments(rows: np.ndarray | sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of columns."""
    if isinstance(rows, np.ndarray):
        return rows.mean(axis=0), rows.std(axis=0)
    mean, variance = mean_variance_axis(rows, axis=0)
    return mean, np.sqrt(variance)


def _standardised(
    rows: np.ndarray | sparse.csr_matrix, mean: np.ndarray, sd: np.ndarray, used: np.ndarray
) -> np.ndarray:
    some = rows[:, used]
    dense = some if isinstance(some, np.ndarray) else some.toarray()
    return (dense - mean[used]) / sd[used]


def _principal_directions(standardised: np.ndarray) -> np.ndarray:
    """Directions of most variance, ``(C, D)``, scaled to an average variance of 1."""
    n_kept = min(MOST_FEATURES, len(standardised) - 1) or 1
    _, sizes, directions = randomized_svd(standardised, n_kept, random_state=_SEED)
    total = np.square(sizes).sum() / len(standardised)
    return directions.T * np.sqrt(n_kept / total)


def _projected(
    rows: np.ndarray | sparse.csr_matrix,
    mean: np.ndarray,
    sd: np.ndarray,
    used: np.ndarray,
    projection: np.ndarray,
) -> np.ndarray:
    """Standardised columns times a projection, without making a sparse table dense."""
    scaled = projection / sd[used, None]
    return rows[:, used] @ scaled - mean[used] @ scaled
