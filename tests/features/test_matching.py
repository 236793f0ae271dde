"""Perturbations find their row by symbol, alias or case; what is not clear is left out and told."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from scvi_sams.exceptions import InvalidArgumentError, UnknownPerturbationError
from scvi_sams.features import FeatureTable, match_genes


def genes(*names):
    return pd.DataFrame({"dim": np.arange(1.0, 1 + len(names))}, index=list(names))


def found(table, perturbations, **arguments):
    """Row and way of each perturbation."""
    kept, report = match_genes(table, perturbations, **arguments)
    ways = {
        name: (row, by)
        for name, row, by, _ in report.itertuples(index=False)
        if row is not None and by != "none"
    }
    assert kept.index.tolist() == list(ways)
    rows = [row for row, _ in ways.values()]
    np.testing.assert_array_equal(kept.to_numpy(), table.loc[rows].to_numpy())
    return ways


def test_symbol_comes_before_alias_before_case():
    table = genes("TP53", "p53", "KLF1", "kLF1", "STAT1", "MYC")
    aliases = {"p53": "TP53", "Klf1": "STAT1"}
    names = ["myc", "p53", "Klf1", "TP53", "kLF1"]
    assert found(table, names, aliases=aliases) == {
        "myc": ("MYC", "case"),
        "p53": ("p53", "symbol"),
        "Klf1": ("STAT1", "alias"),
        "TP53": ("TP53", "symbol"),
        "kLF1": ("kLF1", "symbol"),
    }


@pytest.mark.parametrize("row", ["SEPTIN1", "SEPT1", "DIFF6"])
@pytest.mark.parametrize("name", ["SEPTIN1", "SEPT1", "DIFF6"])
def test_old_names_are_found_on_either_side(row, name):
    by = "symbol" if row == name else "alias"
    aliases = {"SEPT1": "SEPTIN1", "DIFF6": "SEPTIN1"}
    assert found(genes(row, "A"), ["A", name], aliases=aliases)[name] == (row, by)


def test_a_symbol_is_not_an_alias(caplog):
    # CAP1 is the symbol of one gene and an old name of another.
    hgnc = pd.DataFrame({"symbol": ["CAP1", "BRD4"], "alias_symbol": [np.nan, "CAP1|HUNK1"]})
    assert found(genes("CAP1", "X"), ["BRD4", "X"], aliases=hgnc) == {"X": ("X", "symbol")}
    assert found(genes("BRD4", "X"), ["CAP1", "X"], aliases=hgnc) == {"X": ("X", "symbol")}
    assert found(genes("BRD4"), ["HUNK1"], aliases=hgnc) == {"HUNK1": ("BRD4", "alias")}
    assert "1 of 2 perturbations has no row in the table of features: 'CAP1'." in caplog.text


@pytest.mark.parametrize(
    "aliases",
    [
        {"old": "A", "older": ["A"], "both": ["A", "B"]},
        pd.Series({"old": "A", "older": "A", "both": ["A", "B"]}),
        pd.DataFrame({"alias": ["old", "older", "both", "both"], "symbol": list("AAAB")}),
        pd.DataFrame(
            {
                "symbol": ["A", "B"],
                "alias_symbol": ["old|both", "both"],
                "prev_symbol": ["older", np.nan],
            }
        ),
    ],
)
def test_an_alias_of_several_symbols_is_ambiguous(aliases, caplog):
    kept, report = match_genes(genes("A", "B"), ["old", "older", "both"], aliases=aliases)
    assert kept["dim"].to_dict() == {"old": 1.0, "older": 1.0}
    assert report.iloc[2].tolist() == ["both", None, "none", "A, B"]
    assert "'both'. Ambiguous: 1, such as 'both', which could be A, B." in caplog.text
    # Even if only one of the symbols has a row, or the row itself has the ambiguous name.
    assert list(found(genes("A", "X"), ["both", "X"], aliases=aliases)) == ["X"]
    assert list(found(genes("both", "X"), ["A", "X"], aliases=aliases)) == ["X"]


def test_case_is_used_where_it_is_clear_and_wanted(caplog):
    table = genes("Abc", "ABC", "DEF", "X")
    assert found(table, ["abc", "def", "X"]) == {"def": ("DEF", "case"), "X": ("X", "symbol")}
    assert "'abc', which could be Abc, ABC" in caplog.text
    assert list(found(table, ["def", "X"], case=False)) == ["X"]


def test_guides_are_stripped_only_if_asked():
    table = genes("STAT1", "NKX2_1", "IRF1")
    names = ["STAT1_1", "sgSTAT1-2", "NKX2_1", "irf1g3", "IRF1"]
    assert list(found(table, names)) == ["NKX2_1", "IRF1"]
    assert found(table, names, strip_guides=True) == {
        "STAT1_1": ("STAT1", "symbol"),
        "sgSTAT1-2": ("STAT1", "symbol"),
        "NKX2_1": ("NKX2_1", "symbol"),
        "IRF1": ("IRF1", "symbol"),
    }


def test_tables_of_any_kind_keep_theirs_and_names_are_asked_once(caplog):
    values = sparse.csr_matrix([[1, 0, 2], [0, 3, 0]])
    table = FeatureTable(("A", "B"), ("x", "y", "z"), values)
    kept, report = match_genes(table, ["b", "A", "b"])
    assert kept.sparse.to_dense().to_numpy().tolist() == [[0, 3, 0], [1, 0, 2]]
    assert set(kept.dtypes) == {pd.SparseDtype("float32", 0.0)}
    assert report["perturbation"].tolist() == ["b", "A"]
    assert caplog.text == "", "all were found"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"perturbations": ["Q"]}, UnknownPerturbationError, r"no row for 'Q'; its rows are 'A'.*"),
        ({"perturbations": ["dim"]}, UnknownPerturbationError, r"column of .* transpose the table"),
        ({"perturbations": []}, InvalidArgumentError, "`perturbations` is empty"),
        ({"perturbations": 3}, InvalidArgumentError, "`perturbations` must be names"),
        ({"table": [[1.0]]}, InvalidArgumentError, "`table` must be a DataFrame"),
        ({"aliases": ["A"]}, InvalidArgumentError, "`aliases` must be a dict .* not list"),
        (
            {"aliases": pd.DataFrame({"Approved symbol": ["A"]})},
            InvalidArgumentError,
            "needs a column 'symbol' and one of 'alias', .*are 'Approved symbol': rename",
        ),
        ({"aliases": {"a": 3}}, InvalidArgumentError, "`aliases` must be names, not 3"),
        ({"case": 1}, InvalidArgumentError, "`case` must be True or False"),
    ],
)
def test_what_is_wrong_is_told(arguments, error, message):
    with pytest.raises(error, match=message):
        match_genes(**{"table": genes("A", "B"), "perturbations": ["A"]} | arguments)
