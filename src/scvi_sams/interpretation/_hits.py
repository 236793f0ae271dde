"""What each perturbation does, in one row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_sams._checks import check_integer, check_key, check_model
from scvi_sams._constants import RESULT_KEYS
from scvi_sams._fdr import active_at_fdr

if TYPE_CHECKING:
    from scvi_sams.model._perturbation_model import PerturbationModel

_SURE = 2
"""Posterior standard deviations between an effect and zero, for a gene to be named."""


def perturbation_hits(
    model: PerturbationModel,
    *,
    fdr: float = 0.05,
    n_genes: int = 5,
    min_cells: int = 50,
    n_samples: int = 5000,
    n_posterior_samples: int = 500,
    interval: float = 0.95,
    key_added: str | None = RESULT_KEYS.HITS,
) -> pd.DataFrame:
    """Say of each perturbation how much it does, to which genes, and on how many cells that rests.

    Parameters
    ----------
    model
        Trained model.
    fdr
        Mask entries are called active at this false discovery rate over all perturbations
        (:func:`scvi_sams.evaluation.active_at_fdr`).
    n_genes
        Number of genes to name, up and down.
    min_cells
        Perturbations with fewer training cells are marked.
    n_samples, n_posterior_samples, interval
        Of ``predict_ate``; more samples of the posterior than there, for tails in which a mask
        that is nearly sure is off.
    key_added
        Key of ``adata.uns`` of the training data that the table is written to; ``None`` writes
        nothing.

    Returns
    -------
    One row per perturbation, the strongest first:

    - ``n_cells``: training cells that carry it, alone or in combinations; ``few_cells``: whether
      they are fewer than ``min_cells``, so that effects are shrunken and masks unsure.
    - ``expected_active_latents``: sum of inclusion probabilities; ``active_latents``: number of
      entries that are active at ``fdr``. Only for models with masks.
    - ``effect_norm``: posterior mean of the Euclidean norm over genes of the effect of a unit dose
      (``predict_ate(method="lograte")``: log2 units, or the data's for a normal likelihood), with
      ``effect_norm_low`` and ``effect_norm_high``. A norm is never negative and grows with what is
      not known: compare it with that of perturbations known to do nothing.
    - ``genes_up``, ``genes_down``: names, the largest effect first, joined by ``", "``. Only genes
      whose expected effect exceeds twice its posterior standard deviation: for a single mask entry
      that is an inclusion probability above .8.

    Raises
    ------
    SAMSError
        If ``fdr`` or ``interval`` is not between 0 and 1.

    Examples
    --------
    >>> hits = scvi_sams.tl.perturbation_hits(model, n_samples=200, n_posterior_samples=50)
    >>> len(hits)
    8
    >>> hits["effect_norm"].is_monotonic_decreasing
    True
    >>> hits.columns.tolist()[:4]
    ['n_cells', 'few_cells', 'expected_active_latents', 'active_latents']
    """
    check_model("predict_ate", model=model)
    check_integer(n_genes=n_genes)
    check_integer(at_least=0, min_cells=min_cells)
    check_key(key_added=key_added)
    n_cells = model.module.cells_per_perturbation.cpu().numpy().astype(int)
    columns: dict[str, Any] = {"n_cells": n_cells, "few_cells": n_cells < min_cells}
    if hasattr(model, "get_perturbation_masks"):
        masks = model.get_perturbation_masks(key_added=None)
        columns["expected_active_latents"] = masks.sum(axis=1).to_numpy(np.float64)
        columns["active_latents"] = active_at_fdr(masks, fdr).sum(axis=1).to_numpy()
    ate = model.predict_ate(
        method="lograte" if model.module.likelihood.is_count_likelihood else "mean",
        n_samples=n_samples,
        n_posterior_samples=n_posterior_samples,
        interval=interval,
        key_added=None,
    )
    columns |= ate.obs.to_dict("list")
    columns["genes_up"] = _strongest(ate, n_genes, sign=1)
    columns["genes_down"] = _strongest(ate, n_genes, sign=-1)
    index = pd.Index(model.perturbations, name="perturbation")
    hits = pd.DataFrame(columns, index=index)
    hits = hits.sort_values("effect_norm", ascending=False, kind="stable")
    if key_added is not None and model.adata is not None:
        model.adata.uns[key_added] = hits.copy()
        model.keep_provenance(model.adata, key_added)
    return hits


def _strongest(ate: AnnData, n_genes: int, *, sign: int) -> list[str]:
    """Name the genes with the largest effects of a sign, of those whose sign is sure."""
    n_draws = ate.uns["ate"]["n_posterior_samples"]
    posterior_sd = ate.layers["standard_error"] * n_draws**0.5
    strength = np.where(np.abs(ate.X) > _SURE * posterior_sd, sign * ate.X, 0)
    order = np.argsort(-strength, axis=1, kind="stable")[:, :n_genes]
    return [
        ", ".join(ate.var_names[genes[row[genes] > 0]])
        for genes, row in zip(order, strength, strict=True)
    ]
