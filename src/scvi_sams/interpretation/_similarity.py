"""Which perturbations are alike."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import cdist, squareform

from scvi_sams._checks import check_ate, check_choice, check_matrix, check_table
from scvi_sams.exceptions import SAMSError

_MOST_FOR_OPTIMAL_ORDER = 1000
"""Optimal ordering of leaves takes minutes for more."""


def perturbation_similarity(
    table: pd.DataFrame | AnnData,
    *,
    metric: Literal["cosine", "jaccard"] = "cosine",
    order: bool = True,
) -> pd.DataFrame:
    """Similarity of every two perturbations, similar ones next to each other.

    Parameters
    ----------
    table
        One row per perturbation: effects on genes (an ATE table of ``predict_ate``) or on latents
        (the ``mean`` of ``get_perturbation_effects``) for ``"cosine"``; masks
        (``get_perturbation_masks``, or booleans of :func:`scvi_sams.evaluation.active_at_fdr`) for
        ``"jaccard"``.
    metric
        ``"cosine"``: x.y over the product of norms, 1 for the same direction, -1 for opposite ones.
        ``"jaccard"``: sum of min(x, y) / sum of max(x, y), which for booleans is the share of
        common entries among all active ones.
    order
        Order rows and columns by average linkage of 1 - similarity; ``False`` keeps the order of
        ``table``.

    Returns
    -------
    Perturbations x perturbations. A perturbation without effects or active entries is similar (0)
    to no other. The direction of an effect that is hardly there is noise: for a picture of
    pathways leave perturbations out that do nothing (:func:`perturbation_hits`).

    Raises
    ------
    SAMSError
        If ``metric`` is unknown, the table holds NaN, or, for ``"jaccard"``, values outside 0 to 1.

    Examples
    --------
    >>> effects = pd.DataFrame([[1.0, 0.0], [2.0, 0.0], [0.0, -1.0]], index=["A", "B", "C"])
    >>> scvi_sams.tl.perturbation_similarity(effects, order=False)
         A    B    C
    A  1.0  1.0  0.0
    B  1.0  1.0  0.0
    C  0.0  0.0  1.0
    """
    check_choice("metric", metric, ("cosine", "jaccard"))
    if isinstance(table, AnnData):
        check_ate(table=table)
        names, values = table.obs_names, np.asarray(table.X, dtype=np.float64)
    else:
        check_table(table=table)
        names, values = table.index, table.to_numpy(np.float64)
    if np.isnan(values).any():
        bad = names[np.isnan(values).any(axis=1)]
        raise SAMSError(f"{len(bad)} perturbations have NaN entries, such as {bad[0]!r}.")
    similarity = cosine_similarity(values) if metric == "cosine" else _weighted_jaccard(values)
    np.fill_diagonal(similarity, 1)
    if order:
        leaves = hierarchical_order(similarity)
        names, similarity = names[leaves], similarity[np.ix_(leaves, leaves)]
    return pd.DataFrame(similarity, index=names, columns=names.rename(None))


def hierarchical_order(similarity: np.ndarray) -> np.ndarray:
    """Order rows by average linkage of 1 - similarity, for a symmetric matrix.

    Examples
    --------
    >>> similarity = np.array([[1.0, 0.0, 0.9], [0.0, 1.0, 0.0], [0.9, 0.0, 1.0]])
    >>> order = scvi_sams.tl.hierarchical_order(similarity).tolist()
    >>> abs(order.index(0) - order.index(2))  # the similar ones are neighbours
    1
    """
    check_matrix(similarity=similarity)
    if len(similarity) < 3:
        return np.arange(len(similarity))
    distance = np.clip(1 - (similarity + similarity.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    optimal = len(similarity) <= _MOST_FOR_OPTIMAL_ORDER
    return leaves_list(linkage(squareform(distance), method="average", optimal_ordering=optimal))


def unit_rows(values: np.ndarray) -> np.ndarray:
    """Rows of length 1; rows of zeros stay as they are."""
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return np.divide(values, norms, out=np.zeros_like(values), where=norms > 0)


def cosine_similarity(values: np.ndarray) -> np.ndarray:
    """Cosine similarity of every two rows; 0 for a row of zeros."""
    units = unit_rows(values)
    return np.clip(units @ units.T, -1, 1)


def _weighted_jaccard(values: np.ndarray) -> np.ndarray:
    if ((values < 0) | (values > 1)).any():
        raise SAMSError(
            "Jaccard similarity is that of masks: probabilities or booleans. For effects use "
            "metric='cosine'."
        )
    totals = values.sum(axis=1)
    both = totals[:, None] + totals[None]
    # |x - y| = max - min and x + y = max + min.
    difference = cdist(values, values, metric="cityblock")
    union = (both + difference) / 2
    common = (both - difference) / 2
    return np.divide(common, union, out=np.zeros_like(union), where=union > 0)
