"""Effects of perturbations on single genes, in addition to those through the latent state."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scvi_sams.module._combinations import Combinations
from scvi_sams.module._minibatch import perturbations_of_batch, sum_over_slots

COMPONENTS = ("model", "entrywise", "rowwise")
"""Components of stacked predictions: the model with its direct effects, and the effects in the
training cells, shrunken per entry or as a whole."""

COMPONENTS_IN_CONTEXTS = (*COMPONENTS, "other contexts")
"""The same for contexts, plus the estimate from other contexts."""

FEWEST_CELLS, MOST_COMBINATIONS = 5, 10_000
"""Smallest number of cells of a combination with its own row, and largest number of such rows."""

MOST_ENTRIES = 20_000_000
"""Rows x genes that are stored: 0.4 GB for five numbers each. In larger tables, each row has the
genes in which its effects, or their uncertainty, matter most."""

MOST_SUMMED = 200_000_000
"""Rows x genes up to which perturbations in contexts have rows, those with most cells first: sums
of their expression are kept in two tables of that size."""

_TABLES = ("mean", "sd", "sign_error", "correction", "uncertainty")


class Residuals(NamedTuple):
    """A block of rows of the tables of :class:`DirectEffects`; rows x stored genes each."""

    spread: Tensor
    """Scale of the samples of the model's effect around its mean in predictions, ``(R,)``. 1 is the
    model's posterior, which is wider than that of the total effect estimated from the cells."""
    genes: Tensor
    """Positions of the genes, int32."""
    mean: Tensor
    """Posterior mean of direct effects, per unit dose, on the decoder's logits."""
    sd: Tensor
    """Posterior SD of the direct effects."""
    sign_error: Tensor
    """Local false sign rate of the direct effects."""
    correction: Tensor
    """Added to direct effects by stacking, in predictions of means."""
    uncertainty: Tensor
    """SD of what predictions add to the model's effect, per unit dose."""


class Answers(NamedTuple):
    """Estimates of effects without cells, made on request. All genes are stored."""

    effects: Tensor
    """Rows of effects, ascending."""
    combinations: Combinations
    """Combinations of rows of effects that contain some of these."""
    tables: Residuals | None
    """Of the effects, then of the combinations; ``None`` if there are none."""

    def place_of(self, effects: Tensor) -> Tensor:
        """Position of effects among these, -1 for others."""
        if not len(self.effects):
            return torch.full_like(effects, -1)
        place = torch.searchsorted(self.effects, effects.contiguous())
        place = place.clamp(max=len(self.effects) - 1)
        return torch.where(self.effects[place] == effects, place, -1)

    def place_of_combinations(self, effects: Tensor, doses: Tensor) -> Tensor:
        """Position of each cell's combination in the tables, ``(B,)``, -1 for others."""
        found = self.combinations.rows_of(Combinations.of_cells(effects, doses))
        return torch.where(found >= 0, found + len(self.effects), -1)

    def with_effects(self, effects: Tensor, tables: Residuals) -> Answers:
        """Add effects, in any order."""
        effects = torch.cat([self.effects, effects])
        order = effects.argsort()
        of_effects, of_combinations = self._split(tables)
        columns = zip(of_effects, tables, of_combinations, strict=True)
        joined = (torch.cat([torch.cat([a, b])[order], c]) for a, b, c in columns)
        return Answers(effects[order], self.combinations, Residuals(*joined))

    def with_combinations(self, combinations: Combinations, tables: Residuals) -> Answers:
        """Add combinations, in any order."""
        combinations = self.combinations.with_others(combinations)
        order = combinations.order()
        of_effects, of_combinations = self._split(tables)
        columns = zip(of_effects, of_combinations, tables, strict=True)
        joined = (torch.cat([a, torch.cat([b, c])[order]]) for a, b, c in columns)
        return Answers(self.effects, combinations.at(order), Residuals(*joined))

    def without_combinations(self) -> Answers:
        """Effects alone."""
        if self.tables is None:
            return self
        of_effects, _ = self._split(self.tables)
        return Answers(self.effects, self.combinations.at(slice(0)), of_effects)

    def _split(self, like: Residuals) -> tuple[Residuals, Residuals]:
        """Tables of effects, and of combinations, without rows if there are none."""
        tables = self.tables or Residuals(*(column[:0] for column in like))
        n = len(self.effects)
        return (
            Residuals(*(column[:n] for column in tables)),
            Residuals(*(column[n:] for column in tables)),
        )

    @property
    def numbers(self) -> Tensor:
        """For every row, the number of an effect: that of a combination is its last one's."""
        return torch.cat([self.effects, self.combinations.codes[:, 0]])


