"""Gene programs of latent dimensions, as tables for reading and for enrichment tools."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import pandas as pd

from scvi_sams._checks import check_choice, check_integer, check_table
from scvi_sams._fdr import active_at_fdr
from scvi_sams._plurals import counted
from scvi_sams.exceptions import SAMSError
from scvi_sams.interpretation._stored import EFFECTS, MASKS, PROGRAMS, Source, result_of
from scvi_sams.labels._names import check_has
from scvi_sams.model._mechanisms import Effects

Direction = Literal["both", "up", "down"]


def top_genes(
    programs: Source, n_genes: int = 10, *, direction: Direction = "both"
) -> pd.DataFrame:
    """Name the genes that change most with each latent dimension.

    Parameters
    ----------
    programs
        Genes x latent dimensions, from ``get_latent_programs``; or the model, or an AnnData in
        whose ``varm`` they are stored.
    n_genes
        Largest number of genes per latent dimension.
    direction
        ``"up"``: the largest increases, ``"down"``: the largest decreases, ``"both"``: the largest
        changes of either sign. Genes that do not change are never named, so a dimension that is
        switched off has none.

    Returns
    -------
    One row per latent dimension and gene, strongest first: ``latent``, ``rank`` (from 1),
    ``gene``, and ``change`` in the units of ``programs``.

    Raises
    ------
    SAMSError
        If ``direction`` is unknown, or ``programs`` has NaN.
    MissingKeyError
        If the AnnData does not contain them; the message names the method that writes them.

    Examples
    --------
    >>> programs = pd.DataFrame(
    ...     {"latent_0": [0.1, -2.0, 1.0], "latent_1": [0.0, 0.0, 0.3]}, index=["A", "B", "C"]
    ... )
    >>> scvi_sams.tl.top_genes(programs, n_genes=2)
         latent  rank gene  change
    0  latent_0     1    B    -2.0
    1  latent_0     2    C     1.0
    2  latent_1     1    C     0.3
    """
    programs = result_of(programs, PROGRAMS)
    check_table(programs=programs)
    check_integer(n_genes=n_genes)
    check_choice("direction", direction, get_args(Direction))
    _check_not_nan(programs)
    sign = {"both": programs.abs(), "up": programs, "down": -programs}[direction]
    tables = []
    for latent in programs.columns:
        strength = sign[latent].to_numpy()
        order = np.argsort(-strength, kind="stable")[:n_genes]
        order = order[strength[order] > 0]
        tables.append(
            pd.DataFrame(
                {
                    "latent": latent,
                    "rank": np.arange(1, len(order) + 1),
                    "gene": programs.index[order],
                    "change": programs[latent].to_numpy()[order],
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def latent_perturbations(
    masks: Source,
    *,
    effects: Source | None = None,
    fdr: float = 0.05,
) -> pd.DataFrame:
    """List the perturbations that share each latent dimension.

    Parameters
    ----------
    masks
        Perturbations x latent: the booleans of :func:`called_masks`, which are used unchanged, or
        inclusion probabilities, from ``get_perturbation_masks``; or the model, or an AnnData in
        whose ``uns`` these are stored.
    effects
        Masked effects of the same perturbations, the ``mean`` of ``get_perturbation_effects``; or
        a model or an AnnData with them.
    fdr
        For probabilities: entries are called active at this false discovery rate, by masks alone
        (:func:`scvi_sams.evaluation.active_at_fdr`).

    Returns
    -------
    One row per active entry: ``latent``, ``perturbation``, ``inclusion_probability``, ``effect``
    (latent units; only with ``effects``), and ``n_perturbations`` that share the dimension.
    Dimensions are in the order of ``masks``, within each the strongest effects (otherwise the most
    certain entries) first. Latent dimensions that no perturbation shifts are omitted.

    Raises
    ------
    MissingKeyError
        If ``effects`` lacks a perturbation or latent dimension of ``masks``.
    SAMSError
        If ``fdr`` is not between 0 and 1, or ``masks`` are not probabilities.

    Examples
    --------
    >>> masks = pd.DataFrame({"latent_0": [0.99, 0.98, 0.02]}, index=["IFNGR1", "JAK2", "CD86"])
    >>> table = scvi_sams.tl.latent_perturbations(masks)
    >>> table[["latent", "perturbation", "n_perturbations"]]
         latent perturbation  n_perturbations
    0  latent_0       IFNGR1                2
    1  latent_0         JAK2                2
    """
    masks = result_of(masks, MASKS)
    check_table(masks=masks)
    probability = masks.to_numpy(dtype=np.float64)
    active = active_at_fdr(probability, fdr)
    columns, rows = np.nonzero(active.T)
    table = pd.DataFrame(
        {
            "latent": masks.columns[columns],
            "perturbation": masks.index[rows],
            "inclusion_probability": probability[rows, columns],
        }
    )
    strength = table["inclusion_probability"].to_numpy()
    if effects is not None:
        table["effect"] = aligned_effects(effects, masks).to_numpy()[rows, columns]
        strength = table["effect"].abs().to_numpy()
    table["n_perturbations"] = active.sum(axis=0)[columns]
    return table.iloc[np.lexsort((-strength, columns))].reset_index(drop=True)


def aligned_effects(effects: Source, masks: pd.DataFrame) -> pd.DataFrame:
    """Rows and columns of ``effects`` in the order of ``masks``; an error if one is missing."""
    effects = means_of_effects(effects)
    check_table(effects=effects, masks=masks)
    for wanted, present in zip(masks.axes, effects.axes, strict=True):
        absent = wanted.difference(present)
        check_has("`effects` has no", absent, present, " Take both tables from the same model.")
    return effects.loc[masks.index, masks.columns]


def means_of_effects(effects: Source) -> pd.DataFrame:
    """Return means of masked effects, as passed, from a slot or from a model."""
    found = result_of(effects, EFFECTS)
    return found.mean if isinstance(found, Effects) else found


def gene_ranking(programs: Source, latent: str) -> pd.Series:
    """Rank all genes by their change with one latent dimension, for gene-set enrichment.

    Parameters
    ----------
    programs
        Genes x latent dimensions, from ``get_latent_programs``; or a model or an AnnData, as for
        :func:`top_genes`. For decoupler, which takes samples x genes, pass ``programs.T``, or use
        :func:`enrichment`.
    latent
        Latent dimension, such as ``"latent_0"``.

    Returns
    -------
    Change by gene, largest first, as input of ``gseapy.prerank(rnk=...)``. If several genes have
    the same name, the strongest change is kept, because enrichment identifies genes by name.

    Raises
    ------
    MissingKeyError
        If ``programs`` has no such latent dimension.
    SAMSError
        If ``programs`` has NaN.

    Examples
    --------
    >>> programs = pd.DataFrame({"latent_0": [0.1, -2.0, 1.0]}, index=["A", "B", "C"])
    >>> ranking = scvi_sams.tl.gene_ranking(programs, "latent_0")
    >>> ranking.to_dict()
    {'C': 1.0, 'A': 0.1, 'B': -2.0}

    Pass it to an enrichment tool (``pip install "scvi-sams[enrichment]"``):

    >>> gseapy.prerank(rnk=ranking, gene_sets={"interferon": ["A", "B"]})  # doctest: +SKIP
    >>> decoupler.mt.ulm(programs.T, net)  # doctest: +SKIP
    """
    programs = result_of(programs, PROGRAMS)
    check_table(programs=programs)
    check_has("There is no latent dimension", [latent], programs.columns)
    _check_not_nan(programs)
    changes = programs[latent]
    strongest_first = changes.iloc[np.argsort(-changes.abs().to_numpy(), kind="stable")]
    distinct = strongest_first[~strongest_first.index.duplicated()]
    return distinct.sort_values(ascending=False, kind="stable")


def _check_not_nan(programs: pd.DataFrame) -> None:
    bad = programs.isna().any(axis=1)
    if bad.any():
        raise SAMSError(
            f"The programs of {counted(bad.sum(), 'gene')} are NaN, such as "
            f"{programs.index[bad][0]!r}: training diverged, or another table was passed."
        )
