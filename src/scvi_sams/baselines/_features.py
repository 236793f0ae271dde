"""Baselines for unmeasured perturbations: effects predicted from features."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.linear_model import RidgeCV
from sklearn.metrics.pairwise import cosine_similarity

from scvi_sams._checks import check_bool, check_integer
from scvi_sams._plurals import counted, plural
from scvi_sams.baselines._base import Expression, parts_of_labels
from scvi_sams.baselines._simple import MeanBaseline
from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.features._table import FeatureTable, Values, as_feature_table
from scvi_sams.labels._labels import Labels

_STRENGTHS = np.logspace(-3, 5, 33)
"""Candidate penalties, per column; the largest leaves only the mean effect."""
_VARIES = 1e-9
"""Relative to the largest value of a column: a smaller standard deviation is 0 up to rounding."""


@dataclass(eq=False)
class FeatureBaseline(MeanBaseline):
    """A baseline that predicts perturbations without training cells from their features.

    It learns from the mean effects of perturbations that were measured alone and have features.
    Features are standardised over these; constant columns are removed. The prediction is the
    control mean plus the sum of the effects of the perturbations of a label: the observed effect
    if a perturbation was measured alone, otherwise the effect predicted from its features. A
    perturbation with neither raises :class:`~scvi_sams.exceptions.UnknownPerturbationError`.

    Parameters
    ----------
    features
        Perturbations x features, as a DataFrame or any other input of
        :func:`scvi_sams.features.as_feature_table`. A benchmark sets them if there are none.
    shuffled
        Give every perturbation the features of another one, sampled by ``seed``
        (:meth:`FeatureTable.shuffled <scvi_sams.features.FeatureTable.shuffled>`): a negative
        control whose predictions do not depend on features. A benchmark sets the seed.
    seed
        Seed of the shuffling.
    perturbation_key, control, delimiter
        As for :class:`BaselineMethod`.

    Attributes
    ----------
    control_mean, effects
        As for :class:`MeanBaseline`.

    Raises
    ------
    InvalidArgumentError
        If features are not a table of finite numbers; by ``fit``, if there are none, fewer than two
        perturbations were measured alone and have features, or their features are all the same.
    """

    features: Any = None
    shuffled: bool = field(default=False, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    _table: FeatureTable = field(init=False, repr=False)

    def __post_init__(self) -> None:
        check_bool(shuffled=self.shuffled)
        check_integer(at_least=0, seed=self.seed)
        if self.features is not None:
            self.features = as_feature_table(self.features, argument="features")

    def _learn(self, expression: Expression, labels: Labels, genes: pd.Index) -> None:
        super()._learn(expression, labels, genes)
        if self.features is None:
            raise InvalidArgumentError(
                "`features` is None: pass a table of perturbations x features (to the benchmark as "
                "`perturbation_features`, if it runs there)."
            )
        self._table = self.features.shuffled(self.seed) if self.shuffled else self.features
        carried = set(labels.carried)
        measured = [name for name in self.effects.obs_names if name in carried]
        known = [name for name in measured if name in self._table]
        if len(known) < 2:
            raise InvalidArgumentError(
                f"Only {len(known)} of {counted(len(measured), 'perturbation')} with training "
                f"cells of their own {plural(len(known), 'has', 'have')} features; at least 2 are "
                "required." + self._table.transposed_hint(measured)
            )
        self._set_scale(_dense(self._table.rows(known)))
        effects = np.asarray(self.effects[known].X, dtype=np.float64)
        n_cells = self.effects.obs.loc[known, "n_cells"].to_numpy()
        within = _variance_within(expression[~labels.is_control], self.control_mean, self.effects)
        weights = _random_effects_weights(effects, n_cells, within)
        self._learn_features(self._standardised(known), effects, weights)

    def _set_scale(self, rows: np.ndarray) -> None:
        spread = rows.std(axis=0)
        self._columns = np.flatnonzero(spread > _VARIES * np.abs(rows).max(axis=0))
        if not len(self._columns):
            raise InvalidArgumentError(
                "Features of all perturbations with training cells of their own are the same, so "
                "nothing can be learned from them. Pass other features."
            )
        self._centre, self._spread = rows.mean(axis=0)[self._columns], spread[self._columns]

    def _standardised(self, names: list[str]) -> np.ndarray:
        """Features of some perturbations, in SD from the mean of training."""
        rows = _dense(self._table.rows(names)[:, self._columns])
        return (rows - self._centre) / self._spread

    def _profiles(self, labels: Labels) -> np.ndarray:
        parts = parts_of_labels(labels)
        effect_of = dict(zip(self.effects.obs_names, np.asarray(self.effects.X), strict=True))
        unmeasured = sorted({name for names in parts for name in names}.difference(effect_of))
        if unmeasured:
            predicted = self._predicted(self._standardised(unmeasured))
            effect_of |= dict(zip(unmeasured, predicted, strict=True))
        sums = [np.sum([effect_of[name] for name in names], axis=0) for names in parts]
        return self.control_mean + np.reshape(sums, (len(labels), len(self.control_mean)))

    @abstractmethod
    def _learn_features(
        self, features: np.ndarray, effects: np.ndarray, weights: np.ndarray
    ) -> None:
        """Learn from standardised features and effects, perturbations x columns and x genes.

        ``weights`` are the weights of perturbations; their mean is 1.
        """

    @abstractmethod
    def _predicted(self, features: np.ndarray) -> np.ndarray:
        """Predict effects, perturbations x genes, from standardised features."""


@dataclass(eq=False)
class FeatureRidge(FeatureBaseline):
    """Predict effects that are linear in features, by ridge regression.

    With ``f_t`` the standardised features of measured perturbation t and ``e_t`` its mean effect,
    it finds::

        B, e = argmin  sum_t w_t |e_t - e - B f_t|^2  +  alpha * |B|^2

    and predicts ``e + B f`` for an unmeasured perturbation; uninformative features leave the mean
    effect. ``alpha`` minimises the squared error over 33 values when each perturbation is left out
    in turn, which has a closed form; the cost is that of the smaller of perturbations x
    perturbations and columns x columns. Effects of few cells are noisy, and even with many cells
    effects differ from what features predict, so weights are those of a random effect,
    ``w_t = 1 / (between + within / n_t)``, with the variance between measured effects, the
    variance within perturbations, and the number of cells ``n_t``.

    Parameters
    ----------
    features, shuffled, seed, perturbation_key, control, delimiter
        As for :class:`FeatureBaseline`.

    Attributes
    ----------
    alpha
        Selected penalty on squared weights.

    Notes
    -----
    Hoerl and Kennard (1970), Technometrics 12, 55-67; leave-one-out in closed form: Golub, Heath
    and Wahba (1979), Technometrics 21, 215-223; weights: DerSimonian and Laird (1986), Controlled
    Clinical Trials 7, 177-188. A linear map from embeddings of genes to effects is the baseline
    that deep models of unseen perturbations did not beat (Ahlmann-Eltze, Huber and Anders, Nature
    Methods 2025).

    Examples
    --------
    >>> import scanpy as sc
    >>> screen = scvi_sams.datasets.simulate_screen(
    ...     n_genes=50, n_perturbations=60, n_combinations=0, n_features=5, feature_share=0.9
    ... )
    >>> split = scvi_sams.evaluation.perturbation_hold_out(screen.obs["perturbation"])
    >>> sc.pp.normalize_total(screen)
    >>> sc.pp.log1p(screen)
    >>> ridge = scvi_sams.evaluation.FeatureRidge(screen.uns["perturbation_features"])
    >>> predicted = ridge.fit(screen[split.train]).predict(split.held_out)
    >>> observed = scvi_sams.evaluation.TrainingMean().fit(screen).predict(split.held_out)
    >>> effects = [table.X - ridge.control_mean for table in (predicted, observed)]
    >>> bool(np.corrcoef(effects[0].ravel(), effects[1].ravel())[0, 1] > 0.4)
    True
    """

    alpha: float = field(init=False, repr=False)

    def _learn_features(
        self, features: np.ndarray, effects: np.ndarray, weights: np.ndarray
    ) -> None:
        self._ridge = RidgeCV(features.shape[1] * _STRENGTHS)
        self._ridge.fit(features, effects, sample_weight=weights)
        self.alpha = float(self._ridge.alpha_)

    def _predicted(self, features: np.ndarray) -> np.ndarray:
        return np.reshape(self._ridge.predict(features), (len(features), -1))


@dataclass(eq=False)
class FeatureNeighbours(FeatureBaseline):
    """Predict the mean effect of the measured perturbations with the most similar features.

    Similarity is the cosine of standardised features.

    Parameters
    ----------
    k
        Number of neighbours; at most all measured perturbations that have features.
    features, shuffled, seed, perturbation_key, control, delimiter
        As for :class:`FeatureBaseline`.
    """

    k: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(k=self.k)

    def _learn_features(
        self, features: np.ndarray, effects: np.ndarray, weights: np.ndarray
    ) -> None:
        self._of_neighbours = features, effects

    def _predicted(self, features: np.ndarray) -> np.ndarray:
        known, effects = self._of_neighbours
        order = np.argsort(-cosine_similarity(features, known), axis=1, kind="stable")
        return effects[order[:, : self.k]].mean(axis=1)


def _dense(rows: Values) -> np.ndarray:
    return rows.toarray() if isinstance(rows, sparse.csr_matrix) else rows


def _variance_within(perturbed: Expression, control_mean: np.ndarray, effects: Any) -> float:
    """Variance between cells of one label, summed over genes; 0 if no label has two cells."""
    n_cells = effects.obs["n_cells"].to_numpy()
    if n_cells.sum() == len(n_cells):
        return 0.0
    values = perturbed.data if sparse.issparse(perturbed) else perturbed
    means = np.asarray(effects.X, dtype=np.float64) + control_mean
    squares = np.square(values, dtype=np.float64).sum() - n_cells @ np.square(means).sum(axis=1)
    return max(float(squares), 0.0) / (n_cells.sum() - len(n_cells))


def _random_effects_weights(effects: np.ndarray, n_cells: np.ndarray, within: float) -> np.ndarray:
    """Weights of effects: the inverse of their variance, with mean 1."""
    of_errors = within / n_cells
    total = np.square(effects - effects.mean(axis=0)).sum() / (len(effects) - 1)
    variances = max(total - of_errors.mean(), 0.0) + of_errors
    if not variances.min() > 0:
        return np.ones(len(effects))
    return (1 / variances) / (1 / variances).mean()
