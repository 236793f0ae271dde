"""Hold out whole perturbations, with all of their combinations and doses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from scvi_sams._checks import as_list, as_names, check_integer, check_number
from scvi_sams.exceptions import InvalidArgumentError, InvalidSplitError
from scvi_sams.labels._labels import Labels
from scvi_sams.labels._names import listing
from scvi_sams.splits._combinations import (
    CellLabels,
    cells_of,
    check_held_out,
    labels_with,
    read_seeded,
    split_within_labels,
)
from scvi_sams.splits._split import Split, make_split

_FRACTION = 0.2


def perturbation_hold_out(
    labels: CellLabels,
    perturbations: Sequence[str] | None = None,
    *,
    fraction: float | None = None,
    fold: tuple[int, int] | None = None,
    validation_fraction: float = 0.2,
    seed: int = 0,
    control: str | Sequence[str] = "control",
    delimiter: str | None = "+",
) -> Split:
    """Hold out whole perturbations, of which only features are known in training.

    All cells with one of them, alone or in a combination and at any dose, are test cells. The
    other cells are split into training and validation within each label, and are never test cells.

    Parameters
    ----------
    labels, control, delimiter
        As for :func:`canonical_labels`. Doses within labels (``"drug@0.5"``) count as separate
        perturbations: name all of them, or pass labels without doses.
    perturbations
        Names to hold out; ``None`` samples them.
    fraction
        ``int(fraction * n)`` of the n perturbations are held out, at least one; ``None`` is 0.2.
        With the same seed, fewer are a subset of more.
    fold
        ``(k, n)``: hold out part number k, from 0 to n - 1, of n parts of all perturbations. Parts
        are as equal as possible and sampled by the seed. With as many parts as perturbations, each
        is held out once.
    validation_fraction
        Fraction of the other cells of each label used for validation.
    seed
        Seed of the choice of perturbations and of validation cells.

    Returns
    -------
    The split; ``held_out_perturbations`` are the perturbations, ``held_out`` all labels with them,
    including combinations.

    Raises
    ------
    InvalidArgumentError
        If more than one of ``perturbations``, ``fraction`` and ``fold`` is given, or ``fold`` is
        not two whole numbers.
    InvalidSplitError
        If a name is that of the control, a combination or has no cells, a fraction is out of
        range, there is no such fold, or no perturbed cell is left for training.

    Notes
    -----
    A perturbation that occurs only in combinations with held-out ones has no training cells either.

    Examples
    --------
    >>> labels = adata.obs["perturbation"]
    >>> split = scvi_sams.evaluation.perturbation_hold_out(labels, ["P002"])
    >>> split.held_out
    ('P002', 'P002+P003', 'P002+P004')
    >>> bool(labels.iloc[split.train].str.contains("P002").any())
    False

    Every perturbation is in one of four folds:

    >>> splits = [scvi_sams.evaluation.perturbation_hold_out(labels, fold=(k, 4)) for k in range(4)]
    >>> sum(len(split.held_out_perturbations) for split in splits)
    8
    """
    given = {"perturbations": perturbations, "fraction": fraction, "fold": fold}
    several = [name for name, value in given.items() if value is not None]
    if len(several) > 1:
        raise InvalidArgumentError(
            f"`{several[0]}` and `{several[1]}` both set what is held out. Pass one of them."
        )
    check_number(at_least=0, below=1, validation_fraction=validation_fraction)
    labels = read_seeded(labels, control, delimiter, seed)
    settings: dict[str, Any] = {"validation_fraction": validation_fraction}
    if perturbations is not None:
        chosen = _named(labels, as_names("perturbations", perturbations))
    elif fold is not None:
        number, n_folds = _checked_fold(fold)
        chosen = _shuffled(labels, seed)[number::n_folds]
        settings["fold"] = [number, n_folds]
        if not chosen:
            raise InvalidSplitError(
                f"Fold {number} of {n_folds} is empty: there are {len(_shuffled(labels, seed))} "
                "perturbations. Use fewer folds."
            )
    else:
        share = _FRACTION if fraction is None else fraction
        check_number(fraction=share)
        if not 0 < share < 1:
            raise InvalidSplitError(
                f"A fraction of {share} of the perturbations cannot be held out: choose one "
                "between 0 and 1."
            )
        order = _shuffled(labels, seed)
        chosen = order[: max(1, int(share * len(order)))]
        settings["fraction"] = share
    held_out = list(labels_with(labels, chosen))
    is_tested = cells_of(labels, held_out)
    if not (~is_tested & ~labels.is_control).any():
        raise InvalidSplitError(
            f"Every perturbed cell has one of {listing(sorted(chosen))}: none would be left to "
            "train on. Hold out fewer perturbations."
        )
    shares = (1 - validation_fraction, validation_fraction, 0.0)
    train, validation, _ = split_within_labels(
        labels, np.flatnonzero(~is_tested), shares, seed=seed
    )
    return make_split(
        labels,
        train,
        validation,
        np.flatnonzero(is_tested),
        name="perturbation_hold_out",
        held_out=held_out,
        held_out_perturbations=sorted(chosen),
        seed=seed,
        settings=settings,
    )


def _named(labels: Labels, names: Sequence[str]) -> list[str]:
    """Names as in the vocabulary; an error if one is not a single perturbation."""
    parts = {name: labels.spelling.perturbations(name) for name in names}
    combined = [name for name, found in parts.items() if len(found) > 1]
    if combined or not names:
        raise InvalidSplitError(
            f"{listing(combined)} is not a single perturbation. Name single ones, which are held "
            "out with their combinations, or hold out combinations with combination_hold_out."
            if combined
            else "`perturbations` is empty: name at least one, or pass None to sample them."
        )
    chosen = {labels.spelling.canonical(name) for name in names}
    check_held_out(labels, chosen, map(repr, chosen.difference(labels.carried)))
    return sorted(chosen)


def _shuffled(labels: Labels, seed: int) -> list[str]:
    return np.random.default_rng(seed).permutation(labels.carried).tolist()


def _checked_fold(fold: object) -> tuple[int, int]:
    pair = as_list("fold", fold, "two whole numbers, such as (0, 5): the first of five parts")
    if len(pair) != 2:
        raise InvalidArgumentError(
            f"`fold` is {fold!r}: pass two whole numbers, such as (0, 5) for the first of five."
        )
    check_integer(at_least=0, fold=pair[0])
    check_integer(at_least=2, fold=pair[1])
    if pair[0] >= pair[1]:
        raise InvalidSplitError(
            f"There is no fold {pair[0]} of {pair[1]}: folds are numbered from 0 to {pair[1] - 1}."
        )
    return int(pair[0]), int(pair[1])
