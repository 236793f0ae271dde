"""Base of all baselines: the training cells they read and the profiles they return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self, TypeAlias

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse

from scvi_sams._checks import as_names
from scvi_sams.exceptions import (
    InvalidCountsError,
    MissingControlError,
    MissingKeyError,
    SAMSError,
    UnknownPerturbationError,
)
from scvi_sams.labels._labels import NO_PERTURBATION, Labels
from scvi_sams.labels._names import check_known
from scvi_sams.labels._parsing import encode_labels
from scvi_sams.labels._spelling import Control, Spelling
from scvi_sams.metrics._observed import check_unique, labels_of

Expression: TypeAlias = np.ndarray | sparse.csr_matrix
"""Cells x genes, log-normalised."""


def read_expression(adata: ad.AnnData) -> Expression:
    """Read ``X``, dense or CSR; an error if it is missing or not finite."""
    adata = adata.to_memory() if adata.isbacked else adata
    if adata.X is None:
        raise MissingKeyError("X is empty. Put the log-normalised expression there.")
    # scanpy aggregates scipy matrices, but not yet sparse arrays; this copies no values.
    expression = sparse.csr_matrix(adata.X) if sparse.issparse(adata.X) else np.asarray(adata.X)
    if not np.isfinite(expression.data if sparse.issparse(expression) else expression).all():
        raise InvalidCountsError("X has values that are not finite. Normalise the counts again.")
    return expression


def label_means(expression: Expression, labels: Labels, genes: pd.Index) -> ad.AnnData:
    """Mean expression per label, labels x genes, with ``obs["n_cells"]``; labels are sorted."""
    groups = pd.Categorical.from_codes(labels.name_of_cell, pd.Index(labels.names))
    cells = ad.AnnData(
        expression, obs=pd.DataFrame({"label": groups}, index=np.arange(len(labels)).astype(str))
    )
    return ad.AnnData(
        sc.get.aggregate(cells, by="label", func="mean").layers["mean"],
        obs=pd.DataFrame({"n_cells": np.bincount(labels.name_of_cell)}, index=labels.names),
        var=pd.DataFrame(index=genes.copy()),
    )


def parts_of_labels(labels: Labels) -> list[list[str]]:
    """Names of the perturbations of every cell, sorted."""
    return [
        [labels.vocabulary[code] for code in row if code != NO_PERTURBATION] for row in labels.codes
    ]


def multi_hot(labels: Labels, vocabulary: Sequence[str]) -> np.ndarray:
    """Encode labels as 0 and 1, cells x perturbations; an error if one is unknown."""
    check_known(labels.carried, vocabulary)
    indicators = np.zeros((len(labels), len(vocabulary)), dtype=np.float32)
    rows, slots = np.nonzero(labels.codes != NO_PERTURBATION)
    columns = pd.Index(vocabulary).get_indexer(pd.Index(labels.vocabulary))
    indicators[rows, columns[labels.codes[rows, slots]]] = 1
    return indicators


def profile_table(
    expression: np.ndarray,
    genes: pd.Index,
    names: Sequence[str],
    perturbation_key: str,
    labels: Sequence[str],
) -> ad.AnnData:
    """Build the AnnData of predicted profiles: one row per perturbation."""
    obs = pd.DataFrame({perturbation_key: list(labels)}, index=list(names))
    return ad.AnnData(expression, obs=obs, var=pd.DataFrame(index=genes.copy()))


@dataclass(kw_only=True, eq=False)
class BaselineMethod(ABC):
    """A method that learns from training cells and predicts mean profiles of perturbations.

    Parameters
    ----------
    perturbation_key
        Column of ``obs`` with the label of each training cell, and of the predictions.
    control
        Label or labels of the control cells.
    delimiter
        Separator between the perturbations of a combination; ``None`` if labels are never split.

    Examples
    --------
    All baselines are used in the same way, with log-normalised expression:

    >>> import scanpy as sc
    >>> cells = adata.copy()
    >>> sc.pp.normalize_total(cells)
    >>> sc.pp.log1p(cells)
    >>> additive = scvi_sams.evaluation.Additive()
    >>> predicted = additive.fit(cells).predict(["P001+P002"])
    >>> predicted.shape, predicted.obs["perturbation"].tolist()
    ((1, 100), ['P001+P002'])
    """

    perturbation_key: str = "perturbation"
    control: Control = "control"
    delimiter: str | None = "+"
    _genes: pd.Index | None = field(default=None, init=False, repr=False)
    _spelling: Spelling = field(init=False, repr=False)

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
            If ``X`` has values that are not finite.
        SAMSError
            If there are only control cells.
        """
        labels = labels_of(train_adata, self.perturbation_key, self.control, self.delimiter)
        expression = read_expression(train_adata)
        return self._fit(expression, labels, train_adata.var_names)

    def _fit(self, expression: Expression, labels: Labels, genes: pd.Index) -> Self:
        """Learn from cells whose labels are already parsed."""
        if not labels.is_control.any():
            raise MissingControlError(
                f"No training cell is labelled {labels.control!r}. Pass the label of the control "
                "cells as `control`, or put control cells into training."
            )
        if labels.is_control.all():
            raise SAMSError("All training cells are controls: there is no effect to learn from.")
        self._learn(expression, labels, genes)
        self._genes, self._spelling = genes, labels.spelling
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
        ``obs_names`` are the labels as passed, ``obs[perturbation_key]`` their canonical
        spelling.

        Raises
        ------
        UnknownPerturbationError
            If a label requires something that was not learned, or is that of the control.
        SAMSError
            If the method was not fitted, or a perturbation is named twice.
        """
        names, labels, genes = self._requested(perturbations)
        expression = np.reshape(self._profiles(labels), (len(labels), len(genes)))
        return profile_table(
            expression, genes, names, self.perturbation_key, labels.canonical.tolist()
        )

    def _requested(self, perturbations: Sequence[str]) -> tuple[list[str], Labels, pd.Index]:
        """Labels as passed, the same labels parsed, and the genes of training."""
        if self._genes is None:
            raise SAMSError(f"{type(self).__name__} is not fitted yet: call fit first.")
        names = as_names("perturbations", perturbations)
        labels = encode_labels(pd.Series(names, dtype=object), spelling=self._spelling)
        check_unique(labels.canonical.tolist())
        if labels.is_control.any():
            raise UnknownPerturbationError(
                f"{labels.control!r} is the control, not a perturbation to predict: remove it."
            )
        return names, labels, self._genes

    @abstractmethod
    def _learn(self, expression: Expression, labels: Labels, genes: pd.Index) -> None:
        """Learn from cells; some, but not all, are controls."""

    @abstractmethod
    def _profiles(self, labels: Labels) -> np.ndarray:
        """Predict expression, labels x genes, of perturbed cells with these labels."""
