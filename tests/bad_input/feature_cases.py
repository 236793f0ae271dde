"""Features of perturbations, and the files that they are read from."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from bad_input.cases import Case, legal, refused
from bad_input.situation import Situation
from scvi_sams import features
from scvi_sams.exceptions import (
    InvalidArgumentError,
    MissingKeyError,
    UnknownPerturbationError,
    UnreadableDataError,
)

TABLE = pd.DataFrame({"x": [1.0, 0.0, 2.0], "y": [0.0, 3.0, 1.0]}, index=["A", "B", "C"])
Act = Callable[[Situation], Any]


def read(given: Any, **arguments: Any) -> Act:
    return lambda situation: features.as_feature_table(given, **arguments)


def from_file(reader: Callable[..., Any], name: str, content: str | bytes, **arguments: Any) -> Act:
    def act(situation: Situation) -> Any:
        path = situation.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return reader(path, **arguments)

    return act


def match(perturbations: list[str], **arguments: Any) -> Act:
    return lambda situation: features.match_genes(TABLE, perturbations, **arguments)


def reduce(**arguments: Any) -> Act:
    return lambda situation: features.svd(TABLE, **arguments)


def has_rows(*names: str) -> Callable[[Situation, Any], None]:
    def check(situation: Situation, found: Any) -> None:
        assert found[0].index.tolist() == list(names)

    return check


def has_no_columns(situation: Situation, found: pd.DataFrame) -> None:
    assert found.shape == (3, 0)


TABLES: list[Case] = [
    refused(
        "names that occur twice as text",
        read({1: [0.0], "1": [1.0]}),
        InvalidArgumentError,
        "several rows of '1'",
        ".duplicated()",
    ),
    refused(
        "a row without a name",
        read(TABLE.set_axis(["A", np.nan, "C"])),
        InvalidArgumentError,
        "no name in row 1",
    ),
    refused("no columns", read(TABLE[[]]), InvalidArgumentError, "has no columns"),
    refused(
        "categories in a column",
        read(TABLE.assign(family=["p", "q", "p"])),
        InvalidArgumentError,
        "'family'",
        "pd.get_dummies",
    ),
    refused(
        "a missing value",
        read(TABLE.replace(3.0, np.nan)),
        InvalidArgumentError,
        "is nan for 'B' in column 'y'",
    ),
    refused(
        "vectors of different lengths",
        read({"A": [1.0], "B": [1.0, 2.0]}),
        InvalidArgumentError,
        "1 ('A') and 2 ('B')",
    ),
    refused(
        "terms of some and vectors of others",
        read({"A": {"MAPK"}, "B": [1.0]}),
        InvalidArgumentError,
        "mixes terms (of 'A') and vectors of numbers (of 'B')",
    ),
    refused(
        "an array, whose rows have no names",
        read(TABLE.to_numpy()),
        InvalidArgumentError,
        "pd.DataFrame(values, index=names)",
    ),
    refused(
        "a key that is not in uns",
        read("pathway", uns={"pathways": TABLE}),
        MissingKeyError,
        "'pathway'",
        "There are 'pathways'",
    ),
    refused(
        "rows of a perturbation without features",
        lambda situation: features.as_feature_table(TABLE).rows(["A", "Q"]),
        UnknownPerturbationError,
        "No features of 'Q'",
    ),
    refused(
        "perturbations as columns",
        lambda situation: features.as_feature_table(TABLE.T).rows(["A"]),
        UnknownPerturbationError,
        "transpose the table (table.T)",
    ),
]

FILES: list[Case] = [
    refused(
        "`from_gmt`: a line without genes",
        from_file(features.from_gmt, "sets.gmt", "S\t\tA\tB\nT\tdescription\n"),
        UnreadableDataError,
        "Line 2",
        "has no genes: 'T",
    ),
    refused(
        "`from_gmt`: no set of the right size",
        from_file(features.from_gmt, "sets.gmt", "S\t\tA\tB\n"),
        InvalidArgumentError,
        "5 to 500 genes",
        "largest has 2",
    ),
    refused(
        "`from_embedding`: a pickle",
        from_file(features.from_embedding, "genes.pkl", pickle.dumps({"A": [1.0]})),
        InvalidArgumentError,
        "can run any code",
        "np.savez",
    ),
    refused(
        "`from_embedding`: a table without a header",
        from_file(features.from_embedding, "genes.csv", "A,0.5\nB,1.5\n"),
        UnreadableDataError,
        "no header: its first line is '0.5'",
    ),
    refused(
        "`from_embedding`: a damaged file",
        from_file(features.from_embedding, "genes.npz", b"PK\x03\x04nonsense"),
        UnreadableDataError,
        "cannot be read as .npz",
    ),
    refused(
        "`from_smiles`: no names",
        lambda situation: features.from_smiles(["CCO"]),  # type: ignore[arg-type]
        InvalidArgumentError,
        "dict or Series of SMILES by the names",
    ),
    refused(
        "`match_genes`: none is found",
        match(["Q", "R"]),
        UnknownPerturbationError,
        "no row of 'Q', 'R'; its rows are 'A'",
        "`strip_guides=True`",
    ),
    legal(
        "`match_genes`: one is not found and one is ambiguous",
        match(["a", "Q", "old"], aliases={"old": ["B", "C"]}),
        "are left out, with a warning",
        has_rows("a"),
        warns=("2 of 3 perturbations have no row", "'old', which could be B, C"),
    ),
    refused(
        "`svd`: neither effects nor a number of components",
        reduce(),
        InvalidArgumentError,
        "either `effects`",
    ),
    refused(
        "`svd`: effects of other perturbations",
        reduce(effects=TABLE.set_axis(["Q", "R", "A"])),
        InvalidArgumentError,
        "1 perturbations have features and effects",
    ),
    legal(
        "`svd`: features that tell nothing of the effects",
        reduce(effects=pd.DataFrame({"g": [1.0, 0.0, 0.2]}, index=TABLE.index)),
        "has no columns, with a warning",
        has_no_columns,
        warns=("clearly better than the mean",),
    ),
]
