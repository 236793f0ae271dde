"""Contexts of cells: cell types, donors or lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from bad_input.cases import Case, labelled, legal, refused, registered
from bad_input.situation import LABELS, Situation, screen
from scvi_sams import CPAVAE, SAMSVAE
from scvi_sams.data._contexts import registered_contexts
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidCovariateError,
    MissingKeyError,
    RegistrationError,
)

LINES = ["K"] * 12 + ["T"] * 12
by_line = registered(context_key="line")


def of(lines: Sequence[Any], labels: Sequence[str] = LABELS):
    return labelled(labels, line=pd.Series([*lines], dtype=object).array)


def registers(situation: Situation) -> Any:
    situation.register(context_key="line")
    return SAMSVAE._get_most_recent_anndata_manager(situation.adata, required=True)


def then_read(**changes: Any) -> Callable[[Situation], Any]:
    """Register contexts, then other cells by them."""
    return lambda situation: registers(situation).transfer_fields(screen(LABELS, **changes))


def finds(codes: list[int], *levels: str) -> Callable[[Situation, Any], None]:
    """Of all 24 cells."""

    def check(situation: Situation, manager: Any) -> None:
        found = registered_contexts(manager)
        assert found is not None
        assert found.levels == levels
        np.testing.assert_array_equal(found.codes, codes)

    return check


def two_columns() -> AnnData:
    adata = of(LINES)()
    adata.obs = pd.concat([adata.obs, adata.obs[["line"]]], axis=1)
    return adata


PLAIN = [0] * 12 + [1] * 12

CASES: list[Case] = [
    refused(
        "the context column does not exist",
        registered(context_key="celltype"),
        MissingKeyError,
        "'celltype'",
        "'perturbation'",
    ),
    refused(
        "a list as context column",
        registered(context_key=["line"]),
        InvalidArgumentError,
        "`context_key`",
        "['line']",
    ),
    refused(
        "two context columns with the same name",
        by_line,
        RegistrationError,
        "'line'",
        "Rename",
        data=two_columns,
    ),
    refused(
        "contexts in a model with the same effects in all contexts",
        lambda situation: CPAVAE.setup_anndata(situation.adata, context_key="line"),
        InvalidArgumentError,
        "`context_key`",
        "SAMSVAE",
        "register 'line' in `categorical_covariate_keys`",
        data=of(LINES),
    ),
    refused(
        "a context column equal to the perturbations",
        registered(context_key="perturbation"),
        InvalidArgumentError,
        "`context_key` and `perturbation_key` are the same column, 'perturbation'",
    ),
    refused(
        "a context column equal to the guides",
        registered(context_key="line", guide_key="line"),
        InvalidArgumentError,
        "`context_key` and `guide_key` are the same column, 'line'",
        data=of(LINES),
    ),
    *(
        refused(
            what,
            by_line,
            InvalidCovariateError,
            "'c0'",
            "`context_key`",
            data=of([value, *LINES[1:]]),
        )
        for what, value in (("a context is missing", np.nan), ("a context is an empty text", " "))
    ),
    refused(
        "contexts are numbers and text",
        by_line,
        InvalidCovariateError,
        "'line'",
        "astype(str)",
        data=of([3, *LINES[1:]]),
    ),
    refused(
        "one context only",
        by_line,
        InvalidCovariateError,
        "All cells have the same context, 'K'",
        "`context_key`",
        data=of(["K"] * 24),
    ),
    refused(
        "cell names as contexts",
        by_line,
        InvalidCovariateError,
        "24 levels in 24 cells",
        "'AAA0'",
        data=of([f"AAA{i}" for i in range(24)]),
    ),
    refused(
        "a numeric measurement as contexts",
        by_line,
        InvalidCovariateError,
        "24 levels in 24 cells",
        "a measurement",
        data=of(np.linspace(0, 1, 24)),
    ),
    refused(
        "lists as contexts",
        by_line,
        InvalidCovariateError,
        "['K']",
        data=of([["K"], *LINES[1:]]),
    ),
    legal(
        "numbers as contexts",
        registers,
        "read as text, 7.0 as '7'",
        finds([1] * 12 + [0] * 12, "12", "7"),
        data=of([7.0] * 12 + [12.0] * 12),
    ),
    legal(
        "a context without control cells",
        registers,
        "accepted, with a warning",
        finds(PLAIN, "K", "T"),
        warns=("1 of 2 contexts", "'T'", "no control cells"),
        data=of(LINES, [*LABELS[:12], *["A", "B"] * 6]),
    ),
    legal(
        "every perturbation in one context only",
        registers,
        "accepted, with a warning",
        finds(PLAIN, "K", "T"),
        warns=("Every perturbation was measured in only one context", "Omit `context_key`"),
        data=of(LINES, ["control", "A"] * 6 + ["control", "B"] * 6),
    ),
    legal(
        "unknown or missing contexts, in new data",
        then_read(line=["K", "X", "T", None] * 6),
        "treated as an unknown context, with a warning",
        finds([0, 2, 1, 2] * 6, "K", "T"),
        warns=("1 context", "'X'"),
        data=of(LINES),
    ),
    legal(
        "no context column, in new data",
        then_read(),
        "treated as an unknown context, which is logged",
        finds([2] * 24, "K", "T"),
        data=of(LINES),
    ),
]
