"""Gene sets of GMT files, as memberships of genes."""

from __future__ import annotations

import gzip
import logging
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams._checks import as_list, as_names, as_path, check_integer
from scvi_sams._plurals import counted, plural
from scvi_sams.exceptions import InvalidArgumentError, UnreadableDataError
from scvi_sams.features._table import FeatureTable
from scvi_sams.labels._names import listing

logger = logging.getLogger("scvi.sams")

_GZIP = b"\x1f\x8b"
"""First bytes of files compressed with gzip, whatever their name."""


class _GeneSet(NamedTuple):
    name: str
    genes: frozenset[str]


def from_gmt(
    path: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    genes: Iterable[str] | None = None,
    min_genes: int = 5,
    max_genes: int = 500,
) -> pd.DataFrame:
    """Read gene sets (pathways, complexes, ontology terms) as memberships of genes.

    A line of a GMT file is a gene set: its name, a description, and its genes, separated by tabs.
    MSigDB, Reactome and Enrichr, among others, distribute this format.

    Parameters
    ----------
    path
        A GMT file, or several whose sets are combined; plain or compressed with gzip.
    genes
        Genes to keep and to count in sets, such as all genes that could have been perturbed.
        Default: all.
    min_genes, max_genes
        Sets with fewer or more of these genes are omitted: small sets apply to few perturbations,
        large sets are not specific.

    Returns
    -------
    1 where a gene (row) is in a set (column) and 0 elsewhere; sparse columns of float32. Rows are
    in the order of ``genes``, or sorted. A gene in none of the sets has no row: nothing is known
    about it. If several sets have the same name, later ones are renamed ``NAME#2``, ``NAME#3`` and
    so on, with a warning.

    Raises
    ------
    UnreadableDataError
        If a file is missing, is not text, or has a line that is not a gene set.
    InvalidArgumentError
        If no set is left.

    Examples
    --------
    >>> sets = {"HEME": ["ALAS2", "FECH", "HMBS"], "MAPK": ["MAP2K6", "MAPK14"]}
    >>> with open("sets.gmt", "w") as file:
    ...     for name, genes in sets.items():
    ...         print(name, "described", *genes, sep=chr(9), file=file)
    >>> table = scvi_sams.features.from_gmt("sets.gmt", min_genes=2)
    >>> table.index[table["MAPK"] == 1].tolist()
    ['MAP2K6', 'MAPK14']
    """
    check_integer(min_genes=min_genes)
    check_integer(at_least=min_genes, max_genes=max_genes)
    paths = [path] if isinstance(path, str | os.PathLike) else as_list("path", path, "paths")
    files = [as_path("path", one) for one in paths]
    universe = None if genes is None else dict.fromkeys(as_names("genes", genes))
    found = [gene_set for file in files for gene_set in _gene_sets(file)]
    if universe is not None:
        found = [_GeneSet(name, members.intersection(universe)) for name, members in found]
    kept = [one for one in found if min_genes <= len(one.genes) <= max_genes]
    if not kept:
        of_genes = "" if universe is None else f" of the {len(universe)} `genes`"
        largest = max((len(one.genes) for one in found), default=0)
        raise InvalidArgumentError(
            f"None of {counted(len(found), 'gene set')} has {min_genes} to {max_genes} "
            f"genes{of_genes}; the largest has {largest}. Change `min_genes` and `max_genes`, or "
            "check that `genes` are named as in the file (symbols or identifiers, upper or lower "
            "case)."
        )
    logger.info(
        f"{len(kept)} of {counted(len(found), 'gene set')} {plural(len(kept), 'has', 'have')} "
        f"{min_genes} to {max_genes} genes."
    )
    members = frozenset().union(*(one.genes for one in kept))
    rows = [gene for gene in (sorted(members) if universe is None else universe) if gene in members]
    return _memberships(kept, rows)


def _memberships(gene_sets: list[_GeneSet], genes: list[str]) -> pd.DataFrame:
    position = {gene: row for row, gene in enumerate(genes)}
    rows = [position[gene] for _, members in gene_sets for gene in members]
    columns = np.repeat(np.arange(len(gene_sets)), [len(members) for _, members in gene_sets])
    values = sparse.csr_matrix(
        (np.ones(len(rows)), (rows, columns)), shape=(len(genes), len(gene_sets))
    )
    names = _distinct([name for name, _ in gene_sets])
    return FeatureTable(tuple(genes), tuple(names), values, "path").to_frame(np.float32)


def _distinct(names: list[str]) -> list[str]:
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    twice = [name for name, count in seen.items() if count > 1]
    if twice:
        logger.warning(
            f"Several gene sets are called {listing(twice)}: they are renamed "
            f"{listing([twice[0], f'{twice[0]}#2'])} and so on."
        )
    return distinct


def _gene_sets(path: Path) -> Iterator[_GeneSet]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        fields = line.split("\t")
        name = fields[0].strip()
        genes = frozenset(gene.strip() for gene in fields[2:] if gene.strip())
        if not name or not genes:
            what = "no name" if not name else "no genes"
            raise UnreadableDataError(
                f"Line {number} of {str(path)!r} has {what}: {line[:60]!r}. Each line of a GMT "
                "file is a gene set: name, description and genes, separated by tabs."
            )
        yield _GeneSet(name, genes)


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content.startswith(_GZIP) else content
        text = content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UnreadableDataError(
            f"{str(path)!r} cannot be read as a GMT file, plain or compressed with gzip: {error}. "
            "Check the path, or download it again."
        ) from error
    # splitlines would also split at rarer line separators within a description.
    return [line.rstrip("\r") for line in text.split("\n")]
