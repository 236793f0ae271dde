"""Plates: the number of cells that share a global variable, and the cost per cell."""

from __future__ import annotations

import torch
from torch import Tensor

from scvi_sams.module._effect_rows import EffectRows
from scvi_sams.module._scored_cells import ScoredCells


class Plates(ScoredCells):
    """The part of :class:`PerturbationModule` that weights divergences of global variables."""

    effect_rows: EffectRows
    cells_per_perturbation: Tensor
    evidence_cells: float | None

    def cells_behind(self, rows: Tensor, name: str) -> Tensor:
        """Number of training cells with the global variable ``name`` of each row, ``(R,)``."""
        return self.cells_per_perturbation[self.effect_rows.perturbation_of(rows)]

    def plate_weights(self, rows: Tensor, name: str = "effects") -> Tensor:
        """1 / N_t for perturbations with training cells, otherwise 0, shape ``(R,)``."""
        counts = self.cells_behind(rows, name)
        return torch.where(counts > 0, 1 / counts.clamp(min=1), torch.zeros_like(counts))

    def evidence_weights(self, rows: Tensor, name: str = "effects") -> Tensor:
        """Factor of the divergences of effects in training, shape ``(R,)``.

        ``1 + N_t / evidence_cells``. The evidence of N_t cells then counts as that of
        ``1 / (1 / N_t + 1 / evidence_cells)`` cells: a coarsened posterior (Miller & Dunson 2019),
        for a model that is correct only up to some error. The latent axes are estimates, so a
        strong effect on one mechanism appears as weak effects on others. With enough cells the
        plain posterior would be certain of these.
        """
        counts = self.cells_behind(rows, name)
        if self.evidence_cells is None:
            return torch.ones_like(counts)
        if self.responses is not None and self.has_branches:
            # Escaped cells contain no information about an effect.
            counts = counts * self.responses.shares_of(self.effect_rows.perturbation_of(rows))
        return 1 + counts / self.evidence_cells
