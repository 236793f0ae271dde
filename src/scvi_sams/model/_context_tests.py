"""Test whether perturbations have the same effect in all levels of a column, without the model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import chi2_contingency
from scvi.data import AnnDataManager

from scvi_sams._compat import SETUP_ARGUMENTS_KEY
from scvi_sams._fdr import within
from scvi_sams._group_tests import q_values, without_linear
from scvi_sams._level_tests import FEWEST_CELLS, LevelTests, level_tests
from scvi_sams._plurals import counted
from scvi_sams.data._field import registered_labels
from scvi_sams.labels._labels import NO_PERTURBATION, Labels, distinct_rows
from scvi_sams.model._expression_axes import (
    continuous_covariates,
    indicators,
    log_normalised,
    principal_axes,
    strata_of_cells,
    variance_within,
)
from scvi_sams.train._statistics import chunks_of_cells

logger = logging.getLogger("scvi.sams")

MOST_CELLS = 10_000
"""Largest number of cells to read: enough to detect relevant differences."""
_MOST_CONTROLS = 1 / 3
"""Proportion of control cells among the cells that are read."""
_CELLS_OF_LABEL = 300
"""Cells per label; more only if all labels have as many."""
_MOST_LEVELS = 20
_MOST_NAMED = 3
NOT_REGISTERED = "not registered"
_N_COMPONENTS = 20
"""Number of axes. On simulated screens 5, 10 and 40 axes detected fewer differences."""
_MOST_GENES = 500
_FEWEST_COUNTS = 0.1
"""Pseudocount of the mean counts of a gene, by which its counts are divided."""
_UNBALANCED = 1e-3
"""p-value below which levels depend on perturbations."""
FDR = 0.05
LEAST_SHARE = 0.15
"""Smallest proportion of an effect that differs between levels. An effect in one of three types,
and not in the others, differs by 0.67 of its squared size. Equal latent effects in simulated types
whose genes differ by e^0.5 to e^2 (SD) differ by 0.01 to 0.05 as fold changes (single ones by
0.22), and by 0.01 to 0.25 as logarithms of counts plus one. In real screens: knock-outs in three
replicates of THP-1 cells at most 0.07; interferon in two donors 0.002, in CD4 and CD8 T cells 0.01,
in monocytes and lymphocytes 0.15. There was no warning in 72 simulated screens with equal effects,
and one in 142 of 144 with a third or all of the effects in one type, and in 53 of 72 with a tenth
of them."""
SURE, LEAST = 1e-3, 0.05
"""p-value of a column, and proportion of its perturbations that differ, for a warning: smaller
differences matter little, and twenty columns may be tested."""


class ContextTests(NamedTuple):
    """Results for columns, and for each perturbation in each of them."""

    columns: pd.DataFrame
    """One row per column."""
    perturbations: pd.DataFrame
    """One row per column and tested perturbation (and context, if contexts are registered)."""


class _Cells(NamedTuple):
    """Cells to test, with their labels and levels."""

    chosen: np.ndarray
    """Ascending positions."""
    treatment: np.ndarray
    """Code of the label and dose of each; -1 for control cells."""
    names: list[str]
    """Their names."""
    values: sparse.csr_array
    """Counts scaled to a typical size, or values that are not counts."""
    logged: sparse.csr_array
    counts: bool
    strata: np.ndarray
    """Registered batch and categories."""
    context: pd.Series | None
    """Registered contexts."""
    covariates: np.ndarray | None


def _registered_columns(manager: AnnDataManager) -> dict[str, str]:
    """Columns of obs that are registered as levels, and their role."""
    setup = manager.registry[SETUP_ARGUMENTS_KEY]
    named = {"batch": setup["batch_key"], "context": setup["context_key"]}
    columns = {key: what for what, key in named.items() if key is not None}
    return columns | dict.fromkeys(
        setup["categorical_covariate_keys"] or (), "categorical covariate"
    )


def context_tests(
    manager: AnnDataManager,
    keys: Sequence[str] | None = None,
    *,
    counts: bool,
    most_cells: int = MOST_CELLS,
) -> ContextTests:
    """Test columns of obs; all possible contexts if none are named.

    At most ``most_cells`` cells are read: in larger screens some of the control cells, and some of
    those of the perturbations with most cells. Nothing is random.
    """
    registered = _registered_columns(manager)
    obs = manager.adata.obs
    labels = registered_labels(manager)
    treatment, names = _treatments(labels)
    asked = [*registered, *_other_columns(manager, registered)] if keys is None else keys
    levels = {key: _levels(obs[key]) for key in asked}
    if keys is None:
        levels = {key: one for key, one in levels.items() if _is_testable(one, treatment)}
        levels = _distinct(levels, registered)
    rows: dict[str, dict[str, Any]] = {}
    details = []
    if levels:
        cells = _read(manager, treatment, names, most_cells, counts=counts)
        for key, level in levels.items():
            what, own = registered.get(key, NOT_REGISTERED), level[cells.chosen]
            detail = _of_perturbations(key, cells, own, what)
            if keys is not None or len(detail):
                is_balanced = _is_balanced(own, cells.treatment)
                rows[key] = _of_column(own, what, detail, is_balanced=is_balanced)
                details.append(detail)
    columns = pd.DataFrame.from_dict(rows, orient="index", columns=_COLUMNS)
    columns.index.name = "column"
    tested = [detail for detail in details if len(detail)] or [pd.DataFrame(columns=_DETAILS)]
    perturbations = pd.concat(tested, ignore_index=True)
    if "context" not in registered.values():
        perturbations = perturbations.drop(columns="context")
    return ContextTests(columns, perturbations)


def warn_of_contexts(manager: AnnDataManager, *, counts: bool) -> None:
    """Log one warning if effects differ between levels of columns that are not contexts."""
    table = context_tests(manager, counts=counts).columns
    found = table[table["differs"].astype(bool) & (table["registered_as"] != "context")]
    if found.empty:
        return
    more = (
        f"; and {counted(len(found) - _MOST_NAMED, 'more column')}"
        if len(found) > _MOST_NAMED
        else ""
    )
    described = "; ".join(
        f"{key!r} ({row['registered_as']}; {row['n_differ']} of "
        f"{counted(int(row['n_tested']), 'perturbation')}, most of all {row['most_different']!r})"
        for key, row in found[:_MOST_NAMED].iterrows()
    )
    logger.warning(
        f"Perturbations have different effects in the levels of {described}{more}. The model "
        "assumes the same effects in all of them, so masks and effects are an average that may "
        "apply to none. Register such a column as `context_key` of SAMSVAE.setup_anndata, or fit "
        "its levels separately; see tl.context_interactions(model) for details."
    )


_COLUMNS = [
    "registered_as",
    "n_levels",
    "n_tested",
    "n_differ",
    "share",
    "p_value",
    "most_different",
    "is_balanced",
    "differs",
]
_DETAILS = [
    "column",
    "perturbation",
    "context",
    "n_levels",
    "squared_effect",
    "squared_difference",
    "share",
    "p_value",
    "q_value",
    "differs",
]


def _other_columns(manager: AnnDataManager, registered: dict[str, str]) -> Iterator[str]:
    """Text, categorical or boolean columns that are not registered."""
    setup = manager.registry[SETUP_ARGUMENTS_KEY]
    own: set[object] = {*registered, setup["perturbation_key"], setup["dosage_key"]}
    guides = setup["guide_key"]
    own |= {guides} if isinstance(guides, str) or guides is None else set(guides)
    obs = manager.adata.obs
    for position, key in enumerate(obs.columns):
        column = obs.iloc[:, position]
        is_number = pd.api.types.is_numeric_dtype(column) and column.dtype != bool
        is_date = pd.api.types.is_datetime64_any_dtype(column)
        is_named_once = isinstance(key, str) and (obs.columns == key).sum() == 1
        if not (is_number or is_date or key in own) and is_named_once:
            yield key


def _levels(column: pd.Series) -> np.ndarray:
    """Code of each cell's level, -1 where missing."""
    written = column.astype(object).where(column.notna(), None)
    return pd.factorize(written.map(str, na_action="ignore"), sort=True)[0]


