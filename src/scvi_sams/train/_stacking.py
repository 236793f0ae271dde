"""Stacking: effects estimated in three ways, and their weighted average.

If the model has learned little, or cells are few, the shrunken observed effects (entry by entry or
as a whole) may have a smaller error than the model. Predictions of means are an average of the
three (stacking, Wolpert 1992). Held-out cells determine its weights, because the model agrees with
its training cells in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls
from scipy.stats import norm

from scvi_sams._shrinkage import NormalMixture, Shrunken, share_kept, shrink_entries
from scvi_sams.module._direct_effects import COMPONENTS
from scvi_sams.train._compared_scale import Scale
from scvi_sams.train._observed_effects import Block, ObservedEffects

_WEIGHT_SD, _WEIGHT_SD_OF_COMBINATIONS = 0.5, 0.2
"""Prior SD of the weights around equal ones, and of those of combinations around those of
perturbations, of which many more cells are held out."""
PRIOR_INFLATION, _INFLATION_SD = 1.0, 0.5
"""Prior factor of squared errors relative to posterior variances, and its SD."""
_OFF_BY = 0.15
"""Relative error of squared errors of held-out effects, because cells with a perturbation may vary
more than control cells. With few held-out cells it would look like prediction error."""
_MOST_INFLATION = 4.0
_FIRM = 1e3
"""Weight of the constraint that the weights sum to one."""


class Priors(NamedTuple):
    """Mixtures that all perturbations share."""

    observed: NormalMixture
    lacking: NormalMixture
    """Mixture of residuals of the model."""


class Start(NamedTuple):
    """Prior estimates of a block: for combinations, sums of perturbations."""

    direct: np.ndarray | float = 0.0
    """Direct effects, rows x genes, on logits."""
    centre: np.ndarray | float = 0.0
    """Effects towards which observed ones are shrunken, rows x genes, on the compared scale."""
    squared_spread: np.ndarray | None = None
    """Squared scale of samples of shifts in predictions, ``(rows, 1)``; ``None``: to estimate."""
    elsewhere: tuple[np.ndarray, np.ndarray] | None = None
    """Effects without a context-specific part, on the compared scale, and their variances: another
    estimate, if there are contexts."""


class Scored(NamedTuple):
    """Effects in training cells and in held-out cells, and components from the first."""

    trained: ObservedEffects
    held_out: ObservedEffects
    rows: range
    of_block: Callable[[Block], Components]

    def blocks(self) -> Iterator[tuple[Components, Block]]:
        """Yield components and held-out effects of a block at a time."""
        both = zip(self.trained.blocks(self.rows), self.held_out.blocks(self.rows), strict=True)
        for trained, held_out in both:
            yield self.of_block(trained), held_out


class Components(NamedTuple):
    """Components of predictions, for a block of effects, on the compared scale."""

    direct: Shrunken
    """Residuals of the model."""
    means: np.ndarray
    """The effects of each of the :data:`COMPONENTS`, and from other contexts, ``(3 or 4, rows,
    genes)``."""
    variances: np.ndarray
    """Their posterior variances."""


def components(
    block: Block, start: Start, scale: Scale, priors: Priors | None, *, fits_direct: bool
) -> Components:
    """Estimate a block of effects in three ways."""
    error, of_model = block.error, scale.compared(block.of_model + start.direct)
    observed, lacking = block.observed - start.centre, block.observed - of_model
    direct = Shrunken(*np.zeros((4, *observed.shape)))
    if priors is not None:
        entrywise = priors.observed.posterior(observed, error)
        if fits_direct:
            direct = priors.lacking.posterior(lacking, error)
    else:
        entrywise = shrink_entries(observed, error)
        if fits_direct:
            direct = shrink_entries(lacking, error)
    # As a whole: the proportion of the sum of squares, on the compared scale, that is not error.
    known = np.isfinite(error)
    of_shifts = np.square(scale.relative_slope(block.of_model)) * block.variance_of_model
    weighed = scale.slope * observed, np.where(known, scale.slope * error, 0)
    kept = share_kept(*weighed)
    of_rows = _share_unknown(*weighed) * np.square(np.where(known, error, 0))
    means = [of_model + direct.mean, start.centre + entrywise.mean, start.centre + kept * observed]
    variances = [of_shifts + np.square(direct.sd), np.square(entrywise.sd), of_rows]
    if start.elsewhere is not None:
        means.append(start.elsewhere[0])
        variances.append(of_shifts + start.elsewhere[1])
    return Components(direct, np.stack(means), np.stack(variances))


def _share_unknown(effect: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Posterior variance, relative to the squared error, of effects shrunken as a whole.

    It would be the proportion that is kept, ``(rows, 1)``, if that were known. Its estimate has an
    error that is larger for fewer genes: if it is 0 or less, effects are zero but uncertain.
    """
    squared = np.square(error)
    noise = squared.sum(axis=1, keepdims=True)
    ratio = noise / np.maximum(np.square(effect).sum(axis=1, keepdims=True), np.finfo(float).tiny)
    n_genes = noise**2 / np.maximum(np.square(squared).sum(axis=1, keepdims=True), 1e-300)
    sd = np.maximum(ratio * np.sqrt(2 / np.maximum(n_genes, 1)), 1e-12)
    standard = (1 - ratio) / sd
    return np.minimum((1 - ratio) * norm.cdf(standard) + sd * norm.pdf(standard), 1)


def equal_weights(has_contexts: bool) -> np.ndarray:
    """Weights of the :data:`COMPONENTS`, and with contexts, of the estimate from other contexts."""
    n = len(COMPONENTS) + has_contexts
    return np.full(n, 1 / n)


