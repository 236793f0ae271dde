"""Differential expression between perturbations or groups of cells, in the format of scvi-tools."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi.model.base import DifferentialComputation

from scvi_sams._checks import (
    as_names,
    as_positions,
    check_choice,
    check_integer,
    check_key,
    check_number,
)
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams._fdr import mask_q_values, within
from scvi_sams._torch import fixed_seed
from scvi_sams.data._field import registered_labels
from scvi_sams.exceptions import (
    InvalidArgumentError,
    MissingKeyError,
    SAMSError,
    UnknownPerturbationError,
)
from scvi_sams.labels._labels import Labels
from scvi_sams.model._basal_states import Basal, basal_states
from scvi_sams.model._cell_model import CellModel
from scvi_sams.model._contrast import CellSizes, Contrast, Statistic
from scvi_sams.model._counterfactual import (
    drawn_effects,
    encode_requested,
)
from scvi_sams.model._descriptions import control_cells
from scvi_sams.model._noise import derived_seed, keys_of_cells, new_seed, number_of
from scvi_sams.module._likelihoods import Likelihood

_DRAWS_OF_EFFECTS = 25
"""Number of parts in which cells are sampled, each with its own sample of masks and effects."""
_CELLS_PER_DRAW = 10
"""Control cells over which expression is averaged, for each sample of masks and effects."""
_HARDLY_EXPRESSED = 0.1
"""Pseudocount on both sides, per cell: genes with fewer counts have small fold changes."""
_EPSILON = 1e-8
_CONTINUITY = 0.5
"""Pseudocount for counts that may be zero, before dividing by them."""

Comparison = tuple[str, str, np.ndarray, np.ndarray, dict[str, Any]]
"""Names of two groups, boolean masks of their cells, and further columns."""


def check_comparison(
    likelihood: Likelihood,
    mode: str,
    delta: float,
    fdr_target: float,
    pseudocounts: float | None,
    n_samples: int,
) -> None:
    """Raise if groups cannot be compared as requested in ``differential_expression``."""
    check_choice("mode", mode, ("vanilla", "change"))
    check_integer(n_samples=n_samples)
    check_number(at_least=0, delta=delta)
    check_number(above=0, below=1, fdr_target=fdr_target)
    if pseudocounts is not None:
        check_number(at_least=0, pseudocounts=pseudocounts)
    if not likelihood.is_count_likelihood:
        raise SAMSError(
            "Fold changes need rates, but the model has a normal likelihood. Use "
            "predict_ate(method='mean') for differences of means and their intervals."
        )


@torch.inference_mode()
def compare_perturbations(
    model: CellModel,
    adata: AnnData,
    group1: str | Sequence[str] | None,
    group2: str | None,
    delta: float,
    pseudocounts: float | None,
    n_samples: int,
) -> list[Comparison]:
    """Compare the same control cells with one perturbation and with the other, or none.

    Expression is averaged over control cells in every sample of masks and effects, so that
    differences between cells do not add to the uncertainty of the change.
    """
    spelling = model._spelling
    check_key(group2=group2)
    second = spelling.control_label if group2 is None else spelling.canonical(group2)
    asked = _asked_for(group1, model.perturbations, second)
    first = [spelling.canonical(name) for name in asked]
    requested = encode_requested(model, [second, *first])
    module = model.module
    sizes = CellSizes.of(module, None)
    statistic = Statistic(module.likelihood, "mean", sizes, 1.0, module.device)
    basal: Basal = "control" if len(control_cells(model)) else "prior"
    n_basal = min(_CELLS_PER_DRAW, n_samples)
    n_draws = n_samples // n_basal
    contrast = Contrast(module, statistic, basal_states(model, basal, n_draws, n_basal))
    size = _median_size(model)
    if pseudocounts is None:
        pseudocounts = _HARDLY_EXPRESSED / size
    manager = model.get_anndata_manager(adata, required=True)
    label_of_cell = registered_labels(manager).canonical
    effects = drawn_effects(module, requested, n_draws, new_seed(), contrast.contexts)
    n_second, *n_first = _cells_behind(model, requested)
    reference = contrast.mean(next(effects)).double().cpu().numpy()
    of_second = label_of_cell == second
    found = []
    for name, n_cells, drawn in zip(first, n_first, effects, strict=True):
        treated = contrast.mean(drawn).double().cpu().numpy()
        error = _error_of_counts(
            *((treated, n_cells * size), (reference, n_second * size)), pseudocounts=pseudocounts
        )
        columns = _fold_changes(treated, reference, error, delta, pseudocounts)
        found.append((name, second, label_of_cell == name, of_second, columns))
    return found


def _cells_behind(model: CellModel, requested: Labels) -> np.ndarray:
    """Return the number of cells that the estimate for each label is based on.

    For a control, control cells; for a combination the number for which variances of its parts add
    up. Predictions from features are not based on cells: infinitely many, because samples of the
    effect include all of its uncertainty.
    """
    n_carrying = model.module.cells_per_perturbation.double().cpu().numpy()
    n_carrying = np.append(n_carrying, np.full(len(model.unmeasured), np.inf))
    with np.errstate(divide="ignore"):  # a perturbation without training cells
        variance = np.where(requested.codes >= 0, 1 / n_carrying[requested.codes], 0).sum(axis=1)
        return np.where(requested.is_control, len(control_cells(model)), 1 / variance)


def _error_of_counts(*sides: tuple[np.ndarray, float], pseudocounts: float) -> np.ndarray:
    """Return the standard error of a log2 fold change due to Poisson counts, per gene.

    A side is its rates ``(n_draws, n_genes)`` and the sum of the sizes of its cells. The decoder
    was trained on these counts, and cannot be more certain than they are.
    """
    variance = np.zeros(sides[0][0].shape[1])
    for rates, total_size in sides:
        if np.isinf(total_size):
            continue
        rate = rates.mean(axis=0)
        # The pseudocount shrinks the logarithm, and so its error.
        damping = rate / (rate + pseudocounts)
        variance += damping**2 / (rate * total_size + _CONTINUITY)
    return np.sqrt(variance) / np.log(2)


def _asked_for(
    group1: str | Sequence[str] | None, known: Iterable[str], second: str | None
) -> list[str]:
    if group1 is None:
        group1 = [name for name in known if name != second]
    names = as_names("group1", group1)
    if not names:
        raise InvalidArgumentError("`group1` is empty: there is nothing to compare.")
    return names


def _median_size(model: CellModel) -> float:
    """Median size of control cells (of all cells if there are none)."""
    model._validate_anndata()
    cells = control_cells(model)
    chosen = cells if len(cells) else np.arange(model.adata.n_obs)
    if model.module.uses_size_factor:
        sizes = model.adata_manager.get_from_registry(REGISTRY_KEYS.SIZE_FACTOR)[chosen]
    else:
        sizes = model.adata_manager.get_from_registry(REGISTRY_KEYS.X)[chosen].sum(axis=1)
    return float(np.median(np.asarray(sizes)))


def compare_cells(
    model: CellModel,
    adata: AnnData,
    groups: list[tuple[str, str, np.ndarray, np.ndarray]],
    batch_size: int | None,
    kwargs: dict[str, Any],
) -> list[Comparison]:
    """Compare the expression inferred for the cells of groups.

    Samples for a comparison depend on its cells, and not on other comparisons.
    """
    seed = new_seed()

    def sampled(
        data: AnnData,
        *,
        indices: np.ndarray,
        transform_batch: str | None,
        n_samples_overall: int,
    ) -> np.ndarray:
        """Sample cells with replacement, and expression from the posterior of each."""
        keys = keys_of_cells(data.obs_names, indices)
        order = np.argsort(keys, kind="stable")
        own = derived_seed(seed + number_of(keys[order].tobytes()), next(calls))
        source = torch.Generator().manual_seed(own)
        drawn = torch.randint(len(indices), (n_samples_overall,), generator=source).numpy()
        parts = np.array_split(indices[order][drawn], min(_DRAWS_OF_EFFECTS, n_samples_overall))
        rates = []
        for number, part in enumerate(parts):
            with fixed_seed(derived_seed(own, number)):
                rates.append(
                    model.get_normalized_expression(
                        data,
                        part.tolist(),
                        transform_batch=transform_batch,
                        batch_size=batch_size,
                        return_numpy=True,
                    )
                )
        return np.concatenate(rates)

    manager = model.get_anndata_manager(adata, required=True)
    computation = DifferentialComputation(sampled, None, manager)
    size = _median_size(model)
    found: list[Comparison] = []
    for group in groups:
        calls = count()
        with _numpy_seed(seed):
            columns = computation.get_bayes_factors(group[2], group[3], **kwargs)
        if "lfc_mean" in columns:
            sides = [
                (columns[name][None], cells.sum() * size)
                for name, cells in (("scale1", group[2]), ("scale2", group[3]))
            ]
            error = _error_of_counts(*sides, pseudocounts=columns["pseudocounts"])
            columns |= {"lfc_error": error, "lfc_z": columns["lfc_mean"] / error}
        found.append((*group, columns))
    return found


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """Seed the generator with which scvi-tools pairs cells, and restore it."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def check_groups(
    groupby: object, group1: object, group2: object, idx1: object, idx2: object
) -> None:
    """Raise if groups of cells are given twice, or incompletely."""
    if idx1 is None and idx2 is not None:
        raise SAMSError("`idx2` needs `idx1`.")
    if idx1 is not None and not (groupby is group1 is group2 is None):
        raise SAMSError("Pass either `idx1` (and `idx2`) or groups, not both.")


