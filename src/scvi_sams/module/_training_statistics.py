"""What a module must know of the training cells."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class TrainingStatistics:
    """What the module learns from the training cells before the first step.

    Attributes
    ----------
    n_cells
        Number of training cells.
    cells_per_perturbation
        N_t: training cells with a non-zero dose, ``(T,)``.
    input_mean, input_sd
        Of the encoder's input per gene, ``(G,)``.
    scaled_mean, scaled_variance
        Of ``x / size`` (of ``x`` for a normal likelihood) per gene, ``(G,)``.
    inverse_size_mean
        Mean of 1 / size over the cells (1 for a normal likelihood, which has no size).
    cell_sizes
        Sizes that stand for those of the control cells (of all, where none is a control cell), and
        the share of cells that each stands for, ``(2, 3)``.
    largest_counts
        Largest count of each gene in training cells, ``(G,)``; ``None`` for a normal likelihood.
    cells_per_pair
        Training cells of each pair of a perturbation and a context that registered cells have;
        ``None`` where no contexts are registered.
    """

    n_cells: int
    cells_per_perturbation: Tensor
    input_mean: Tensor
    input_sd: Tensor
    scaled_mean: Tensor
    scaled_variance: Tensor
    inverse_size_mean: float
    cell_sizes: Tensor
    largest_counts: np.ndarray | None = None
    cells_per_pair: Tensor | None = None
