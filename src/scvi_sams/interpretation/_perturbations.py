"""Summarise perturbations, one row each, and compare them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import cdist, squareform

from scvi_sams._checks import (
    check_ate,
    check_choice,
    check_integer,
    check_key,
    check_matrix,
    check_table,
)
from scvi_sams._constants import RESULT_KEYS
from scvi_sams._fdr import active_at_fdr
from scvi_sams._plurals import counted
from scvi_sams.data._field import registered_labels
from scvi_sams.exceptions import SAMSError
from scvi_sams.interpretation._calls import called_masks
from scvi_sams.interpretation._confounding import confounding_columns
from scvi_sams.interpretation._programs import means_of_effects
from scvi_sams.interpretation._row_order import MOST_FOR_OPTIMAL_ORDER
from scvi_sams.interpretation._stored import MASKS, Source, is_ate, result_of
from scvi_sams.model._doses import doses_to_report

if TYPE_CHECKING:
    from scvi_sams.model._perturbation_model import PerturbationModel

logger = logging.getLogger("scvi.sams")

_NO_NORM = 0.01
"""Norm below which the lower end of an interval counts as zero."""
_SCALE = ("method", "units", "target_sum", "size_factor_key")
SURE = 2
"""Smallest ratio of an effect to its posterior SD for a gene to be named."""


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
    """Summarise each perturbation: strength of its effect, genes that change, and certainty.

    Parameters
    ----------
    model
        Trained model.
    fdr
        False discovery rate of mask entries that are called (:func:`called_masks`), and of
        perturbations whose cells differ from control cells (``model.test_perturbations``).
    n_genes
        Number of genes to name, up and down.
    min_cells
        Perturbations with fewer training cells are marked.
    n_samples, n_posterior_samples, interval
        As in ``predict_ate``, with more posterior samples for accurate tails, in which a nearly
        certain mask is off.
    key_added
        Key of ``adata.uns`` of the training data to which the table is written; ``None`` writes
        nothing.

    Returns
    -------
    One row per perturbation, the strongest first:

    - ``is_hit``: whether its cells differ from control cells at ``fdr`` (a test that does not
      depend on the model), the model names a gene that changes, and the interval of the norm
      excludes 0.
    - ``n_cells``: training cells with it, alone or in combinations; ``few_cells``: whether they are
      fewer than ``min_cells``, so that effects are shrunken and masks uncertain.
    - ``q_value``: of the test that cells differ, over the screen.
    - ``confounded``: unregistered columns of ``adata.obs`` that are confounded with the
      perturbation (another lane or donor than that of control cells), joined by ``", "``. Its
      effects may be theirs: register them as ``batch_key`` or covariates, if control cells have the
      same levels.
    - ``expected_active_latents``: sum of inclusion probabilities; ``active_latents``: number of
      entries called at ``fdr`` by masks and test; ``unstable``: whether masks alone call an entry
      that the test does not support. Only for models with masks.
    - ``dosage``: the dose of all following columns, the largest in training cells.
    - ``effect_norm``: posterior mean of the Euclidean norm over genes of the effect
      (``predict_ate(method="lograte")``: log2 units, or the data's for a normal likelihood), with
      ``effect_norm_low`` and ``effect_norm_high``. A norm is never negative and increases with
      uncertainty: compare it with that of perturbations known to have no effect.
    - ``genes_up``, ``genes_down``: names, the largest effect first, joined by ``", "``. Only genes
      whose expected effect exceeds twice its posterior SD: for a single mask entry this is an
      inclusion probability above 0.8.

    ``attrs["ate"]`` describes the scale of effects, like ``uns["ate"]`` of ``predict_ate``.

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
    >>> hits.columns.tolist()[:5]
    ['is_hit', 'n_cells', 'few_cells', 'q_value', 'confounded']
    """
    check_integer(n_genes=n_genes)
    check_integer(at_least=0, min_cells=min_cells)
    check_key(key_added=key_added)
    n_cells = model.module.cells_per_perturbation.cpu().numpy().astype(int)
    tests = model.test_perturbations(key_added=None)
    columns: dict[str, Any] = {
        "n_cells": n_cells,
        "few_cells": n_cells < min_cells,
        "q_value": tests["q_value"].to_numpy(),
        "confounded": _confounded(model).to_numpy(),
    }
    if hasattr(model, "get_perturbation_masks"):
        masks = model.get_perturbation_masks(key_added=None)
        called = called_masks(model, fdr=fdr, masks=masks, tests=tests)
        columns["expected_active_latents"] = masks.sum(axis=1).to_numpy(np.float64)
        columns["active_latents"] = called.sum(axis=1).to_numpy()
        columns["unstable"] = (active_at_fdr(masks, fdr) & ~called).any(axis=1).to_numpy()
    ate = model.predict_ate(
        dosages=doses_to_report(model.largest_doses_, len(n_cells)).tolist(),
        method="lograte" if model.module.likelihood.is_count_likelihood else "mean",
        n_samples=n_samples,
        n_posterior_samples=n_posterior_samples,
        interval=interval,
        key_added=None,
    )
    columns |= ate.obs.drop(columns="perturbation").to_dict("list")
    columns["genes_up"] = _strongest(ate, n_genes, sign=1)
    columns["genes_down"] = _strongest(ate, n_genes, sign=-1)
    index = pd.Index(model.perturbations, name="perturbation")
    hits = pd.DataFrame(columns, index=index)
    names_a_gene = (hits["genes_up"] != "") | (hits["genes_down"] != "")
    low = hits["effect_norm"] if interval is None else hits["effect_norm_low"]
    excludes_zero = low > _NO_NORM * hits["effect_norm"]
    hits.insert(0, "is_hit", (hits["q_value"] <= fdr) & names_a_gene & excludes_zero)
    _warn_of_doubtful(hits)
    hits = hits.sort_values("effect_norm", ascending=False, kind="stable")
    hits.attrs["ate"] = {key: ate.uns["ate"][key] for key in _SCALE}
    if key_added is not None and model.adata is not None:
        model.adata.uns[key_added] = hits.copy()
        model.keep_provenance(model.adata, key_added)
    return hits


def _confounded(model: PerturbationModel) -> pd.Series:
    manager = model.adata_manager
    setup = model._setup_arguments
    registered = {setup[name] for name in ("perturbation_key", "batch_key", "dosage_key")}
    registered |= {*(setup["categorical_covariate_keys"] or ())}
    return confounding_columns(manager.adata, registered_labels(manager), registered)


def _warn_of_doubtful(hits: pd.DataFrame) -> None:
    confounded = hits.index[hits["confounded"] != ""]
    if len(confounded):
        columns = sorted(
            {name for names in hits["confounded"] for name in names.split(", ")} - {""}
        )
        logger.warning(
            f"{counted(len(confounded), 'perturbation is', 'perturbations are')} confounded with "
            f"unregistered columns of adata.obs ({', '.join(columns)}), such as {confounded[0]!r}: "
            "their effects may be those of these columns. Register them as `batch_key` or "
            "`categorical_covariate_keys`, if control cells have the same levels."
        )
    if "unstable" in hits and hits["unstable"].any():
        names = hits.index[hits["unstable"]]
        logger.warning(
            f"The masks of {counted(len(names), 'perturbation')}, such as {names[0]!r}, are on "
            "although their cells do not differ from control cells: they are not called."
        )


def _strongest(ate: AnnData, n_genes: int, *, sign: int) -> list[str]:
    """Name the genes with the largest effects of one sign, among those with a certain sign."""
    posterior_sd = ate.layers["standard_error"] * ate.uns["ate"]["n_posterior_samples"] ** 0.5
    strength = np.where(np.abs(ate.X) > SURE * posterior_sd, sign * ate.X, 0)
    order = np.argsort(-strength, axis=1, kind="stable")[:, :n_genes]
    return [
        ", ".join(ate.var_names[genes[row[genes] > 0]])
        for genes, row in zip(order, strength, strict=True)
    ]


def perturbation_similarity(
    table: Source,
    *,
    metric: Literal["cosine", "jaccard"] = "cosine",
    order: bool = True,
) -> pd.DataFrame:
    """Similarity of all pairs of perturbations, with similar ones next to each other.

    Parameters
    ----------
    table
        One row per perturbation: effects on genes (an ATE table of ``predict_ate``) or on latents
        (the ``mean`` of ``get_perturbation_effects``) for ``"cosine"``; masks
        (``get_perturbation_masks``, or the booleans of :func:`called_masks`) for ``"jaccard"``. Or
        a model, or a screen in whose ``uns`` results are stored: of these, effects on latents for
        ``"cosine"`` and masks for ``"jaccard"``.
    metric
        ``"cosine"``: x.y over the product of norms, 1 for the same direction, -1 for opposite ones.
        ``"jaccard"``: sum of min(x, y) / sum of max(x, y), which for booleans is the proportion of
        common entries among all active ones.
    order
        Order rows and columns by average linkage of 1 - similarity; ``False`` keeps the order of
        ``table``.

    Returns
    -------
    Perturbations x perturbations. A perturbation without effects or active entries has similarity 0
    with all others. The direction of a very small effect is noise: remove perturbations without
    effects (:func:`perturbation_hits`) to show pathways.

    Raises
    ------
    SAMSError
        If ``metric`` is unknown, the table has NaN, or, for ``"jaccard"``, values outside 0 to 1.

    Examples
    --------
    >>> effects = pd.DataFrame([[1.0, 0.0], [2.0, 0.0], [0.0, -1.0]], index=["A", "B", "C"])
    >>> scvi_sams.tl.perturbation_similarity(effects, order=False)
         A    B    C
    A  1.0  1.0  0.0
    B  1.0  1.0  0.0
    C  0.0  0.0  1.0
    """
    check_choice("metric", metric, ("cosine", "jaccard"))
    if not isinstance(table, AnnData) or not is_ate(table):
        table = means_of_effects(table) if metric == "cosine" else result_of(table, MASKS)
    if isinstance(table, AnnData):
        check_ate(table=table)
        names, values = table.obs_names, np.asarray(table.X, dtype=np.float64)
    else:
        check_table(table=table)
        names, values = table.index, table.to_numpy(np.float64)
    if np.isnan(values).any():
        bad = names[np.isnan(values).any(axis=1)]
        raise SAMSError(
            f"{counted(len(bad), 'perturbation has', 'perturbations have')} NaN entries, such as "
            f"{bad[0]!r}."
        )
    similarity = cosine_similarity(values) if metric == "cosine" else _weighted_jaccard(values)
    np.fill_diagonal(similarity, 1)
    if order:
        leaves = hierarchical_order(similarity)
        names, similarity = names[leaves], similarity[np.ix_(leaves, leaves)]
    return pd.DataFrame(similarity, index=names, columns=names.rename(None))


def hierarchical_order(similarity: np.ndarray) -> np.ndarray:
    """Order rows by average linkage of 1 - similarity, for a symmetric matrix.

    For up to 500 rows, branches are rotated so that neighbours are most similar; for more this
    would take minutes and is omitted.

    Examples
    --------
    >>> similarity = np.array([[1.0, 0.0, 0.9], [0.0, 1.0, 0.0], [0.9, 0.0, 1.0]])
    >>> order = scvi_sams.tl.hierarchical_order(similarity).tolist()
    >>> abs(order.index(0) - order.index(2))  # the similar ones are neighbours
    1
    """
    check_matrix(similarity=similarity)
    if len(similarity) < 3:
        return np.arange(len(similarity))
    distance = np.clip(1 - (similarity + similarity.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    optimal = len(similarity) <= MOST_FOR_OPTIMAL_ORDER
    return leaves_list(linkage(squareform(distance), method="average", optimal_ordering=optimal))


def unit_rows(values: np.ndarray) -> np.ndarray:
    """Rows of length 1; rows of zeros are unchanged."""
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return np.divide(values, norms, out=np.zeros_like(values), where=norms > 0)


def cosine_similarity(values: np.ndarray) -> np.ndarray:
    """Cosine similarity of every two rows; 0 for a row of zeros."""
    units = unit_rows(values)
    return np.clip(units @ units.T, -1, 1)


def _weighted_jaccard(values: np.ndarray) -> np.ndarray:
    if ((values < 0) | (values > 1)).any():
        raise SAMSError(
            "Jaccard similarity is for masks: probabilities or booleans. For effects use "
            "metric='cosine'."
        )
    totals = values.sum(axis=1)
    both = totals[:, None] + totals[None]
    # |x - y| = max - min and x + y = max + min.
    difference = cdist(values, values, metric="cityblock")
    union = (both + difference) / 2
    common = (both - difference) / 2
    return np.divide(common, union, out=np.zeros_like(union), where=union > 0)
