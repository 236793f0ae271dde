"""Baselines of shrunken means: mean effects, shrunken by their standard errors."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from scvi_sams._shrinkage import moderated_variance, shrink_entries, shrink_rows
from scvi_sams.baselines._base import Expression, label_means, parts_of_labels
from scvi_sams.baselines._simple import Additive, MeanBaseline, sum_of_effects
from scvi_sams.exceptions import SAMSError
from scvi_sams.labels._labels import Labels

_ROUNDING = 1e-12
"""Relative to the mean square: a smaller variance is 0 up to rounding."""


class Spread(NamedTuple):
    """Variation of expression between cells of one label.

    Attributes
    ----------
    variance
        Sample variances, perturbations x genes; NaN for a single cell.
    n_cells
        Number of cells of each perturbation.
    control_variance, control_kurtosis
        Sample variance and excess kurtosis over the control cells, shape ``(n_genes,)``.
    n_controls
        Number of control cells.
    """

    variance: np.ndarray
    n_cells: np.ndarray
    control_variance: np.ndarray
    control_kurtosis: np.ndarray
    n_controls: int


@dataclass(kw_only=True, eq=False)
class ShrunkenMean(MeanBaseline):
    """A baseline that shrinks the mean effects in training by their standard errors.

    The squared error of an effect is ``var_t / n_t + var_c / n_c``, from the cells of the
    perturbation and the control cells. A label in training is predicted from its own cells; any
    other combination by the control mean plus the sum of the shrunken effects of its single
    perturbations. A perturbation without training cells of its own raises
    :class:`~scvi_sams.exceptions.UnknownPerturbationError`. A single control cell has no variance:
    :meth:`fit` then raises a :class:`~scvi_sams.exceptions.SAMSError`.

    Attributes
    ----------
    control_mean
        Mean of the training control cells, shape ``(n_genes,)``.
    effects
        Shrunken effects, an ATE table as for :class:`MeanBaseline`;
        ``layers["standard_error"]`` is the standard error before shrinking.
    """

    def _learn(self, expression: Expression, labels: Labels, genes: pd.Index) -> None:
        super()._learn(expression, labels, genes)
        spread = _spread(expression, labels, genes)
        of_controls = spread.control_variance / spread.n_controls
        error = np.sqrt(self._variance(spread) / spread.n_cells[:, None] + of_controls)
        self.effects.X = self._shrink(np.asarray(self.effects.X, dtype=np.float64), error)
        self.effects.layers["standard_error"] = error

    def _profiles(self, labels: Labels) -> np.ndarray:
        names, seen = labels.canonical.tolist(), self.effects.obs_names
        parts = [
            [name] if name in seen else singles
            for name, singles in zip(names, parts_of_labels(labels), strict=True)
        ]
        effects = sum_of_effects(self.effects, seen.tolist(), names, parts)
        return self.control_mean + np.asarray(effects.X)

    @abstractmethod
    def _variance(self, spread: Spread) -> np.ndarray:
        """Variances between cells used for standard errors, perturbations x genes."""

    @abstractmethod
    def _shrink(self, effect: np.ndarray, error: np.ndarray) -> np.ndarray:
        """Shrink effects, perturbations x genes."""


class EBMean(ShrunkenMean):
    """Predict the control mean plus the mean training effect, shrunken as a whole.

    The effect of a perturbation is multiplied by ``max(0, 1 - sum(se^2) / sum(effect^2))`` with
    sums over genes and ``se`` the standard error: the proportion of its squared size that is not
    error, the empirical Bayes estimate under a normal prior. It is hard to beat if effects are
    spread over many genes; effects on a few genes are shrunken too much because of the noise of
    all others (see :class:`AshMean`). A perturbation with a single cell uses the variances of the
    controls. Other labels are predicted as in :class:`ShrunkenMean`.

    Notes
    -----
    Efron and Morris (1975), Journal of the American Statistical Association 70, 311-319.

    Examples
    --------
    >>> import scanpy as sc
    >>> cells = adata.copy()
    >>> sc.pp.normalize_total(cells)
    >>> sc.pp.log1p(cells)
    >>> seen = scvi_sams.evaluation.TrainingMean().fit(cells).effects
    >>> shrunken = scvi_sams.evaluation.EBMean().fit(cells).effects
    >>> float((shrunken["P001"].X / seen["P001"].X).mean().round(2))  # one factor for all genes
    0.98
    """

    def _variance(self, spread: Spread) -> np.ndarray:
        return np.where(spread.n_cells[:, None] > 1, spread.variance, spread.control_variance)

    def _shrink(self, effect: np.ndarray, error: np.ndarray) -> np.ndarray:
        return shrink_rows(effect, error)


class AshMean(ShrunkenMean):
    """Predict the control mean plus the mean training effect, shrunken gene by gene.

    The effects of a perturbation are modelled as a mixture of normal distributions around 0, one
    of them a point mass, fitted to its genes. Large effects are then hardly changed and small ones
    vanish (adaptive shrinkage). Variances over few cells are moderated: shrunken towards those of
    the control cells. A combination in training is predicted from its own cells (see
    :class:`ShrunkenAdditive`), other labels as in :class:`ShrunkenMean`.

    Notes
    -----
    Stephens (2017), Biostatistics 18, 275-294; Smyth (2004), Statistical Applications in Genetics
    and Molecular Biology 3, article 3.

    Examples
    --------
    >>> import scanpy as sc
    >>> cells = adata.copy()
    >>> sc.pp.normalize_total(cells)
    >>> sc.pp.log1p(cells)
    >>> seen = scvi_sams.evaluation.TrainingMean().fit(cells).effects
    >>> shrunken = scvi_sams.evaluation.AshMean().fit(cells).effects
    >>> kept = shrunken["P001"].X / seen["P001"].X  # a factor for every gene
    >>> float(kept.min().round(2)), float(kept.max().round(2))
    (0.49, 0.99)
    """

    def _variance(self, spread: Spread) -> np.ndarray:
        return moderated_variance(
            spread.variance,
            spread.n_cells,
            spread.control_variance,
            spread.n_controls,
            spread.control_kurtosis,
        )

    def _shrink(self, effect: np.ndarray, error: np.ndarray) -> np.ndarray:
        return shrink_entries(effect, error).mean


class ShrunkenAdditive(Additive, AshMean):
    """Predict the control mean plus the sum of the shrunken effects of the single perturbations.

    :class:`Additive` with effects of singles shrunken as in :class:`AshMean`: in a combination the
    errors of two effects add up, above all for genes that neither changes. Combinations are
    predicted from singles even if their own cells were in training.
    """


def _spread(expression: Expression, labels: Labels, genes: pd.Index) -> Spread:
    """Variances of every label but the control, and variance and kurtosis of the controls."""
    expression = expression.astype(np.float64)
    means = label_means(expression, labels, genes)
    n_cells = means.obs["n_cells"].to_numpy()
    is_control = means.obs_names == labels.control
    n_controls = int(n_cells[is_control][0])
    if n_controls < 2:
        raise SAMSError(
            "There is a single control cell in training, so standard errors, which effects are "
            "shrunken by, are unknown. Put more control cells into training."
        )
    second = np.asarray(label_means(_power(expression, 2), labels, genes).X)
    biased = second - np.square(means.X)
    biased[biased < _ROUNDING * second] = 0
    variance = biased * (n_cells / np.where(n_cells > 1, n_cells - 1, np.nan))[:, None]
    return Spread(
        variance[~is_control],
        n_cells[~is_control],
        variance[is_control][0],
        _kurtosis(expression[labels.is_control], biased[is_control][0]),
        n_controls,
    )


def _kurtosis(cells: Expression, variance: np.ndarray) -> np.ndarray:
    """Excess kurtosis of every gene; 0 if all cells are the same."""
    first, second, third, fourth = (
        np.asarray(_power(cells, power).mean(axis=0)).ravel() for power in (1, 2, 3, 4)
    )
    central = fourth - 4 * third * first + 6 * second * first**2 - 3 * first**4
    square = np.square(variance)
    return np.divide(central, square, out=np.full_like(square, 3), where=square > 0) - 3


def _power(expression: Expression, power: int) -> Expression:
    return expression**power if isinstance(expression, np.ndarray) else expression.power(power)
