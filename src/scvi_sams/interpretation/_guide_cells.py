"""Effects of guides in cells relative to controls: on genes, and along a predicted effect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scvi.data import AnnDataManager

from scvi_sams.data._field import registered_labels
from scvi_sams.data._guides import Guides
from scvi_sams.exceptions import MissingControlError
from scvi_sams.model._expression_axes import strata_of_cells
from scvi_sams.train._gene_sums import TARGET_SUM
from scvi_sams.train._statistics import chunks_of_cells

_MOST_CONTROLS = 5000
"""Control cells used to estimate variances along effects; means use all of them."""
_SMALLEST_VARIANCE = 1e-8
"""Smallest variance of a gene that is used."""


@dataclass(frozen=True, eq=False)
class Compared:
    """Cells of each guide, and the control cells with which they are compared.

    Used are cells with one perturbation, at its dose, and one guide, in a stratum (batch and
    categorical covariates) with control cells. K guides, S strata.

    Attributes
    ----------
    perturbation
        Perturbation of each guide, ``(K,)``.
    guide
        Guide of each cell, ``(n_cells,)``: K for control cells, -1 for those that are not used.
    stratum
        Stratum of each cell, ``(n_cells,)``.
    n_cells
        Number of cells of each guide, ``(K,)``.
    share
        Proportion of the cells of each guide in each stratum, ``(K, S)``.
    n_controls
        Number of control cells in each stratum, ``(S,)``.
    """

    perturbation: np.ndarray
    guide: np.ndarray
    stratum: np.ndarray
    n_cells: np.ndarray
    share: np.ndarray
    n_controls: np.ndarray

    @classmethod
    def of(cls, manager: AnnDataManager, guides: Guides, doses: np.ndarray) -> Compared:
        """Choose cells of a registered screen; ``doses``, ``(T,)``, are those of the effects."""
        labels = registered_labels(manager)
        n_guides = len(guides.names)
        strata = strata_of_cells(manager)
        n_controls = np.bincount(strata[labels.is_control], minlength=int(strata.max()) + 1)
        if not n_controls.any():
            raise MissingControlError(
                "Effects of guides are differences from control cells, but there are none."
            )
        code = labels.codes.max(axis=1)
        speaks = (labels.codes >= 0).sum(axis=1) == 1
        speaks &= np.isclose(labels.doses.sum(axis=1), doses[code])
        speaks &= ((guides.codes >= 0).sum(axis=1) == 1) & (n_controls[strata] > 0)
        guide = np.where(speaks, guides.codes.max(axis=1), -1)
        guide[labels.is_control] = n_guides
        in_stratum = np.zeros((n_guides, len(n_controls)))
        np.add.at(in_stratum, (guide[speaks], strata[speaks]), 1)
        n_cells = in_stratum.sum(axis=1)
        share = in_stratum / np.maximum(n_cells, 1)[:, None]
        counted = n_cells.astype(int)
        return cls(guides.perturbation, guide, strata, counted, share, n_controls)

    @property
    def n_guides(self) -> int:
        """K."""
        return len(self.n_cells)

    @property
    def is_control(self) -> np.ndarray:
        """Whether each cell is a control cell, ``(n_cells,)``."""
        return self.guide == self.n_guides

    def each_guide(self) -> sparse.csr_array:
        """Weights of each guide alone, ``(K, K)``; rows of guides without cells are empty."""
        return sparse.csr_array(sparse.diags_array((self.n_cells > 0).astype(float)))

    def error_of_controls(self, share: np.ndarray) -> np.ndarray:
        """Variance of means of control cells per cell variance, for proportions ``(..., S)``."""
        return (share**2 / np.maximum(self.n_controls, 1)).sum(axis=-1)

    def less_controls(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Subtract from cells the mean of the control cells of their stratum.

        Parameters
        ----------
        values
            ``(n_cells, n)``.

        Returns
        -------
        The same shape, and the covariance within strata of control cells, ``(n, n)``.
        """
        means = np.zeros((len(self.n_controls), values.shape[1]))
        np.add.at(means, self.stratum[self.is_control], values[self.is_control])
        means /= np.maximum(self.n_controls, 1)[:, None]
        left = values - means[self.stratum]
        of_controls = left[self.is_control]
        freedom = max(len(of_controls) - int((self.n_controls > 0).sum()), 1)
        return left, of_controls.T @ of_controls / freedom


class GeneEffects(NamedTuple):
    """Observed effects on genes."""

    effect: np.ndarray
    """Effect of each guide, ``(K, G)``; NaN without cells."""
    variance: np.ndarray
    """Variance within guides and strata of controls, ``(G,)``; infinite if it is too small."""
    of_controls: np.ndarray
    """Means of the control cells of each stratum, ``(S, G)``."""


def normalised_cells(
    manager: AnnDataManager, cells: np.ndarray, *, counts: bool
) -> Iterator[tuple[np.ndarray, sparse.csr_array]]:
    """Yield positions in ascending ``cells`` and their normalised values, in blocks."""
    start = 0
    for x, size in chunks_of_cells(manager, cells):
        values = sparse.csr_array(x)
        if counts:
            values = sparse.csr_array(sparse.diags_array(TARGET_SUM / size) @ values)
            values.data = np.log2(1 + values.data)
        yield np.arange(start, start + values.shape[0]), values
        start += values.shape[0]


