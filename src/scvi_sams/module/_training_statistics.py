"""Statistics of the training cells that a module needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class TrainingStatistics:
    """Statistics of the training cells, computed before the first step.

    Attributes
    ----------
    n_cells
        Number of training cells.
    cells_per_perturbation
        N_t: training cells with a non-zero dose, ``(T,)``.
    input_mean, input_sd
        Mean and SD of the encoder's input per gene, ``(G,)``.
    scaled_mean, scaled_variance
        Mean and variance of ``x / size`` (``x`` for a normal likelihood) per gene, ``(G,)``.
    inverse_size_mean
        Mean of 1 / size over the cells (1 for a normal likelihood, which has no size).
    cell_sizes
        Sizes that represent those of the control cells (of all cells if there are no controls), and
        the proportion of cells with each, ``(2, 3)``.
    largest_counts
        Largest count of each gene in training cells, ``(G,)``; ``None`` for a normal likelihood.
    cells_per_pair
        Training cells of each pair of a perturbation and a context with registered cells;
        ``None`` if no contexts are registered.
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
