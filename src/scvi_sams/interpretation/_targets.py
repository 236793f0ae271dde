"""Effects of perturbations on the genes that they target."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from scvi_sams._checks import check_key, check_number
from scvi_sams._constants import RESULT_KEYS
from scvi_sams._plurals import counted
from scvi_sams.exceptions import InvalidArgumentError, MissingKeyError
from scvi_sams.labels._names import check_known, listing
from scvi_sams.model._contrast import bounds
from scvi_sams.model._counterfactual import drawn_effects, encode_requested, make_contrast
from scvi_sams.model._doses import doses_to_report
from scvi_sams.model._noise import new_seed
from scvi_sams.module._direct_effects import DirectEffects

if TYPE_CHECKING:
    from scvi_sams.model._perturbation_model import PerturbationModel

logger = logging.getLogger("scvi.sams")

_CONTINUITY = 0.5
"""Pseudocount for counts that may be zero, before taking logarithms."""


@torch.inference_mode()
def target_knockdown(
    model: PerturbationModel,
    *,
    target_genes: Mapping[str, str] | None = None,
    n_samples: int = 5000,
    n_posterior_samples: int = 500,
    interval: float = 0.95,
    key_added: str | None = RESULT_KEYS.TARGETS,
) -> pd.DataFrame:
    """Change of the target gene of each perturbation.

    Check this first in a CRISPRi, CRISPRa or overexpression screen: a guide that does not change
    its own gene did not work, whatever other changes its cells show. (A knockout need not change
    the RNA of its gene.)

    Parameters
    ----------
    model
        Trained model.
    target_genes
        Gene of ``var_names`` that a perturbation targets, by the name of the perturbation. Default:
        the gene with the name of the perturbation, also for perturbations that are not in it.
    n_samples, n_posterior_samples, interval
        As in ``predict_ate``, with more posterior samples for accurate tails.
    key_added
        Key of ``adata.uns`` of the training data to which the table is written; ``None`` writes
        nothing.

    Returns
    -------
    One row per perturbation whose gene was measured, the strongest decrease first:

    - ``gene``, and ``dosage``, the largest in training cells, for all following columns.
    - ``lfc``, with its posterior interval ``lfc_low`` and ``lfc_high``: predicted log2 fold change
      of the gene's mean rate; -2 leaves a quarter.
    - ``direct``: the part that is a direct effect, in the same units, and ``lfsr``, its local false
      sign rate (``get_direct_effects``); the rest comes from the latent state and from stacking.
      Only for models with direct effects.
    - ``n_cells``: cells in the data with only this perturbation, at that dose, and ``observed``:
      log2 fold change of the gene's counts per size of the cell, between sums over control cells
      and over these cells, with a pseudocount of 0.5 each; NaN without cells. Only for models with
      their data.

    The two fold changes need not agree: predictions fit means of logarithms, the scale on which
    effects are reported, while ``observed`` is that of means. If some cells escaped, or counts are
    low, ``lfc`` is further from 0.

    For a normal likelihood, all of these are differences of means, in the units of the data.
    ``attrs["without_gene"]`` names the perturbations without a row.

    Raises
    ------
    MissingKeyError
        If no perturbation has a gene among those measured.
    UnknownPerturbationError
        If ``target_genes`` has a perturbation that the model does not know.
    InvalidArgumentError
        If ``target_genes`` is not a mapping, or a number is out of range.

    Examples
    --------
    >>> targets = {"P001": "gene_0004", "P002": "gene_0007"}
    >>> table = scvi_sams.tl.target_knockdown(model, target_genes=targets, n_samples=500)
    >>> table.sort_index()[["gene", "n_cells"]].values.tolist()
    [['gene_0004', 60], ['gene_0007', 60]]
    >>> len(table.attrs["without_gene"])  # no gene is called P003
    6
    """
    check_key(key_added=key_added)
    check_number(above=0, below=1, interval=interval)
    rows, genes, without = _targets(model, target_genes)
    names = [str(name) for name in np.array(model.perturbations, dtype=object)[rows]]
    module = model.module
    dosages = doses_to_report(model.largest_doses_, len(model.perturbations))
    columns: dict[str, Any] = {"gene": np.array(model.get_var_names(), dtype=object)[genes]}
    columns["dosage"] = dosages[rows]
    drawn = (n_samples, n_posterior_samples, interval)
    columns |= _predicted_changes(model, names, dosages[rows], genes, *drawn)
    if module.fits_direct_effects and module.direct is not None and module.direct.is_estimated:
        is_count = module.likelihood.is_count_likelihood
        columns |= _direct_changes(module.direct, rows, genes, is_count=is_count)
        columns["direct"] *= dosages[rows]
    if model.adata is not None:
        columns |= _observed_changes(model, rows, genes, dosages)
    table = pd.DataFrame(columns, index=pd.Index(names, name="perturbation"))
    table = table.sort_values("lfc", kind="stable")
    table.attrs["without_gene"] = without
    if without:
        logger.info(
            f"{counted(len(without), 'perturbation has', 'perturbations have')} no gene among "
            f"those measured, such as {listing(without, 3)}; you can name it in `target_genes`."
        )
    if key_added is not None and model.adata is not None:
        model.adata.uns[key_added] = table.copy()
        model.keep_provenance(model.adata, key_added)
    return table


def _targets(
    model: PerturbationModel, target_genes: Mapping[str, str] | None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Positions of perturbations with a gene and of these genes; perturbations without."""
    if target_genes is not None and not isinstance(target_genes, Mapping):
        raise InvalidArgumentError(
            "`target_genes` must be a dict from names of perturbations to genes, such as "
            f"{{'guide_1': 'STAT1'}}, not {target_genes!r}."
        )
    targets = {} if target_genes is None else dict(target_genes)
    perturbations = model.perturbations
    check_known(targets, perturbations)
    names = [str(targets.get(name, name)) for name in perturbations]
    genes = pd.Index(model.get_var_names()).get_indexer(pd.Index(names))
    rows = np.flatnonzero(genes >= 0)
    if not len(rows):
        raise MissingKeyError(
            f"No perturbation targets a gene that was measured: {listing(names)} are not among "
            f"{listing(model.get_var_names())}. Name the genes in `target_genes`."
        )
    without = [perturbations[row] for row in np.flatnonzero(genes < 0)]
    return rows, genes[rows], without


