"""Prepare features of perturbations for a model: rows it can use, standardised and reduced."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.extmath import randomized_svd
from sklearn.utils.sparsefuncs import mean_variance_axis
from torch import Tensor

from scvi_sams._plurals import counted
from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.features._table import FeatureTable
from scvi_sams.labels._names import listing
from scvi_sams.labels._spelling import Spelling
from scvi_sams.model._registration import logger
from scvi_sams.module._feature_prior import MOST_FEATURES, FeaturePrior

_SEED = 5023
_SMALLEST_SD = 1e-12
"""Relative to the mean of a column: smaller SDs are rounding errors."""
_SMALLEST_DISTANCE = 1e-5
"""Distances between standardised features below this are rounding errors."""


class FeaturesOfModel(NamedTuple):
    """Features of T measured and U other perturbations, and the transformation of columns."""

    unmeasured: list[str]
    """Names of the others, in the order of the table."""
    values: np.ndarray
    """``(T + U, D)``; zeros for measured perturbations that are not in the table."""
    columns: list[str]
    """The C columns that vary among measured perturbations."""
    projection: np.ndarray
    """``(C, D)``: ``values`` are standardised columns times this."""
    target_genes: np.ndarray
    """Position of the gene with the name of each perturbation, ``(T + U,)``; -1 for none."""

    @property
    def for_module(self) -> dict[str, np.ndarray]:
        """Arguments of the module."""
        return {"features": self.values, "target_genes": self.target_genes}


class WeightsOfColumns(NamedTuple):
    """Posterior of the weights of the C columns of a table for latent dimensions, ``(C, L)`` each.

    Per SD of a column among measured perturbations.
    """

    columns: list[str]
    masks: np.ndarray
    """Means, in log-odds."""
    masks_sd: np.ndarray
    effects: np.ndarray
    """Means, in SD of basal states."""
    effects_sd: np.ndarray
    unexplained: float
    """Proportion of the prior variance of effects that is explained."""


def features_of_model(
    table: FeatureTable, perturbations: list[str], spelling: Spelling, genes: np.ndarray
) -> FeaturesOfModel:
    """Standardise the columns of a table by its measured perturbations.

    More than :data:`MOST_FEATURES` columns are reduced to as many by a singular value decomposition
    of the standardised columns of measured perturbations, at an average variance of 1. Warnings
    name measured perturbations without features, names that are combinations, and unmeasured
    perturbations whose features are unlike those of any measured one.

    Raises
    ------
    InvalidArgumentError
        If no measured perturbation has features, or their features are all the same.
    """
    known = [name for name in perturbations if name in table]
    if not known:
        raise InvalidArgumentError(
            f"`perturbation_features` has rows for {counted(len(table), 'perturbation')}, such as "
            f"{listing(table.names)}, but none of them was measured: there are "
            f"{listing(perturbations)}. Names must be spelled alike; features.match_genes matches "
            f"them by symbol and alias.{table.transposed_hint(perturbations)}"
        )
    missing = table.missing(perturbations)
    if missing:
        logger.warning(
            f"`perturbation_features` has no row for {len(missing)} of "
            f"{counted(len(perturbations), 'measured perturbation')}: {listing(missing)}. Their "
            "prior is that of average features."
        )
    others = [name for name in table.names if name not in set(perturbations)]
    others = [name for name in others if not spelling.is_control(name)]
    joint = [name for name in others if len(spelling.split(name)) > 1]
    if joint:
        logger.warning(
            f"`perturbation_features` must be of single perturbations: {listing(joint)} "
            f"{'are combinations' if len(joint) > 1 else 'is a combination'} with "
            f"delimiter={spelling.delimiter!r}, and ignored."
        )
        others = [name for name in others if name not in set(joint)]
    columns = _Columns.of(table, known)
    values = np.zeros((len(perturbations) + len(others), columns.projection.shape[1]))
    place = {name: row for row, name in enumerate([*perturbations, *others])}
    for names in (known, others):
        if names:
            values[[place[name] for name in names]] = columns.projected(table.rows(names))
    own = columns.projected(table.rows(known))
    _warn_of_extrapolation(others, values[len(perturbations) :], own)
    targets = pd.Index(genes).get_indexer(pd.Index(list(place)))
    return FeaturesOfModel(others, values, columns.names, columns.projection, targets)


def _warn_of_extrapolation(others: list[str], values: np.ndarray, measured: np.ndarray) -> None:
    """Name perturbations whose features are further from all measured ones than these lie apart."""
    if not others or len(measured) < 2:
        return
    nearest = NearestNeighbors(n_neighbors=1).fit(measured)
    apart = nearest.kneighbors()[0].max()
    distances = nearest.kneighbors(values)[0][:, 0]
    is_far = distances > apart + _SMALLEST_DISTANCE
    far = [name for name, beyond in zip(others, is_far, strict=True) if beyond]
    if far:
        logger.warning(
            f"The features of {len(far)} of {len(others)} unmeasured perturbations are unlike "
            f"those of any measured one: {listing(far)}. They are further from the nearest "
            "measured perturbation than any measured perturbation is from its own nearest. "
            "Predictions for them extrapolate; check that all features are on the same scale."
        )


class _Columns(NamedTuple):
    """Columns that vary among measured perturbations, with their scale and projection."""

    names: list[str]
    used: np.ndarray
    """Their positions in the table, ``(C,)``."""
    mean: np.ndarray
    sd: np.ndarray
    projection: np.ndarray

    @classmethod
    def of(cls, table: FeatureTable, known: list[str]) -> _Columns:
        """Scale the columns by the measured perturbations ``known`` in the table."""
        rows = table.rows(known)
        mean, sd = _moments(rows)
        used = np.flatnonzero(sd > _SMALLEST_SD * np.abs(mean))
        if not len(used):
            raise InvalidArgumentError(
                "`perturbation_features` are the same for all measured perturbations, and cannot "
                "distinguish them."
            )
        mean, sd = mean[used], sd[used]
        projection = np.eye(len(used))
        if len(used) > MOST_FEATURES:
            some = rows[:, used]
            dense = some if isinstance(some, np.ndarray) else some.toarray()
            projection = _principal_directions((dense - mean) / sd)
        return cls([table.columns[column] for column in used], used, mean, sd, projection)

    def projected(self, rows: np.ndarray | sparse.csr_matrix) -> np.ndarray:
        """Standardised columns times the projection, without making a sparse table dense."""
        scaled = self.projection / self.sd[:, None]
        return rows[:, self.used] @ scaled - self.mean @ scaled


def _moments(rows: np.ndarray | sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Mean and SD of columns."""
    if isinstance(rows, np.ndarray):
        return rows.mean(axis=0), rows.std(axis=0)
    mean, variance = mean_variance_axis(rows, axis=0)
    return mean, np.sqrt(variance)


