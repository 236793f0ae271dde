"""Predicted and observed expression of a group of cells, and how a metric is declared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from scvi_sams.exceptions import (
    InvalidCountsError,
    MissingControlError,
    MissingKeyError,
    SAMSError,
)
from scvi_sams.labels._labels import Labels
from scvi_sams.labels._spelling import Spelling
from scvi_sams.metrics._observed import check_predicted, levels_of, read_cells
from scvi_sams.metrics._profiles import Matrix, mean_over_cells, not_finite, squared

RankVersion = Literal["2025", "2024"]
Derived = TypeVar("Derived")

_LARGEST_LOG1P = 30.0
"""No natural logarithm of counts is near it (e^30 is 10^13): such values are not log1p."""


@dataclass(frozen=True)
class Options:
    """Options of the user; see :func:`score_predictions`."""

    target_genes: Mapping[str, str | Sequence[str]] | None = None
    perturbed_centroid: np.ndarray | None = None
    n_top_genes: int = 20
    rank_version: RankVersion = "2025"
    n_components: int | None = 50
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Comparison:
    """Predicted and observed expression of one group of cells, such as a cell type."""

    covariate: str | None
    """Name of the group; ``None`` if there is only one."""
    perturbations: list[str]
    """Observed perturbations, sorted; rows of all fields below."""
    genes: pd.Index
    """Genes of the observed data, columns of all fields below."""
    predicted: np.ndarray
    observed: np.ndarray
    """Mean expression, perturbations x genes; NaN where there is no prediction."""
    control_mean: np.ndarray
    control_variance: np.ndarray
    """Mean expression of the control cells, genes."""
    n_cells: np.ndarray
    """Number of observed cells of each perturbation."""
    status: np.ndarray
    """``"ok"``, or why there is no prediction: ``"missing"`` or ``"nan"``."""
    predicted_cells: list[Matrix]
    observed_cells: list[Matrix]
    """Cells x genes of each perturbation."""
    control_cells: Matrix
    """Control cells x genes."""
    from_cells: bool
    """Whether cells are predicted, rather than one profile per perturbation."""
    spelling: Spelling
    """How the names of perturbations are written."""
    options: Options
    """Options of the user."""
    _derived: dict[Callable[..., Any], Any] = field(default_factory=dict)

    @property
    def succeeded(self) -> np.ndarray:
        """Which perturbations have a prediction (boolean)."""
        return self.status == "ok"

    def once(self, derive: Callable[[Comparison], Derived]) -> Derived:
        """Result of a function of this comparison, computed once for all metrics that need it."""
        if derive not in self._derived:
            self._derived[derive] = derive(self)
        return self._derived[derive]


class Scores(NamedTuple):
    """Values of a metric per perturbation."""

    values: np.ndarray
    """One per perturbation."""
    chance: float | np.ndarray | None = None
    """Value of a prediction that is the same for all perturbations; ``None``: as declared."""
    defined: bool | np.ndarray = True
    """Where the metric is defined."""


@dataclass(frozen=True)
class Metric:
    """Definition of a metric and how it is computed."""

    mode: str
    metric: str
    """Its mode and name."""
    axis: str
    """The question that it answers: ``"fit"``, ``"specificity"``, ``"distribution"`` or
    ``"truth"``. A good method does well in more than one."""
    definition: str
    """Definition; x is the prediction and y the observation."""
    source: str
    """Source of the definition."""
    higher_is_better: bool
    """Its direction."""
    score: Callable[[Comparison], np.ndarray | Scores] | None = None
    """Values per perturbation of a comparison, NaN for a failed prediction. ``None`` for metrics of
    a whole fit, which :func:`benchmark` computes."""
    pooled: Callable[[Sequence[Comparison]], float] | None = None
    """One value over all perturbations and groups, for the row ``"all"``."""
    chance: float = np.nan
    """Value of a prediction that is the same for all perturbations; NaN if it depends on the
    data."""
    worst_if_failed: bool = False
    """Whether ``score`` assigns the worst value to a failed prediction."""
    needs: Literal["cells", "profiles"] | None = None
    """``"cells"`` or ``"profiles"``, if the metric is defined for only one kind of prediction."""
    is_headline: bool = False
    """Whether a summary shows it first."""


@dataclass(frozen=True, eq=False)
class Side:
    """Expression of cells (or profiles) with their labels and levels."""

    expression: Matrix
    """Cells x genes, log1p-normalised."""
    labels: Labels
    """Labels of the cells."""
    levels: np.ndarray | None
    """Level of the covariate of every cell; ``None`` if there is one group."""

    @cached_property
    def positions(self) -> dict[tuple[str | None, str], np.ndarray]:
        """Positions of the cells of each level and label."""
        levels = np.full(len(self.labels), "") if self.levels is None else self.levels
        groups = pd.DataFrame({"level": levels, "name": self.labels.name_of_cell})
        positions: dict[tuple[str | None, str], np.ndarray] = {}
        for cells in groups.groupby(["level", "name"]).indices.values():
            level = None if self.levels is None else levels[cells[0]]
            name = self.labels.names[self.labels.name_of_cell[cells[0]]]
            positions[level, name] = np.asarray(cells)
        return positions

    def cells(self, covariate: str | None, perturbation: str) -> Matrix:
        """Expression of the cells of one level and label."""
        return self.expression[self.positions.get((covariate, perturbation), [])]


def compare_sides(
    predicted: Side, observed: Side, genes: pd.Index, options: Options
) -> list[Comparison]:
    """Compare both sides, group by group; an error without perturbed cells or controls."""
    names: dict[str | None, list[str]] = {}
    for covariate, label in sorted(observed.positions, key=str):
        if label != observed.labels.control:
            names.setdefault(covariate, []).append(label)
    if not names:
        raise SAMSError("No observed cell is perturbed: there is nothing to compare with.")
    from_cells = any(
        len(predicted.positions.get((covariate, label), ())) > 1
        for covariate, labels in names.items()
        for label in labels
    )
    control = observed.labels.control
    comparisons = []
    for covariate, perturbations in names.items():
        if (covariate, control) not in observed.positions:
            group = "" if covariate is None else f" of {covariate!r}"
            raise MissingControlError(
                f"No observed cell{group} is labelled {control!r}. The observed data must contain "
                "the control cells of every group in addition to the held-out cells."
            )
        predicted_cells = [predicted.cells(covariate, p) for p in perturbations]
        observed_cells = [observed.cells(covariate, p) for p in perturbations]
        control_cells = observed.cells(covariate, control)
        means = np.array([mean_over_cells(cells) for cells in predicted_cells])
        control_mean = mean_over_cells(control_cells)
        absent = np.array([cells.shape[0] == 0 for cells in predicted_cells])
        failed = not_finite(means)
        mean_of_squares = mean_over_cells(squared(control_cells))
        comparisons.append(
            Comparison(
                covariate=covariate,
                perturbations=perturbations,
                genes=genes,
                # An infinite prediction is a failure, as NaN is.
                predicted=np.where(failed[:, None], np.nan, means),
                observed=np.array([mean_over_cells(cells) for cells in observed_cells]),
                control_mean=control_mean,
                control_variance=np.maximum(mean_of_squares - control_mean**2, 0),
                n_cells=np.array([cells.shape[0] for cells in observed_cells]),
                status=np.select([absent, failed], ["missing", "nan"], "ok"),
                predicted_cells=predicted_cells,
                observed_cells=observed_cells,
                control_cells=control_cells,
                from_cells=from_cells,
                spelling=observed.labels.spelling,
                options=options,
            )
        )
    return comparisons


def check_predicted_genes(predicted: ad.AnnData, observed: ad.AnnData) -> None:
    """Raise unless genes are unique and every observed gene is predicted."""
    for side, data in (("predicted", predicted), ("observed", observed)):
        if not data.var_names.is_unique:
            repeated = data.var_names[data.var_names.duplicated()][0]
            raise SAMSError(
                f"The gene {repeated!r} occurs twice in the {side} data. Make the names unique "
                "(var_names_make_unique)."
            )
    check_predicted(observed.var_names, predicted.var_names)


def read_side(
    data: ad.AnnData,
    genes: pd.Index,
    side: str,
    perturbation_key: str,
    covariate_key: str | None,
    spelling: Spelling,
) -> Side:
    """Read expression, labels and levels of the predicted or the observed cells.

    Genes in the requested order; an error if the expression cannot be log1p-normalised.
    """
    of = f" of the {side} data"
    labels = read_cells(data, perturbation_key, spelling, of=of)
    levels = levels_of(data, covariate_key, of)
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
        raise InvalidCountsError("The observed data contain values that are not finite.")
    highest = np.max(values, where=finite, initial=-np.inf)
    if highest > _LARGEST_LOG1P:
        raise InvalidCountsError(
            f"X of the {side} data contains {highest:g}, too large for log1p-normalised "
            "expression. Normalise and log-transform (scanpy.pp.normalize_total, scanpy.pp.log1p)."
        )
    return Side(matrix, labels, levels)
