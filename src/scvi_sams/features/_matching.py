"""Match perturbations of a screen with rows of a table of features."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from scvi_sams._checks import as_names, check_bool
from scvi_sams._plurals import counted, plural
from scvi_sams.exceptions import InvalidArgumentError, UnknownPerturbationError
from scvi_sams.features._table import FeatureTable, as_feature_table
from scvi_sams.labels._conventions import gene_of_guide
from scvi_sams.labels._names import listing

logger = logging.getLogger("scvi.sams")

_ALIAS_COLUMNS = ("alias", "alias_symbol", "prev_symbol")
_ALIAS_SEPARATOR = "|"
"""Separator of several aliases in a field, as in HGNC files."""


class _Match(NamedTuple):
    """Candidates for a name: none, one row, or (ambiguous) several rows or symbols."""

    candidates: tuple[str, ...]
    by: str


def match_genes(
    table: Any,
    perturbations: Iterable[str],
    *,
    aliases: Mapping[str, Any] | pd.DataFrame | None = None,
    case: bool = True,
    strip_guides: bool = False,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Find the row of each perturbation even if gene names are spelled differently.

    Names are tried in this order: exactly (``"symbol"``); by an alias with the same symbol
    (``"alias"``), where either name or both may be outdated; ignoring case (``"case"``). A name
    that matches several rows, or is an alias of several symbols, is not matched.

    Parameters
    ----------
    table
        Features of genes; any input of :func:`as_feature_table`.
    perturbations
        Names to find, such as ``model.perturbations``.
    aliases
        Symbol, or list of symbols, by alias; or a DataFrame with a column ``"symbol"`` and one or
        more of ``"alias"``, ``"alias_symbol"`` and ``"prev_symbol"``, whose fields may contain
        several values separated by ``"|"``, as in HGNC's complete set. A name that is itself a
        symbol there is not used as an alias. Nothing is downloaded.
    case
        Whether names that differ only by case match.
    strip_guides
        Whether a name without a row that looks like that of a guide, such as ``"STAT1_1"`` or
        ``"sgSTAT1-2"``, is matched by its gene.

    Returns
    -------
    table
        The rows that were found, float32, with the names of their perturbations, in their order.
    report
        One row per perturbation: ``"perturbation"``; ``"matched"``, the row of ``table``, or
        None; ``"by"``, ``"symbol"``, ``"alias"``, ``"case"`` or ``"none"``; and ``"candidates"``,
        the rows or symbols of an ambiguous name. A warning counts the names without a match.

    Raises
    ------
    InvalidArgumentError
        If ``table`` or ``aliases`` cannot be read.
    UnknownPerturbationError
        If none of the perturbations has a row.

    Examples
    --------
    >>> genes = pd.DataFrame({"dim_0": [0.1, 0.2, 0.3]}, index=["TP53", "KLF1", "MAP2K6"])
    >>> found, report = scvi_sams.features.match_genes(
    ...     genes, ["KLF1", "p53", "Map2k6"], aliases={"p53": "TP53"}
    ... )
    >>> report[["perturbation", "matched", "by"]]
      perturbation matched      by
    0         KLF1    KLF1  symbol
    1          p53    TP53   alias
    2       Map2k6  MAP2K6    case
    >>> found.index.tolist()
    ['KLF1', 'p53', 'Map2k6']
    """
    check_bool(case=case, strip_guides=strip_guides)
    known = as_feature_table(table, argument="table")
    names = list(dict.fromkeys(as_names("perturbations", perturbations)))
    if not names:
        raise InvalidArgumentError("`perturbations` is empty. Pass the names to match.")
    lookup = _Lookup.of(known, _symbols_by_alias(aliases), case)
    matches = [lookup.match(name, strip_guides) for name in names]
    report = _report(names, matches)
    found = report.dropna(subset="matched")
    if not len(found):
        raise UnknownPerturbationError(
            f"`table` has no row for {listing(names)}; its rows are {listing(known.names)}. Pass "
            "`aliases` (old symbols, or identifiers instead of symbols)"
            + ("." if strip_guides else ", or `strip_guides=True` if these are guides.")
            + known.transposed_hint(names)
        )
    _warn_of_missing(report)
    rows = known.rows(found["matched"])
    kept = FeatureTable(tuple(found["perturbation"]), known.columns, rows, "table")
    return kept.to_frame(np.float32), report


