"""Numbers of cells of each perturbation, and of each guide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd

from scvi_sams._checks import check_choice, check_integer
from scvi_sams.data._field import registered_labels
from scvi_sams.data._guides import Guides, registered_guides
from scvi_sams.exceptions import SAMSError
from scvi_sams.labels._labels import Labels

if TYPE_CHECKING:
    from scvi_sams.model._perturbation_model import PerturbationModel

Per = Literal["perturbation", "guide"]


def cell_counts(
    model: PerturbationModel, *, per: Per = "perturbation", min_cells: int = 50
) -> pd.DataFrame:
    """Count the cells of each perturbation, or of each guide.

    Parameters
    ----------
    model
        Model with its data; it need not be trained.
    per
        ``"perturbation"``, or ``"guide"`` (``setup_anndata(guide_key=...)``).
    min_cells
        Perturbations or guides with fewer cells are marked in ``few_cells``.

    Returns
    -------
    One row per perturbation, in the order of ``model.perturbations``, after one for control cells;
    or one row per guide, grouped by perturbation.

    - ``perturbation``: of each guide.
    - ``n_cells``: cells with it, alone or with others; ``n_alone``: cells with nothing else (for a
      guide: without a second guide).
    - ``n_train``: how many of ``n_cells`` were in the last training; omitted before training.
    - ``n_guides``, ``fewest_of_a_guide``: guides of the perturbation, and the number of cells of
      the rarest. Only if guides are registered.
    - ``few_cells``: whether ``n_cells`` is below ``min_cells``: effects are then shrunken, and
      masks uncertain.

    Raises
    ------
    SAMSError
        If the model was loaded without data, or guides are requested but not registered.
    InvalidArgumentError
        If ``per`` is invalid, or ``min_cells`` is negative.

    Examples
    --------
    >>> table = scvi_sams.tl.cell_counts(model)
    >>> table.loc[["control", "P001"], ["n_cells", "n_alone"]].to_numpy().tolist()
    [[200, 200], [90, 60]]
    """
    check_choice("per", per, get_args(Per))
    check_integer(at_least=0, min_cells=min_cells)
    if model.adata is None:
        raise SAMSError("The model was loaded without data: load it with `adata` to count cells.")
    model._validate_anndata()
    labels = registered_labels(model.adata_manager)
    guides = registered_guides(model.adata_manager)
    is_train = np.zeros(len(labels), dtype=bool)
    if model.is_trained and model.train_indices is not None:
        is_train[model.train_indices] = True
    if per == "guide":
        if guides is None:
            raise SAMSError(
                "No guides are registered. Name the column of adata.obs with the guides in "
                "setup_anndata(guide_key=...)."
            )
        table = _of_guides(guides, labels, is_train)
    else:
        table = _of_perturbations(labels, guides, is_train)
    if not is_train.any():
        table = table.drop(columns="n_train")
    return table.assign(few_cells=table["n_cells"] < min_cells)


def _counts(codes: np.ndarray, is_train: np.ndarray, n: int) -> dict[str, np.ndarray]:
    """Numbers of cells by ``codes`` of shape ``(n_cells, n_slots)``, unique within rows."""
    carried = codes >= 0
    is_alone = carried.sum(axis=1) == 1
    return {
        name: np.bincount(codes[cells][carried[cells]], minlength=n)
        for name, cells in (
            ("n_cells", np.ones(len(codes), dtype=bool)),
            ("n_alone", is_alone),
            ("n_train", is_train),
        )
    }


def _of_perturbations(labels: Labels, guides: Guides | None, is_train: np.ndarray) -> pd.DataFrame:
    n = len(labels.vocabulary)
    counts = _counts(labels.codes, is_train, n)
    controls = int(labels.is_control.sum())
    of_controls = {
        "n_cells": controls, "n_alone": controls, "n_train": int(is_train[labels.is_control].sum()),
    }  # fmt: skip
    columns = {name: np.append(of_controls[name], values) for name, values in counts.items()}
    if guides is not None:
        of_guides = pd.Series(_counts(guides.codes, is_train, len(guides.names))["n_cells"])
        grouped = of_guides.groupby(guides.perturbation)
        fewest = grouped.min().reindex(range(n), fill_value=0)
        columns["n_guides"] = np.append(0, np.bincount(guides.perturbation, minlength=n))
        columns["fewest_of_a_guide"] = np.append(0, fewest)
    index = pd.Index([labels.control, *labels.vocabulary], name="perturbation")
    return pd.DataFrame(columns, index=index)


def _of_guides(guides: Guides, labels: Labels, is_train: np.ndarray) -> pd.DataFrame:
    names = np.array(labels.vocabulary, dtype=object)[guides.perturbation]
    counts = _counts(guides.codes, is_train, len(guides.names))
    index = pd.Index(guides.names, name="guide")
    return pd.DataFrame({"perturbation": names, **counts}, index=index)