class DirectEffects(nn.Module):
    """Tables of additions to the decoder's logits, perturbations x genes.

    ``logit_ig = decoder_g(z_i) + sum_t d_it r_tg``. A measured combination has its own row, which
    replaces the sum in cells that received it at the same doses, and so includes interactions of
    its perturbations. If contexts are registered, so has a perturbation in each context in which it
    was measured (``pairs``, rows of effects). Rows of combinations follow those of the
    perturbations; those of pairs come last.

    The tables are not parameters: they are computed in closed form when training ends. Until then
    they are empty and nothing is added.

    Effects without cells have additional rows, of ``answers`` to requests.

    Parameters
    ----------
    n_perturbations, n_genes
        Size of the tables.
    is_stacked
        Whether to estimate weights of the :data:`COMPONENTS`, and to add ``correction`` in
        predictions of means.
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
    answers: Answers

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
        """Number of genes stored per row."""
        return min(self.n_genes, max(1, MOST_ENTRIES // max(1, self.n_rows)))

    @property
    def n_rows(self) -> int:
        """Number of perturbations, measured combinations, and perturbations in contexts."""
        return self.n_perturbations + len(self.combinations) + len(self.pairs)

    @property
    def measured(self) -> Combinations:
        """Combinations that have rows of their own."""
        return Combinations(self.combinations, self.combination_doses)

    @property
    def is_estimated(self) -> bool:
        """Whether direct effects have been estimated."""
        return self.mean.shape[1] > 0

    @property
    def is_stacked(self) -> bool:
        """Whether predictions of means are an average of the :data:`COMPONENTS`."""
        return bool(self.stacked)

    @property
    def stacking(self) -> dict[str, float] | None:
        """Weights of the :data:`COMPONENTS`; ``None`` if predictions are those of the model."""
        return self._weights(self.weights)

    @property
    def stacking_of_combinations(self) -> dict[str, float] | None:
        """The same for measured combinations; also ``None`` if there are none."""
        return self._weights(self.combination_weights) if len(self.combinations) else None

    @property
    def stacking_of_contexts(self) -> dict[str, float] | None:
        """Weights of the :data:`COMPONENTS_IN_CONTEXTS`; also ``None`` if there are none."""
        return self._weights(self.context_weights) if len(self.pairs) else None

    def _weights(self, weights: Tensor) -> dict[str, float] | None:
        if not (self.is_stacked and self.is_estimated):
            return None
        return dict(zip(COMPONENTS_IN_CONTEXTS, weights.tolist(), strict=False))

    def measure(self, codes: Tensor, doses: Tensor, effects: Tensor | None = None) -> None:
        """Give rows to the combinations of some cells, ``(N, K)`` each; estimates are dropped.

        With ``effects``, ``(N, K)``, also to perturbations in contexts, from cells with only one.
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
        """Set the estimates of all rows, and the weights of the :data:`COMPONENTS`."""
        for name, values in tables._asdict().items():
            setattr(self, name, values.to(self.weights.device))
        self.weights.copy_(weights)
        if of_combinations is not None:
            self.combination_weights.copy_(of_combinations)

    def forget(self) -> None:
        """Drop estimates of effects without cells: they are computed again on request."""
        # Not buffers: requests differ between processes, and training changes buffers in place.
        nothing = torch.zeros(0, dtype=torch.int64, device=self.weights.device)
        combinations = Combinations(nothing[:, None], self.weights.new_zeros(0, 1))
        self.answers = Answers(nothing, combinations, None)

    def _apply(self, *args: Any, **kwargs: Any) -> DirectEffects:
        """Move the tables, without estimates that can be computed again."""
        moved = super()._apply(*args, **kwargs)
        self.forget()
        return moved

    def numbers_of(self, rows: Tensor) -> Tensor:
        """Numbers of rows that, unlike ``rows``, do not depend on other requests."""
        numbers = self.answers.numbers
        if not len(numbers):
            return rows
        place = (rows - self.n_rows).clamp(min=0, max=len(numbers) - 1)
        return torch.where(rows >= self.n_rows, self.n_rows + numbers[place], rows)

    def of_rows(self, rows: Tensor, name: str) -> Tensor:
        """One of the tables for some ``rows``, all genes, ``(R, G)``.

        Genes that are not stored, and all genes before training, have no effect: 0, with a false
        sign rate of 1.
        """
        answers = self.answers.tables
        if answers is not None:
            is_asked = rows >= self.n_rows
            if bool(is_asked.any()):
                found = self.weights.new_empty(len(rows), self.n_genes)
                found[~is_asked] = self.of_rows(rows[~is_asked], name)
                found[is_asked] = getattr(answers, name)[rows[is_asked] - self.n_rows]
                return found
        values = getattr(self, name)[rows]
        if values.shape[1] == self.n_genes:
            return values
        table = values.new_full((len(rows), self.n_genes), float(name == "sign_error"))
        return table.scatter_(1, self.genes[rows].long(), values)

    def rows_of_cells(self, codes: Tensor, doses: Tensor, effects: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that apply to each cell, and their factors, ``(B, K)`` each.

        These are perturbations and doses; for a measured combination its own row, once; and for a
        perturbation in a context with rows of its own, these. ``effects``: see
        :class:`~scvi_sams.module._effect_rows.EffectRows`. Effects without cells, and
        combinations with them, have the requested rows, or none.
        """
        rows = self.measured.rows_of(Combinations.of_cells(codes, doses))
        rows = torch.where(rows >= 0, rows + self.n_perturbations, -1)
        if len(self.answers.combinations.codes):
            place = self.answers.place_of_combinations(effects, doses)
            rows = torch.where(place >= 0, self.n_rows + place, rows)
        own = torch.full_like(codes, -1)
        own[:, 0] = rows.to(codes)
        has_own = (rows >= 0)[:, None]
        weights = (own >= 0).to(doses)
        place = self.answers.place_of(effects)
        singles = torch.where(codes < self.n_perturbations, codes, -1)
        singles = torch.where(place >= 0, self.n_rows + place, singles)
        pairs = self.rows_of_pairs(effects)
        singles = torch.where(pairs >= 0, pairs, singles)
        return torch.where(has_own, own, singles), torch.where(has_own, weights, doses)

    def rows_of_pairs(self, effects: Tensor) -> Tensor:
        """Rows of perturbations in their contexts; -1 for those without a row of their own."""
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
        rows, slots = perturbations_of_batch(rows_of_cells, self.n_rows + len(self.answers.numbers))
        return sum_over_slots(self.of_rows(rows, name)[None], slots, weights)[0]

    def spread_of(self, codes: Tensor, effects: Tensor) -> Tensor | None:
        """Scale of the samples of shifts around their mean, ``(R,)``; ``None``: unscaled.

        ``codes`` are those of the perturbations of ``effects``.
        """
        if not (self.is_stacked and self.is_estimated):
            return None
        found = torch.ones(len(codes), device=codes.device)
        is_measured = codes < self.n_perturbations
        found[is_measured] = self.spread[codes[is_measured]]
        if self.answers.tables is not None:
            place = self.answers.place_of(effects)
            found[place >= 0] = self.answers.tables.spread[place[place >= 0]]
        return found

    def are_mean_rates(self, rows: Tensor) -> Tensor:
        """Whether additions of rows change the log of the mean rate; others the mean log rate.

        For counts, these differ by half the variance. Estimates without cells are mean logs.
        """
        return rows < self.n_rows

    def in_predictions(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Additions to predictions of means for some rows, and their SD; each ``(R, G)``."""
        mean = self.of_rows(rows, "mean")
        if not self.is_stacked:
            return mean, self.of_rows(rows, "sd")
        return mean + self.of_rows(rows, "correction"), self.of_rows(rows, "uncertainty")

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load tables of any width; a model of an earlier version has none."""
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

    In a likelihood with several outputs per gene the first is that of the mean.
    """
    if direct is None:
        return logits
    if logits.shape[-1] == direct.shape[-1]:
        return logits + direct
    n_genes = direct.shape[-1]
    return torch.cat([logits[..., :n_genes] + direct, logits[..., n_genes:]], dim=-1)
