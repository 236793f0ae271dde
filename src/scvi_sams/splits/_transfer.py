"""PerturBench's split that holds out perturbations in some levels of a covariate."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from math import ceil

import numpy as np

from scvi_sams._checks import check_integer, check_number
from scvi_sams.labels._spelling import control_names
from scvi_sams.splits._cells import canonical_labels
from scvi_sams.splits._perturbench import assemble_split, check_fractions
from scvi_sams.splits._split import Labels, Split, levels_of_cells


def covariate_transfer(
    labels: Labels,
    covariate: Labels,
    *,
    fraction: float = 0.3,
    most_levels: int = 1,
    control_fraction: float = 0.5,
    seed: int = 0,
    control: str | Sequence[str] = "control",
    delimiter: str | None = "+",
) -> Split:
    """Hold out perturbations in some levels of a covariate that train in other levels.

    Perturbations with the most levels come first, in random order among equals. Each is held out
    in 1 to ``most_levels`` levels drawn at random, at least one of its levels always trains, and in
    no level more than ``int(fraction * n)`` of its n perturbations are held out. Those of a level
    are halved between validation and test. Control cells of each level are in all three parts.

    Parameters
    ----------
    labels
        One label per cell.
    covariate
        Level of each cell, for example its cell type.
    fraction
        Largest share of the perturbations of a level that is held out in it.
    most_levels
        Largest number of levels that a perturbation is held out in.
    control_fraction
        Share of the control cells of each level that train; the others are halved.
    seed
        Of the choices and of the control cells.
    control
        Label or labels of the control cells.
    delimiter
        What joins the perturbations of a combination; ``None`` if labels are never split.

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
    PerturBench (Wu et al., arXiv 2408.10609v4), task "transfer"; the draw is this package's own.

    Examples
    --------
    >>> cell_types = np.where(np.arange(adata.n_obs) % 2 == 0, "T cell", "B cell")
    >>> split = scvi_sams.evaluation.covariate_transfer(adata.obs["perturbation"], cell_types)
    >>> set(split.held_out_levels) <= {"T cell", "B cell"}
    True
    """
    check_number(fraction=fraction, control_fraction=control_fraction)
    check_integer(at_least=0, seed=seed)
    check_integer(most_levels=most_levels)
    check_fractions(fraction, control_fraction)
    label_of_cell = canonical_labels(labels, control=control, delimiter=delimiter)
    level_of_cell = levels_of_cells(covariate, len(label_of_cell))
    control_label = control_names(control)[0]
    pairs = sorted(set(zip(label_of_cell, level_of_cell, strict=True)))
    perturbed = [pair for pair in pairs if pair[0] != control_label]
    held_out = _draw_pairs(perturbed, fraction, most_levels, np.random.default_rng(seed))
    tested, validated = set(), set()
    for level in sorted({level for _, level in held_out}):
        of_level = [pair for pair in held_out if pair[1] == level]
        n_tested = ceil(len(of_level) / 2)
        tested.update(of_level[:n_tested])
        validated.update(of_level[n_tested:])
    part_of_pair = dict.fromkeys(validated, "validation") | dict.fromkeys(tested, "test")
    part_of_cell = np.array(
        [part_of_pair.get(pair, "train") for pair in zip(label_of_cell, level_of_cell, strict=True)]
    )
    ordered = sorted(held_out)
    return assemble_split(
        labels,
        part_of_cell,
        label_of_cell == control_label,
        level_of_cell,
        name="covariate_transfer",
        held_out=[label for label, _ in ordered],
        held_out_levels=[level for _, level in ordered],
        covariate=covariate,
        settings={
            "fraction": fraction,
            "most_levels": most_levels,
            "control_fraction": control_fraction,
        },
        seed=seed,
        control=control,
        delimiter=delimiter,
    )


def _draw_pairs(
    pairs: list[tuple[str, str]], fraction: float, most_levels: int, rng: np.random.Generator
) -> list[tuple[str, str]]:
    """Draw the pairs of perturbation and level to hold out, in random order."""
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
