"""What all baseline methods share: the training cells they read and the profiles they return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse

from scvi_sams.exceptions import (
    InvalidCountsError,
    MissingControlError,
    MissingKeyError,
    SAMSError,
    UnknownPerturbationError,
)
from scvi_sams.labels._labels import NO_PERTURBATION
from scvi_sams.labels._parsing import encode_labels
from scvi_sams.labels._spelling import Spelling, canonical_label, control_names
from scvi_sams.metrics._observed import ate_table, check_unique
from scvi_sams.splits._cells import canonical_labels


@dataclass(frozen=True)
class LabelledCells:
    """Expression of cells and what was done to them.

    Attributes
    ----------
    expression
        Cells x genes, in the units of the AnnData's ``X``; dense or CSR.
    labels
        Canonical label of every cell.
    genes
        Names of the genes.
    control
        Canonical label of the control cells.
    """

    expression: np.ndarray | sparse.csr_matrix
    labels: np.ndarray
    genes: pd.Index
    control: str

    @property
    def is_control(self) -> np.ndarray:
        """Boolean of shape ``(n_cells,)``: control cells."""
        return self.labels == self.control

    def means(self) -> ad.AnnData:
        """Mean expression per label, labels x genes, with ``obs["n_cells"]``; labels are sorted."""
        cells = ad.AnnData(
            self.expression,
            obs=pd.DataFrame(
                {"label": pd.Categorical(self.labels)},
                index=np.arange(len(self.labels)).astype(str),
            ),
        )
        grouped = sc.get.aggregate(cells, by="label", func="mean")
        names = grouped.obs["label"].astype(str)
        n_cells = pd.Series(self.labels).value_counts()[names].to_numpy()
        return ad.AnnData(
            grouped.layers["mean"],
            obs=pd.DataFrame({"n_cells": n_cells}, index=names.to_numpy()),
            var=pd.DataFrame(index=self.genes.copy()),
        )


def labelled_cells(
    adata: ad.AnnData,
    *,
    perturbation_key: str,
    control: str | Sequence[str],
    delimiter: str | None,
) -> LabelledCells:
    """Read the expression and the labels of cells, without changing the AnnData.

    Raises
    ------
    MissingKeyError
        If ``X`` or the column of labels is missing.
    InvalidPerturbationLabelError
        If a label is missing or malformed.
    InvalidCountsError
        If ``X`` holds values that are not finite.
    """
    if perturbation_key not in adata.obs:
        raise MissingKeyError(
            f"obs has no column {perturbation_key!r}; its columns are "
            f"{', '.join(map(repr, adata.obs.columns))}. Pass the column of the labels as "
            "`perturbation_key`."
        )
    adata = adata.to_memory() if adata.isbacked else adata
    if adata.X is None:
        raise MissingKeyError("X is empty. Put the log-normalised expression there.")
    # scanpy aggregates the matrices of scipy, not yet its sparse arrays; this copies no values.
    expression = sparse.csr_matrix(adata.X) if sparse.issparse(adata.X) else np.asarray(adata.X)
    values = expression.data if sparse.issparse(expression) else expression
    if not np.isfinite(values).all():
        raise InvalidCountsError("X has values that are not finite. Normalise the counts again.")
    labels = canonical_labels(adata.obs[perturbation_key], control=control, delimiter=delimiter)
    return LabelledCells(expression, labels, adata.var_names, control_names(control)[0])


def multi_hot(
    labels: Sequence[str] | np.ndarray,
    *,
    control: str | Sequence[str],
    delimiter: str | None,
    vocabulary: Sequence[str] | None = None,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Encode labels as 0 and 1 (labels x perturbations) and return the perturbations as well.

    Raises
    ------
    UnknownPerturbationError
        If a label names a perturbation that ``vocabulary`` lacks.
    """
    encoded = encode_labels(
        pd.Series(labels, dtype=object),
        spelling=Spelling.of(control, delimiter),
        vocabulary=vocabulary,
    )
    indicators = np.zeros((len(encoded.codes), len(encoded.vocabulary)), dtype=np.float32)
    rows, slots = np.nonzero(encoded.codes != NO_PERTURBATION)
    indicators[rows, encoded.codes[rows, slots]] = 1
    return indicators, encoded.vocabulary