def check_none_of_cells(
    mode: str,
    batch_correction: bool,
    batchid1: Sequence[str] | None,
    batchid2: Sequence[str] | None,
    further: dict[str, Any],
) -> None:
    """Raise an error if perturbations are compared with arguments that are of groups of cells."""
    if mode == "vanilla" or further or batch_correction or batchid1 or batchid2:
        raise SAMSError(
            "`mode='vanilla'`, batches and arguments for scvi-tools "
            f"({', '.join(further) or 'none were given'}) are of comparisons of cells: pass "
            "`groupby` or `idx1`."
        )


def groups_of_cells(
    adata: AnnData,
    groupby: str | None,
    group1: str | Sequence[str] | None,
    group2: str | None,
    idx1: Sequence[int] | Sequence[bool] | None,
    idx2: Sequence[int] | Sequence[bool] | None,
) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
    """Return names and boolean masks of the two sides of every comparison."""
    if idx1 is not None:
        first = _mask("idx1", adata.n_obs, idx1)
        second = ~first if idx2 is None else _mask("idx2", adata.n_obs, idx2)
        if not first.any() or not second.any():
            raise SAMSError(f"There are no cells in `{'idx2' if first.any() else 'idx1'}`.")
        return [("one", "two", first, second)]
    check_key(groupby=groupby, group2=group2)
    if groupby not in adata.obs:
        raise MissingKeyError(f"obs has no column {groupby!r} to group the cells by.")
    group_of_cell = adata.obs[groupby].astype(str).to_numpy()
    present = np.unique(group_of_cell)
    if len(present) < 2:
        raise SAMSError(f"All cells are in one group, {present[0]!r}: nothing to compare.")
    asked = _asked_for(group1, present, group2)
    unknown = [name for name in [*asked, group2] if name is not None and name not in present]
    if unknown:
        raise UnknownPerturbationError(
            f"There are no cells in the group {', '.join(map(repr, unknown[:5]))}; groups are "
            f"{', '.join(map(repr, present[:5]))}{', ...' if len(present) > 5 else ''}."
        )
    comparisons = []
    for name in asked:
        first = group_of_cell == name
        second = ~first if group2 is None else group_of_cell == group2
        comparisons.append((name, group2 or "Rest", first, second))
    return comparisons


