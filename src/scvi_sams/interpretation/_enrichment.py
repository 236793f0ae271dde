"""Gene set enrichment of latent dimensions and perturbations."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import stats

from scvi_sams._checks import as_names, check_choice, check_integer
from scvi_sams._group_tests import q_values
from scvi_sams._plurals import counted, plural
from scvi_sams.exceptions import InvalidArgumentError, MissingPackageError, SAMSError
from scvi_sams.features._gmt import from_gmt
from scvi_sams.interpretation._programs import gene_ranking
from scvi_sams.interpretation._stored import PROGRAMS, Source, ate_of, result_of
from scvi_sams.labels._names import check_has
from scvi_sams.model._perturbation_model import PerturbationModel

logger = logging.getLogger("scvi.sams")

Method = Literal["ulm", "gsea"]
Subject = Literal["latents", "perturbations"]
GeneSets = str | os.PathLike[str] | Mapping[str, Iterable[str]]

_N_LEADING = 10
"""Number of genes of a set that are named: those that change most in its direction."""
_COLUMNS = (
    "gene_set", "score", "p_value", "q_value", "n_genes", "leading_genes",
)  # fmt: skip


def enrichment(
    source: Source,
    gene_sets: GeneSets,
    *,
    of: Subject = "latents",
    names: Sequence[str] | str | None = None,
    method: Method = "ulm",
    min_genes: int = 5,
    max_genes: int = 500,
    n_permutations: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Find gene sets that increase or decrease with latent dimensions or perturbations.

    Requires decoupler or gseapy: ``pip install "scvi-sams[enrichment]"``.

    Parameters
    ----------
    source
        A trained model; or an AnnData in which its programs (``of="latents"``) or effects
        (``of="perturbations"``) are stored; or a table of these: genes x latent dimensions, from
        ``get_latent_programs``, or an ATE table.
    gene_sets
        A GMT file (:func:`scvi_sams.features.from_gmt`), or a dict of genes by the name of the set.
    of
        Rank genes by the programs of latent dimensions, or by the effects of perturbations (for a
        model those of ``predict_ate(method="lograte")``; ``"mean"`` for a normal likelihood).
    names
        Latent dimensions or perturbations, including combinations; ``None`` for all. Dimensions
        that change no gene are omitted.
    method
        ``"ulm"``: t-statistic of the slope of a linear regression of the changes of all genes on
        membership (decoupler; Badia-i-Mompel et al. 2022). ``"gsea"``: normalised enrichment score
        of preranked genes, with permuted ones for the p-value (gseapy; Subramanian et al. 2005).
    min_genes, max_genes
        Sets with fewer or more measured genes are omitted.
    n_permutations, seed
        Settings of ``"gsea"``.

    Returns
    -------
    One row per set, grouped by latent dimension or perturbation, the most significant first:
    ``latent`` or ``perturbation``; ``gene_set``; ``score``, positive if the genes of the set
    increase; ``p_value`` (0 if no permutation reaches the score); ``q_value`` (Benjamini and
    Hochberg, over the whole table); ``n_genes``, the number of measured genes; ``leading_genes``,
    the ten that change most in the direction of the score.

    Raises
    ------
    MissingPackageError
        If decoupler (gseapy) is not installed.
    UnreadableDataError
        If the GMT file cannot be read.
    InvalidArgumentError
        If no set has an allowed number of measured genes.
    MissingKeyError
        If there is no such latent dimension or perturbation, or the AnnData has no such results.

    Warnings
    --------
    Both tests assume independent genes, but co-regulated genes change together, so p-values are
    too small: use them to rank sets. The background is the measured genes: in a panel that was
    selected for a pathway, this pathway is not enriched.

    Examples
    --------
    >>> sets = {"first": [f"gene_{i:04d}" for i in range(20)], "second": ["gene_0030"] * 9}
    >>> scvi_sams.tl.enrichment(model, sets)  # doctest: +SKIP
    >>> scvi_sams.tl.enrichment(model, "reactome.gmt", of="perturbations")  # doctest: +SKIP
    """
    check_choice("of", of, get_args(Subject))
    check_choice("method", method, get_args(Method))
    check_integer(min_genes=min_genes, n_permutations=n_permutations)
    check_integer(at_least=min_genes, max_genes=max_genes)
    check_integer(at_least=0, seed=seed)
    package = _package("decoupler" if method == "ulm" else "gseapy")
    changes = _changes(source, of, None if names is None else as_names("names", names))
    sets = _measured(gene_sets, changes.index, min_genes, max_genes)
    run = _ulm if method == "ulm" else _gsea
    tables = run(package, changes, sets, n_permutations, seed)
    subject = of.removesuffix("s")
    found = pd.concat([_rows(changes[name], table, sets) for name, table in tables.items()])
    found.insert(0, subject, np.repeat(list(tables), [len(table) for table in tables.values()]))
    found["q_value"] = q_values(found["p_value"].to_numpy())
    return found[[subject, *_COLUMNS]].reset_index(drop=True)


def _package(name: str) -> Any:
    try:
        if name == "decoupler":
            import decoupler

            return decoupler
        import gseapy
    except ImportError as error:
        raise MissingPackageError(
            f"enrichment requires {name}, which cannot be imported ({error}): pip install "
            f'"scvi-sams[enrichment]" (or pip install {name}).'
        ) from error
    return gseapy


