"""Guides of cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from bad_input.cases import Case, labelled, legal, refused, registered
from bad_input.situation import LABELS, Situation, elbo, screen, trains
from scvi_sams import SVAEPlus
from scvi_sams.data._guides import registered_guides
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidPerturbationLabelError,
    MissingKeyError,
    RegistrationError,
)

GUIDES = ["NTg1", "Ag1", "Bg1", "Bg1|Ag1"]
by_guide = registered(guide_key="guide")


def guided(guides: Sequence[Any] = GUIDES, labels: Sequence[str] = LABELS):
    return labelled(labels, guide=pd.Series([*guides] * 6, dtype=object).array)


def finds(codes: list[list[int]], *names: str):
    """Of the first four cells, which occur six times."""

    def check(situation: Situation, model: Any) -> None:
        found = registered_guides(model.adata_manager)
        assert found is not None
        assert found.names == names
        np.testing.assert_array_equal(found.codes, codes * 6)
        trains(situation, model)

    return check


def then_scored(**changes: Any) -> Callable[[Situation], float]:
    """Train with guides, then score other cells."""

    def act(situation: Situation) -> float:
        model = situation.train({"guide_key": "guide"})
        return elbo(model, screen(LABELS, **changes))

    return act


def finite(situation: Situation, found: float) -> None:
    assert np.isfinite(found)


def two_columns() -> AnnData:
    adata = guided()()
    adata.obs = pd.concat([adata.obs, adata.obs[["guide"]]], axis=1)
    return adata


PLAIN = finds([[-1, -1], [0, -1], [1, -1], [0, 1]], "Ag1", "Bg1")

CASES: list[Case] = [
    refused(
        "the guide column does not exist",
        registered(guide_key="grna"),
        MissingKeyError,
        "'grna'",
        "'perturbation'",
    ),
    refused(
        "a list as guide column",
        registered(guide_key=["guide"]),
        InvalidArgumentError,
        "`guide_key`",
        "['guide']",
    ),
    refused(
        "two guide columns with the same name",
        by_guide,
        RegistrationError,
        "'guide'",
        "Rename",
        data=two_columns,
    ),
    refused(
        "guides in a model that treats combinations as separate perturbations",
        lambda situation: SVAEPlus.setup_anndata(situation.adata, guide_key="guide"),
        InvalidArgumentError,
        "`guide_key`",
        "SAMSVAE, CPAVAE",
        data=guided(),
    ),
    refused(
        "a guide of two perturbations",
        by_guide,
        InvalidPerturbationLabelError,
        "'x' is in 6 cells of 'A' (such as 'c1'), 6 cells of 'B' (such as 'c2')",
        "Correct the guide or the label",
        data=guided(["NT", "x", "x", "x"]),
    ),
    refused(
        "a guide of control cells and perturbed cells",
        by_guide,
        InvalidPerturbationLabelError,
        "'x' is in 6 control cells and in 6 cells of 'A'",
        "control=['control', 'x']",
        data=guided(["x", "x", "Bg1", "Bg1"]),
    ),
    legal(
        "the same, and `control` names the guide",
        registered(guide_key="guide", control=["control", "NT*"]),
        "not treated as a guide",
        PLAIN,
        data=guided(["NT1", "Ag1|NT1", "Bg1|NT2", "Bg1|Ag1"]),
    ),
    refused(
        "a guide of combinations only, with an uninformative name",
        by_guide,
        InvalidPerturbationLabelError,
        "'x' is in 6 cells of 'A' and 'B' (such as 'c3')",
        "it could belong to any of 'A', 'B'",
        "such as 'A_x'",
        data=guided(["NT", "Ag1", "Bg1", "x"]),
    ),
    refused(
        "guides of control cells only",
        by_guide,
        InvalidPerturbationLabelError,
        "No perturbed cell has a guide",
        data=guided(["NT", None, "", np.nan]),
    ),
    refused(
        "lists as guides",
        by_guide,
        InvalidPerturbationLabelError,
        "['Ag1']",
        data=guided([None, ["Ag1"], ["Bg1"], ["Ag1", "Bg1"]]),
    ),
    legal(
        "a perturbed cell without a guide (NaN, None or empty)",
        by_guide,
        "accepted; their number is logged",
        finds([[-1], [0], [-1], [-1]], "Ag1"),
        data=guided([np.nan, "Ag1", None, ""]),
    ),
    legal(
        "guides joined by the delimiter of the labels, with spaces",
        by_guide,
        "two guides",
        PLAIN,
        data=guided(["NT", " Ag1", "Bg1 ", "Bg1 + Ag1"]),
    ),
    legal(
        "numbers as guides, with missing values",
        by_guide,
        "read as text, 7.0 as '7'",
        finds([[-1], [0], [1], [-1]], "7", "8"),
        data=guided([np.nan, 7.0, 8.0, np.nan]),
    ),
    legal(
        "guides unknown to the model, in new data",
        then_scored(guide=["NT", "Ag1", "Bg9", None] * 6),
        "ignored, with a warning",
        finite,
        warns=("1 guide", "'Bg9'"),
        data=guided(),
    ),
    legal(
        "no guide column, in new data",
        then_scored(),
        "guides of these cells are treated as unknown, which is logged",
        finite,
        data=guided(),
    ),
]