def _mask(argument: str, n_obs: int, cells: Sequence[int] | Sequence[bool]) -> np.ndarray:
    mask = np.zeros(n_obs, dtype=bool)
    mask[as_positions(argument, cells, n_obs)] = True
    return mask


def table_of_comparisons(
    found: list[Comparison], genes: pd.Index, expression: Any, mode: str, fdr_target: float
) -> pd.DataFrame:
    """Comparisons x genes, most differential first; ``expression`` adds its statistics."""
    tables = []
    for name1, name2, cells1, cells2, columns in found:
        if expression is not None:
            columns |= _statistics(expression, cells1, cells2)
        key = "proba_de" if mode == "change" else "bayes_factor"
        table = pd.DataFrame(columns, index=genes)
        if "lfc_z" in table:  # genes that depend on the same mask are equally probable
            table = table.sort_values("lfc_z", key=np.abs, ascending=False, kind="stable")
        table = table.sort_values(key, ascending=False, kind="stable")
        if mode == "change":
            q_values = mask_q_values(table["proba_de"].to_numpy())
            table[f"is_de_fdr_{fdr_target}"] = within(q_values, fdr_target)
            table["log_fc"] = table["lfc_mean"]
            table["adj_p_value"] = q_values
        table["variable"] = table.index
        comparison = f"{name1} vs {name2}"
        tables.append(table.assign(comparison=comparison, group1=name1, group2=name2))
    return pd.concat(tables)


def _fold_changes(
    scale1: np.ndarray,
    scale2: np.ndarray,
    error: np.ndarray,
    delta: float,
    pseudocounts: float,
) -> dict[str, Any]:
    """Columns of scvi-tools for paired samples of rates, each ``(n_draws, n_genes)``, and two more.

    ``error`` is that of counts, per gene: a change must exceed ``delta`` by more than it.
    """
    change = np.log2(scale1 + pseudocounts) - np.log2(scale2 + pseudocounts)
    least = delta + error
    likely = np.maximum((change > least).mean(axis=0), (change < -least).mean(axis=0))
    return {
        "proba_de": likely,
        "proba_not_de": 1 - likely,
        "bayes_factor": np.log(likely + _EPSILON) - np.log(1 - likely + _EPSILON),
        "scale1": scale1.mean(axis=0),
        "scale2": scale2.mean(axis=0),
        "pseudocounts": pseudocounts,
        "delta": delta,
        "lfc_mean": change.mean(axis=0),
        "lfc_median": np.median(change, axis=0),
        "lfc_std": change.std(axis=0),
        "lfc_min": change.min(axis=0),
        "lfc_max": change.max(axis=0),
        "lfc_error": error,
        "lfc_z": change.mean(axis=0) / error,
    }


def _statistics(
    expression: Any, cells1: np.ndarray, cells2: np.ndarray
) -> dict[str, np.ndarray | float]:
    statistics: dict[str, np.ndarray | float] = {}
    for number, cells in ((1, cells1), (2, cells2)):
        mean: np.ndarray | float = np.nan
        share: np.ndarray | float = np.nan
        if cells.any():
            values = expression[np.flatnonzero(cells)]
            mean = np.asarray(values.mean(axis=0)).ravel()
            share = np.asarray((values != 0).mean(axis=0)).ravel()
        statistics[f"raw_mean{number}"] = mean
        statistics[f"non_zeros_proportion{number}"] = share
    return statistics