def _changes(source: Source, of: Subject, names: list[str] | None) -> pd.DataFrame:
    """Changes of genes, genes x latent dimensions or perturbations; each gene once."""
    if of == "latents":
        table = result_of(source, PROGRAMS)
        what = "There is no latent dimension"
    else:
        table = _effects(source, names).to_df().T
        what = "There are no effects of"
        if isinstance(source, PerturbationModel):  # already selected, in canonical spelling
            names = None
    check_has(what, names or (), table.columns)
    rankings = {str(name): gene_ranking(table, name) for name in names or table.columns}
    changing = {name: ranking for name, ranking in rankings.items() if ranking.abs().max() > 0}
    if not changing:
        raise SAMSError(f"No gene changes with any of the requested {of}.")
    return pd.DataFrame(changing)


def _effects(source: Source, names: list[str] | None) -> AnnData:
    if isinstance(source, PerturbationModel):
        scale = "lograte" if source.module.likelihood.is_count_likelihood else "mean"
        return source.predict_ate(names, method=scale, key_added=None)  # type: ignore[arg-type]
    if not isinstance(source, AnnData):
        raise InvalidArgumentError(
            "Effects of perturbations must be a table of predict_ate or observed_ate (an AnnData), "
            f"or a model, not a {type(source).__name__}."
        )
    return ate_of(source)


def _measured(
    gene_sets: GeneSets, genes: pd.Index, min_genes: int, max_genes: int
) -> dict[str, list[str]]:
    """Measured genes of each set, for sets of an allowed size."""
    if not isinstance(gene_sets, Mapping):
        members = from_gmt(gene_sets, genes=genes, min_genes=min_genes, max_genes=max_genes)
        sparse: Any = members.sparse
        matrix = sparse.to_coo().tocsc()
        return {
            str(name): members.index[matrix[:, [column]].indices].tolist()
            for column, name in enumerate(members.columns)
        }
    measured = set(genes)
    found = {
        str(name): [
            gene for gene in dict.fromkeys(as_names("gene_sets", listed)) if gene in measured
        ]
        for name, listed in gene_sets.items()
    }
    kept = {name: listed for name, listed in found.items() if min_genes <= len(listed) <= max_genes}
    if not kept:
        largest = max((len(listed) for listed in found.values()), default=0)
        raise InvalidArgumentError(
            f"None of {counted(len(found), 'gene set')} has {min_genes} to {max_genes} of the "
            f"{len(genes)} measured genes; the largest has {largest}. Change `min_genes` and "
            "`max_genes`, or check that genes are named as in the screen (symbols or identifiers, "
            "upper or lower case)."
        )
    logger.info(
        f"{len(kept)} of {counted(len(found), 'gene set')} {plural(len(kept), 'has', 'have')} "
        f"{min_genes} to {max_genes} genes."
    )
    return kept


def _ulm(
    decoupler: Any, changes: pd.DataFrame, sets: dict[str, list[str]], n: int, seed: int
) -> dict[str, pd.DataFrame]:
    """t-statistics of memberships; deterministic."""
    del n, seed
    net = pd.DataFrame(
        [(name, gene, 1.0) for name, genes in sets.items() for gene in genes],
        columns=["source", "target", "weight"],
    )
    # decoupler adjusts p-values within a latent dimension; we adjust over the whole table.
    scores, _ = decoupler.mt.ulm(changes.T, net, tmin=1)
    p_values = 2 * stats.t.sf(scores.abs(), len(changes) - 2)
    return {
        name: pd.DataFrame({"score": scores.loc[name], "p_value": row})
        for name, row in zip(scores.index, p_values, strict=True)
    }


def _gsea(
    gseapy: Any, changes: pd.DataFrame, sets: dict[str, list[str]], n: int, seed: int
) -> dict[str, pd.DataFrame]:
    """Normalised enrichment scores, and proportions of permutations that exceed them."""
    tables = {}
    for name, ranking in changes.items():
        table = gseapy.prerank(
            rnk=ranking.sort_values(ascending=False, kind="stable"),
            gene_sets=sets,
            min_size=1,
            max_size=len(changes),
            permutation_num=n,
            outdir=None,
            seed=seed,
            threads=1,
        ).res2d.set_index("Term")
        columns = {"NES": "score", "NOM p-val": "p_value"}
        tables[str(name)] = table[list(columns)].rename(columns=columns).astype(float)
    return tables


def _rows(changes: pd.Series, table: pd.DataFrame, sets: Mapping[str, list[str]]) -> pd.DataFrame:
    """One row per set, the most significant first, with its leading genes."""
    strength = -table["score"].abs().to_numpy()
    table = table.iloc[np.lexsort((strength, table["p_value"].to_numpy()))]
    leading = []
    for name, score in table["score"].items():
        along = np.sign(score) * changes[sets[str(name)]]
        leading.append(", ".join(along[along > 0].nlargest(_N_LEADING).index))
    sizes = [len(sets[str(name)]) for name in table.index]
    return table.rename_axis("gene_set").reset_index().assign(n_genes=sizes, leading_genes=leading)
