"""Plates: how many cells share a global variable, and what each of them pays for it."""

from __future__ import annotations

import torch
from torch import Tensor

from scvi_sams.module._effect_rows import EffectRows
from scvi_sams.module._scored_cells import ScoredCells


class Plates(ScoredCells):
    """The part of :class:`PerturbationModule` that weighs divergences of global variables."""

    effect_rows: EffectRows
    cells_per_perturbation: Tensor
    evidence_cells: float | None

    def cells_behind(self, rows: Tensor, name: str) -> Tensor:
        """Training cells that share the global variable ``name`` of each row, ``(R,)``."""
        return self.cells_per_perturbation[self.effect_rows.perturbation_of(rows)]

    def plate_weights(self, rows: Tensor, name: str = "effects") -> Tensor:
        """1 / N_t for perturbations with training cells, else 0, shape ``(R,)``."""
        counts = self.cells_behind(rows, name)
        return torch.where(counts > 0, 1 / counts.clamp(min=1), torch.zeros_like(counts))

    def evidence_weights(self, rows: Tensor, name: str = "effects") -> Tensor:
        """Factor by which training charges the divergences of effects, shape ``(R,)``.

        ``1 + N_t / evidence_cells``. The evidence of N_t cells then counts as that of
        ``1 / (1 / N_t + 1 / evidence_cells)``: a coarsened posterior (Miller & Dunson 2019), for
        a model that is right only up to some error. The latent axes are learned, never exactly
        the true ones, so a strong effect on one mechanism is also a weak effect on others. Given
        enough cells the plain posterior is sure of those, rightly so and to no use.
        """
        counts = self.cells_behind(rows, name)
        if self.evidence_cells is None:
            return torch.ones_like(counts)
        if self.responses is not None and self.has_branches:
            # Cells that escaped say nothing about an effect.
            counts = counts * self.responses.shares_of(self.effect_rows.perturbation_of(rows))
        return 1 + counts / self.evidence_cells