def _distinct(levels: dict[str, np.ndarray], registered: Mapping[str, str]) -> dict[str, Any]:
    """Remove unregistered columns that divide cells in the same way as an earlier one."""
    found: dict[bytes, str] = {}
    for key, level in levels.items():
        partition = pd.factorize(level)[0].tobytes()
        found.setdefault(partition, key)
        if key in registered:
            found[partition + key.encode()] = key
    return {key: level for key, level in levels.items() if key in set(found.values())}


def _treatments(labels: Labels) -> tuple[np.ndarray, list[str]]:
    """Code of each cell's label and doses, -1 for control cells, and their names."""
    acting = labels.doses != 0
    codes = np.where(acting, labels.codes, NO_PERTURBATION)
    dose = pd.factorize(np.where(acting, labels.doses, 0).ravel())[0].reshape(codes.shape)
    rows, row_of_cell = distinct_rows(np.concatenate([codes, dose], axis=1))
    is_control = (rows[:, : codes.shape[1]] == NO_PERTURBATION).all(axis=1)
    first_cell = np.zeros(len(rows), dtype=int)
    first_cell[row_of_cell] = np.arange(len(row_of_cell))
    names = pd.Series(
        [
            labels.spelling.join(sorted(labels.vocabulary[c] for c in row if c != NO_PERTURBATION))
            for row in codes[first_cell]
        ]
    )
    doses = pd.Series(
        [
            "+".join(f"{one:g}" for one in row[use])
            for row, use in zip(labels.doses[first_cell], acting[first_cell], strict=True)
        ]
    )
    named = names.where(~names.duplicated(keep=False), names + "@" + doses)[~is_control]
    number = np.where(is_control, -1, np.cumsum(~is_control) - 1)
    return number[row_of_cell], named.tolist()


