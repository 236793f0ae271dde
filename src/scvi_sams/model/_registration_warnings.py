"""What is legal in a screen and yet often a mistake: said once, when it is registered."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from scvi.data import AnnDataManager

from scvi_sams.data._field import registered_labels
from scvi_sams.labels._labels import inseparable_perturbations
from scvi_sams.labels._names import similar_names

logger = logging.getLogger("scvi.sams")

_LARGE_DOSE = 100.0
_WORDS_FOR_MISSING = frozenset({"nan", "none", "na", "n/a", "<na>", "null", "unknown"})


def warn_of_what_is_unusual(manager: AnnDataManager) -> None:
    """Log a warning for each thing in the training data that is often a mistake.

    Large doses, names that differ only by case, names that are words for a missing value, and
    perturbations that occur only together.
    """
    labels = registered_labels(manager)
    if labels.doses.max() > _LARGE_DOSE:
        logger.warning(
            f"Doses reach {labels.doses.max():g}. Effects are linear in the dose, in units of the "
            "spread of basal states: give doses on a scale on which that is plausible, of order "
            "one (such as the logarithm, or a share of the highest dose)."
        )
    similar = similar_names([*labels.spelling.control, *labels.vocabulary])
    if similar:
        logger.warning(
            f"{len(similar)} names differ only by case or encoding and count as different: "
            f"{_listed(similar)}. If they are the same perturbation, or control, give them one "
            "name."
        )
    missing = [name for name in labels.vocabulary if name.casefold() in _WORDS_FOR_MISSING]
    if missing:
        logger.warning(
            f"Cells are labelled {', '.join(map(repr, missing))}, which counts as a perturbation. "
            "If it stands for a missing label, drop these cells."
        )
    together = inseparable_perturbations(labels.codes, labels.vocabulary)
    if together:
        logger.warning(
            f"{len(together)} groups of perturbations occur only together, and no cell tells their "
            f"effects apart: {_listed(together)}. If such a group is one name that contains the "
            "delimiter, pass another `delimiter`, or None to never split."
        )


def _listed(groups: Iterable[list[str]]) -> str:
    shown = list(groups)
    return "; ".join(" and ".join(map(repr, group)) for group in shown[:5]) + (
        "; ..." if len(shown) > 5 else ""
    )
