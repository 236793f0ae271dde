"""What perturbations do to single genes, beside what they do through the latent state."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scvi_sams.module._combinations import Combinations
from scvi_sams.module._minibatch import perturbations_of_batch, sum_over_slots

COMPONENTS = ("model", "entrywise", "rowwise")
"""What predictions may be made of: the model with its direct effects, and the effects in the
training cells, shrunken entry by entry or as a whole."""

COMPONENTS_IN_CONTEXTS = (*COMPONENTS, "other contexts")
"""The same of a context, and what is known of all contexts together."""

FEWEST_CELLS, MOST_COMBINATIONS = 5, 10_000
"""Cells of a combination from which on it has a row of its own, and how many may have one."""

MOST_ENTRIES = 20_000_000
"""Rows x genes that are kept: 0.4 GB for five numbers each. Of larger tables, each
row has the genes in which its effects, or what is not known of them, matter most."""

MOST_SUMMED = 200_000_000
"""Rows x genes up to which perturbations in contexts have rows, those of most cells first: what
their cells express is summed up in two tables of that size."""

_TABLES = ("mean", "sd", "sign_error", "correction", "uncertainty")


class Residuals(NamedTuple):
    """A block of rows of the tables of :class:`DirectEffects`; rows x kept genes each."""

    spread: Tensor
    """How wide predictions sample the model's own effect around its mean, ``(R,)``: 1 is as its
    posterior, which knows less of an effect than the cells do that the whole is estimated from."""
    genes: Tensor
    """Positions of the genes, int32."""
    mean: Tensor
    """Direct effects, per unit dose, on the decoder's logits: posterior mean."""
    sd: Tensor
    """Posterior standard deviation of the direct effects."""
    sign_error: Tensor
    """Local false sign rate of the direct effects."""
    correction: Tensor
    """What stacking adds to the direct effects in predictions of means."""
    uncertainty: Tensor
    """Standard deviation of what predictions add to the model's own effect, per unit dose."""


