"""Cells to which effects refer, if some may have escaped their perturbations."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch

from scvi_sams._checks import check_choice
from scvi_sams.exceptions import SAMSError
from scvi_sams.labels._labels import Labels
from scvi_sams.model._cell_model import CellModel
from scvi_sams.model._cells import CellReader
from scvi_sams.module._perturbation_module import PerturbationModule

Among = Literal["responding", "all"]
"""Cells with the effects: those that respond to a perturbation, or all that are labelled."""


def response_rates(module: PerturbationModule, requested: Labels, among: Among) -> np.ndarray:
    """Proportion of the cells of each label with its effect, ``(n_labels,)``."""
    check_choice("among", among, get_args(Among))
    if among == "responding" or module.responses is None or not module.has_branches:
        return np.ones(len(requested.codes))
    codes = torch.as_tensor(requested.codes.astype(np.int64), device=module.device)
    return module.responses.rates_of(codes).double().cpu().numpy()


def check_has_responses(model: CellModel) -> None:
    """Raise if the model assumes that all cells respond, or responses are not estimated yet."""
    if model.module.responses is None:
        raise SAMSError(
            "This model assumes that every cell responds to its perturbations. Make one with "
            "responses=True, and train it."
        )
    if not model.module.has_branches:
        raise SAMSError(
            "Responses are not estimated yet: the model is not trained, or its training ended "
            "before the stage of responses. Train it, or continue training."
        )


def response_probabilities(cells: CellReader) -> np.ndarray:
    """Posterior probability that each cell responded, ``(n_cells,)``; NaN if not identifiable.

    That is for control cells, and for cells of perturbations without a sufficient effect.
    """
    responses = cells.module.responses
    assert responses is not None
    found = np.empty(len(cells), dtype=np.float64)
    for place, read, probability in cells.response_probabilities():
        known = responses.knows(read)
        found[place] = torch.where(known, probability, torch.nan).double().cpu().numpy()
    return found
