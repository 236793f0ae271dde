"""PerturBench's splits that hold out combinations, or single perturbations that occur in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np

from scvi_sams._checks import check_integer, check_number, check_text
from scvi_sams.exceptions import InvalidSplitError
from scvi_sams.labels._spelling import control_names
from scvi_sams.labels._stratified import stratified_split
from scvi_sams.splits._cells import canonical_labels, shuffled_combinations
from scvi_sams.splits._split import Labels, Split, make_split


def combination_hold_out(
    labels: Labels,
    *,
    fraction: float = 0.7,
    control_fraction: float = 0.5,
    seed: int = 0,
    control: str | Sequence[str] = "control",
    delimiter: str = "+",
) -> Split:
    """Hold out a fraction of the combinations, half of them for validation, half for the test.

    All cells of singles and of the other combinations train. Control cells are in all three parts.

    Parameters
    ----------
    labels
        One label per cell.
    fraction
        ``int(fraction * n)`` of the n combinations are held out. With an odd number, the test has
        one more than validation.
    control_fraction
        Share of the control cells that train; the others are halved between validation and test.
    seed
        Of the choice and of the control cells.
    control
        Label or labels of the control cells.
    delimiter
        What joins the perturbations of a combination.

    Returns
    -------
    The split; ``held_out`` are the combinations of validation and test.

    Raises
    ------
    InvalidSplitError
        If no combination would be held out, or a fraction is not between 0 and 1.

    Notes
    -----
    PerturBench (Wu et al., arXiv 2408.10609v4), task "combine"; 70 % is their Norman19. The draw
    is this package's own: the same seed holds out other combinations than their code.

    Examples
    --------
    Four of six combinations are held out, two of them for the test:

    >>> split = scvi_sams.evaluation.combination_hold_out(adata.obs["perturbation"], fraction=0.7)
    >>> len(split.held_out)
    4
    >>> tested = adata.obs["perturbation"].iloc[split.test]
    >>> tested[tested != "control"].nunique()
    2
    >>> split.save("split.npz")
    """
    check_number(fraction=fraction, control_fraction=control_fraction)
    check_integer(at_least=0, seed=seed)
    check_text(delimiter=delimiter)
    check_fractions(fraction, control_fraction)
    label_of_cell = canonical_labels(labels, control=control, delimiter=delimiter)
    order = shuffled_combinations(label_of_cell, seed, control=control, delimiter=delimiter)
    held_out = order[: int(fraction * len(order))]
    return _hold_out_labels(
        labels,
        label_of_cell,
        held_out,
        name="combination_hold_out",
        settings={"fraction": fraction, "control_fraction": control_fraction},
        seed=seed,
        control=control,
        delimiter=delimiter,
    )


def single_hold_out(
    labels: Labels,
    *,
    fraction: float = 0.3,
    control_fraction: float = 0.5,
    seed: int = 0,
    control: str | Sequence[str] = "control",
    delimiter: str = "+",
) -> Split:
    """Hold out single perturbations that train in combinations: the inverse problem.

    Of the perturbations of one combination at most one is held out alone. The held-out ones are
    halved between validation and test; all other perturbed cells train.

    Parameters
    ----------
    labels
        One label per cell.
    fraction
        ``int(fraction * n)`` of the n single perturbations that also occur in a combination are
        held out, or fewer if all others share a combination with one of them.
    control_fraction
        Share of the control cells that train; the others are halved between validation and test.
    seed
        Of the choice and of the control cells.
    control
        Label or labels of the control cells.
    delimiter
        What joins the perturbations of a combination.

    Returns
    -------
    The split; ``held_out`` are the single perturbations of validation and test.

    Raises
    ------
    InvalidSplitError
        If no perturbation would be held out, or a fraction is not between 0 and 1.

    Notes
    -----
    PerturBench (Wu et al., arXiv 2408.10609v4), task "combine_inverse". Their code also holds
    out singles that occur in no combination, about which training cells say nothing; these are
    not chosen here.

    Examples
    --------
    >>> split = scvi_sams.evaluation.single_hold_out(adata.obs["perturbation"], fraction=0.4)
    >>> held_out = adata.obs["perturbation"].isin(split.held_out).to_numpy()
    >>> bool(held_out[split.train].any())  # only their combinations train
    False
    """
    check_number(fraction=fraction, control_fraction=control_fraction)
    check_integer(at_least=0, seed=seed)
    check_text(delimiter=delimiter)
    check_fractions(fraction, control_fraction)
    label_of_cell = canonical_labels(labels, control=control, delimiter=delimiter)
    partners: dict[str, set[str]] = defaultdict(set)
    for names in (label.split(delimiter) for label in set(label_of_cell) if delimiter in label):
        for single in names:
            partners[single].update(names)
    eligible = sorted(set(label_of_cell).intersection(partners))
    most = int(fraction * len(eligible))
    held_out: list[str] = []
    excluded: set[str] = set()
    for single in np.random.default_rng(seed).permutation(eligible):
        if len(held_out) < most and single not in excluded:
            held_out.append(str(single))
            excluded |= partners[single]
    return _hold_out_labels(
        labels,
        label_of_cell,
        held_out,
        name="single_hold_out",
        settings={"fraction": fraction, "control_fraction": control_fraction},
        seed=seed,
        control=control,
        delimiter=delimiter,
    )


def _hold_out_labels(
    labels: Labels,
    label_of_cell: np.ndarray,
    held_out: list[str],
    *,
    control: str | Sequence[str],
    **described: Any,
) -> Split:
    """Make the split that tests the first half of the held-out labels and validates the others."""
    n_tested = ceil(len(held_out) / 2)
    part_of_cell = np.full(len(label_of_cell), "train", dtype=object)
    part_of_cell[np.isin(label_of_cell, held_out[:n_tested])] = "test"
    part_of_cell[np.isin(label_of_cell, held_out[n_tested:])] = "validation"
    return assemble_split(
        labels,
        part_of_cell,
        label_of_cell == control_names(control)[0],
        np.zeros(len(label_of_cell)),
        held_out=sorted(held_out),
        control=control,
        **described,
    )


def assemble_split(
    labels: Labels,
    part_of_cell: np.ndarray,
    is_control: np.ndarray,
    control_groups: np.ndarray,
    *,
    held_out: list[str],
    settings: dict[str, Any],
    seed: int,
    **described: Any,
) -> Split:
    """Spread the control cells over the parts, within each group, and make the split."""
    if not held_out:
        raise InvalidSplitError(
            f"Nothing would be held out with {settings}. Ask for a larger fraction; check that the "
            "data has combinations (or, for covariate_transfer, perturbations in several levels) "
            "and that `delimiter` is right."
        )
    share = settings["control_fraction"]
    controls = np.flatnonzero(is_control)
    shares = (share, (1 - share) / 2, (1 - share) / 2)
    parts = stratified_split(control_groups[controls].astype(str), shares, seed=seed)
    train, validation, test = (
        np.concatenate([np.flatnonzero((part_of_cell == part) & ~is_control), controls[cells]])
        for part, cells in zip(("train", "validation", "test"), parts, strict=True)
    )
    return make_split(
        labels,
        train,
        validation,
        test,
        held_out=held_out,
        settings=settings,
        seed=seed,
        **described,
    )


def check_fractions(fraction: float, control_fraction: float) -> None:
    """Raise an error unless both fractions are above 0 and at most 1."""
    if not 0 < fraction <= 1 or not 0 < control_fraction <= 1:
        raise InvalidSplitError(
            f"The fractions are {fraction} (held out) and {control_fraction} (of control cells "
            "that train); both must be above 0 and at most 1."
        )
