"""Random splits of cells within groups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scvi_sams._checks import as_numbers
from scvi_sams.exceptions import InvalidSplitError

_ROUNDING = 1e-9


def stratified_split(
    groups: np.ndarray, fractions: Sequence[float], *, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions of training, validation and test cells, each ascending, split within each group.

    ``groups`` is the group of every cell, of any type that can be sorted; ``fractions`` are the
    three fractions, which sum to one. Negative rounding errors, as in ``1 - 0.9 - 0.1``, count as
    zero. In each group numbers of cells are rounded up or down at random, so that the fractions
    also hold over many small groups; every group keeps at least one training cell. The global
    random state is neither used nor changed.
    """
    shares = as_numbers("fractions", fractions)
    if (
        shares.shape != (3,)
        or shares.min() < -_ROUNDING
        or not np.isclose(shares.sum(), 1)
        or not shares[0] > 0
    ):
        raise InvalidSplitError(
            f"The fractions of training, validation and test cells are {fractions}; pass three "
            "non-negative numbers that sum to 1, the first above 0."
        )
    rng = np.random.default_rng(seed)
    _, group, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = rng.permutation(len(group))
    order = order[np.argsort(group[order], kind="stable")]
    rank = np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # One random offset for both boundaries: the size of each part is rounded up or down.
    boundaries = np.floor(
        np.outer(sizes, np.cumsum(np.clip(shares, 0, 1))[:2])
        + rng.random((len(sizes), 1))
        - _ROUNDING
    )
    boundaries = np.clip(boundaries, 1, sizes[:, None])
    end_of_train, end_of_validation = np.repeat(boundaries, sizes, axis=0).T
    train = rank < end_of_train
    validation = ~train & (rank < end_of_validation)
    test = ~train & ~validation
    return np.sort(order[train]), np.sort(order[validation]), np.sort(order[test])
