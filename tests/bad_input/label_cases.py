"""Labels, control and delimiter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from bad_input.cases import Case, labelled, legal, refused, registered
from bad_input.situation import LABELS, Situation, screen, trains, trains_alike
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidPerturbationLabelError,
    MissingControlError,
    MissingKeyError,
    RegistrationError,
)


def learns(*names: str):
    def check(situation: Situation, model: Any) -> None:
        assert model.perturbations == list(names)
        trains(situation, model)

    return check


def two_columns():
    adata = screen()
    adata.obs = pd.concat([adata.obs, adata.obs], axis=1)
    return adata


def validation_only(situation: Situation) -> Any:
    cells = np.arange(24)
    lone = np.flatnonzero(situation.adata.obs["perturbation"] == "B")
    split = [np.setdiff1d(cells, lone), lone]
    return situation.train(datasplitter_kwargs={"external_indexing": split})


ALIKE = "equivalent; same results as with the plain spelling"
WITH_HOLE = ["control", None, "A", "B"] * 6
SINGLES = ["control", "A", "B", "C"] * 6

CASES: list[Case] = [
    refused(
        "the label column does not exist",
        registered(perturbation_key="guide"),
        MissingKeyError,
        "'guide'",
        "'perturbation'",
    ),
    refused(
        "no label column and no dosage matrix",
        registered(perturbation_key=None),
        MissingKeyError,
        "`perturbation_key`",
        "`dosage_obsm_key`",
    ),
    refused(
        "a list as label column",
        registered(perturbation_key=["perturbation"]),
        InvalidArgumentError,
        "`perturbation_key`",
        "['perturbation']",
    ),
    refused(
        "two label columns of the same name",
        registered(),
        RegistrationError,
        "'perturbation'",
        "Rename",
        data=two_columns,
    ),
    refused(
        "NaN among labels",
        registered(),
        InvalidPerturbationLabelError,
        "6 of 24 cells",
        "'c1'",
        data=labelled(["control", np.nan, "A", "B"] * 6),
    ),
    refused(
        "None among labels",
        registered(),
        InvalidPerturbationLabelError,
        "6 of 24 cells",
        "'c1'",
        data=labelled(WITH_HOLE),
    ),
    refused(
        "a missing value in a categorical column",
        registered(),
        InvalidPerturbationLabelError,
        "6 of 24 cells",
        "'c1'",
        data=labelled(pd.Categorical(WITH_HOLE)),
    ),
    legal(
        "the text 'nan' as a label",
        registered(),
        "a perturbation of that name, with a warning",
        learns("A", "B", "nan"),
        warns=("'nan'", "drop these cells"),
        data=labelled(["control", "nan", "A", "B"] * 6),
    ),
    refused(
        "an empty label",
        registered(),
        InvalidPerturbationLabelError,
        "''",
        "empty name",
        data=labelled(["control", "", "A", "B"] * 6),
    ),
    refused(
        "a label of spaces",
        registered(),
        InvalidPerturbationLabelError,
        "' '",
        "empty name",
        data=labelled(["control", " ", "A", "B"] * 6),
    ),
    refused(
        "two delimiters in a row",
        registered(),
        InvalidPerturbationLabelError,
        "'A++B'",
        "delimiter '+'",
        data=labelled(["control", "A++B", "A", "B"] * 6),
    ),
    refused(
        "a perturbation that occurs twice in a label",
        registered(),
        InvalidPerturbationLabelError,
        "'A+A'",
        "dosage",
        data=labelled(["control", "A+A", "A", "B"] * 6),
    ),
    refused(
        "lists as labels",
        registered(),
        InvalidPerturbationLabelError,
        "['A']",
        "`delimiter`",
        data=lambda: screen([["A"], ["B"], ["control"], ["A"]] * 6),
    ),
    legal(
        "spaces around labels and names",
        registered(),
        ALIKE,
        trains_alike,
        data=labelled(["control ", " A", "B", "B + A"] * 6),
    ),
    legal(
        "names in another order within labels",
        registered(),
        ALIKE,
        trains_alike,
        data=labelled(["control", "A", "B", "A+B"] * 6),
    ),
    legal(
        "a categorical column with unused levels",
        registered(),
        "unused levels are ignored; same results",
        trains_alike,
        data=labelled(pd.Categorical(LABELS, ["Z", "control", "A", "B", "B+A"])),
    ),
    legal(
        "names that differ only by case",
        registered(),
        "two perturbations, with a warning",
        learns("ABC", "Abc", "B"),
        warns=("'ABC' and 'Abc'", "one name"),
        data=labelled(["control", "ABC", "Abc", "B"] * 6),
    ),
    legal(
        "a perturbation that differs from the control label only by case",
        registered(),
        "a perturbation of its own, with a warning",
        learns("A", "B", "Control"),
        warns=("'control' and 'Control'",),
        data=labelled(["control", "Control", "A", "B"] * 6),
    ),
    legal(
        "one letter in two Unicode forms (composed, decomposed)",
        registered(),
        "two perturbations, with a warning",
        learns("B", "e\u0301", "\u00e9"),
        warns=("encoding",),
        data=labelled(["control", "\u00e9", "e\u0301", "B"] * 6),
    ),
    legal(
        "a name that contains the delimiter",
        registered(delimiter="-"),
        "split; a warning names parts that occur only together",
        learns("A", "B", "C", "HLA"),
        warns=("'A' and 'HLA'", "`delimiter`"),
        data=labelled(["control", "HLA-A", "B", "C"] * 6),
    ),
    legal(
        "the same with delimiter=None",
        registered(delimiter=None),
        "one perturbation",
        learns("B", "C", "HLA-A"),
        data=labelled(["control", "HLA-A", "B", "C"] * 6),
    ),
    legal(
        "a control label that contains the delimiter",
        registered(control="non-targeting", delimiter="-"),
        "control, alone and in combinations",
        learns("A", "B"),
        data=labelled(["non-targeting", "A-non-targeting", "B", "A-B"] * 6),
    ),
    refused(
        "a delimiter that is not text",
        registered(delimiter=3),
        InvalidArgumentError,
        "`delimiter`",
        "3",
    ),
    refused(
        "integer labels, and control='control'",
        registered(),
        MissingControlError,
        "'control'",
        "'0', '1', '2', '3'",
        data=labelled([0, 1, 2, 3] * 6),
    ),
    legal(
        "integer labels with an integer control",
        registered(control=0),
        "read as text",
        learns("1", "2", "3"),
        data=labelled([0, 1, 2, 3] * 6),
    ),
    refused(
        "float labels with an integer control",
        registered(control=0),
        MissingControlError,
        "'0'",
        "'0.0'",
        data=labelled([0.0, 1.0, 2.0, 3.0] * 6),
    ),
    legal(
        "boolean labels with control=False",
        registered(control=False),
        "one perturbation, 'True'",
        learns("True"),
        data=labelled([False, True] * 12),
    ),
    legal(
        "one of two control labels that no cell has",
        registered(control=["control", "NTC"]),
        "same results, with a warning",
        trains_alike,
        warns=("No cell has the control label 'NTC'", "misspelt"),
    ),
    legal(
        "a pattern as control",
        registered(control="c*l"),
        ALIKE,
        trains_alike,
    ),
    legal(
        "booleans per cell as control",
        registered(control=np.array([True, False, False, False] * 6)),
        ALIKE,
        trains_alike,
    ),
    legal(
        "a boolean column as control",
        registered(control="is_control"),
        ALIKE,
        trains_alike,
        data=labelled(LABELS, is_control=[True, False, False, False] * 6),
    ),
    refused(
        "booleans per cell as control that contradict the labels",
        registered(control=np.array([True, False, True, False] * 3 + [False] * 12)),
        InvalidPerturbationLabelError,
        "`control`",
        "'control'",
    ),
    refused(
        "control=pd.NA",
        registered(control=pd.NA),
        InvalidArgumentError,
        "`control` is <NA>",
    ),
    legal(
        "control labels as a generator",
        lambda situation: situation.train({"control": (name for name in ["control"])}),
        ALIKE,
        trains_alike,
    ),
    refused(
        "control=None",
        registered(control=None),
        InvalidArgumentError,
        "`control` is None",
    ),
    refused(
        "NaN among the control labels",
        registered(control=["control", np.nan]),
        InvalidArgumentError,
        "`control`",
        "nan",
    ),
    refused(
        "an empty list of control labels",
        registered(control=[]),
        MissingControlError,
        "empty list",
        "'control'",
    ),
    refused(
        "no control cells",
        registered(),
        MissingControlError,
        "'control'",
        "'A', 'B'",
        data=labelled(["A", "B"] * 12),
    ),
    refused(
        "no control cells, but a categorical column with that level",
        registered(),
        MissingControlError,
        "'control'",
        data=labelled(pd.Categorical(["A", "B"] * 12, ["control", "A", "B"])),
    ),
    refused(
        "no control cells with the given name, but with a similar one",
        registered(),
        MissingControlError,
        "'NT1'",
        data=labelled(["NT1", "A", "B", "C"] * 6),
    ),
    refused(
        "control cells only",
        registered(),
        InvalidPerturbationLabelError,
        "Every cell is a control cell",
        data=labelled(["control"] * 24),
    ),
    legal(
        "one perturbation",
        registered(),
        "trains",
        learns("A"),
        data=labelled(["control", "A"] * 12),
    ),
    legal(
        "a perturbation with one cell",
        registered(),
        "trains",
        learns("A", "B"),
        data=labelled(["control", "A"] * 11 + ["control", "B"]),
    ),
    legal(
        "one control cell",
        registered(),
        "trains",
        learns("A"),
        data=labelled(["control"] + ["A"] * 23),
    ),
    legal(
        "perturbations that occur only together",
        registered(),
        "trains, with a warning that their effects are not identifiable separately",
        learns("A", "B"),
        warns=("only together", "'A' and 'B'"),
        data=labelled(["control", "A+B"] * 12),
    ),
    legal(
        "a perturbation only in the validation cells",
        validation_only,
        "trains, with a warning that nothing is learned about it",
        learns("A", "B"),
        warns=("1 perturbation has no training cells", "'B'"),
        data=labelled(["control", "A", "B", "A"] * 6),
    ),
    refused(
        "an argument that there is not",
        registered(labels_key="perturbation"),
        InvalidArgumentError,
        "labels_key",
        "`perturbation_key`",
    ),
]
