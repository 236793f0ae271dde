"""Baselines that need means only, and a positive control: what any model is to be read against."""

from __future__ import annotations

from collections.abc import Sequence

import anndata as ad
import numpy as np

from scvi_sams._checks import check_anndata, check_integer, check_text
from scvi_sams.baselines._ate import additive_ate, mean_ate, single_perturbations
from scvi_sams.baselines._base import (
    BaselineMethod,
    LabelledCells,
    effect_table,
    labelled_cells,
    profile_table,
)
from scvi_sams.exceptions import SAMSError, UnknownPerturbationError
from scvi_sams.labels._stratified import stratified_split


class MeanBaseline(BaselineMethod):
    """A baseline that knows the mean of the control cells and the mean effects in training.

    Attributes
    ----------
    control_mean
        Mean of the training control cells, shape ``(n_genes,)``.
    effects
        ATE table of the training cells in the units of ``X``: per label, the mean of its cells
        minus ``control_mean``; ``obs["n_cells"]`` counts the cells.
    """

    control_mean: np.ndarray
    effects: ad.AnnData

    def _learn(self, cells: LabelledCells) -> None:
        self.control_mean, self.effects = effect_table(cells.means(), cells.control)


class ControlMean(MeanBaseline):
    """Predict the mean of the control cells for every perturbation: nothing changes."""

    def _profiles(self, labels: list[str]) -> np.ndarray:
        return np.tile(self.control_mean, (len(labels), 1))


class PerturbationMean(MeanBaseline):
    """Predict the control mean plus the mean training effect, the same for every perturbation.

    Every training label, single or combination, has the same weight whatever its number of cells
    (see :func:`mean_ate`).
    """

    def _profiles(self, labels: list[str]) -> np.ndarray:
        return self.control_mean + np.asarray(mean_ate(self.effects, labels).X)


class TrainingMean(MeanBaseline):
    """Predict the mean of the training cells with the very same label.

    It says how well perturbations seen in training can be predicted without a model. Other labels
    raise :class:`~scvi_sams.exceptions.UnknownPerturbationError`.
    """

    def _profiles(self, labels: list[str]) -> np.ndarray:
        unseen = sorted(set(labels).difference(self.effects.obs_names))
        if unseen:
            raise UnknownPerturbationError(
                f"No training cell carries {', '.join(map(repr, unseen))}, so there is no mean to "
                "predict. Ask for labels of the training cells only."
            )
        return self.control_mean + np.asarray(self.effects[labels].X)


class Additive(MeanBaseline):
    """Predict the control mean plus the sum of the effects of the single perturbations.

    A single perturbation is predicted by its own training mean. A combination is predicted from
    its singles also where its own cells were in training, so that the deviation from additivity is
    the same quantity for every combination. A perturbation that has no training cells of its own
    raises :class:`~scvi_sams.exceptions.UnknownPerturbationError` (see :func:`additive_ate`).
    """

    def _profiles(self, labels: list[str]) -> np.ndarray:
        effects = additive_ate(self.effects, labels, delimiter=self.delimiter)
        return self.control_mean + np.asarray(effects.X)


class MatchingMean(MeanBaseline):
    """Predict a combination by the mean of the centroids of its single perturbations.

    A perturbation without training cells of its own counts with the perturbed centroid: the mean
    over all training cells that are not controls. A single perturbation is predicted by its
    own centroid, or by the perturbed centroid. Cells of combinations enter the latter only.

    Notes
    -----
    Matching mean of Systema (Vinas Torne et al., Nature Biotechnology 2025). Where their code is
    asked for a single perturbation that was in training it averages its centroid with the
    perturbed centroid; here the centroid itself is taken.
    """

    def _profiles(self, labels: list[str]) -> np.ndarray:
        centroids = dict(zip(self.effects.obs_names, np.asarray(self.effects.X), strict=True))
        perturbed = np.average(self.effects.X, axis=0, weights=self.effects.obs["n_cells"])
        matching = [
            np.mean(
                [
                    centroids.get(name, perturbed)
                    for name in single_perturbations(label, self.delimiter)
                ],
                axis=0,
            )
            for label in labels
        ]
        return self.control_mean + np.reshape(matching, (len(labels), len(self.control_mean)))


def split_half(
    test_adata: ad.AnnData,
    *,
    seed: int = 0,
    perturbation_key: str = "perturbation",
    control: str | Sequence[str] = "control",
    delimiter: str | None = "+",
) -> tuple[ad.AnnData, np.ndarray]:
    """Predict one half of the observed cells of each perturbation by the other half.

    The positive control: how well anybody could do who knows the truth but for the sampling of
    cells. It is not fitted to training cells. Compared with a prediction that is scored on all
    cells, both its sides rest on half as many.

    Parameters
    ----------
    test_adata
        Observed cells x genes, perturbed and, if there are any, control cells. Not changed.
    seed
        Of the halves.
    perturbation_key
        Column of ``obs`` with the label of each cell.
    control
        Label or labels of the control cells.
    delimiter
        What joins the perturbations of a combination; ``None`` if labels are never split.

    Returns
    -------
    The prediction, one row per perturbation (labels sorted), as :meth:`BaselineMethod.predict`
    returns it, and the ascending positions in ``test_adata`` of the cells to score it on: the
    other half of each perturbation and all control cells. With an odd number of cells, either half
    may have the additional one.

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
    check_text(perturbation_key=perturbation_key)
    cells = labelled_cells(
        test_adata, perturbation_key=perturbation_key, control=control, delimiter=delimiter
    )
    perturbed = np.flatnonzero(~cells.is_control)
    names, n_cells = np.unique(cells.labels[perturbed].astype(str), return_counts=True)
    if len(names) == 0:
        raise SAMSError("All observed cells are controls: there is nothing to predict.")
    if n_cells.min() < 2:
        alone = ", ".join(map(repr, names[n_cells < 2].tolist()))
        raise SAMSError(
            f"{alone} has a single cell, which has no half. Leave out perturbations with fewer "
            "than two cells."
        )
    half, _, rest = stratified_split(cells.labels[perturbed].astype(str), (0.5, 0, 0.5), seed=seed)
    means = LabelledCells(
        cells.expression[perturbed[half]], cells.labels[perturbed[half]], cells.genes, cells.control
    ).means()
    labels = list(means.obs_names)
    observed = np.sort(np.concatenate([np.flatnonzero(cells.is_control), perturbed[rest]]))
    prediction = profile_table(np.asarray(means.X), labels, labels, cells.genes, perturbation_key)
    return prediction, observed