def _is_testable(level: np.ndarray, treatment: np.ndarray) -> bool:
    """Whether there are few levels, and two of them have control cells and treated cells."""
    n_levels = int(level.max(initial=-1)) + 1
    if not 2 <= n_levels <= _MOST_LEVELS:
        return False
    known = level >= 0
    n_cells = [
        np.bincount(level[known & of_kind], minlength=n_levels)
        for of_kind in (treatment < 0, treatment >= 0)
    ]
    return bool((np.minimum(*n_cells) >= FEWEST_CELLS).sum() >= 2)


def _read(
    manager: AnnDataManager,
    treatment: np.ndarray,
    names: list[str],
    most_cells: int,
    *,
    counts: bool,
) -> _Cells:
    chosen = _chosen(treatment, most_cells)
    blocks = list(chunks_of_cells(manager, chosen))
    typical = float(np.median(np.concatenate([size for _, size in blocks]))) if counts else None
    values = sparse.csr_array(
        sparse.vstack(
            [x if typical is None else sparse.diags_array(typical / s) @ x for x, s in blocks]
        )
    )
    logged = sparse.vstack([log_normalised(x, size, typical) for x, size in blocks])
    key = manager.registry[SETUP_ARGUMENTS_KEY]["context_key"]
    covariates = continuous_covariates(manager)
    return _Cells(
        chosen=chosen,
        treatment=treatment[chosen],
        names=names,
        values=values,
        logged=sparse.csr_array(logged),
        counts=counts,
        strata=strata_of_cells(manager)[chosen],
        context=None if key is None else manager.adata.obs[key].iloc[chosen],
        covariates=None if covariates is None else covariates[chosen],
    )