class DirectEffects(nn.Module):
    """Tables of what is added to the decoder's logits, perturbations x genes.

    ``logit_ig = decoder_g(z_i) + sum_t d_it r_tg``. A combination that was measured has a row of
    its own, which takes the place of the sum in cells that carry it at the same doses: what its
    perturbations do to one another is known there. Where contexts are registered, so has a
    perturbation in each in which it was measured (``pairs``, rows of effects). Rows of combinations
    follow those of the perturbations, and those of pairs come last.

    The tables are no parameters: training fits them in closed form. Until then they are empty and
    nothing is added.

    Effects that no cell shows have rows beyond these while they are ``asked`` for.

    Parameters
    ----------
    n_perturbations, n_genes
        Size of the tables.
    is_stacked
        Whether the weights of the :data:`COMPONENTS` are to be estimated, and predictions of means
        add ``correction`` too.
    """

    spread: Tensor
    genes: Tensor
    mean: Tensor
    sd: Tensor
    sign_error: Tensor
    correction: Tensor
    uncertainty: Tensor
    weights: Tensor
    combination_weights: Tensor
    context_weights: Tensor
    combinations: Tensor
    combination_doses: Tensor
    pairs: Tensor
    stacked: Tensor
    asked: Tensor
    of_asked: Residuals | None

    def __init__(self, n_perturbations: int, n_genes: int, *, is_stacked: bool) -> None:
        super().__init__()
        self.n_perturbations = n_perturbations
        self.n_genes = n_genes
        self.estimates_weights = is_stacked
        self.register_buffer("genes", torch.zeros(n_perturbations, 0, dtype=torch.int32))
        for name in _TABLES:
            self.register_buffer(name, torch.zeros(n_perturbations, 0))
        self.register_buffer("spread", torch.ones(n_perturbations))
        self.register_buffer("weights", torch.zeros(len(COMPONENTS)))
        self.register_buffer("combination_weights", torch.zeros(len(COMPONENTS)))
        self.register_buffer("context_weights", torch.zeros(len(COMPONENTS_IN_CONTEXTS)))
        self.register_buffer("combinations", torch.zeros(0, 1, dtype=torch.int64))
        self.register_buffer("combination_doses", torch.zeros(0, 1))
        self.register_buffer("pairs", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("stacked", torch.tensor(is_stacked))
        self.forget()

    @property
    def n_kept(self) -> int:
        """Genes that are kept of each row."""
        return min(self.n_genes, max(1, MOST_ENTRIES // max(1, self.n_rows)))

    @property
    def n_rows(self) -> int:
        """Perturbations, measured combinations, and perturbations in contexts."""
        return self.n_perturbations + len(self.combinations) + len(self.pairs)

    @property
    def measured(self) -> Combinations:
        """Combinations that have rows of their own."""
        return Combinations(self.combinations, self.combination_doses)

    @property
    def is_estimated(self) -> bool:
        """Whether there are direct effects yet."""
        return self.mean.shape[1] > 0

    @property
    def is_stacked(self) -> bool:
        """Whether predictions of means are an average of the :data:`COMPONENTS`."""
        return bool(self.stacked)

    @property
    def stacking(self) -> dict[str, float] | None:
        """Weights of the :data:`COMPONENTS`; ``None`` where predictions are the model's alone."""
        return self._weights(self.weights)

    @property
    def stacking_of_combinations(self) -> dict[str, float] | None:
        """The same of measured combinations, also ``None`` where there are none."""
        return self._weights(self.combination_weights) if len(self.combinations) else None

    @property
    def stacking_of_contexts(self) -> dict[str, float] | None:
        """Weights of the :data:`COMPONENTS_IN_CONTEXTS`, also ``None`` where there are none."""
        return self._weights(self.context_weights) if len(self.pairs) else None

    def _weights(self, weights: Tensor) -> dict[str, float] | None:
        if not (self.is_stacked and self.is_estimated):
            return None
        return dict(zip(COMPONENTS_IN_CONTEXTS, weights.tolist(), strict=False))

    def measure(self, codes: Tensor, doses: Tensor, effects: Tensor | None = None) -> None:
        """Give rows to the combinations of some cells, ``(N, K)`` each; estimates are dropped.

        With ``effects``, ``(N, K)``, also to perturbations in contexts, by cells of nothing else.
        """
        cells = Combinations.of_cells(codes, doses)
        measured = cells.at_least(FEWEST_CELLS, MOST_COMBINATIONS)
        self.combinations, self.combination_doses = (
            part.to(self.weights.device) for part in measured
        )
        if effects is not None:
            of_cells = effects[(codes >= 0).sum(dim=1) == 1].amax(dim=1)
            found, counts = of_cells[of_cells >= 0].unique(return_counts=True)
            most = max(0, MOST_SUMMED // self.n_genes - self.n_rows + len(self.pairs))
            frequent = counts.argsort(descending=True, stable=True)[:most]
            frequent = frequent[counts[frequent] >= FEWEST_CELLS].sort().values
            self.pairs = found[frequent].to(self.weights.device)
        self.genes = self.genes.new_zeros(self.n_rows, 0)
        for name in _TABLES:
            setattr(self, name, self.weights.new_zeros(self.n_rows, 0))
        self.forget()

    def fill(
        self, tables: Residuals, weights: Tensor, of_combinations: Tensor | None = None
    ) -> None:
        """Take the estimates of all rows, and the weights of the :data:`COMPONENTS`."""
        for name, values in tables._asdict().items():
            setattr(self, name, values.to(self.weights.device))
        self.weights.copy_(weights)
        if of_combinations is not None:
            self.combination_weights.copy_(of_combinations)

    def answer(self, rows: Tensor, tables: Residuals | None) -> None:
        """Take estimates of effects that no cell shows, ascending rows of effects, of all genes."""
        self.asked, self.of_asked = rows, tables

    def forget(self) -> None:
        """Drop estimates of effects that no cell shows: they are made anew when asked for."""
        # No buffers: each process has been asked for others, and training changes buffers in place.
        self.asked = torch.zeros(0, dtype=torch.int64, device=self.weights.device)
        self.of_asked = None

    def _apply(self, *args: Any, **kwargs: Any) -> DirectEffects:
        """Move the tables, without estimates that can be made anew."""
        moved = super()._apply(*args, **kwargs)
        self.forget()
        return moved

    def _is_asked(self, effects: Tensor) -> tuple[Tensor, Tensor]:
        """Whether effects are among those that were asked for, and at which place."""
        if not len(self.asked):
            return torch.zeros_like(effects, dtype=torch.bool), torch.zeros_like(effects)
        place = torch.searchsorted(self.asked, effects.contiguous()).clamp(max=len(self.asked) - 1)
        return self.asked[place] == effects, place

    def numbers_of(self, rows: Tensor) -> Tensor:
        """Numbers of rows that do not depend on what else was asked for, as ``rows`` may."""
        if not len(self.asked):
            return rows
        place = (rows - self.n_rows).clamp(min=0, max=len(self.asked) - 1)
        return torch.where(rows >= self.n_rows, self.n_rows + self.asked[place], rows)

    def of_rows(self, rows: Tensor, name: str) -> Tensor:
        """One of the tables for some ``rows``, all genes, ``(R, G)``.

        Where a gene is not kept, as before training, there is no effect: 0, with the wrong sign.
        """
        if self.of_asked is not None:
            is_asked = rows >= self.n_rows
            if bool(is_asked.any()):
                found = self.weights.new_empty(len(rows), self.n_genes)
                found[~is_asked] = self.of_rows(rows[~is_asked], name)
                found[is_asked] = getattr(self.of_asked, name)[rows[is_asked] - self.n_rows]
                return found
        values = getattr(self, name)[rows]
        if values.shape[1] == self.n_genes:
            return values
        table = values.new_full((len(rows), self.n_genes), float(name == "sign_error"))
        return table.scatter_(1, self.genes[rows].long(), values)

    def rows_of_cells(self, codes: Tensor, doses: Tensor, effects: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that speak for each cell, and what they are multiplied by, ``(B, K)`` each.

        They are perturbations and doses; of a measured combination its own row, once; and of a
        perturbation in a context with rows of its own these. ``effects``: see
        :class:`~scvi_sams.module._effect_rows.EffectRows`. Of effects that no cell shows they are
        those that were asked for, or none.
        """
        rows = self.measured.rows_of(Combinations.of_cells(codes, doses))
        own = torch.full_like(codes, -1)
        own[:, 0] = rows.to(codes) + self.n_perturbations
        is_measured = (rows >= 0)[:, None]
        weights = (own >= 0).to(doses)
        is_asked, place = self._is_asked(effects)
        singles = torch.where(codes < self.n_perturbations, codes, -1)
        singles = torch.where(is_asked, self.n_rows + place, singles)
        pairs = self.rows_of_pairs(effects)
        singles = torch.where(pairs >= 0, pairs, singles)
        return torch.where(is_measured, own, singles), torch.where(is_measured, weights, doses)

    def rows_of_pairs(self, effects: Tensor) -> Tensor:
        """Rows of perturbations in their contexts; -1 for those that have none of their own."""
        if not len(self.pairs):
            return torch.full_like(effects, -1)
        wanted = effects.clamp(min=0).contiguous()
        place = torch.searchsorted(self.pairs, wanted).clamp(max=len(self.pairs) - 1)
        first = self.n_perturbations + len(self.combinations)
        return torch.where(self.pairs[place] == effects, first + place, -1)

    def of_cells(self, codes: Tensor, doses: Tensor, effects: Tensor) -> Tensor | None:
        """Sum of the direct effects of every cell, ``(B, G)``; ``None`` if there are none yet."""
        if not self.is_estimated:
            return None
        return self.summed(*self.rows_of_cells(codes, doses, effects), "mean")

    def summed(self, rows_of_cells: Tensor, weights: Tensor, name: str) -> Tensor:
        """Weighted sums of rows of one of the tables for every cell, ``(B, G)``."""
        rows, slots = perturbations_of_batch(rows_of_cells, self.n_rows + len(self.asked))
        return sum_over_slots(self.of_rows(rows, name)[None], slots, weights)[0]

    def spread_of(self, codes: Tensor, effects: Tensor) -> Tensor | None:
        """How wide predictions sample shifts around their mean, ``(R,)``; ``None``: as they are.

        ``codes`` are those of the perturbations of ``effects``.
        """
        if not (self.is_stacked and self.is_estimated):
            return None
        found = torch.ones(len(codes), device=codes.device)
        is_measured = codes < self.n_perturbations
        found[is_measured] = self.spread[codes[is_measured]]
        is_asked, place = self._is_asked(effects)
        if self.of_asked is not None:
            found[is_asked] = self.of_asked.spread[place[is_asked]]
        return found

    def in_predictions(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What predictions of means add for some rows, and its sd; each ``(R, G)``."""
        mean = self.of_rows(rows, "mean")
        if not self.is_stacked:
            return mean, self.of_rows(rows, "sd")
        return mean + self.of_rows(rows, "correction"), self.of_rows(rows, "uncertainty")

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take tables of any width; a model of an earlier version has none."""
        for name in self._buffers:
            saved = state.get(prefix + name)
            present = getattr(self, name)
            if saved is None:
                state[prefix + name] = present
            elif saved.shape != present.shape:
                setattr(self, name, present.new_zeros(saved.shape))
        super()._load_from_state_dict(state, prefix, *args)
        self.forget()


def add_to_logits(logits: Tensor, direct: Tensor | None) -> Tensor:
    """Add direct effects ``(..., G)`` to logits ``(..., outputs per gene x G)``.

    A likelihood of several outputs per gene has the one of the mean first.
    """
    if direct is None:
        return logits
    if logits.shape[-1] == direct.shape[-1]:
        return logits + direct
    n_genes = direct.shape[-1]
    return torch.cat([logits[..., :n_genes] + direct, logits[..., n_genes:]], dim=-1)