def stacking_weights(
    scored: Sequence[Scored], *, has_contexts: bool = False, of_singles: np.ndarray | None = None
) -> np.ndarray:
    """Weights of the :data:`COMPONENTS` of the training cells that best explain held-out effects.

    They are non-negative and sum to one; their prior is normal around equal weights, or those
    ``of_singles``. Errors of a few cells are correlated between genes, which then say less of the
    weights: products are divided by a design effect, the ratio of the variance between rows to that
    of independent errors.
    """
    centre, sd = equal_weights(has_contexts), _WEIGHT_SD
    if of_singles is not None:
        centre, sd = of_singles, _WEIGHT_SD_OF_COMBINATIONS
    of_parts, of_rows = zip(*map(_products, scored), strict=True)
    of_all, rows = np.sum(of_parts, axis=0), np.concatenate(of_rows)
    design_effect = _design_effect(rows, _posterior_mode(of_all, centre, sd), sd)
    return _posterior_mode(of_all / design_effect, centre, sd)


def _posterior_mode(of_all: np.ndarray, centre: np.ndarray, sd: float) -> np.ndarray:
    n = len(centre)
    products = of_all[:n, :n] + np.eye(n) / sd**2
    targets = of_all[:n, n] + centre / sd**2
    factor = np.linalg.cholesky(products)
    firm = _FIRM * np.sqrt(products.max())
    weights, _ = nnls(
        np.vstack([factor.T, np.full(n, firm)]), np.append(np.linalg.solve(factor, targets), firm)
    )
    return weights / weights.sum()


def _design_effect(of_rows: np.ndarray, weights: np.ndarray, sd: float) -> float:
    """Variance of the gradient between rows, relative to its variance with independent errors.

    ``of_rows`` are products ``(R, n + 1, n + 1)``; at least 1. The directions are those in which
    weights that sum to one can change.
    """
    of_rows = of_rows[of_rows.any(axis=(1, 2))]
    n, n_rows = len(weights), len(of_rows)
    if n_rows < 2:
        return 1.0
    directions = np.linalg.svd(np.ones((1, n)))[2][1:]
    gradients = (of_rows[:, :n, :n] @ weights - of_rows[:, :n, n]) @ directions.T
    between = gradients.T @ gradients * n_rows / (n_rows - 1)
    independent = directions @ of_rows[:, :n, :n].sum(axis=0) @ directions.T
    independent += np.eye(n - 1) / sd**2
    return max(1.0, float(np.trace(np.linalg.solve(independent, between))) / (n - 1))


def _products(part: Scored) -> tuple[np.ndarray, np.ndarray]:
    """Generalised products of the components and of held-out effects, which are last.

    Held-out effects are differences from the same control cells, few of which are held out, so the
    errors of all perturbations on a gene have a part in common. If it were treated as independent,
    the weights would fit it. The covariance is inverted by the Sherman-Morrison formula. Also
    returns products of each row as if its errors were independent, ``(R, n + 1, n + 1)``.
    """
    slope = part.trained.scale.slope
    of_rows, common, of_common = [], 0.0, 0.0
    for found, of_held_out in part.blocks():
        known = np.isfinite(of_held_out.error)
        error = np.where(known, slope * of_held_out.error, 0)
        signal = np.square(slope * found.means.mean(axis=0)).mean()
        of_controls = of_held_out.of_controls
        own = (1 - of_controls) * np.square(error) + signal + np.finfo(float).tiny
        precision = np.where(known, 1 / own, 0)
        values = slope * np.concatenate([found.means, of_held_out.observed[None]])
        shared = np.sqrt(of_controls) * error
        of_rows.append(np.einsum("itg,jtg,tg->tij", values, values, precision))
        common = common + np.einsum("itg,tg->ig", values, precision * shared)
        of_common = of_common + (precision * np.square(shared)).sum(axis=0)
    rows = np.concatenate(of_rows)
    explained = np.einsum("ig,jg->ij", common, common / (1 + of_common))
    return rows.sum(axis=0) - explained, rows


def inflation_of_variance(scored: Sequence[Scored], weights: np.ndarray) -> float:
    """Ratio of squared errors of stacked effects in held-out cells to posterior variances.

    Close to its prior mean if held-out effects are too uncertain; at least 1.
    """
    errors = variances = noise = of_held_out_cells = 0.0
    for part in scored:
        scale = np.square(part.trained.scale.slope)
        shared = np.zeros(len(scale))
        for found, of_held_out in part.blocks():
            whole, variance = stacked(found, weights)
            known = np.isfinite(of_held_out.error)
            own = np.where(known, np.square(of_held_out.error), 0)
            squared = np.where(known, np.square(of_held_out.observed - whole), 0)
            errors += float((scale * (squared - own)).sum())
            variances += float((scale * np.where(known, variance, 0)).sum())
            of_controls = of_held_out.of_controls * scale * own
            noise += float(2 * (np.square(scale * own) - np.square(of_controls)).sum())
            shared += of_controls.sum(axis=0)
            of_held_out_cells += float((scale * own).sum())
        noise += float(2 * np.square(shared).sum())
    if variances <= 0:
        return PRIOR_INFLATION
    noise += (_OFF_BY * of_held_out_cells) ** 2
    uncertainty = noise / variances**2 / _INFLATION_SD**2
    inflation = (errors / variances + uncertainty * PRIOR_INFLATION) / (1 + uncertainty)
    return float(np.clip(inflation, 1, _MOST_INFLATION))


def stacked(found: Components, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean of the components, and its variance, that of a mixture, rows x genes both.

    If the components disagree, at most one of them can be correct.
    """
    whole = np.einsum("i,itg->tg", weights, found.means)
    apart = np.square(found.means - whole)
    return whole, np.einsum("i,itg->tg", weights, found.variances + apart)
