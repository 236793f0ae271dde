"""Baselines that transfer a perturbation to a level of a covariate from the other levels."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import anndata as ad
import numpy as np
import pandas as pd

from scvi_sams._checks import as_names
from scvi_sams.baselines._base import (
    BaselineMethod,
    Expression,
    label_means,
    profile_table,
    read_expression,
)
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidCovariateError,
    MissingControlError,
    UnknownPerturbationError,
)
from scvi_sams.labels._labels import Labels
from scvi_sams.metrics._observed import labels_of, levels_of


@dataclass(kw_only=True, eq=False)
class LevelBaseline(BaselineMethod):
    """A baseline for covariate transfer: a level is predicted from the other levels.

    A label, single or combination, is predicted from cells with the same label, but never from
    cells of the predicted level, so that predictions are comparable whether or not these cells
    were held out.

    Parameters
    ----------
    perturbation_key, control, delimiter
        As for :class:`BaselineMethod`.
    covariate_key
        Column of ``obs`` with the level of each training cell, such as its cell type, and of the
        predictions. A benchmark sets it.

    Attributes
    ----------
    means
        Mean of ``X`` by label for each level: labels x genes, ``obs["n_cells"]``.

    Examples
    --------
    Cells of two types; B cells with ``P001`` are held out:

    >>> import scanpy as sc
    >>> cells = adata.copy()
    >>> cells.obs["cell_type"] = np.where(np.arange(cells.n_obs) % 2 == 0, "T cell", "B cell")
    >>> sc.pp.normalize_total(cells)
    >>> sc.pp.log1p(cells)
    >>> held_out = (cells.obs["perturbation"] == "P001") & (cells.obs["cell_type"] == "B cell")
    >>> method = scvi_sams.evaluation.VectorArithmetic(covariate_key="cell_type")
    >>> predicted = method.fit(cells[~held_out]).predict(["P001"], levels=["B cell"])
    >>> predicted.shape, predicted.obs["cell_type"].tolist()
    ((1, 100), ['B cell'])
    """

    covariate_key: str | None = None
    means: dict[str, ad.AnnData] = field(init=False, repr=False)
    _level_of_cell: np.ndarray = field(init=False, repr=False)

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
        InvalidArgumentError
            If there is no ``covariate_key``.
        InvalidCovariateError
            If a cell has no level.
        MissingKeyError, MissingControlError, InvalidPerturbationLabelError, InvalidCountsError
            As for :meth:`BaselineMethod.fit`.
        SAMSError
            If there are only control cells.
        """
        labels = labels_of(train_adata, self.perturbation_key, self.control, self.delimiter)
        levels = levels_of(train_adata, self.covariate_key)
        return self._fit_levels(read_expression(train_adata), labels, levels, train_adata.var_names)

    def _fit_levels(
        self, expression: Expression, labels: Labels, levels: np.ndarray | None, genes: pd.Index
    ) -> Self:
        """Learn from cells whose labels and levels are already parsed."""
        if levels is None:
            raise InvalidArgumentError(
                "`covariate_key` is None: pass the column of obs with the level of each cell, "
                "such as its cell type (to the benchmark, if it runs there)."
            )
        self._level_of_cell = levels
        return self._fit(expression, labels, genes)

    def _learn(self, expression: Expression, labels: Labels, genes: pd.Index) -> None:
        self.means = {}
        for level in sorted(set(self._level_of_cell)):
            cells = np.flatnonzero(self._level_of_cell == level)
            self.means[level] = label_means(expression[cells], labels[cells], genes)

    def predict(
        self, perturbations: Sequence[str], levels: Sequence[str] | None = None
    ) -> ad.AnnData:
        """Predict the mean expression of cells with each perturbation in each level.

        Parameters
        ----------
        perturbations
            Labels to predict, combinations in any spelling.
        levels
            Levels to predict; ``None`` for all levels in training.

        Returns
        -------
        One row per perturbation and level, perturbations slowest, in the units of the training
        ``X``, genes as in training. ``obs[perturbation_key]``: the canonical label;
        ``obs[covariate_key]``: the level. ``obs_names`` join both: ``"A in T cell"``.

        Raises
        ------
        UnknownPerturbationError
            If no training cell of another level has a label, or a label is the control.
        InvalidCovariateError
            If a level has no training cells.
        MissingControlError
            If the prediction requires control cells of the level and there are none.
        SAMSError
            If the method was not fitted, or a perturbation is named twice.
        """
        names, labels, genes = self._requested(perturbations)
        asked = list(self.means) if levels is None else as_names("levels", levels)
        unknown = sorted(set(asked) - set(self.means))
        if unknown:
            raise InvalidCovariateError(
                f"There are no training cells of level {unknown[0]!r} of {self.covariate_key!r}; "
                f"levels in training are {', '.join(map(repr, self.means))}."
            )
        table = profile_table(
            np.reshape(self._profiles(labels, asked), (len(labels) * len(asked), len(genes))),
            genes,
            [f"{name} in {level}" for name in names for level in asked],
            self.perturbation_key,
            np.repeat(labels.canonical, len(asked)).tolist(),
        )
        table.obs[self.covariate_key] = asked * len(names)
        return table

    def _profiles(self, labels: Labels, levels: Sequence[str] = ()) -> np.ndarray:
        """Predict expression, (labels x levels) x genes, labels slowest."""
        return np.array([self._profile(label, x) for label in labels.canonical for x in levels])

    @abstractmethod
    def _profile(self, label: str, level: str) -> np.ndarray:
        """Predict expression, shape ``(n_genes,)``, of a label in a level."""

    def _elsewhere(self, level: str, *labels: str) -> list[ad.AnnData]:
        """Means of the other levels that have cells of all of the labels: at least one."""
        found = [
            means
            for other, means in self.means.items()
            if other != level and set(labels).issubset(means.obs_names)
        ]
        if not found:
            raise UnknownPerturbationError(
                f"No level other than {level!r} has training cells of "
                f"{' and '.join(map(repr, labels))}. Pass labels and levels for which other "
                "levels have cells."
            )
        return found


