"""PerturBench's splits: hold out combinations, single perturbations or levels of a covariate."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np

from scvi_sams._checks import check_integer, check_number
from scvi_sams.exceptions import InvalidSplitError
from scvi_sams.labels._labels import Labels
from scvi_sams.labels._stratified import stratified_split
from scvi_sams.splits._combinations import (
    CellLabels,
    parts_of_combinations,
    read_seeded,
    shuffled_combinations,
)
from scvi_sams.splits._split import PARTS, Levels, Split, levels_of_cells, make_split


def combination_hold_out(
    labels: CellLabels,
    *,
    fraction: float = 0.7,
    control_fraction: float = 0.5,
    seed: int = 0,
    control: str | Sequence[str] = "control",
    delimiter: str = "+",
) -> Split:
    """Hold out a fraction of the combinations, half of them for validation, half for testing.

    All cells of singles and of the other combinations train. Control cells are in all three parts.

    Parameters
    ----------
    labels, control, delimiter
        As for :func:`canonical_labels`.
    fraction
        ``int(fraction * n)`` of the n combinations are held out. If the number is odd, one more is
        for testing than for validation.
    control_fraction
        Fraction of control cells that train; the others are divided between validation and test.
    seed
        Seed of the choice of combinations and of control cells.

    Returns
    -------
    The split; ``held_out`` are the combinations of validation and test.

    Raises
    ------
    InvalidSplitError
        If no combination would be held out, or a fraction is not between 0 and 1.

    Notes
    -----
    PerturBench (Wu et al., arXiv 2408.10609v4), task "combine"; 70 % is their Norman19. Sampling
    differs from their code: the same seed holds out other combinations.

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
    _check_fractions(fraction, control_fraction)
    labels = read_seeded(labels, control, delimiter, seed)
    order = shuffled_combinations(labels, seed)
    return _hold_out(
        labels,
        [(label, "") for label in order[: int(fraction * len(order))]],
        name="combination_hold_out",
        seed=seed,
        settings={"fraction": fraction, "control_fraction": control_fraction},
    )


def single_hold_out(
    labels: CellLabels,
    *,
    fraction: float = 0.3,
    control_fraction: float = 0.5,
    seed: int = 0,
    control: str | Sequence[str] = "control",
    delimiter: str = "+",
) -> Split:
    """Hold out single perturbations that are in training combinations: the inverse problem.

    At most one perturbation of each combination is held out. Held-out perturbations are divided
    between validation and test; all other perturbed cells train.

    Parameters
    ----------
    labels, control_fraction, seed, control, delimiter
        As for :func:`combination_hold_out`.
    fraction
        ``int(fraction * n)`` of the n single perturbations that also occur in a combination are
        held out, or fewer if all others are in a combination with one of them.

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
    out singles that occur in no combination, which cannot be learned from training cells; these
    are not held out here.

    Examples
    --------
    >>> split = scvi_sams.evaluation.single_hold_out(adata.obs["perturbation"], fraction=0.4)
    >>> held_out = adata.obs["perturbation"].isin(split.held_out).to_numpy()
    >>> bool(held_out[split.train].any())  # only their combinations train
    False
    """
    _check_fractions(fraction, control_fraction)
    labels = read_seeded(labels, control, delimiter, seed)
    partners: dict[str, set[str]] = defaultdict(set)
    for names in parts_of_combinations(labels).values():
        for single in names:
            partners[single].update(names)
    eligible = sorted(partners.keys() & set(labels.names))
    most = int(fraction * len(eligible))
    held_out: list[str] = []
    excluded: set[str] = set()
    for single in np.random.default_rng(seed).permutation(eligible):
        if len(held_out) < most and single not in excluded:
            held_out.append(str(single))
            excluded |= partners[single]
    return _hold_out(
        labels,
        [(label, "") for label in held_out],
        name="single_hold_out",
        seed=seed,
        settings={"fraction": fraction, "control_fraction": control_fraction},
    )


