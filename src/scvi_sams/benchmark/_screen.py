"""Cells of a benchmark: input of methods, and cells to score predictions on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams._checks import check_choice, check_number
from scvi_sams._constants import REGISTERED_DOSES
from scvi_sams._plurals import counted
from scvi_sams.counts._validation import validate_expression
from scvi_sams.data._covariates import validate_size_factor
from scvi_sams.exceptions import (
    InvalidCountsError,
    InvalidDosageError,
    InvalidSplitError,
    MissingControlError,
    SAMSError,
)
from scvi_sams.features._table import FeatureTable
from scvi_sams.labels._labels import Labels
from scvi_sams.labels._rows import dosage_text, groups_of_cells
from scvi_sams.metrics._observed import levels_of, matrix_of_counts, obs_column, read_cells
from scvi_sams.splits._combinations import cells_of
from scvi_sams.splits._split import Split

COUNTS = "counts"
SIMULATION = "simulation"
TRUE_LATENTS = ("true_basal", "true_latent")

Reference = Literal["all", "test"]
"""Control cells to which observed effects are relative: all of a split, or its test cells."""


@dataclass(frozen=True)
class Columns:
    """Columns of labels and covariates in ``obs``."""

    perturbation_key: str
    covariate_key: str | None
    batch_key: str | None
    size_factor_key: str | None

    def levels(self, cells: ad.AnnData) -> np.ndarray | None:
        """Level of the covariate of some cells; ``None`` if there is no covariate."""
        return levels_of(cells, self.covariate_key)


@dataclass(frozen=True, eq=False)
class Screen:
    """All cells, as counts with canonical labels, reduced to what is needed."""

    counts: ad.AnnData
    """Cells x genes; ``X`` is CSR. A simulated screen keeps its truth."""
    labels: Labels
    """Labels of every cell, parsed once for all methods and splits."""
    columns: Columns
    """Names of columns in ``obs``."""
    target_sum: float | None
    """Total to which expression is normalised; ``None``: the median depth of training cells."""
    features: FeatureTable | None = None
    """Features of measured and unmeasured perturbations; ``None`` if there are none."""
    reference: Reference = "all"
    """Control cells to which observed effects are relative."""


@dataclass(frozen=True, eq=False)
class Fold:
    """The cells of one split, and the expression that its training cells define."""

    columns: Columns
    """Names of columns in ``obs``."""
    train: ad.AnnData
    """Training cells. ``X``: log1p-normalised expression (CSR); ``layers["counts"]``: counts."""
    train_labels: Labels
    """Their labels."""
    fitted: ad.AnnData
    """Training cells, then validation cells: counts."""
    n_train: int
    """Number of training cells among them."""
    tested: ad.AnnData
    """Test cells: counts."""
    is_held_out: np.ndarray
    """Which of them have a label (in their level) without training cells."""
    observed: ad.AnnData
    """Perturbed test cells, and the control cells to which effects are relative: those of all three
    parts, as many as the data allow, or test cells. Normalised."""
    observed_labels: Labels
    """Their labels."""
    perturbations: list[tuple[str | None, str]]
    """Level of the covariate (``None`` without one) and label of each prediction, sorted."""
    target_sum: float
    """Total to which expression was normalised."""
    features: FeatureTable | None
    """Features of measured and unmeasured perturbations; ``None`` if there are none."""
    has_own_reference: bool
    """Whether observed effects are relative to test cells; predicted effects are then relative to
    training cells."""

    def difference_of_controls(self, level: str | None) -> np.ndarray:
        """Mean of the controls of observed effects minus that of training controls, ``(G,)``."""
        tested = self._controls(self.observed, self.observed_labels, level, "test")
        means = (
            np.asarray(cells.mean(axis=0, dtype=np.float64)).ravel()
            for cells in (self.observed.X[tested], self.train.X[self.training_controls(level)])
        )
        return np.subtract(*means)

    def training_controls(self, level: str | None) -> np.ndarray:
        """Positions in ``train`` of the control cells of a level (``None``: all of them)."""
        return self._controls(self.train, self.train_labels, level, "training")

    def _controls(
        self, cells: ad.AnnData, labels: Labels, level: str | None, part: str
    ) -> np.ndarray:
        """Positions of the control cells of a level; an error if there are none."""
        chosen = labels.is_control.copy()
        if level is not None:
            chosen &= self.columns.levels(cells) == level
        if not chosen.any():
            raise MissingControlError(f"There is no {part} control cell of level {level!r}.")
        return np.flatnonzero(chosen)


def make_screen(
    adata: ad.AnnData,
    labels: Labels,
    columns: Columns,
    *,
    layer: str | None,
    target_sum: float | None,
    other_columns: Iterable[str] = (),
    features: FeatureTable | None = None,
    reference: Reference = "all",
) -> Screen:
    """Copy what a benchmark needs from an AnnData, which is not changed."""
    check_choice("reference", reference, get_args(Reference))
    keys = [columns.covariate_key, columns.batch_key, columns.size_factor_key, *other_columns]
    names = list(dict.fromkeys(key for key in keys if key is not None))
    for name in names:
        obs_column(adata, name)
    if target_sum is not None:
        check_number(above=0, target_sum=target_sum)
    obs = adata.obs[names].copy()
    obs[columns.perturbation_key] = pd.Categorical(labels.canonical.astype(str))
    columns.levels(adata)  # an error if a level is missing
    _check_one_dose(adata, labels, columns.perturbation_key)
    if columns.size_factor_key is not None:
        validate_size_factor(obs[columns.size_factor_key])
    if not (adata.obs_names.is_unique and adata.var_names.is_unique):
        raise SAMSError(
            "Names of cells and genes must be unique: call obs_names_make_unique and "
            "var_names_make_unique."
        )
    matrix = matrix_of_counts(adata.to_memory() if adata.isbacked else adata, layer)
    location = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    validate_expression(matrix, counts=True, location=location)
    matrix = sparse.csr_matrix(matrix, dtype=np.float32)
    counts = ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=adata.var_names.copy()))
    if SIMULATION in adata.uns:
        counts.uns[SIMULATION] = adata.uns[SIMULATION]
        for key in TRUE_LATENTS:
            if key in adata.obsm:
                counts.obsm[key] = np.array(adata.obsm[key])
    return Screen(counts, labels, columns, target_sum, features, reference)


def _check_one_dose(adata: ad.AnnData, labels: Labels, perturbation_key: str) -> None:
    """Raise if cells of a label were registered with several doses, including 0."""
    if REGISTERED_DOSES not in adata.uns:
        return
    _, dosages, group_of_cell = groups_of_cells(
        read_cells(adata, perturbation_key, labels.spelling)
    )
    groups = pd.Series(group_of_cell).groupby(labels.canonical).unique()
    for label, of_label in groups.items():
        if len(of_label) > 1:
            doses = ", ".join(dosage_text(dosages[group]) for group in np.sort(of_label))
            raise InvalidDosageError(
                f"Cells labelled {label!r} are registered with doses {doses}, but a benchmark "
                "compares labels, not doses. Use cells of one dose, or put doses into a column of "
                "labels ('A@0.5') and pass it as `perturbation_key`; cells of dose 0 are "
                "controls."
            )


def make_fold(screen: Screen, split: Split) -> Fold:
    """Divide the cells by a split and normalise them by its training cells."""
    labels, is_control = screen.labels, screen.labels.is_control
    levels = screen.columns.levels(screen.counts)
    in_use = np.concatenate([split.train, split.validation, split.test])
    perturbed_tests = split.test[~is_control[split.test]]
    if not len(perturbed_tests):
        raise InvalidSplitError(
            f"All test cells of the split {split.name!r} are controls: there is nothing to "
            "predict. Test perturbed cells."
        )
    has_own_reference = screen.reference == "test"
    reference = split.test if has_own_reference else in_use
    reference = np.sort(reference[is_control[reference]])
    if not len(reference):
        raise InvalidSplitError(
            f"There are no control cells among the test cells of the split {split.name!r}. Pass "
            "reference='all', or a split with such cells."
        )
    size = sizes(screen.counts.X, screen.counts.obs, screen.columns)
    target_sum = screen.target_sum or float(np.median(size[split.train]))
    train = _normalised(screen, split.train, size, target_sum)
    name_of = labels.canonical
    is_held_out = cells_of(labels, split.held_out)[split.test]
    if split.held_out_levels is not None and levels is not None:
        pairs = set(zip(split.held_out, split.held_out_levels, strict=True))
        is_held_out = np.array([(name_of[c], levels[c]) in pairs for c in split.test], dtype=bool)
    observed = np.concatenate([reference, perturbed_tests])
    return Fold(
        columns=screen.columns,
        train=train,
        train_labels=labels[split.train],
        fitted=screen.counts[np.concatenate([split.train, split.validation])].copy(),
        n_train=len(split.train),
        tested=screen.counts[split.test].copy(),
        is_held_out=is_held_out,
        observed=_normalised(screen, observed, size, target_sum),
        observed_labels=labels[observed],
        perturbations=sorted(
            {(None if levels is None else levels[c], str(name_of[c])) for c in perturbed_tests},
            key=str,
        ),
        target_sum=target_sum,
        features=screen.features,
        has_own_reference=has_own_reference,
    )


def sizes(counts: sparse.csr_matrix, obs: pd.DataFrame, columns: Columns) -> np.ndarray:
    """Size of every cell: its size factor, or the sum of its counts."""
    if columns.size_factor_key is not None:
        return obs[columns.size_factor_key].to_numpy(dtype=np.float64)
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()


def _normalised(
    screen: Screen, cells: np.ndarray, size: np.ndarray, target_sum: float
) -> ad.AnnData:
    chosen = screen.counts[cells].copy()
    if not (size[cells] > 0).all():
        empty = counted(int((size[cells] <= 0).sum()), "cell has", "cells have")
        raise InvalidCountsError(
            f"{empty} no counts, so they cannot be normalised. Filter them out first."
        )
    chosen.layers[COUNTS] = chosen.X
    chosen.X = lognorm(chosen.X, size[cells], target_sum)
    chosen.uns = {}
    chosen.obsm.clear()
    return chosen


def lognorm(counts: sparse.csr_matrix, size: np.ndarray, target_sum: float) -> sparse.csr_matrix:
    """Compute ``log(1 + target_sum * x / size)``, natural logarithm."""
    result = sparse.csr_matrix(counts, dtype=np.float32, copy=True)
    scale = np.repeat(target_sum / size, np.diff(result.indptr))
    result.data = np.log1p(result.data * scale).astype(np.float32)
    return result
