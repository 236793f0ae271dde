"""Doses of training cells, and requested doses."""

from __future__ import annotations

import numpy as np
from scvi.model.base import BaseModelClass

from scvi_sams._plurals import counted
from scvi_sams.data._field import registered_labels
from scvi_sams.labels._labels import Labels
from scvi_sams.labels._rows import dosage_text
from scvi_sams.model._registration import logger

_TOLERANCE = 1e-5
"""Relative tolerance of doses, larger than the rounding error of single precision."""


def largest_doses(model: BaseModelClass, datamodule: object | None) -> np.ndarray:
    """Largest dose of each perturbation in the cells of the last training, ``(T,)``; 0 for none."""
    manager = model.adata_manager if datamodule is None else datamodule.adata_manager  # type: ignore[attr-defined]
    labels = registered_labels(manager)[model.train_indices]
    return _largest(labels, len(labels.vocabulary))


def warn_beyond_measured(measured: np.ndarray | None, requested: Labels) -> None:
    """Log a warning if requested doses are larger than those of the training cells.

    ``measured`` are the latter; ``None`` if unknown.
    """
    if measured is None:
        return
    asked = _largest(requested, len(measured))
    beyond = np.flatnonzero((measured > 0) & (asked > measured * (1 + _TOLERANCE)))
    if len(beyond):
        told = [
            f"{requested.vocabulary[code]} at {asked[code]:g} (measured: up to {measured[code]:g})"
            for code in beyond[:5]
        ]
        logger.warning(
            f"Doses of {counted(len(beyond), 'perturbation')} are outside the measured range: "
            f"{', '.join(told)}. Effects are extrapolated there. Set `dosages` (1 by default) to "
            "doses that cells received."
        )


def doses_to_report(measured: np.ndarray | None, n_perturbations: int) -> np.ndarray:
    """Return doses at which single effects are reported: the largest measured, or 1."""
    if measured is None:
        return np.ones(n_perturbations)
    return np.array([float(dosage_text(dose)) if dose > 0 else 1.0 for dose in measured])


def _largest(labels: Labels, n_perturbations: int) -> np.ndarray:
    largest = np.zeros(n_perturbations)
    carried = (labels.codes >= 0) & (labels.codes < n_perturbations)
    np.maximum.at(largest, labels.codes[carried], labels.doses[carried])
    return largest
