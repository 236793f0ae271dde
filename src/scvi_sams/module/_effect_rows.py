"""Rows of tables of effects: a perturbation, or where contexts are registered one of a context."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class EffectRows(nn.Module):
    """Numbers of effects: those of perturbations, or of pairs of a perturbation and a context.

    Without contexts the row of an effect is the code of its perturbation. With C contexts the
    effect of perturbation t in context c has row ``t * (C + 1) + c``; in the place of ``c = C``
    stands a context that is not one of these. Perturbations that no cell carries, of which features
    are known, come after those that were measured.

    Parameters
    ----------
    n_perturbations, n_contexts, n_unmeasured
        T, C, and how many perturbations follow.
    pairs
        ``t * C + c`` of every pair that registered cells have, ascending.

    Attributes
    ----------
    measured
        Rows that registered cells have, ascending.
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
        # Known from the registered data, so that it need not be saved.
        self.register_buffer("measured", measured, persistent=False)

    @property
    def per_perturbation(self) -> int:
        """Rows of a perturbation: one for each context, and for one that is none of these."""
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

    def places(self, rows: Tensor) -> Tensor:
        """Positions of rows among the measured ones, -1 where a row is none of them."""
        found = torch.searchsorted(self.measured, rows.contiguous()).clamp(
            max=len(self.measured) - 1
        )
        return torch.where(self.measured[found] == rows, found, -1)
