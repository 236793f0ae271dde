"""What perturbations do to single genes, beside what they do through the latent state."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scvi_sams.module._minibatch import perturbations_of_batch, sum_over_slots

COMPONENTS = ("model", "entrywise", "rowwise")
"""What predictions may be made of: the model with its direct effects, and the effects in the
training cells, shrunken entry by entry or as a whole."""

MOST_ENTRIES = 20_000_000
"""Perturbations x genes that are kept: 0.4 GB for five numbers each. Of larger tables, each
perturbation has the genes in which its effects, or what is not known of them, matter most."""

_TABLES = ("mean", "sd", "sign_error", "correction", "uncertainty")


class Residuals(NamedTuple):
    """A block of rows of the tables of :class:`DirectEffects`; perturbations x kept genes each."""

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

    ``logit_ig = decoder_g(z_i) + sum_t d_it r_tg``. They are no parameters: training fits them in
    closed form. Until then the tables are empty and nothing is added.

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
    stacked: Tensor

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
        self.register_buffer("stacked", torch.tensor(is_stacked))

    @property
    def n_kept(self) -> int:
        """Genes that are kept of each perturbation."""
        return min(self.n_genes, max(1, MOST_ENTRIES // max(1, self.n_perturbations)))

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
        if not (self.is_stacked and self.is_estimated):
            return None
        return dict(zip(COMPONENTS, self.weights.tolist(), strict=True))

    def fill(self, tables: Residuals, weights: Tensor) -> None:
        """Take the estimates of all perturbations, and the weights of the :data:`COMPONENTS`."""
        for name, values in tables._asdict().items():
            setattr(self, name, values.to(self.weights.device))
        self.weights.copy_(weights)

    def of_rows(self, rows: Tensor, name: str) -> Tensor:
        """One of the tables for perturbations ``rows``, all genes, ``(R, G)``.

        Where a gene is not kept, as before training, there is no effect: 0, with the wrong sign.
        """
        values = getattr(self, name)[rows]
        if values.shape[1] == self.n_genes:
            return values
        table = values.new_full((len(rows), self.n_genes), float(name == "sign_error"))
        return table.scatter_(1, self.genes[rows].long(), values)

    def of_cells(self, codes: Tensor, doses: Tensor) -> Tensor | None:
        """Sum of the direct effects of every cell, ``(B, G)``; ``None`` if there are none yet."""
        if not self.is_estimated:
            return None
        rows, slots = perturbations_of_batch(codes, self.n_perturbations)
        return sum_over_slots(self.of_rows(rows, "mean")[None], slots, doses)[0]

    def spread_of(self, rows: Tensor) -> Tensor | None:
        """How wide predictions sample shifts around their mean, ``(R,)``; ``None``: as they are."""
        return self.spread[rows] if self.is_stacked and self.is_estimated else None

    def in_predictions(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What predictions of means add for perturbations, and its sd; each ``(R, G)``."""
        mean = self.of_rows(rows, "mean")
        if not self.is_stacked:
            return mean, self.of_rows(rows, "sd")
        return mean + self.of_rows(rows, "correction"), self.of_rows(rows, "uncertainty")

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take tables of any width; a model of an earlier version has none."""
        for name in ("spread", "genes", *_TABLES, "weights", "stacked"):
            saved = state.get(prefix + name)
            present = getattr(self, name)
            if saved is None:
                state[prefix + name] = present
            elif saved.shape != present.shape:
                setattr(self, name, present.new_zeros(saved.shape))
        super()._load_from_state_dict(state, prefix, *args)


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