def _mean(means: ad.AnnData, label: str) -> np.ndarray:
    return np.asarray(means[label].X, dtype=np.float64)[0]


class VectorArithmetic(LevelBaseline):
    """Predict the control mean of a level plus the mean effect of the label in the other levels.

    ``c_l + mean over levels k other than l of (t_k - c_k)``, with ``t_k`` the mean of the cells of
    the label in level k and ``c_k`` that of its control cells. All levels with both have the same
    weight, whatever their number of cells. The prediction is correct if the effect of a
    perturbation does not depend on the level.

    Notes
    -----
    Vector arithmetic in gene expression, to which scGen is compared (Lotfollahi et al., Nature
    Methods 2019); the baseline of perturbation means of State (Adduri et al., bioRxiv 2025).
    """

    def _profile(self, label: str, level: str) -> np.ndarray:
        own, control = self.means[level], self._spelling.control_label
        if control not in own.obs_names:
            raise MissingControlError(f"No training control cell is of level {level!r}.")
        effects = [
            _mean(means, label) - _mean(means, control)
            for means in self._elsewhere(level, label, control)
        ]
        return _mean(own, control) + np.mean(effects, axis=0)


class OtherLevelsMean(LevelBaseline):
    """Predict the mean of the cells of the label in the other levels.

    Each cell has the same weight. Differences between unperturbed cells of the levels are ignored:
    a method that is no better does not capture the level.
    """

    def _profile(self, label: str, level: str) -> np.ndarray:
        elsewhere = self._elsewhere(level, label)
        return np.average(
            [_mean(means, label) for means in elsewhere],
            axis=0,
            weights=[means.obs.loc[label, "n_cells"] for means in elsewhere],
        )
