"""Look up combinations of perturbations and doses among the measured ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_MULTIPLIER = 6364136223846793005
"""Multiplier of Knuth's linear congruential generator (MMIX), odd: distinct keys stay distinct."""


class Combinations(NamedTuple):
    """Perturbations and doses of cells in canonical order: codes descending, empty slots last."""

    codes: Tensor
    """``(B, K)``, -1 where a slot is empty."""
    doses: Tensor
    """``(B, K)``, 0 where a slot is empty."""

    @classmethod
    def of_cells(cls, codes: Tensor, doses: Tensor) -> Combinations:
        """Sort the perturbations of each cell."""
        codes, order = codes.long().sort(dim=1, descending=True)
        return cls(codes, doses.float().gather(1, order).masked_fill(codes < 0, 0))

    def at_least(self, n_cells: int, most: int) -> Combinations:
        """Distinct rows with several perturbations and ``n_cells``; the ``most`` frequent ones."""
        n_slots = self.codes.shape[1]
        if n_slots < 2:
            return Combinations(self.codes[:0], self.doses[:0])
        found, counts = self.of_several()
        enough = (counts >= n_cells).nonzero(as_tuple=True)[0]
        kept = enough[counts[enough].argsort(descending=True, stable=True)[:most]]
        chosen = found.at(kept)
        return chosen.at(chosen.order())

    def of_several(self) -> tuple[Combinations, Tensor]:
        """Distinct rows with several perturbations, and the number of each."""
        several = (self.codes >= 0).sum(dim=1) > 1
        # Doses are exact in double precision, and codes are at most millions.
        both = torch.cat([self.codes.double(), self.doses.double()], dim=1)[several]
        found, counts = both.unique(dim=0, return_counts=True)
        n_slots = self.codes.shape[1]
        return Combinations(found[:, :n_slots].long(), found[:, n_slots:].float()), counts

    def at(self, rows: Tensor | slice) -> Combinations:
        """Some of the rows, by position."""
        return Combinations(self.codes[rows], self.doses[rows])

    def order(self) -> Tensor:
        """Positions in the order in which :meth:`rows_of` finds them."""
        return self._keys().argsort()

    def with_others(self, others: Combinations) -> Combinations:
        """These rows and then the others, with as many slots as the wider ones."""
        n_slots = max(self.codes.shape[1], others.codes.shape[1])
        both = zip(self._widened(n_slots), others._widened(n_slots), strict=True)
        return Combinations(*(torch.cat(part) for part in both))

    def rows_of(self, cells: Combinations) -> Tensor:
        """Row of each cell's combination among these (in :meth:`order`); -1 for none."""
        if not len(self.codes):
            return cells.codes.new_full((len(cells.codes),), -1)
        n_slots = self.codes.shape[1]
        fits = (cells.codes[:, n_slots:] < 0).all(dim=1)
        cells = cells._widened(n_slots)
        rows = torch.searchsorted(self._keys(), cells._keys()).clamp(max=len(self.codes) - 1)
        # Different combinations may have the same key, so the combination itself is compared.
        same = (self.codes[rows] == cells.codes) & (self.doses[rows] == cells.doses)
        return torch.where(fits & same.all(dim=1), rows, -1)

    def _widened(self, n_slots: int) -> Combinations:
        """The same with ``n_slots`` slots; further slots are cut off."""
        missing = n_slots - self.codes.shape[1]
        return Combinations(
            functional.pad(self.codes, (0, missing), value=-1),
            functional.pad(self.doses, (0, missing)),
        )

    def _keys(self) -> Tensor:
        """A number for each row, equal for equal codes and doses; int64 that overflows."""
        keys = torch.zeros_like(self.codes[:, 0])
        for column in (*self.codes.T, *self.doses.contiguous().view(torch.int32).long().T):
            keys = (keys + column + 1) * _MULTIPLIER
            keys = keys ^ (keys >> 29)
        return keys
