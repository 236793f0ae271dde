"""Perturbations without cells of their own: divide the effect in shared cells between them."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from scvi_sams.train._gene_sums import Cells

_N_STEPS = 20


def together_only(cells: Cells, n_perturbations: int) -> np.ndarray:
    """Whether the cells used for a perturbation have others too, ``(T,)``."""
    has_others = (cells.codes[:, 1:] >= 0).any(dim=1).numpy()
    group = cells.group.numpy()
    of_perturbation = has_others & (group < n_perturbations)
    return np.bincount(group[of_perturbation], minlength=n_perturbations)[:n_perturbations] > 0


def effects_of_others(
    cells: Cells, together: np.ndarray, lacking: np.ndarray, known: np.ndarray
) -> np.ndarray:
    """Additions of the other perturbations in their cells to the logits, besides shifts.

    If none of a cell's perturbations has cells of its own, the residual of the model is divided
    between them, evenly if they cannot be distinguished; otherwise it would be counted more than
    once.

    Parameters
    ----------
    cells
        Cells of all perturbations.
    together
        Perturbations without cells of their own, booleans ``(T,)``.
    lacking
        Residual of shifts in the log rate in the cells of each of these, ``(together, G)``.
    known
        Direct effects and corrections per unit dose, ``(T, G)``; only rows of perturbations with
        cells of their own are used.

    Returns
    -------
    ``(together, G)``, on logits.
    """
    own, others = _mean_doses(cells, together)
    remaining = lacking - others[:, ~together] @ known[~together]
    among = others[:, together]
    found = np.zeros_like(lacking)
    for _ in range(_N_STEPS):
        found += (remaining - own * found - among @ found) / (2 * own)
    return lacking - remaining + among @ found


def _mean_doses(cells: Cells, together: np.ndarray) -> tuple[np.ndarray, sparse.csr_array]:
    """Mean doses in the cells of these perturbations: their own, and of all others."""
    position = np.cumsum(together) - 1
    group = cells.group.numpy()
    used = np.flatnonzero(group < len(together))
    used = used[together[group[used]]]
    row = position[group[used]]
    codes, doses = cells.codes[used].numpy(), cells.doses[used].double().numpy()
    n = np.bincount(row, minlength=together.sum())
    own = np.bincount(row, doses[:, 0], minlength=len(n)) / n
    cell, slot = np.nonzero(codes[:, 1:] >= 0)
    weights = doses[:, 1:][cell, slot] / n[row[cell]]
    entries = (weights, (row[cell], codes[:, 1:][cell, slot]))
    others = sparse.coo_array(entries, shape=(len(n), len(together))).tocsr()
    return own[:, None], others
