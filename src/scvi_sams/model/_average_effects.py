"""Average treatment effects as tables, in one context or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import anndata
import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scvi_sams.labels._labels import Labels
from scvi_sams.labels._rows import rows_as_asked
from scvi_sams.model._basal_states import Basal, CellsToCompare
from scvi_sams.model._cell_model import CellModel
from scvi_sams.model._contrast import Contrast, EffectScale, bounds, norms, summary
from scvi_sams.model._counterfactual import drawn_effects, encode_requested, make_contrast
from scvi_sams.model._descriptions import cells_with_effects
from scvi_sams.model._noise import new_seed
from scvi_sams.model._responses import Among, response_rates

_UNCERTAINTY = ("standard_error", "interval_low", "interval_high")
"""Layers of a table of effects. By name, because those of anndata 0.13 include X."""


class EffectSettings(NamedTuple):
    """Arguments of ``predict_ate`` that determine how effects are computed."""

    method: EffectScale
    n_samples: int
    n_posterior_samples: int
    basal: Basal | None
    library_size: float | None
    target_sum: float
    interval: float | None


def average_effects(
    model: CellModel,
    labels: list[str],
    dosages: Sequence[float | str] | None,
    among: Among,
    contexts: list[str] | None,
    indices: Sequence[int] | Sequence[bool] | None,
    settings: EffectSettings,
) -> AnnData:
    """Average treatment effects of labels, as returned by ``predict_ate``.

    In each of the ``contexts``; ``None``: averaged over the contexts of the cells.
    """
    requested = encode_requested(model, labels, dosages)
    rates = response_rates(model.module, requested, among)
    rows = rows_as_asked(labels, dosages, model._spelling)
    genes = pd.Index(model.get_var_names())
    tables = []
    for context in [None] if contexts is None else contexts:
        cells = CellsToCompare(context, indices)
        contrast, description = make_contrast(model, *settings, cells)
        of_context = rows if context is None else rows.assign(context=context)
        if context is not None or model.unmeasured:
            of_context = of_context.assign(measured=_are_measured(model, requested, context))
        table = effects_of_labels(contrast, of_context, requested, genes, settings.interval, rates)
        table.uns["ate"] = description | cells_with_effects(model.module, among)
        tables.append(table)
    if contexts is None or len(contexts) == 1:
        return tables[0]
    for table, context in zip(tables, contexts, strict=True):
        table.obs_names = [f"{name}:{context}" for name in table.obs_names]
    joined = anndata.concat(tables, merge="same")
    joined.uns["ate"] = tables[0].uns["ate"] | {"context": np.array(contexts, dtype=str)}
    return joined


def _are_measured(model: CellModel, requested: Labels, context: str | None) -> np.ndarray:
    """Whether registered cells have all perturbations of each label, in a context or in any."""
    rows = model.module.effect_rows
    codes = torch.as_tensor(requested.codes.astype(np.int64), device=rows.measured.device)
    if context is None:
        return (codes < rows.n_perturbations).all(dim=1).cpu().numpy()
    where = torch.full_like(codes[:, 0], model.contexts.index(context))
    places = rows.places(rows.of_cells(codes, where))
    return ((codes < 0) | (places >= 0)).all(dim=1).cpu().numpy()


def effects_of_labels(
    contrast: Contrast,
    rows: pd.DataFrame,
    requested: Labels,
    genes: pd.Index,
    interval: float | None,
    rates: np.ndarray,
) -> AnnData:
    """Average treatment effects, labels x genes, as returned by ``predict_ate``.

    ``rows`` are the rows of the labels from :func:`~scvi_sams.labels._rows.rows_as_asked`;
    ``rates``, ``(n_labels,)``, the proportions of cells with the effects.
    """
    names = ["X", *(_UNCERTAINTY[:1] if interval is None else _UNCERTAINTY)]
    tables = {name: np.empty((len(rows), len(genes)), np.float32) for name in names}
    n_draws = len(contrast.z_basal)
    of_draws = torch.empty(n_draws, len(rows), device=contrast.module.device)
    found = drawn_effects(contrast.module, requested, n_draws, new_seed(), contrast.contexts)
    for row, drawn in enumerate(found):
        effects = contrast.effect(drawn).mul_(float(rates[row]))
        for name, value in zip(names, summary(effects, interval, caused_by=drawn), strict=True):
            tables[name][row] = value.cpu().numpy()
        of_draws[:, row] = norms(effects)
    obs = rows.assign(**norm_columns(of_draws, interval))
    return AnnData(tables.pop("X"), obs=obs, var=pd.DataFrame(index=genes), layers=tables)


def norm_columns(of_draws: torch.Tensor, interval: float | None) -> dict[str, np.ndarray]:
    """Columns of ``obs`` for norms of effects, ``(n_draws, n_labels)``."""
    columns = {"effect_norm": of_draws.mean(dim=0)}
    if interval is not None:
        low, high = bounds(of_draws, interval)
        columns |= {"effect_norm_low": low, "effect_norm_high": high}
    return {name: values.double().cpu().numpy() for name, values in columns.items()}


def keep_effects(model: CellModel, result: AnnData, key_added: str | None) -> None:
    """Write a table of effects, with names of its rows, to ``uns`` of the training data."""
    if model.adata is None or key_added is None:
        return
    dosages = result.obs["dosage"].to_numpy()
    model.adata.uns[key_added] = {
        "effect": result.X.copy(),
        **{n: result.layers[n].copy() for n in _UNCERTAINTY if n in result.layers},
        "perturbations": np.array(result.obs["perturbation"], dtype=str),
        "dosages": dosages if dosages.dtype.kind == "f" else dosages.astype(str),
        "genes": np.array(result.var_names, dtype=str),
        **({"contexts": result.obs["context"].to_numpy(str)} if "context" in result.obs else {}),
        **result.uns["ate"],
    }
    model.keep_provenance(model.adata, key_added)
