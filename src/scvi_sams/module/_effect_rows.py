"""Rows of tables of effects: perturbations, or perturbations in registered contexts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class EffectRows(nn.Module):
    """Numbers of effects: those of perturbations, or of pairs of a perturbation and a context.

    Without contexts the row of an effect is the code of its perturbation. With C contexts the
    effect of perturbation t in context c has row ``t * (C + 1) + c``; ``c = C`` is any other
    context. Perturbations without cells, of which only features are known, follow the measured
    ones.

    Parameters
    ----------
    n_perturbations, n_contexts, n_unmeasured
        T, C, and the number of perturbations without cells.
    pairs
        ``t * C + c`` of every pair with registered cells, ascending.

    Attributes
    ----------
    measured
        Rows with registered cells, ascending.
    """

    measured: Tensor

    def __init__(
        self,
        n_perturbations: int,
        n_contexts: int = 0,
        pairs: Sequence[int] = (),
        n_unmeasured: int = 0,
    ) -> None:
        super().__init__()
        self.n_perturbations = n_perturbations
        self.n_unmeasured = n_unmeasured
        self.n_contexts = n_contexts
        measured = torch.arange(n_perturbations)
        if n_contexts:
            codes = torch.as_tensor(pairs, dtype=torch.int64)
            measured = codes // n_contexts * self.per_perturbation + codes % n_contexts
        # Derived from the registered data, so it need not be saved.
        self.register_buffer("measured", measured, persistent=False)

    @property
    def per_perturbation(self) -> int:
        """Rows per perturbation: one for each context, and one for any other context."""
        return self.n_contexts + 1

    def __len__(self) -> int:
        """Return the number of rows."""
        return (self.n_perturbations + self.n_unmeasured) * self.per_perturbation

    def of_cells(self, codes: Tensor, contexts: Tensor | None) -> Tensor:
        """Rows of the perturbations of cells in their contexts, ``(B, K)``, -1 for none.

        ``codes`` are ``(B, K)``; ``contexts``, ``(B,)``, or ``None`` where there are none.
        """
        if not self.n_contexts:
            return codes
        if contexts is None:
            contexts = torch.full_like(codes[:, 0], self.n_contexts)
        return torch.where(codes < 0, -1, codes * self.per_perturbation + contexts[:, None])

    def perturbation_of(self, rows: Tensor) -> Tensor:
        """Codes of the perturbations of rows."""
        return rows if not self.n_contexts else rows // self.per_perturbation

    def context_of(self, rows: Tensor) -> Tensor:
        """Contexts of rows; the last stands for any other context."""
        return rows % self.per_perturbation

    def places(self, rows: Tensor) -> Tensor:
        """Positions of rows among the measured ones, -1 for other rows."""
        found = torch.searchsorted(self.measured, rows.contiguous()).clamp(
            max=len(self.measured) - 1
        )
        return torch.where(self.measured[found] == rows, found, -1)