def gene_effects(manager: AnnDataManager, compared: Compared, *, counts: bool) -> GeneEffects:
    """Read the cells once and compute differences from control cells within strata."""
    n_guides, n_strata = compared.share.shape
    # Groups are guides, then control cells of each stratum.
    group = np.where(compared.is_control, n_guides + compared.stratum, compared.guide)
    used = np.flatnonzero(group >= 0)
    n_genes = manager.summary_stats.n_vars
    sums, squares = np.zeros((n_guides + n_strata, n_genes)), np.zeros(n_genes)
    for place, values in normalised_cells(manager, used, counts=counts):
        row = group[used[place]]
        shape = (len(sums), len(row))
        indicator = sparse.csr_array((np.ones(len(row)), (row, np.arange(len(row)))), shape)
        sums += (indicator @ values).toarray()
        squares += np.asarray(values.power(2).sum(axis=0)).ravel()
    n = np.concatenate([compared.n_cells, compared.n_controls])
    means = sums / np.maximum(n, 1)[:, None]
    freedom = max(len(used) - int((n > 0).sum()), 1)
    variance = (squares - (sums * means).sum(axis=0)) / freedom
    effect = means[:n_guides] - compared.share @ means[n_guides:]
    effect[compared.n_cells == 0] = np.nan
    variance = np.where(variance > _SMALLEST_VARIANCE, variance, np.inf)
    return GeneEffects(effect, variance, means[n_guides:])


class Slopes(NamedTuple):
    """Proportion of an effect in guides, or in several together."""

    slope: np.ndarray
    standard_error: np.ndarray


class AlongEffects(NamedTuple):
    """Projection of cells on the effect of their perturbation, in units of it."""

    mean: np.ndarray
    """Mean of each guide, minus control cells, ``(K,)``."""
    squared_error: np.ndarray
    """Variance of the mean over the cells of each guide, ``(K,)``; NaN for a single cell."""
    variance_of_controls: np.ndarray
    """Variance of a control cell, for each guide, ``(K,)``."""

    def of(self, weights: sparse.csr_array, compared: Compared) -> Slopes:
        """Slopes of weighted means of guides, ``(n, K)``, each of one perturbation.

        NaN for empty rows. Weights are proportions of cells.
        """
        total = np.asarray(weights.sum(axis=1)).ravel()
        slope = weights @ np.where(compared.n_cells > 0, self.mean, 0)
        has_cells = compared.n_cells > 0
        of_guides = weights.power(2) @ np.where(has_cells, self.squared_error, 0)
        per_cell = compared.error_of_controls(weights @ compared.share)
        of_controls = per_cell * (weights @ self.variance_of_controls)
        return Slopes(
            np.where(total > 0, slope, np.nan),
            np.sqrt(np.where(total > 0, of_guides + of_controls, np.nan)),
        )


def along_effects(
    manager: AnnDataManager,
    compared: Compared,
    genes: GeneEffects,
    predicted: np.ndarray,
    *,
    counts: bool,
) -> AlongEffects:
    """Regress observed effects of guides on predicted effects of their perturbations.

    Weights are inverse variances of genes. The slope is a sum over the genes of each cell, so
    errors are those of means over cells, and correlations between genes are accounted for.

    Parameters
    ----------
    predicted
        ``(T, G)``; a row of zeros has no slopes (NaN).
    """
    weighted = predicted / genes.variance
    size = (weighted * predicted).sum(axis=1, keepdims=True)
    loadings = np.divide(weighted, size, out=np.full_like(weighted, np.nan), where=size > 0)
    of_guides = loadings[compared.perturbation]
    mean = (of_guides * genes.effect).sum(axis=1)
    squares = np.zeros(compared.n_guides)
    treated = np.flatnonzero((compared.guide >= 0) & ~compared.is_control)
    base = loadings @ genes.of_controls.T
    for place, values in normalised_cells(manager, treated, counts=counts):
        guide, stratum = compared.guide[treated[place]], compared.stratum[treated[place]]
        code = compared.perturbation[guide]
        for one in np.unique(code):
            rows = np.flatnonzero(code == one)
            shown = values[rows] @ loadings[one] - base[one, stratum[rows]]
            np.add.at(squares, guide[rows], shown**2)
    n = compared.n_cells
    spread = np.maximum(squares - n * np.nan_to_num(mean) ** 2, 0)
    squared_error = spread / np.where(n > 1, n * (n - 1.0), np.nan)
    of_controls = _variance_of_controls(manager, compared, loadings, base, counts=counts)
    return AlongEffects(mean, squared_error, of_controls[compared.perturbation])


def _variance_of_controls(
    manager: AnnDataManager,
    compared: Compared,
    loadings: np.ndarray,
    base: np.ndarray,
    *,
    counts: bool,
) -> np.ndarray:
    """Variance of control cells along each effect, within strata, ``(T,)``."""
    controls = np.flatnonzero(compared.is_control)
    every = -(-len(controls) // _MOST_CONTROLS)
    chosen = controls[::every]
    squares = np.zeros(len(loadings))
    for place, values in normalised_cells(manager, chosen, counts=counts):
        shown = values @ loadings.T - base[:, compared.stratum[chosen[place]]].T
        squares += np.square(shown).sum(axis=0)
    freedom = len(chosen) * (1 - (compared.n_controls > 0).sum() / len(controls))
    return squares / max(freedom, 1)
