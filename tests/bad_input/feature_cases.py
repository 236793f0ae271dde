"""Features of perturbations, and the files that they are read from."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from bad_input.cases import Case, labelled, legal, refused
from bad_input.situation import Situation
from scvi_sams import CPAVAE, features
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
        "terms for some and vectors for others",
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


def of_model(given: Any, **settings: Any) -> Act:
    return lambda situation: situation.train(
        settings={"perturbation_features": given} | settings  # type: ignore[arg-type]
    )


def unmeasured(method: str, *arguments: Any) -> Act:
    """Ask a model that knows "U" by its features."""

    def act(situation: Situation) -> Any:
        model = of_model({**KNOWN, "U": [0.5]})(situation)
        situation.built = None  # this training is no work that an error comes after
        return getattr(model, method)(*arguments)

    return act


def predicts(*names: str) -> Callable[[Situation, Any], None]:
    """Check for the names of unmeasured perturbations, and for predictions of them."""

    def check(situation: Situation, model: Any) -> None:
        assert list(model.unmeasured) == list(names)
        ate = model.predict_ate(["A", *names], n_samples=4, n_posterior_samples=2)
        assert np.isfinite(ate.X).all()

    return check


def other_model(model_cls: Any) -> Act:
    def act(situation: Situation) -> Any:
        model_cls.setup_anndata(situation.adata)
        situation.is_registered = True
        return model_cls(situation.adata, perturbation_features=KNOWN)

    return act


KNOWN = {"A": [1.0], "B": [2.0]}
OF_MODELS: list[Case] = [
    refused(
        "for no measured perturbation",
        of_model({"Q": [1.0], "R": [2.0]}),
        InvalidArgumentError,
        "none of them was measured: there are 'A', 'B'",
        "features.match_genes",
    ),
    refused(
        "perturbations as columns",
        of_model(pd.DataFrame(KNOWN, index=["x"])),
        InvalidArgumentError,
        "transpose the table (table.T)",
    ),
    refused(
        "the same for all measured perturbations",
        of_model({"A": [1.0], "B": [1.0], "U": [2.0]}),
        InvalidArgumentError,
        "the same for all measured perturbations",
    ),
    refused(
        "for a single measured perturbation",
        of_model({"A": [1.0], "U": [2.0]}),
        InvalidArgumentError,
        "the same for all measured perturbations",
    ),
    refused(
        "a missing value",
        of_model({"A": [1.0], "B": [np.nan]}),
        InvalidArgumentError,
        "`perturbation_features` is nan for 'B'",
    ),
    refused(
        "an array, whose rows have no names",
        of_model(np.eye(2)),
        InvalidArgumentError,
        "`perturbation_features` must be a DataFrame",
        "pd.DataFrame(values, index=names)",
    ),
    refused(
        "a key that is not in adata.uns",
        of_model("pathways"),
        MissingKeyError,
        "`perturbation_features` is 'pathways', which is not a key of adata.uns",
    ),
    refused(
        "with a learned mask prior",
        of_model(KNOWN, mask_prior_concentration=2.0),
        InvalidArgumentError,
        "`mask_prior_concentration`",
    ),
    refused(
        "in a model that does not support features",
        other_model(CPAVAE),
        InvalidArgumentError,
        "perturbation_features",
    ),
    legal(
        "a row of a combination and of a control",
        of_model({**KNOWN, "A+U": [0.0], "control": [9.0], "U": [0.5]}),
        "left out, combinations with a warning",
        predicts("U"),
        warns=("'A+U' is a combination",),
    ),
    legal(
        "no row of a measured perturbation",
        of_model({**KNOWN, "U": [0.5]}),
        "average features are used, with a warning",
        predicts("U"),
        warns=("no row for 1 of 3 measured perturbations: 'C'",),
        data=labelled(["control", "A", "B", "C"] * 6),
    ),
    legal(
        "for measured perturbations only",
        of_model(KNOWN),
        "the prior of these depends on them",
        predicts(),
    ),
    refused(
        "`get_direct_effects`: a perturbation without cells",
        unmeasured("get_direct_effects", ["U"]),
        UnknownPerturbationError,
        "There are no cells with 'U'",
        "predict_ate",
    ),
    refused(
        "`predict_ate`: a perturbation without cells and features",
        unmeasured("predict_ate", ["U", "V"]),
        UnknownPerturbationError,
        "'V'",
        "`perturbation_features`",
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
        "can run arbitrary code",
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
        "`match_genes`: no match",
        match(["Q", "R"]),
        UnknownPerturbationError,
        "no row for 'Q', 'R'; its rows are 'A'",
        "`strip_guides=True`",
    ),
    legal(
        "`match_genes`: one without match and one ambiguous match",
        match(["a", "Q", "old"], aliases={"old": ["B", "C"]}),
        "left out, with a warning",
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
        "1 perturbation has features and effects",
    ),
    legal(
        "`svd`: features that do not predict the effects",
        reduce(effects=pd.DataFrame({"g": [1.0, 0.0, 0.2]}, index=TABLE.index)),
        "no columns are kept, with a warning",
        has_no_columns,
        warns=("significantly better than the mean",),
    ),
]