@dataclass(frozen=True)
class _Lookup:
    """Rows of a table by all of their possible names.

    Attributes
    ----------
    symbols_of
        Symbols by alias; every symbol is an alias of itself.
    rows_of
        Rows of the table by symbol.
    by_case
        Rows by their name in lower case; empty if case matters.
    """

    table: FeatureTable
    symbols_of: Mapping[str, tuple[str, ...]]
    rows_of: Mapping[str, list[str]]
    by_case: Mapping[str, list[str]]

    @classmethod
    def of(
        cls, table: FeatureTable, symbols_of: Mapping[str, tuple[str, ...]], case: bool
    ) -> _Lookup:
        rows_of: defaultdict[str, list[str]] = defaultdict(list)
        by_case: defaultdict[str, list[str]] = defaultdict(list)
        for name in table.names:
            symbols = symbols_of.get(name, (name,))
            if len(symbols) == 1:  # otherwise the row is ambiguous
                rows_of[symbols[0]].append(name)
            if case:
                by_case[name.casefold()].append(name)
        return cls(table, symbols_of, rows_of, by_case)

    def match(self, name: str, strip_guides: bool) -> _Match:
        """Candidate rows for a name; those of the gene of a guide if there are none."""
        found = self._match(name)
        gene = gene_of_guide(name) if strip_guides and not found.candidates else None
        return found if gene is None else self._match(gene)

    def _match(self, name: str) -> _Match:
        if name in self.table:
            return _Match((name,), "symbol")
        symbols = self.symbols_of.get(name, (name,))
        rows = [row for symbol in symbols for row in self.rows_of.get(symbol, ())]
        if rows:
            return _Match(tuple(rows) if len(symbols) == 1 else symbols, "alias")
        return _Match(tuple(self.by_case.get(name.casefold(), ())), "case")


def _symbols_by_alias(aliases: Any) -> dict[str, tuple[str, ...]]:
    if aliases is None:
        return {}
    if isinstance(aliases, pd.DataFrame):
        pairs = _pairs_of_frame(aliases)
    elif isinstance(aliases, Mapping | pd.Series):
        pairs = [
            (str(alias).strip(), symbol.strip())
            for alias, symbols in aliases.items()
            for symbol in as_names("aliases", symbols)
        ]
    else:
        raise InvalidArgumentError(
            "`aliases` must be a dict of aliases to symbols, or a DataFrame with columns 'symbol' "
            f"and one of {listing(_ALIAS_COLUMNS)}, not {type(aliases).__name__}."
        )
    symbols_of: defaultdict[str, list[str]] = defaultdict(list)
    for alias, symbol in pairs:
        symbols_of[alias].append(symbol)
    # CAP1 is an old name of other genes, and the current symbol of one.
    itself = {symbol: (symbol,) for symbols in symbols_of.values() for symbol in symbols}
    return {alias: tuple(dict.fromkeys(symbols)) for alias, symbols in symbols_of.items()} | itself


def _pairs_of_frame(aliases: pd.DataFrame) -> list[tuple[str, str]]:
    columns = [column for column in _ALIAS_COLUMNS if column in aliases]
    if "symbol" not in aliases or not columns:
        raise InvalidArgumentError(
            f"`aliases` needs a column 'symbol' and one of {listing(_ALIAS_COLUMNS)}. Its columns "
            f"are {listing(aliases.columns)}: rename them (aliases.rename(columns=...))."
        )
    # Symbols are their own aliases, including those without other aliases.
    pairs = [(str(symbol).strip(),) * 2 for symbol in aliases["symbol"].dropna()]
    for column in columns:
        given = aliases[["symbol", column]].dropna().astype(str)
        for symbol, texts in given.itertuples(index=False):
            named = (text.strip() for text in texts.split(_ALIAS_SEPARATOR))
            pairs += [(alias, symbol.strip()) for alias in named if alias]
    return pairs


def _report(names: list[str], matches: list[_Match]) -> pd.DataFrame:
    are_clear = [len(match.candidates) == 1 for match in matches]
    found = list(zip(matches, are_clear, strict=True))
    return pd.DataFrame(
        {
            "perturbation": names,
            "matched": pd.Series(
                [match.candidates[0] if is_clear else None for match, is_clear in found],
                dtype=object,
            ),
            "by": [match.by if is_clear else "none" for match, is_clear in found],
            "candidates": ["" if clear else ", ".join(match.candidates) for match, clear in found],
        }
    )


def _warn_of_missing(report: pd.DataFrame) -> None:
    is_missing = report["matched"].isna()
    if not is_missing.any():
        return
    is_ambiguous = is_missing & report["candidates"].ne("")
    ambiguous = report[is_ambiguous]
    told = f" Ambiguous: {len(ambiguous)}" if len(ambiguous) else ""
    if told:
        first = ambiguous.iloc[0]
        told += f", such as {first['perturbation']!r}, which could be {first['candidates']}."
    logger.warning(
        f"{is_missing.sum()} of {counted(len(report), 'perturbation')} "
        f"{plural(is_missing.sum(), 'has', 'have')} no row in the table of features: "
        f"{listing(report['perturbation'][is_missing])}.{told}"
    )
