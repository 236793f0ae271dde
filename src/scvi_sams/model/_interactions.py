"""Genetic interactions: what a combination does beyond the sum of its perturbations."""

from __future__ import annotations

from itertools import islice
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scvi_sams._checks import check_number
from scvi_sams.data._field import registered_labels
from scvi_sams.exceptions import SAMSError
from scvi_sams.labels._labels import distinct_combinations, parts_of_combination
from scvi_sams.model._cell_model import CellModel
from scvi_sams.model._contrast import Contrast
from scvi_sams.model._counterfactual import drawn_shifts, encode_requested
from scvi_sams.model._draws import bounds, summary

_PAIRS_PER_CHUNK = 32
"""Combinations whose single effects are held in memory at a time."""


class Interaction(NamedTuple):
    """Draws of a combination's effect and of its additive expectation, ``(n_draws, n_genes)``."""

    effect: torch.Tensor
    additive: torch.Tensor

    def summary(self, interval: float) -> dict[str, float]:
        """Columns of ``obs`` in a table of interactions."""
        effect, additive = self.effect.mean(dim=0), self.additive.mean(dim=0)
        direction = additive / additive.norm().clamp(min=torch.finfo(additive.dtype).tiny)
        draws = (self.effect - self.additive) @ direction
        low, high = bounds(draws, interval)
        return {
            "score": float(draws.mean()),
            "score_low": float(low),
            "score_high": float(high),
            "additive_score": float(additive.norm()),
            "effect_norm": float(effect.norm()),
            "interaction_norm": float((effect - additive).norm()),
        }


def interactions_of_labels(
    model: CellModel, contrast: Contrast, labels: list[str], interval: float
) -> AnnData:
    """Interactions, combinations x genes, as ``predict_interactions`` returns them."""
    check_number(above=0, below=1, interval=interval)
    spelling = model._spelling
    parts = [
        parts_of_combination(spelling.canonical(label), spelling.delimiter) for label in labels
    ]
    names = ("X", "effect", "additive", "standard_error", "interval_low", "interval_high")
    genes = pd.Index(model.get_var_names())
    tables = {name: np.empty((len(labels), len(genes)), np.float32) for name in names}
    rows = []
    for start in range(0, len(labels), _PAIRS_PER_CHUNK):
        chunk = slice(start, start + _PAIRS_PER_CHUNK)
        found = _drawn_interactions(model, contrast, labels[chunk], parts[chunk])
        for place, drawn in enumerate(found, start):
            mean, *uncertainty = summary(drawn.effect - drawn.additive, interval)
            means = (mean, drawn.effect.mean(0), drawn.additive.mean(0))
            for name, value in zip(names, (*means, *uncertainty), strict=True):
                tables[name][place] = value.cpu().numpy()
            rows.append(drawn.summary(interval))
    return AnnData(
        tables.pop("X"),
        obs=pd.DataFrame(rows, index=pd.Index(labels, name="combination")),
        var=pd.DataFrame(index=genes),
        layers=tables,
    )


def _drawn_interactions(
    model: CellModel, contrast: Contrast, labels: list[str], parts: list[list[str]]
) -> list[Interaction]:
    singles = sorted({name for names in parts for name in names})
    requested = encode_requested(model, [*singles, *labels])
    drawn = drawn_shifts(model.module, requested, len(contrast.z_basal))
    of_single = {
        name: contrast.effect(shift)
        for name, shift in zip(singles, islice(drawn, len(singles)), strict=True)
    }
    return [
        Interaction(contrast.effect(shift), torch.stack([of_single[p] for p in names]).sum(0))
        for names, shift in zip(parts, drawn, strict=True)
    ]


def measured_combinations(model: CellModel) -> list[str]:
    """Canonical labels of the combinations in the training data, sorted."""
    model._check_has_data("combinations")
    spelling, vocabulary = model._spelling, model.perturbations
    codes = registered_labels(model.adata_manager).codes
    cells, _ = distinct_combinations(codes, vocabulary)
    if not model._additive:  # a combination is the one perturbation of a cell
        joint = spelling.delimiter or "+"
        cells = [name.split(joint) for names in cells for name in names]
    found = sorted({spelling.join(parts) for parts in cells if len(parts) > 1})
    if not found:
        raise SAMSError(
            "The training data has no combinations. Name some in `combinations`; "
            "rank_unseen_pairs looks at all pairs."
        )
    return found
