"""Predicted beside observed expression: what the metrics of every mode are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams.exceptions import (
    InvalidCountsError,
    InvalidCovariateError,
    MissingControlError,
    MissingKeyError,
    SAMSError,
)
from scvi_sams.labels._spelling import control_names
from scvi_sams.metrics._matrix import Matrix, mean_over_cells, squared
from scvi_sams.metrics._ranking import not_finite
from scvi_sams.splits._cells import canonical_labels

_LARGEST_LOG1P = 30.0
"""No natural logarithm of counts comes near it (e^30 is 10^13): such values are not log1p."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Predicted and observed expression of one group of cells, such as a cell type.

    Attributes
    ----------
    covariate
        Name of the group; ``None`` if there is only one.
    perturbations
        Observed perturbations, sorted; rows of all that follows.
    genes
        Genes of the observed data, columns of all that follows.
    predicted, observed
        Mean expression, perturbations x genes; NaN where there is no prediction.
    control_mean, control_variance
        Of the control cells, genes.
    n_cells
        Observed cells of each perturbation.
    status
        ``"ok"``, or why there is no prediction: ``"missing"`` or ``"nan"``.
    predicted_cells, observed_cells
        Cells x genes of each perturbation.
    control_cells
        Control cells x genes.
    """

    covariate: str | None
    perturbations: list[str]
    genes: pd.Index
    predicted: np.ndarray
    observed: np.ndarray
    control_mean: np.ndarray
    control_variance: np.ndarray
    n_cells: np.ndarray
    status: np.ndarray
    predicted_cells: list[Matrix]
    observed_cells: list[Matrix]
    control_cells: Matrix

    @property
    def succeeded(self) -> np.ndarray:
        """Which perturbations have a prediction (boolean)."""
        return self.status == "ok"


@dataclass(frozen=True, eq=False)
class _Side:
    """Expression, and the positions of the cells of each covariate and perturbation."""

    expression: Matrix
    positions: dict[tuple[str | None, str], np.ndarray]

    def cells(self, covariate: str | None, perturbation: str) -> Matrix:
        return self.expression[self.positions.get((covariate, perturbation), [])]


def compare_expression(
    predicted: ad.AnnData,
    observed: ad.AnnData,
    *,
    perturbation_key: str,
    control: str | Sequence[str],
    covariate_key: str | None,
    delimiter: str | None,
) -> list[Comparison]:
    """Bring predictions to the perturbations, groups and genes of the observed cells.

    Returns
    -------
    One comparison per group of observed cells with a perturbed cell.

    Raises
    ------
    MissingKeyError
        If a column is missing, ``X`` is empty, or observed genes have no prediction.
    MissingControlError
        If a group has no control cell.
    InvalidCountsError
        If values cannot be log1p-normalised expression, or observed ones are not finite.
    InvalidCovariateError
        If a cell has no covariate.
    SAMSError
        If genes are not unique, or no observed cell is perturbed.
    """
    _check_genes_present(predicted, observed)
    keys = (perturbation_key, control, covariate_key, delimiter)
    ours = _read(predicted, observed.var_names, "predicted", *keys)
    theirs = _read(observed, observed.var_names, "observed", *keys)
    name = control_names(control)[0]
    names: dict[str | None, list[str]] = {}
    for covariate, label in sorted(theirs.positions, key=str):
        if label != name:
            names.setdefault(covariate, []).append(label)
    if not names:
        raise SAMSError("No observed cell is perturbed: there is nothing to compare with.")
    return [
        _compare(covariate, perturbations, observed.var_names, ours, theirs, name)
        for covariate, perturbations in names.items()
    ]


def _compare(
    covariate: str | None,
    perturbations: list[str],
    genes: pd.Index,
    ours: _Side,
    theirs: _Side,
    control: str,
) -> Comparison:
    if (covariate, control) not in theirs.positions:
        group = "" if covariate is None else f" of {covariate!r}"
        raise MissingControlError(
            f"No observed cell{group} is labelled {control!r}. The observed data must hold the "
            "control cells of every group beside the held-out cells."
        )
    predicted_cells = [ours.cells(covariate, p) for p in perturbations]
    observed_cells = [theirs.cells(covariate, p) for p in perturbations]
    control_cells = theirs.cells(covariate, control)
    predicted = np.array([mean_over_cells(cells) for cells in predicted_cells])
    control_mean = mean_over_cells(control_cells)
    absent = np.array([cells.shape[0] == 0 for cells in predicted_cells])
    failed = not_finite(predicted)
    mean_of_squares = mean_over_cells(squared(control_cells))
    return Comparison(
        covariate=covariate,
        perturbations=perturbations,
        genes=genes,
        # An infinite prediction is as much of a failure as NaN.
        predicted=np.where(failed[:, None], np.nan, predicted),
        observed=np.array([mean_over_cells(cells) for cells in observed_cells]),
        control_mean=control_mean,
        control_variance=np.maximum(mean_of_squares - control_mean**2, 0),
        n_cells=np.array([cells.shape[0] for cells in observed_cells]),
        status=np.select([absent, failed], ["missing", "nan"], "ok"),
        predicted_cells=predicted_cells,
        observed_cells=observed_cells,
        control_cells=control_cells,
    )


def _check_genes_present(predicted: ad.AnnData, observed: ad.AnnData) -> None:
    for side, data in (("predicted", predicted), ("observed", observed)):
        if not data.var_names.is_unique:
            repeated = data.var_names[data.var_names.duplicated()][0]
            raise SAMSError(
                f"The gene {repeated!r} occurs twice in the {side} data. Make the names unique "
                "(var_names_make_unique)."
            )
    absent = observed.var_names.difference(predicted.var_names)
    if len(absent):
        raise MissingKeyError(
            f"{len(absent)} genes of the observed data have no prediction, for example "
            f"{absent[0]!r}. Subset the observed data to the predicted genes if you mean to."
        )


def _read(
    data: ad.AnnData,
    genes: pd.Index,
    side: str,
    perturbation_key: str,
    control: str | Sequence[str],
    covariate_key: str | None,
    delimiter: str | None,
) -> _Side:
    for key in (perturbation_key, covariate_key):
        if key is not None and key not in data.obs:
            raise MissingKeyError(
                f"obs of the {side} data has no column {key!r}; its columns are "
                f"{', '.join(map(repr, data.obs.columns))}."
            )
    labels = canonical_labels(data.obs[perturbation_key], control=control, delimiter=delimiter)
    groups = pd.DataFrame({"covariate": "", "label": labels})
    if covariate_key is not None:
        covariates = data.obs[covariate_key]
        if covariates.isna().any():
            raise InvalidCovariateError(
                f"{covariates.isna().sum()} cells of the {side} data have no {covariate_key!r} "
                "(NaN). Drop them, or name their group."
            )
        groups["covariate"] = covariates.astype(str).to_numpy()
    positions: dict[tuple[str | None, str], np.ndarray] = {}
    for at in groups.groupby(["covariate", "label"]).indices.values():
        covariate, label = groups.iloc[at[0]]
        positions[None if covariate_key is None else covariate, label] = np.asarray(at)
    return _Side(_expression(data, genes, side), positions)


def _expression(data: ad.AnnData, genes: pd.Index, side: str) -> Matrix:
    if not data.var_names.equals(genes):
        data = data[:, genes]
    if data.isbacked:
        data = data.to_memory()
    if data.X is None:
        raise MissingKeyError(f"X of the {side} data is empty. Put log1p-normalised values there.")
    matrix = sparse.csr_array(data.X) if sparse.issparse(data.X) else np.asarray(data.X)
    values = matrix if isinstance(matrix, np.ndarray) else matrix.data
    finite = np.isfinite(values)
    if side == "observed" and not finite.all():
        raise InvalidCountsError("The observed data hold values that are not finite.")
    highest = np.max(values, where=finite, initial=-np.inf)
    if highest > _LARGEST_LOG1P:
        raise InvalidCountsError(
            f"X of the {side} data reaches {highest:g}, which log1p-normalised expression cannot. "
            "Normalise and take logarithms (scanpy.pp.normalize_total, scanpy.pp.log1p)."
        )
    return matrix
