"""Baselines of means and linear regression, of effects or cells, and a positive control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import anndata as ad
import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from scvi_sams._checks import as_names, check_anndata, check_ate, check_integer
from scvi_sams.baselines._base import (
    BaselineMethod,
    Expression,
    label_means,
    multi_hot,
    parts_of_labels,
    profile_table,
    read_expression,
)
from scvi_sams.exceptions import SAMSError, UnknownPerturbationError
from scvi_sams.labels._labels import Labels
from scvi_sams.labels._rows import join_dosages, label_rows
from scvi_sams.labels._spelling import Control, Spelling
from scvi_sams.labels._stratified import stratified_split
from scvi_sams.metrics._observed import ate_table, check_unique, labels_of


def additive_ate(
    singles: ad.AnnData,
    combinations: Sequence[str],
    *,
    control: str | Sequence[str] = "control",
    delimiter: str | None = "+",
) -> ad.AnnData:
    """Predict the effect of a combination as the sum of the effects of its perturbations.

    Parameters
    ----------
    singles
        ATE table with every single perturbation of the combinations, as returned by
        :func:`observed_ate`.
    combinations
        Labels to predict, in any spelling. A single perturbation predicts itself.
    control, delimiter
        How labels are written; ``delimiter=None`` if they are never split.

    Returns
    -------
    An ATE table, combinations x genes, in the units and at the doses of ``singles``. If
    ``singles`` has standard errors, ``layers["standard_error"]`` combines them in quadrature. This
    ignores that singles share their control cells, so it is too small by the shared part of their
    error.

    Raises
    ------
    UnknownPerturbationError
        If a perturbation of a combination is not in ``singles``.
    SAMSError
        If ``singles`` names a perturbation twice.

    Examples
    --------
    >>> from scvi_sams import evaluation
    >>> singles = evaluation.observed_ate(adata, perturbations=["P001", "P007"])
    >>> additive = evaluation.additive_ate(singles, ["P001+P007"])
    >>> np.allclose(additive.X[0], singles.X.sum(axis=0))
    True
    """
    check_ate(singles=singles)
    combinations = as_names("combinations", combinations)
    spelling = Spelling.of(control, delimiter)
    parts = [spelling.perturbations(name) or [spelling.control_label] for name in combinations]
    names = [spelling.canonical(name) for name in combinations]
    known = [spelling.canonical(name) for name in singles.obs_names]
    table = sum_of_effects(singles, known, names, parts)
    if "dosage" in singles.obs:
        dosage_of = dict(zip(known, singles.obs["dosage"], strict=True))
        dosages = [join_dosages((dosage_of[name] for name in group), spelling) for group in parts]
        table.obs = label_rows(names, dosages)
    return table


def sum_of_effects(
    singles: ad.AnnData, rows: Sequence[str], combinations: Sequence[str], parts: list[list[str]]
) -> ad.AnnData:
    """Sum the effects of the parts of each combination; ``rows`` are canonical names."""
    check_unique(rows)
    missing = sorted({name for names in parts for name in names}.difference(rows))
    if missing:
        raise UnknownPerturbationError(
            f"The single effect of {', '.join(map(repr, missing))} is required but not in the "
            "table. Estimate it first (observed_ate), or remove its combinations."
        )
    positions = [pd.Index(rows).get_indexer(pd.Index(names)) for names in parts]

    def sums(values: np.ndarray) -> np.ndarray:
        summed = [values[members].sum(axis=0) for members in positions]
        return np.reshape(summed, (len(positions), singles.n_vars))

    return _in_units_of(
        singles, combinations, sums, lambda errors: np.sqrt(sums(np.square(errors)))
    )


def mean_ate(ate: ad.AnnData, perturbations: Sequence[str]) -> ad.AnnData:
    """Predict the same effect for every perturbation: the mean over those of a table.

    A model that does not beat this baseline may have learned what perturbed cells have in common,
    but not how perturbations differ.

    Parameters
    ----------
    ate
        ATE table whose rows are averaged with equal weights: those of the training perturbations,
        as returned by :func:`observed_ate`.
    perturbations
        Labels to predict; they need not be in ``ate``.

    Returns
    -------
    An ATE table, perturbations x genes, in the units of ``ate``. If ``ate`` has standard errors,
    ``layers["standard_error"]`` is their mean: an upper bound, whatever part of their error the
    rows share through their control cells.

    Raises
    ------
    SAMSError
        If ``ate`` has no rows.

    Examples
    --------
    >>> from scvi_sams import evaluation
    >>> singles = evaluation.observed_ate(adata, perturbations=["P001", "P007"])
    >>> same = evaluation.mean_ate(singles, ["P003", "P004"])
    >>> np.allclose(same["P003"].X, same["P004"].X)
    True
    """
    check_ate(ate=ate)
    perturbations = as_names("perturbations", perturbations)
    if ate.n_obs == 0:
        raise SAMSError("There is no effect to average: the table has no perturbations.")

    def mean(values: np.ndarray) -> np.ndarray:
        return np.tile(np.mean(values, axis=0), (len(perturbations), 1))

    return _in_units_of(ate, perturbations, mean, mean)


def _in_units_of(
    table: ad.AnnData,
    names: Sequence[str],
    effect: Callable[[np.ndarray], np.ndarray],
    standard_error: Callable[[np.ndarray], np.ndarray],
) -> ad.AnnData:
    """Make an ATE table of effects in the units of another one, with errors if it has them."""
    layers = {}
    if "standard_error" in table.layers:
        layers["standard_error"] = standard_error(table.layers["standard_error"])
    return ate_table(
        effect(np.asarray(table.X)),
        pd.DataFrame(index=list(names)),
        table.var_names,
        description=dict(table.uns["ate"]),
        layers=layers,
    )


@dataclass(kw_only=True, eq=False)
class MeanBaseline(BaselineMethod):
    """A baseline that learns the mean of the control cells and the mean effects in training.

    Attributes
    ----------
    control_mean
        Mean of the training control cells, shape ``(n_genes,)``.
    effects
        ATE table of the training cells in the units of ``X``: for each label, the mean of its cells
        minus ``control_mean``; ``obs["n_cells"]`` is the number of cells.
    """

    control_mean: np.ndarray = field(init=False, repr=False)
    effects: ad.AnnData = field(init=False, repr=False)

    def _learn(self, expression: Expression, labels: Labels, genes: pd.Index) -> None:
        means = label_means(expression, labels, genes)
        is_control = means.obs_names == labels.control
        self.control_mean = np.asarray(means.X)[is_control][0]
        perturbed = means[~is_control]
        self.effects = ate_table(
            np.asarray(perturbed.X) - self.control_mean,
            perturbed.obs[["n_cells"]].copy(),
            genes,
            description={"method": "mean", "units": "difference of mean X"},
            layers={},
        )


class ControlMean(MeanBaseline):
    """Predict the mean of the control cells for every perturbation: nothing changes."""

    def _profiles(self, labels: Labels) -> np.ndarray:
        return np.tile(self.control_mean, (len(labels), 1))


class PerturbationMean(MeanBaseline):
    """Predict the control mean plus the mean training effect, the same for every perturbation.

    Every training label, single or combination, has the same weight, whatever its number of cells
    (see :func:`mean_ate`).
    """

    def _profiles(self, labels: Labels) -> np.ndarray:
        return self.control_mean + np.asarray(mean_ate(self.effects, labels.canonical.tolist()).X)


class TrainingMean(MeanBaseline):
    """Predict the mean of the training cells with the same label.

    It shows how well seen perturbations can be predicted without a model. Other labels raise
    :class:`~scvi_sams.exceptions.UnknownPerturbationError`.
    """

    def _profiles(self, labels: Labels) -> np.ndarray:
        unseen = sorted(set(labels.names).difference(self.effects.obs_names))
        if unseen:
            raise UnknownPerturbationError(
                f"No training cell has the label {', '.join(map(repr, unseen))}, so there is no "
                "mean to predict. Pass only labels of training cells."
            )
        return self.control_mean + np.asarray(self.effects[labels.canonical.tolist()].X)


class Additive(MeanBaseline):
    """Predict the control mean plus the sum of the effects of the single perturbations.

    A single perturbation is predicted by its own training mean. A combination is predicted from
    its singles even if its own cells were in training, so that the deviation from additivity is
    defined in the same way for every combination. A perturbation without training cells of its own
    raises :class:`~scvi_sams.exceptions.UnknownPerturbationError` (see :func:`additive_ate`).
    """

    def _profiles(self, labels: Labels) -> np.ndarray:
        names, singles = labels.canonical.tolist(), self.effects.obs_names.tolist()
        effects = sum_of_effects(self.effects, singles, names, parts_of_labels(labels))
        return self.control_mean + np.asarray(effects.X)


class MatchingMean(MeanBaseline):
    """Predict a combination by the mean of the centroids of its single perturbations.

    A perturbation without training cells of its own is replaced by the perturbed centroid: the
    mean over all training cells that are not controls. A single perturbation is predicted by its
    own centroid, or by the perturbed centroid. Cells of combinations affect only the latter.

    Notes
    -----
    Matching mean of Systema (Vinas Torne et al., Nature Biotechnology 2025). For a single
    perturbation in training, their code averages its centroid with the perturbed centroid; here
    the centroid itself is used.
    """

    def _profiles(self, labels: Labels) -> np.ndarray:
        centroids = dict(zip(self.effects.obs_names, np.asarray(self.effects.X), strict=True))
        perturbed = np.average(self.effects.X, axis=0, weights=self.effects.obs["n_cells"])
        matching = [
            np.mean([centroids.get(name, perturbed) for name in parts], axis=0)
            for parts in parts_of_labels(labels)
        ]
        return self.control_mean + np.reshape(matching, (len(labels), len(self.control_mean)))


@dataclass(kw_only=True, eq=False)
class PCARidge(MeanBaseline):
    """Predict the control mean plus a linear function of the perturbations, of low rank.

    With ``V`` the principal axes (genes x components) of all training cells, ``x_i`` the
    expression of perturbed cell i, ``c`` the mean of the controls and ``d_i`` the perturbations of
    the cell (0 or 1 each), it finds::

        W = argmin  sum_i |V^T (x_i - c) - W d_i|^2  +  alpha * |W|^2

    and predicts ``c + V W d``. A combination adds the effects of its perturbations; unlike
    :class:`Additive`, these are shrunken and are also learned from cells of combinations. A
    perturbation in no training label raises
    :class:`~scvi_sams.exceptions.UnknownPerturbationError`.

    Parameters
    ----------
    n_components
        Number of principal components; at most one fewer than cells and than genes are used.
    alpha
        Penalty on squared effects, in numbers of cells: the effect of a perturbation with n cells
        of its own, and none in combinations, is shrunken by ``n / (n + alpha)``.
    seed
        Seed of the solver for principal components, if it is randomised.
    perturbation_key, control, delimiter
        As for :class:`BaselineMethod`.

    Notes
    -----
    Based on the linear baseline of Ahlmann-Eltze, Huber & Anders (Nature Methods 2025), which
    regresses changes from control on ``G W P^T`` with ridge penalties. There ``P`` embeds the
    perturbed gene; here it is the indicator of perturbations, so that drugs and genes outside the
    panel can be used too, but unseen perturbations cannot.
    """

    n_components: int = 50
    alpha: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_components < 1 or self.alpha < 0:
            raise SAMSError(
                f"n_components is {self.n_components} and alpha {self.alpha}; pass at least one "
                "component and a penalty that is not negative."
            )

    def _learn(self, expression: Expression, labels: Labels, genes: pd.Index) -> None:
        super()._learn(expression, labels, genes)
        n_components = min(self.n_components, min(expression.shape) - 1)
        if n_components < 1:
            raise SAMSError("Principal components need at least two cells and two genes.")
        axes = PCA(n_components, random_state=self.seed).fit(expression).components_
        # All cells of a label share one row of the regression, so regression on their mean,
        # weighted by their number, has the same solution.
        rows = labels[np.unique(labels.name_of_cell, return_index=True)[1]]
        self._vocabulary = rows.carried
        ridge = Ridge(self.alpha, fit_intercept=False).fit(
            multi_hot(rows[~rows.is_control], self._vocabulary),
            self.effects.X @ axes.T,
            sample_weight=self.effects.obs["n_cells"],
        )
        self._weights = np.reshape(ridge.coef_, (n_components, -1)).T @ axes

    def _profiles(self, labels: Labels) -> np.ndarray:
        return self.control_mean + multi_hot(labels, self._vocabulary) @ self._weights


def split_half(
    test_adata: ad.AnnData,
    *,
    seed: int = 0,
    perturbation_key: str = "perturbation",
    control: Control = "control",
    delimiter: str | None = "+",
) -> tuple[ad.AnnData, np.ndarray]:
    """Predict one half of the observed cells of each perturbation by the other half.

    The positive control: the score of a method that knows the truth up to the sampling of cells.
    It is not fitted to training cells. Both sides have half as many cells as for a prediction
    that is scored on all cells.

    Parameters
    ----------
    test_adata
        Observed cells x genes, perturbed and, if there are any, control cells. Not changed.
    seed
        Seed of the halves.
    perturbation_key, control, delimiter
        As for :class:`BaselineMethod`.

    Returns
    -------
    The prediction, one row per perturbation (labels sorted), as returned by
    :meth:`BaselineMethod.predict`, and the ascending positions in ``test_adata`` of the cells to
    score it on: the other half of each perturbation and all control cells. If the number of cells
    is odd, either half may have one more.

    Raises
    ------
    MissingKeyError, InvalidPerturbationLabelError, InvalidCountsError
        As for :meth:`BaselineMethod.fit`.
    SAMSError
        If a perturbation has a single cell, or there are no perturbed cells.

    Examples
    --------
    >>> import scanpy as sc
    >>> cells = adata.copy()
    >>> sc.pp.normalize_total(cells)
    >>> sc.pp.log1p(cells)
    >>> halves, scored = scvi_sams.evaluation.split_half(cells)
    >>> halves.n_obs  # one row per perturbation and combination
    14
    >>> len(scored)  # half of their 660 cells, and 200 controls
    530
    """
    check_anndata(test_adata=test_adata)
    check_integer(at_least=0, seed=seed)
    labels = labels_of(test_adata, perturbation_key, control, delimiter)
    genes = test_adata.var_names
    means, half = mean_of_halves(read_expression(test_adata), labels, genes, seed)
    names = list(means.obs_names)
    table = profile_table(np.asarray(means.X), genes, names, perturbation_key, names)
    return table, np.setdiff1d(np.arange(len(labels)), half)


def mean_of_halves(
    expression: Expression, labels: Labels, genes: pd.Index, seed: int
) -> tuple[ad.AnnData, np.ndarray]:
    """Means of one half of the cells of each perturbation, and the positions of these cells."""
    perturbed = np.flatnonzero(~labels.is_control)
    if not len(perturbed):
        raise SAMSError("All observed cells are controls: there is nothing to predict.")
    n_cells = np.bincount(labels.name_of_cell[perturbed], minlength=len(labels.names))
    if (n_cells == 1).any():
        alone = [name for name, n in zip(labels.names, n_cells, strict=True) if n == 1]
        raise SAMSError(
            f"{', '.join(map(repr, alone))} has a single cell and cannot be halved. Remove "
            "perturbations with fewer than two cells."
        )
    half, _, _ = stratified_split(labels.name_of_cell[perturbed], (0.5, 0, 0.5), seed=seed)
    half = perturbed[half]
    return label_means(expression[half], labels[half], genes), half