def covariate_transfer(
    labels: CellLabels,
    covariate: Levels,
    *,
    fraction: float = 0.3,
    most_levels: int = 1,
    control_fraction: float = 0.5,
    seed: int = 0,
    control: str | Sequence[str] = "control",
    delimiter: str | None = "+",
) -> Split:
    """Hold out perturbations in some levels of a covariate; they train in other levels.

    Perturbations with the most levels come first, in random order among ties. Each is held out in
    1 to ``most_levels`` random levels, but always keeps at least one level in training, and in each
    level at most ``int(fraction * n)`` of its n perturbations are held out. Those of a level are
    divided between validation and test. Control cells of each level are in all three parts.

    Parameters
    ----------
    labels, seed, control, delimiter
        As for :func:`combination_hold_out`.
    covariate
        Level of each cell, for example its cell type.
    fraction
        Largest fraction of the perturbations of a level that is held out in it.
    most_levels
        Largest number of levels in which a perturbation is held out.
    control_fraction
        Fraction of the control cells of each level that train; the others are divided.

    Returns
    -------
    The split; ``held_out`` and ``held_out_levels`` name what is held out where.

    Raises
    ------
    InvalidCovariateError
        If a cell has no level.
    InvalidSplitError
        If nothing would be held out, or a fraction is not between 0 and 1.

    Notes
    -----
    PerturBench (Wu et al., arXiv 2408.10609v4), task "transfer"; sampling differs from their code.

    Examples
    --------
    >>> cell_types = np.where(np.arange(adata.n_obs) % 2 == 0, "T cell", "B cell")
    >>> split = scvi_sams.evaluation.covariate_transfer(adata.obs["perturbation"], cell_types)
    >>> set(split.held_out_levels) <= {"T cell", "B cell"}
    True
    """
    _check_fractions(fraction, control_fraction)
    check_integer(most_levels=most_levels)
    labels = read_seeded(labels, control, delimiter, seed)
    pairs = set(zip(labels.canonical, levels_of_cells(covariate, len(labels)), strict=True))
    perturbed = [pair for pair in sorted(pairs) if pair[0] != labels.control]
    return _hold_out(
        labels,
        _draw_pairs(perturbed, fraction, most_levels, np.random.default_rng(seed)),
        name="covariate_transfer",
        covariate=covariate,
        settings={
            "fraction": fraction,
            "most_levels": most_levels,
            "control_fraction": control_fraction,
        },
        seed=seed,
    )


def _hold_out(
    labels: Labels,
    held_out: list[tuple[str, str]],
    *,
    name: str,
    settings: dict[str, Any],
    seed: int,
    covariate: Levels | None = None,
) -> Split:
    """Test the first half of the held-out pairs of each level, validate the others.

    A pair is a label and a level (``""`` without a covariate). Control cells are distributed over
    the parts within each level.
    """
    if not held_out:
        raise InvalidSplitError(
            f"Nothing would be held out with {settings}. Use a larger fraction; check that the "
            "data has combinations (or, for covariate_transfer, perturbations in several levels) "
            "and that `delimiter` is right."
        )
    levels = np.full(len(labels), "")
    if covariate is not None:
        levels = levels_of_cells(covariate, len(labels))
    part_of_pair: dict[tuple[str, str], str] = {}
    for level in {level for _, level in held_out}:
        of_level = [pair for pair in held_out if pair[1] == level]
        n_tested = ceil(len(of_level) / 2)
        part_of_pair |= dict.fromkeys(of_level[:n_tested], "test")
        part_of_pair |= dict.fromkeys(of_level[n_tested:], "validation")
    pairs = zip(labels.canonical, levels, strict=True)
    part_of_cell = np.array([part_of_pair.get(pair, "train") for pair in pairs])
    share = settings["control_fraction"]
    controls = np.flatnonzero(labels.is_control)
    shares = (share, (1 - share) / 2, (1 - share) / 2)
    of_controls = stratified_split(levels[controls].astype(str), shares, seed=seed)
    parts = (
        np.concatenate(
            [np.flatnonzero((part_of_cell == part) & ~labels.is_control), controls[cells]]
        )
        for part, cells in zip(PARTS, of_controls, strict=True)
    )
    held_out = sorted(held_out)
    return make_split(
        labels,
        *parts,
        name=name,
        held_out=[label for label, _ in held_out],
        held_out_levels=None if covariate is None else [level for _, level in held_out],
        covariate=covariate,
        settings=settings,
        seed=seed,
    )


def _check_fractions(fraction: float, control_fraction: float) -> None:
    """Raise unless both fractions are above 0 and at most 1."""
    check_number(fraction=fraction, control_fraction=control_fraction)
    if not 0 < fraction <= 1 or not 0 < control_fraction <= 1:
        raise InvalidSplitError(
            f"The fractions are {fraction} (held out) and {control_fraction} (of control cells "
            "that train); both must be above 0 and at most 1."
        )


def _draw_pairs(
    pairs: list[tuple[str, str]], fraction: float, most_levels: int, rng: np.random.Generator
) -> list[tuple[str, str]]:
    """Sample the pairs of perturbation and level to hold out, in random order."""
    levels_of: dict[str, list[str]] = defaultdict(list)
    for label, level in pairs:
        levels_of[label].append(level)
    room = {level: int(fraction * n) for level, n in Counter(level for _, level in pairs).items()}
    order = [str(label) for label in rng.permutation(sorted(levels_of))]
    held_out = []
    for label in sorted(order, key=lambda label: -len(levels_of[label])):
        open_levels = [level for level in levels_of[label] if room[level] > 0]
        most = min(most_levels, len(levels_of[label]) - 1, len(open_levels))
        if most < 1:
            continue
        for level in rng.choice(open_levels, rng.integers(1, most + 1), replace=False):
            room[str(level)] -= 1
            held_out.append((label, str(level)))
    return held_out
