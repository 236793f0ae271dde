"""Order rows so that similar ones are adjacent, in reasonable time for any number."""

from __future__ import annotations

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import pdist
from sklearn.cluster import KMeans

MOST_FOR_OPTIMAL_ORDER = 500
"""Largest number of rows for optimal leaf ordering, whose time grows with the third power."""
_N_GROUPS = 100
_SEED = 0


def order_of_rows(rows: np.ndarray) -> np.ndarray:
    """Order rows by average linkage of Euclidean distances; above 500 rows by groups.

    These are 100 k-means groups, ordered by linkage of their centres; the rows of a group are in
    the order from the previous centre to the next. The same in every call.
    """
    if len(rows) < 3:
        return np.arange(len(rows))
    if len(rows) <= MOST_FOR_OPTIMAL_ORDER:
        # Distances first: a square table of zeros would be taken for distances itself.
        return leaves_list(linkage(pdist(rows), method="average", optimal_ordering=True))
    n_groups = min(_N_GROUPS, len(np.unique(rows, axis=0)))
    groups = KMeans(n_groups, n_init=1, random_state=_SEED).fit(rows)
    along = order_of_rows(groups.cluster_centers_)
    centres = groups.cluster_centers_[along]
    padded = np.concatenate([centres[:1], centres, centres[-1:]])
    direction = padded[2:] - padded[:-2]
    place = np.argsort(along)[groups.labels_]
    within = np.einsum("ij,ij->i", rows, direction[place])
    return np.lexsort((within, place))
