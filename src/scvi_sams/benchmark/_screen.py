"""The cells of a benchmark: what a method may see, and what it is scored on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams.counts._validation import validate_expression
from scvi_sams.data._covariates import validate_size_factor
from scvi_sams.exceptions import (
    InvalidCountsError,
    InvalidCovariateError,
    InvalidSplitError,
    MissingControlError,
    SAMSError,
)
from scvi_sams.labels._labels import Labels
from scvi_sams.labels._parsing import read_labels
from scvi_sams.metrics._observed import matrix_of_counts, obs_column
from scvi_sams.splits._split import Split

COUNTS = "counts"
SIMULATION = "simulation"
TRUE_LATENTS = ("true_basal", "true_latent")


@dataclass(frozen=True)
class Columns:
    """Where labels and covariates stand in ``obs``."""

    perturbation_key: str
    covariate_key: str | None
    batch_key: str | None
    size_factor_key: str | None


@dataclass(frozen=True, eq=False)
class Screen:
    """All cells, as counts with canonical labels, and nothing that is not needed.

    Attributes
    ----------
    counts
        Cells x genes; ``X`` is CSR. Where the screen is simulated it keeps its truth.
    labels
        Of every cell, read once for all methods and splits.
    columns
        What stands where in ``obs``.
    target_sum
        Total that expression is normalised to; ``None`` for the median depth of training cells.
    """

    counts: ad.AnnData
    labels: Labels
    columns: Columns
    target_sum: float | None

    @property
    def levels(self) -> np.ndarray | None:
        """Level of the covariate of every cell; ``None`` if there is no covariate."""
        key = self.columns.covariate_key
        return None if key is None else self.counts.obs[key].astype(str).to_numpy(dtype=object)


@dataclass(frozen=True, eq=False)
class Fold:
    """The cells of one split, and the expression that its training cells define.

    Attributes
    ----------
    columns
        What stands where in ``obs``.
    train
        Training cells. ``X``: log1p-normalised expression (CSR); ``layers["counts"]``: counts.
    train_labels
        Their labels.
    fitted
        Training cells, then validation cells: counts.
    n_train
        How many of them train.
    tested
        Test cells: counts.
    is_held_out
        Which of them carry a label (in their level) that no training cell carries.
    observed
        Test cells that are perturbed, and all control cells of the three parts: the reference that
        stands on both sides of an effect, as large as the data allow. Normalised.
    observed_labels
        Their labels.
    perturbations
        What is predicted: level of the covariate (``None`` without one) and label, sorted.
    target_sum
        Total that expression was normalised to.
    """

    columns: Columns
    train: ad.AnnData
    train_labels: Labels
    fitted: ad.AnnData
    n_train: int
    tested: ad.AnnData
    is_held_out: np.ndarray
    observed: ad.AnnData
    observed_labels: Labels
    perturbations: list[tuple[str | None, str]]
    target_sum: float

    def levels_of(self, cells: ad.AnnData) -> np.ndarray | None:
        """Level of the covariate of some cells; ``None`` if there is no covariate."""
        key = self.columns.covariate_key
        return None if key is None else cells.obs[key].astype(str).to_numpy(dtype=object)

    def training_controls(self, level: str | None) -> np.ndarray:
        """Positions in ``train`` of the control cells of a level (``None``: of all)."""
        chosen = self.train_labels.is_control.copy()
        if level is not None:
            chosen &= self.levels_of(self.train) == level
        if not chosen.any():
            raise MissingControlError(f"No training control cell is of level {level!r}.")
        return np.flatnonzero(chosen)


def make_screen(
    adata: ad.AnnData,
    *,
    perturbation_key: str,
    control: str | Sequence[str],
    delimiter: str | None,
    layer: str | None,
    covariate_key: str | None,
    batch_key: str | None,
    size_factor_key: str | None,
    target_sum: float | None,
    other_columns: Iterable[str] = (),
) -> Screen:
    """Copy what a benchmark needs out of an AnnData; it is not changed."""
    keys = [covariate_key, batch_key, size_factor_key, *other_columns]
    columns = list(dict.fromkeys(key for key in keys if key is not None))
    for key in [perturbation_key, *columns]:
        obs_column(adata, key)
    if target_sum is not None and not target_sum > 0:
        raise SAMSError(f"`target_sum` must be a positive number or None, not {target_sum!r}.")
    obs = adata.obs[columns].copy()
    labels = read_labels(adata.obs[perturbation_key], control, delimiter)
    obs[perturbation_key] = pd.Categorical(labels.canonical.astype(str))
    if covariate_key is not None and obs[covariate_key].isna().any():
        raise InvalidCovariateError(
            f"{obs[covariate_key].isna().sum()} cells have no {covariate_key!r} (NaN). Drop them, "
            "or name their group."
        )
    if size_factor_key is not None:
        validate_size_factor(obs[size_factor_key])
    if not (adata.obs_names.is_unique and adata.var_names.is_unique):
        raise SAMSError(
            "Names of cells and genes must be unique: call obs_names_make_unique and "
            "var_names_make_unique."
        )
    counts = ad.AnnData(
        _counts(adata, layer), obs=obs, var=pd.DataFrame(index=adata.var_names.copy())
    )
    if SIMULATION in adata.uns:
        counts.uns[SIMULATION] = adata.uns[SIMULATION]
        for key in TRUE_LATENTS:
            if key in adata.obsm:
                counts.obsm[key] = np.array(adata.obsm[key])
    where = Columns(perturbation_key, covariate_key, batch_key, size_factor_key)
    return Screen(counts, labels, where, target_sum)


def _counts(adata: ad.AnnData, layer: str | None) -> sparse.csr_matrix:
    matrix = matrix_of_counts(adata.to_memory() if adata.isbacked else adata, layer)
    location = "adata.X" if layer is None else f"adata.layers[{layer!r}]"
    validate_expression(matrix, counts=True, location=location)
    return sparse.csr_matrix(matrix, dtype=np.float32)


def make_fold(screen: Screen, split: Split) -> Fold:
    """Cut the cells by a split and normalise them by its training cells."""
    labels, levels, is_control = screen.labels, screen.levels, screen.labels.is_control
    in_use = np.concatenate([split.train, split.validation, split.test])
    perturbed_tests = split.test[~is_control[split.test]]
    if not len(perturbed_tests):
        raise InvalidSplitError(
            f"All test cells of the split {split.name!r} are controls: there is nothing to "
            "predict. Test perturbed cells."
        )
    reference = np.sort(in_use[is_control[in_use]])
    size = sizes(screen.counts.X, screen.counts.obs, screen.columns)
    target_sum = screen.target_sum or float(np.median(size[split.train]))
    train = _normalised(screen, split.train, size, target_sum)
    name_of = labels.canonical
    if split.held_out_levels is not None and levels is not None:
        pairs = set(zip(split.held_out, split.held_out_levels, strict=True))
        is_held_out = [(name_of[cell], levels[cell]) in pairs for cell in split.test]
    else:
        is_held_out = [name_of[cell] in split.held_out for cell in split.test]
    observed = np.concatenate([reference, perturbed_tests])
    return Fold(
        columns=screen.columns,
        train=train,
        train_labels=labels[split.train],
        fitted=screen.counts[np.concatenate([split.train, split.validation])].copy(),
        n_train=len(split.train),
        tested=screen.counts[split.test].copy(),
        is_held_out=np.array(is_held_out, dtype=bool),
        observed=_normalised(screen, observed, size, target_sum),
        observed_labels=labels[observed],
        perturbations=sorted(
            {(None if levels is None else levels[c], str(name_of[c])) for c in perturbed_tests},
            key=str,
        ),
        target_sum=target_sum,
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
        raise InvalidCountsError(
            f"{int((size[cells] <= 0).sum())} cells have no counts, so they cannot be normalised. "
            "Filter them out first."
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
