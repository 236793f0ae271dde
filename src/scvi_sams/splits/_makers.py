"""The splits of the SAMS-VAE paper: held-out combinations, few combination cells, random cells."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np

from scvi_sams._checks import check_bool, check_number
from scvi_sams.exceptions import InvalidSplitError
from scvi_sams.labels._labels import Labels
from scvi_sams.labels._stratified import stratified_split
from scvi_sams.splits._combinations import (
    CellLabels,
    Shares,
    cells_of,
    read_seeded,
    shuffled_combinations,
    split_within_labels,
)
from scvi_sams.splits._split import Split, make_split

_TESTED = 0.25
_TRAIN_AND_VALIDATION = (0.8, 0.2, 0.0)


def norman_ood(
    labels: CellLabels,
    fraction: float,
    *,
    seed: int = 0,
    control: str | Sequence[str] = "control",
    delimiter: str = "+",
) -> Split:
    """Test on a quarter of the combinations and train on a fraction of all combinations.

    The n combinations are sorted, then shuffled by the seed. The first ``int(fraction * n)`` are
    training combinations; the last ``ceil(n / 4)`` are test combinations with all their cells;
    the combinations in between are not used. Cells of singles, controls and training combinations
    are split 80/20 into training and validation within each label, and are never test cells.

    Parameters
    ----------
    labels, control, delimiter
        As for :func:`canonical_labels`.
    fraction
        Fraction of all combinations that train, from 0 (only singles) to 0.75 (all but the test
        combinations).
    seed
        Seed of the order of combinations and cells. With the same seed, test combinations are the
        same for every fraction, and training combinations are nested.

    Returns
    -------
    The split; ``held_out`` are the test combinations.

    Raises
    ------
    InvalidSplitError
        If there are no combinations, no training control, or no test combination is left.

    Notes
    -----
    Norman-OOD of Bereket & Karaletsos, NeurIPS 2023. Their "100 % of the combinations" are all
    but the test combinations: a fraction of 0.75 here.

    Examples
    --------
    Six combinations: two test, three training, one not used.

    >>> split = scvi_sams.evaluation.norman_ood(adata.obs["perturbation"], fraction=0.5)
    >>> len(split.held_out), len(split.test)
    (2, 60)
    """
    check_number(fraction=fraction)
    labels = read_seeded(labels, control, delimiter, seed)
    order = _combinations(labels, seed)
    n_tested = ceil(_TESTED * len(order))
    n_trained = int(fraction * len(order))
    if not 0 <= fraction <= 1 - _TESTED:
        raise InvalidSplitError(
            f"A fraction of {fraction} of the combinations cannot train: {_TESTED} of them are "
            f"always tested. Choose from 0 to {1 - _TESTED}."
        )
    tested = order[len(order) - n_tested :]
    known = np.flatnonzero(~cells_of(labels, order[n_trained:]))
    train, validation, _ = split_within_labels(labels, known, _TRAIN_AND_VALIDATION, seed=seed)
    test = np.flatnonzero(cells_of(labels, tested))
    return make_split(
        labels,
        train,
        validation,
        test,
        name="norman_ood",
        held_out=sorted(tested),
        seed=seed,
        settings={"fraction": fraction},
    )


def norman_data_efficiency(
    labels: CellLabels,
    fraction: float,
    *,
    fractions: Shares = (0.64, 0.16, 0.2),
    seed: int = 0,
    control: str | Sequence[str] = "control",
    delimiter: str = "+",
) -> Split:
    """Test every combination after training on a fraction of its other cells.

    The cells of each combination are split into training, validation and test cells. Only a
    fraction of its training and validation cells is kept (at least one of each, where there are
    any and the fraction is above 0). Cells of singles and controls are split 80/20 into training
    and validation within each label, and are never test cells.

    Parameters
    ----------
    labels, control, delimiter
        As for :func:`canonical_labels`.
    fraction
        Fraction of the training and validation cells of each combination to keep, from 0 to 1.
    fractions
        Fractions of training, validation and test cells among the cells of each combination.
    seed
        Seed of the order of the cells. With the same seed, test cells are the same for every
        fraction, and training cells are nested.

    Returns
    -------
    The split; ``held_out`` is empty, or all combinations if the fraction is 0.

    Raises
    ------
    InvalidSplitError
        If there are no combinations, no training control, or a fraction is out of range.

    Notes
    -----
    Norman data efficiency of Bereket & Karaletsos, NeurIPS 2023.

    Examples
    --------
    >>> split = scvi_sams.evaluation.norman_data_efficiency(adata.obs["perturbation"], fraction=0.5)
    >>> adata.obs["perturbation"].iloc[split.test].nunique()  # every combination
    6
    """
    check_number(fraction=fraction)
    labels = read_seeded(labels, control, delimiter, seed)
    if not 0 <= fraction <= 1:
        raise InvalidSplitError(f"The fraction of cells to keep is {fraction}: choose from 0 to 1.")
    combined = cells_of(labels, _combinations(labels, seed))
    train, validation, _ = split_within_labels(
        labels, np.flatnonzero(~combined), _TRAIN_AND_VALIDATION, seed=seed
    )
    pool, validation_pool, test = split_within_labels(
        labels, np.flatnonzero(combined), fractions, seed=seed
    )
    if fraction > 0:
        shares = (fraction, 0.0, 1 - fraction)
        kept, _, _ = split_within_labels(labels, pool, shares, seed=seed)
        kept_for_validation, _, _ = split_within_labels(labels, validation_pool, shares, seed=seed)
        train = np.concatenate([train, kept])
        validation = np.concatenate([validation, kept_for_validation])
    return make_split(
        labels,
        train,
        validation,
        test,
        name="norman_data_efficiency",
        # A combination with a single cell keeps it for training, so it cannot be tested.
        held_out=labels[test].names if fraction == 0 else (),
        seed=seed,
        settings={"fraction": fraction, "fractions": list(fractions)},
    )


def random_cells(
    labels: CellLabels,
    *,
    fractions: Shares = (0.64, 0.16, 0.2),
    stratified: bool = True,
    seed: int = 0,
    control: str | Sequence[str] = "control",
    delimiter: str | None = "+",
) -> Split:
    """Split cells at random; every perturbation may train, validate and test.

    Parameters
    ----------
    labels, fractions, seed, control, delimiter
        As for :func:`split_cells`.
    stratified
        Whether fractions hold within each label, so that every label keeps a training cell.
        ``False``: only over all cells, as in the paper; a rare label may then be missing in a part.

    Returns
    -------
    The split; ``held_out`` is empty.

    Raises
    ------
    InvalidSplitError
        If the fractions do not sum to 1, there is no training control cell, or no test cell.

    Notes
    -----
    64/16/20 by cell: Replogle in Bereket & Karaletsos, NeurIPS 2023.

    Examples
    --------
    >>> split = scvi_sams.evaluation.random_cells(adata.obs["perturbation"])
    >>> adata.obs["perturbation"].iloc[split.train].nunique()  # every label
    15
    """
    check_bool(stratified=stratified)
    labels = read_seeded(labels, control, delimiter, seed)
    groups = labels.name_of_cell if stratified else np.zeros(len(labels))
    return make_split(
        labels,
        *stratified_split(groups, fractions, seed=seed),
        name="random_cells",
        seed=seed,
        settings={"fractions": list(fractions), "stratified": stratified},
    )


def _combinations(labels: Labels, seed: int) -> list[str]:
    order = shuffled_combinations(labels, seed)
    if not order:
        raise InvalidSplitError(
            f"No label is a combination joined by {labels.spelling.delimiter!r}. Pass the "
            "`delimiter` of your labels, or split single perturbations with random_cells."
        )
    return order