def _predicted_changes(
    model: PerturbationModel,
    names: list[str],
    dosages: np.ndarray,
    genes: np.ndarray,
    n_samples: int,
    n_posterior_samples: int,
    interval: float,
) -> dict[str, np.ndarray]:
    requested = encode_requested(model, names, dosages.tolist())
    contrast, _ = make_contrast(
        model, "mean", n_samples, n_posterior_samples, "prior", None, 1.0, interval
    )
    n_draws = len(contrast.z_basal)
    effects = drawn_effects(contrast.module, requested, n_draws, new_seed())
    treated = torch.stack(
        [contrast.mean(drawn)[:, gene] for gene, drawn in zip(genes, effects, strict=True)],
        dim=1,
    )
    control = contrast.control[:, genes]
    if contrast.module.likelihood.is_count_likelihood:
        smallest = torch.finfo(treated.dtype).tiny
        treated, control = treated.clamp(min=smallest).log2(), control.clamp(min=smallest).log2()
    change = treated - control
    columns = (change.mean(dim=0), *bounds(change, interval))
    return {
        name: values.cpu().double().numpy()
        for name, values in zip(("lfc", "lfc_low", "lfc_high"), columns, strict=True)
    }


def _direct_changes(
    direct: DirectEffects, rows: np.ndarray, genes: np.ndarray, *, is_count: bool
) -> dict[str, np.ndarray]:
    # One perturbation at a time: for a large screen all genes of all do not fit into memory.
    each = torch.as_tensor(rows, device=direct.mean.device).split(1)
    mean, sign_error = np.array(
        [
            [
                float(direct.of_rows(row, table)[0, gene])
                for row, gene in zip(each, genes, strict=True)
            ]
            for table in ("mean", "sign_error")
        ]
    )
    return {"direct": mean / (np.log(2) if is_count else 1), "lfsr": sign_error}


def _observed_changes(
    model: PerturbationModel, rows: np.ndarray, genes: np.ndarray, dosages: np.ndarray
) -> dict[str, np.ndarray]:
    """Cells with only one perturbation at its dose, and the observed change of its gene."""
    n_perturbations = len(model.perturbations)
    gene_of = np.full(n_perturbations, -1)
    gene_of[rows] = genes
    is_count = model.module.likelihood.is_count_likelihood
    n_cells, size, total = np.zeros((3, n_perturbations))
    size_of_controls, total_of_controls = 0.0, np.zeros(len(genes))
    for _, cells in model._read(None, None, None).cells():
        x, codes, doses = (v.cpu().numpy() for v in (cells.x, cells.codes, cells.doses))
        sizes = cells.size.cpu().numpy() if is_count else np.ones(len(x))
        n_carried, code = (codes >= 0).sum(axis=1), codes.max(axis=1)
        controls = n_carried == 0
        size_of_controls += sizes[controls].sum()
        total_of_controls += x[controls][:, genes].sum(axis=0)
        alone = (
            (n_carried == 1) & np.isclose(doses.sum(axis=1), dosages[code]) & (gene_of[code] >= 0)
        )
        code = code[alone]
        np.add.at(n_cells, code, 1)
        np.add.at(size, code, sizes[alone])
        np.add.at(total, code, x[alone, gene_of[code]])
    with np.errstate(divide="ignore", invalid="ignore"):  # groups without cells
        if is_count:
            treated = np.log2((total[rows] + _CONTINUITY) / size[rows])
            control = np.log2((total_of_controls + _CONTINUITY) / size_of_controls)
        else:
            treated, control = total[rows] / size[rows], total_of_controls / size_of_controls
        change = np.where((n_cells[rows] > 0) & (size_of_controls > 0), treated - control, np.nan)
    return {"n_cells": n_cells[rows].astype(int), "observed": change}
