"""Warnings of likely mistakes in the labels of training data: one for each kind."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from scvi_sams._plurals import counted, plural
from scvi_sams.labels._conventions import (
    guides_of_genes,
    likely_delimiter,
    looks_like_control,
    looks_unassigned,
)
from scvi_sams.labels._labels import NO_PERTURBATION, Labels, inseparable_perturbations
from scvi_sams.labels._names import listing, similar_names
from scvi_sams.labels._spelling import Spelling

logger = logging.getLogger("scvi.sams")

_LARGE_DOSE = 100.0


def warn_of_labels(labels: Labels) -> None:
    """Log a warning for each kind of likely mistake in the labels of training data."""
    for warning in (*_of_names(labels), *_of_cells(labels)):
        logger.warning(warning)


def warn_of_unused_controls(
    spelling: Spelling, labels: Iterable[str], guides: Iterable[str] = ()
) -> None:
    """Log a warning if one of several control labels is that of no cell, and of no guide."""
    names = {name for label in labels for name in spelling.split(label)}
    guides = list(guides)
    unused = [
        control
        for control in spelling.control
        if not any(map(Spelling((control,), spelling.delimiter).is_control, names))
        and not any(control.strip("*") in guide for guide in guides)
    ]
    if unused:
        logger.warning(
            f"No cell has the control label {' or '.join(map(repr, unused))}. If it is misspelt, "
            f"cells count as perturbed that are controls; labels name {listing(sorted(names))}."
        )


def _of_names(labels: Labels) -> Iterator[str]:
    names = labels.vocabulary
    similar = similar_names([*labels.spelling.control, *names])
    if similar:
        yield (
            f"Names differ only by case or encoding and count as different: {_listed(similar)}. If "
            "they are the same perturbation, or control, give them one name."
        )
    controls = [name for name in names if looks_like_control(name)]
    if controls:
        yield (
            f"{listing(controls)} {'look' if len(controls) > 1 else 'looks'} like control cells, "
            "but count as perturbations. If they are controls, name them in `control`: a label, a "
            "list of labels, or a pattern such as 'NT*'."
        )
    unassigned = [name for name in names if looks_unassigned(name)]
    if unassigned:
        yield (
            f"Cells are labelled {listing(unassigned)}: each of these counts as a perturbation. If "
            "they stand for missing or ambiguous assignments, drop these cells; if for control "
            "cells, name them in `control`."
        )
    guides = guides_of_genes(names)
    if guides:
        examples = [f"{listing(found)} ({gene})" for gene, found in list(guides.items())[:3]]
        yield (
            f"Several labels look like guides of one gene, such as {'; '.join(examples)}. Each is "
            "learned separately. To learn one effect per gene, pass a column with the gene of each "
            "cell as `perturbation_key`."
        )


def _of_cells(labels: Labels) -> Iterator[str]:
    if labels.doses.max() > _LARGE_DOSE:
        yield (
            f"Doses are as large as {labels.doses.max():g}. Effects are linear in the dose, in "
            "units of the SD of basal states: use a scale on which that is plausible, of order "
            "one (such as the logarithm, or the fraction of the highest dose)."
        )
    delimiter = labels.spelling.delimiter
    has_combinations = ((labels.codes != NO_PERTURBATION).sum(axis=1) > 1).any()
    if delimiter is not None and not has_combinations:
        found = likely_delimiter(labels.vocabulary, labels.spelling.control)
        if found is not None:
            likely, built = found
            yield (
                f"No label has the delimiter {delimiter!r}, but "
                f"{counted(len(built), 'label joins', 'labels join')} names by {likely!r}, such as "
                f"{listing(built)}. If they are combinations, pass delimiter={likely!r}; if not, "
                "delimiter=None."
            )
    together = inseparable_perturbations(labels.codes, labels.vocabulary)
    if together:
        yield (
            f"{counted(len(together), 'group')} of perturbations "
            f"{plural(len(together), 'occurs', 'occur')} only together, so that their effects "
            f"cannot be separated: {_listed(together)}. If such a group is one name that contains "
            "the delimiter, pass another `delimiter`, or None to never split."
        )


def _listed(groups: Iterable[list[str]]) -> str:
    shown = list(groups)
    return "; ".join(" and ".join(map(repr, group)) for group in shown[:5]) + (
        "; ..." if len(shown) > 5 else ""
    )