def effect_table(means: ad.AnnData, control: str) -> tuple[np.ndarray, ad.AnnData]:
    """Return the mean of the controls and the other rows minus it, as an ATE table."""
    is_control = means.obs_names == control
    control_mean = np.asarray(means.X)[is_control][0]
    perturbed = means[~is_control]
    table = ate_table(
        np.asarray(perturbed.X) - control_mean,
        list(perturbed.obs_names),
        means.var_names,
        description={"method": "mean", "units": "difference of mean X"},
        layers={},
        obs={"n_cells": perturbed.obs["n_cells"].to_numpy()},
    )
    return control_mean, table


def profile_table(
    expression: np.ndarray,
    names: Sequence[str],
    labels: Sequence[str],
    genes: pd.Index,
    perturbation_key: str,
) -> ad.AnnData:
    """Build the AnnData of predicted profiles: one row per perturbation."""
    return ad.AnnData(
        expression,
        obs=pd.DataFrame({perturbation_key: list(labels)}, index=list(names)),
        var=pd.DataFrame(index=genes.copy()),
    )


class BaselineMethod(ABC):
    """A method that learns from training cells and predicts mean profiles of perturbations.

    Parameters
    ----------
    perturbation_key
        Column of ``obs`` with the label of each training cell, and of the predictions.
    control
        Label or labels of the control cells.
    delimiter
        What joins the perturbations of a combination; ``None`` if labels are never split.

    Examples
    --------
    All baselines work alike. They take log-normalised expression:

    >>> import scanpy as sc
    >>> cells = adata.copy()
    >>> sc.pp.normalize_total(cells)
    >>> sc.pp.log1p(cells)
    >>> additive = scvi_sams.evaluation.Additive()
    >>> predicted = additive.fit(cells).predict(["P001+P002"])
    >>> predicted.shape, predicted.obs["perturbation"].tolist()
    ((1, 100), ['P001+P002'])
    """

    def __init__(
        self,
        *,
        perturbation_key: str = "perturbation",
        control: str | Sequence[str] = "control",
        delimiter: str | None = "+",
    ) -> None:
        self.perturbation_key = perturbation_key
        self.control = control
        self.delimiter = delimiter
        self._genes: pd.Index | None = None

    def fit(self, train_adata: ad.AnnData) -> Self:
        """Learn from training cells.

        Parameters
        ----------
        train_adata
            Cells x genes; ``X`` (dense or CSR) is log-normalised expression. Not changed.

        Returns
        -------
        The method itself.

        Raises
        ------
        MissingKeyError
            If ``X`` or the column of labels is missing.
        MissingControlError
            If there is no control cell.
        InvalidPerturbationLabelError
            If a label is missing or malformed.
        InvalidCountsError
            If ``X`` holds values that are not finite.
        SAMSError
            If there are only control cells.
        """
        cells = labelled_cells(
            train_adata,
            perturbation_key=self.perturbation_key,
            control=self.control,
            delimiter=self.delimiter,
        )
        if not cells.is_control.any():
            raise MissingControlError(
                f"No training cell is labelled {cells.control!r}. Pass the label of the control "
                "cells as `control`, or put control cells into training."
            )
        if cells.is_control.all():
            raise SAMSError("All training cells are controls: there is no effect to learn from.")
        self._learn(cells)
        self._genes = cells.genes
        return self

    def predict(self, perturbations: Sequence[str]) -> ad.AnnData:
        """Predict the mean expression of cells with each perturbation.

        Parameters
        ----------
        perturbations
            Labels to predict, combinations in any spelling.

        Returns
        -------
        One row per perturbation, in the units of the training ``X``, genes as in training.
        ``obs_names`` are the labels as they were asked for, ``obs[perturbation_key]`` their
        canonical spelling.

        Raises
        ------
        UnknownPerturbationError
            If the method has not learned what a label needs, or a label is that of the control.
        SAMSError
            If the method was not fitted, or a perturbation is named twice.
        """
        if self._genes is None:
            raise SAMSError(f"{type(self).__name__} has learned nothing yet: call fit first.")
        control = control_names(self.control)
        labels = [
            canonical_label(p, delimiter=self.delimiter, control=control) for p in perturbations
        ]
        check_unique(labels)
        if control[0] in labels:
            raise UnknownPerturbationError(
                f"{control[0]!r} is the control, not a perturbation to predict: leave it out."
            )
        expression = np.reshape(self._profiles(labels), (len(labels), len(self._genes)))
        return profile_table(expression, perturbations, labels, self._genes, self.perturbation_key)

    @abstractmethod
    def _learn(self, cells: LabelledCells) -> None:
        """Learn from cells of which some, but not all, are controls."""

    @abstractmethod
    def _profiles(self, labels: list[str]) -> np.ndarray:
        """Predict expression, labels x genes, of canonical labels other than the control."""