def _chosen(treatment: np.ndarray, most_cells: int) -> np.ndarray:
    """Positions of at most so many cells, evenly over the cells of each label."""
    if len(treatment) <= most_cells:
        return np.arange(len(treatment))
    controls = _spread(np.flatnonzero(treatment < 0), int(most_cells * _MOST_CONTROLS))
    left = most_cells - len(controls)
    n_cells = np.bincount(treatment[treatment >= 0])
    each = max(_CELLS_OF_LABEL, left // max(len(n_cells), 1))
    taken = [controls]
    for one in np.argsort(-n_cells, kind="stable"):
        if left < min(each, n_cells[one]) or n_cells[one] < 2 * FEWEST_CELLS:
            break
        taken.append(_spread(np.flatnonzero(treatment == one), each))
        left -= len(taken[-1])
    return np.sort(np.concatenate(taken))


def _spread(cells: np.ndarray, most: int) -> np.ndarray:
    if len(cells) <= most:
        return cells
    return cells[np.linspace(0, len(cells) - 1, most).astype(int)]


class _Tested(NamedTuple):
    """Input of the test of one column, for cells with a level."""

    rows: np.ndarray
    """Positions among the cells that were read."""
    treatment: np.ndarray
    """Code of the treatment and context of each; -1 for control cells."""
    names: list[tuple[str, str | None]]
    """Their label and context."""
    level: np.ndarray
    """Levels; those of different contexts are distinct."""
    stratum: np.ndarray


def _tested(cells: _Cells, level: np.ndarray, *, within_contexts: bool) -> _Tested:
    context, contexts = np.zeros(len(level), dtype=int), pd.Index([None])
    if cells.context is not None and within_contexts:
        context, contexts = pd.factorize(cells.context.astype(object), sort=True)
    rows = np.flatnonzero((level >= 0) & (context >= 0))
    context, treatment = context[rows], cells.treatment[rows]
    is_treated = treatment >= 0
    both, of_cell = distinct_rows(np.column_stack([treatment, context])[is_treated])
    crossed = np.full(len(rows), -1)
    crossed[is_treated] = of_cell
    return _Tested(
        rows=rows,
        treatment=crossed,
        names=[(cells.names[one], contexts[where]) for one, where in both],
        level=distinct_rows(np.column_stack([context, level[rows]]))[1],
        stratum=distinct_rows(np.column_stack([context, level[rows], cells.strata[rows]]))[1],
    )


def _features(cells: _Cells, rows: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Features on which effects are compared, computed without labels, cells x axes.

    Axes in which cells vary most within levels. Counts are divided by their mean in the level, so
    that effects are fold changes: the same fold change in two cell types that express a gene at
    different rates is the same effect, which it would not be on logarithms of counts plus one.
    """
    of_level = indicators(level)
    _, spread = variance_within(cells.logged[rows], of_level)
    genes = np.sort(np.argsort(-spread, kind="stable")[:_MOST_GENES])
    values = sparse.csr_array(cells.values[rows][:, genes])
    if cells.counts:
        mean, _ = variance_within(values, of_level)
        row = np.repeat(level, np.diff(values.indptr))
        scaled = values.data / (mean[row, values.indices] + _FEWEST_COUNTS)
        values = sparse.csr_array((scaled, values.indices, values.indptr), values.shape)
    used, sd, axes = principal_axes(values, of_level, _N_COMPONENTS)
    features = values[:, used] @ (axes / sd[:, None])
    covariates = None if cells.covariates is None else cells.covariates[rows]
    return without_linear(features, covariates)


def _of_perturbations(key: str, cells: _Cells, level: np.ndarray, what: str) -> pd.DataFrame:
    """Rows of one column: what was tested, and the results."""
    tested = _tested(cells, level, within_contexts=what != "context")
    if not len(tested.names):
        return pd.DataFrame(columns=_DETAILS)
    features = _features(cells, tested.rows, tested.level)
    tests = level_tests(features, tested.treatment, tested.level, tested.stratum)
    known = np.isfinite(tests.p_value)
    tests = LevelTests(*(values[known] for values in tests))
    names = [name for name, is_known in zip(tested.names, known, strict=True) if is_known]
    q_value = q_values(tests.p_value)
    share = _share(tests.squared_difference, tests.squared_effect)
    columns = (
        key,
        [label for label, _ in names],
        [context for _, context in names],
        tests.n_levels,
        tests.squared_effect,
        tests.squared_difference,
        share,
        tests.p_value,
        q_value,
        within(q_value, FDR) & (share >= LEAST_SHARE),
    )
    return pd.DataFrame(dict(zip(_DETAILS, columns, strict=True)))


def _of_column(
    level: np.ndarray, what: str, of_perturbations: pd.DataFrame, *, is_balanced: bool
) -> dict[str, Any]:
    found = of_perturbations[of_perturbations["differs"].astype(bool)]
    effect, difference = of_perturbations[["squared_effect", "squared_difference"]].sum()
    # Simes' method, which is valid for tests that share control cells.
    p_value = of_perturbations["q_value"].min()
    n_tested, n_differ = (table["perturbation"].nunique() for table in (of_perturbations, found))
    is_sure, may_differ = p_value <= SURE, is_balanced or what != NOT_REGISTERED
    return {
        "registered_as": what,
        "n_levels": int(level.max(initial=-1)) + 1,
        "n_tested": n_tested,
        "n_differ": n_differ,
        "share": float(_share(difference, effect)) if len(of_perturbations) else np.nan,
        "p_value": p_value,
        "most_different": "" if found.empty else _most_different(found),
        "is_balanced": is_balanced,
        "differs": bool(may_differ and n_differ > 0 and is_sure and n_differ >= LEAST * n_tested),
    }


def _share(difference: Any, effect: Any) -> Any:
    """Proportion of squared effects; by chance the difference may exceed the whole."""
    difference = np.maximum(difference, 0)
    return difference / np.maximum(np.maximum(effect, difference), np.finfo(float).tiny)


def _most_different(found: pd.DataFrame) -> str:
    return found["perturbation"].to_numpy()[found["squared_difference"].to_numpy().argmax()]


def _is_balanced(level: np.ndarray, treatment: np.ndarray) -> bool:
    """Whether levels are as frequent among the cells of each perturbation as among controls."""
    known = level >= 0
    table = np.zeros((int(treatment.max(initial=-1)) + 2, int(level.max(initial=-1)) + 1))
    np.add.at(table, (treatment[known], level[known]), 1)  # controls are the last
    p_values = []
    for of_treatment in table[:-1]:
        both = np.stack([of_treatment, table[-1]])
        both = both[:, both.sum(axis=0) > 0]
        if both.sum(axis=1).min() > 0 and both.shape[1] > 1:
            p_values.append(chi2_contingency(both).pvalue)
    return not p_values or bool(q_values(np.array(p_values)).min() > _UNBALANCED)
