"""Ridge regression of principal components on perturbations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from scvi_sams.baselines._base import LabelledCells, multi_hot
from scvi_sams.baselines._simple import MeanBaseline
from scvi_sams.exceptions import SAMSError


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
        Penalty on squared effects, in numbers of cells: with all cells of a perturbation alone,
        its n cells are shrunken by ``n / (n + alpha)``.
    seed
        Of the solver for principal components, where it is a randomised one.
    perturbation_key, control, delimiter
        As for :class:`BaselineMethod`.

    Notes
    -----
    After the linear baseline of Ahlmann-Eltze, Huber & Anders (Nature Methods 2025), which
    regresses changes from control on ``G W P^T`` with ridge penalties. There ``P`` embeds the
    perturbed gene; here it is the perturbations themselves, so that drugs and genes outside the
    panel can be used too, and unseen perturbations cannot.
    """

    def __init__(
        self,
        *,
        n_components: int = 50,
        alpha: float = 1.0,
        seed: int = 0,
        perturbation_key: str = "perturbation",
        control: str | Sequence[str] = "control",
        delimiter: str | None = "+",
    ) -> None:
        super().__init__(perturbation_key=perturbation_key, control=control, delimiter=delimiter)
        if n_components < 1 or alpha < 0:
            raise SAMSError(
                f"n_components is {n_components} and alpha {alpha}; give at least one component "
                "and a penalty that is not negative."
            )
        self.n_components = n_components
        self.alpha = alpha
        self.seed = seed

    def _learn(self, cells: LabelledCells) -> None:
        super()._learn(cells)
        n_components = min(self.n_components, min(cells.expression.shape) - 1)
        if n_components < 1:
            raise SAMSError("Principal components need at least two cells and two genes.")
        axes = PCA(n_components, random_state=self.seed).fit(cells.expression).components_
        perturbed, self._vocabulary = multi_hot(
            self.effects.obs_names, control=self.control, delimiter=self.delimiter
        )
        # All cells of a label share one row of the regression, so their mean, weighted by their
        # number, has the same solution as the cells themselves.
        ridge = Ridge(self.alpha, fit_intercept=False).fit(
            perturbed, self.effects.X @ axes.T, sample_weight=self.effects.obs["n_cells"]
        )
        self._weights = np.reshape(ridge.coef_, (n_components, -1)).T @ axes

    def _profiles(self, labels: list[str]) -> np.ndarray:
        perturbed, _ = multi_hot(
            labels, control=self.control, delimiter=self.delimiter, vocabulary=self._vocabulary
        )
        return self.control_mean + perturbed @ self._weights