def _principal_directions(standardised: np.ndarray) -> np.ndarray:
    """Directions of largest variance, ``(C, D)``, scaled to an average variance of 1."""
    n_kept = min(MOST_FEATURES, len(standardised) - 1) or 1
    _, sizes, directions = randomized_svd(standardised, n_kept, random_state=_SEED)
    total = np.square(sizes).sum() / len(standardised)
    return directions.T * np.sqrt(n_kept / total)


def weights_of_columns(
    table: FeatureTable, perturbations: list[str], prior: FeaturePrior
) -> WeightsOfColumns:
    """Weights of the columns of a table from the weights in the prior."""
    columns = _Columns.of(table, [name for name in perturbations if name in table])
    projection = columns.projection
    # Without the intercept, which is last.
    masks, effects = (
        projection @ _as_array(means[:-1]) for means in (prior.mask_weights, prior.effect_weights)
    )
    masks_sd, effects_sd = (
        _sd_of_columns(projection, _as_array(covariances[:, :-1, :-1]))
        for covariances in (prior.mask_covariance, prior.effect_covariance)
    )
    unexplained = float(prior.unexplained)
    return WeightsOfColumns(columns.names, masks, masks_sd, effects, effects_sd, unexplained)


def _as_array(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()


def _sd_of_columns(projection: np.ndarray, covariances: np.ndarray) -> np.ndarray:
    """SDs of weights of columns, ``(C, L)``, one dimension at a time."""
    variances = [((projection @ one) * projection).sum(axis=1) for one in covariances]
    return np.sqrt(np.maximum(np.stack(variances, axis=1), 0))
