"""Efficacy of guides, and agreement of guides of the same gene."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import expit
from scipy.stats import norm

from scvi_sams._checks import check_integer, check_key, check_number
from scvi_sams._constants import RESULT_KEYS
from scvi_sams._fdr import within
from scvi_sams._group_tests import without_linear
from scvi_sams._plurals import counted
from scvi_sams.data._guides import Guides, registered_guides
from scvi_sams.exceptions import SAMSError
from scvi_sams.interpretation._guide_cells import (
    AlongEffects,
    Compared,
    along_effects,
    gene_effects,
)
from scvi_sams.interpretation._siblings import (
    SiblingTests,
    independent_features,
    sibling_tests,
    sibling_weights,
)
from scvi_sams.labels._names import listing
from scvi_sams.model._contrast import EffectScale
from scvi_sams.model._doses import doses_to_report
from scvi_sams.model._expression_axes import (
    continuous_covariates,
    principal_features,
    strata_of_cells,
)

if TYPE_CHECKING:
    from scvi_sams.model._perturbation_model import PerturbationModel

logger = logging.getLogger("scvi.sams")

NOTHING = 0.25
"""Proportion of the effect of a perturbation below which a guide has no effect."""
_N_COMPONENTS = 30
"""Number of axes on which siblings are compared. Axes of predicted effects would be more sensitive,
but were fitted to the chance deviations of the same cells: of guides without an effect, most with a
hundred cells would differ from their siblings."""


def guide_efficacy(
    model: PerturbationModel,
    *,
    fdr: float = 0.05,
    interval: float = 0.95,
    n_samples: int = 2500,
    n_posterior_samples: int = 100,
    key_added: str | None = RESULT_KEYS.GUIDES,
) -> pd.DataFrame:
    """Measure for each guide how much of the effect of its perturbation its cells show.

    A guide that does not cut or bind leaves its cells unchanged; an off-target guide changes them
    in a way that other guides of the gene do not.

    Parameters
    ----------
    model
        Model trained on cells registered with ``guide_key``, with its data.
    fdr
        False discovery rate over guides of ``differs_from_siblings``.
    interval
        Probability mass of intervals.
    n_samples, n_posterior_samples
        As in ``predict_ate``.
    key_added
        Key of ``adata.uns`` of the training data to which the table is written; ``None`` writes
        nothing.

    Returns
    -------
    One row per guide, in the order of perturbations:

    - ``perturbation``; ``n_cells``: cells with only this perturbation, at its largest dose, and no
      second guide, in batches and categories with control cells. All columns below except the
      response rate are computed from these cells.
    - ``acts``: whether the cells of the perturbation differ enough from others for the model to
      identify responding cells (``responses=True``), or at all (``model.test_perturbations`` at
      ``fdr``). **If not, guides cannot be assessed**: all following numbers are NaN and both flags
      are False.
    - ``response_rate``: proportion of the cells of the guide that respond, with the posterior
      interval ``rate_low`` to ``rate_high``, computed on the log-odds scale given the other guides.
      NaN for models with ``responses=False``.
    - ``effect_size``: slope of the observed effect of the guide over genes on the effect predicted
      for cells that respond to the perturbation, weighted by inverse variances; 1 is the full
      effect, 0 none. ``effect_standard_error`` (of means over cells, so that correlations between
      genes are accounted for; the prediction is taken as known) and ``effect_low``,
      ``effect_high``. With ``responses=False`` the prediction is that for all cells, and active
      guides exceed 1 if others are inactive.
    - ``agreement``: cosine of the observed effects of the guide and of its siblings (the other
      guides of the perturbation together), on axes of expression scaled by the variation between
      cells, corrected for errors; NaN if either is mostly error, or there are no siblings.
    - ``p_value``, ``q_value``: of the test whether the effect of the guide is something other than
      a non-negative multiple of that of its siblings, over all tested guides. NaN with fewer than
      five cells, or 20 of the perturbation.
    - ``does_nothing``: its effect is below a quarter of that of the perturbation, that of its
      siblings is above (both by their intervals), and it does not differ in other ways.
    - ``differs_from_siblings``: ``q_value`` is at most ``fdr``, and ``agreement`` below 0.9: the
      additional effect of the guide is at least half of the shared one. The guide that differs most
      is then excluded from the siblings of the others. If two guides are left, both are flagged,
      because it is unknown which one is correct.

    Weaker siblings (fewer responding cells) are multiples of stronger ones. So is a guide that is
    the only one with an effect: the others are then flagged as inactive, although it may be the
    off-target one. Batches and categorical covariates are accounted for; continuous covariates only
    in tests.

    Raises
    ------
    SAMSError
        If no guides are registered, or the model has no data.
    MissingControlError
        If the data have no control cells.
    InvalidArgumentError
        If ``fdr`` or ``interval`` is not between 0 and 1.

    Notes
    -----
    The test is Hotelling's test of the residual after the best multiple, on the axes in which cells
    vary most; if all cells had the same covariance, it would be Bartlett's test of a second
    canonical variate. Means of mixtures of responding and other cells are collinear on any scale.
    Effects of a weaker shift need not be: where the decoder is curved, a guide with half of the
    effect may differ from its siblings.

    Examples
    --------
    >>> screen = scvi_sams.datasets.simulate_screen(
    ...     n_genes=50, n_perturbations=3, n_combinations=0, guides_per_perturbation=2
    ... )
    >>> scvi_sams.SAMSVAE.setup_anndata(screen, guide_key="guide")
    >>> of_guides = scvi_sams.SAMSVAE(screen, n_latent=4, n_hidden=16)
    >>> of_guides.train(max_epochs=2, enable_progress_bar=False)
    >>> table = scvi_sams.tl.guide_efficacy(of_guides, n_samples=200)
    >>> table.groupby("perturbation")["n_cells"].sum().tolist()
    [100, 100, 100]
    """
    check_number(above=0, below=1, fdr=fdr, interval=interval)
    check_integer(n_samples=n_samples)
    check_integer(at_least=2, n_posterior_samples=n_posterior_samples)
    check_key(key_added=key_added)
    guides = _guides_of(model)
    model._check_if_trained(warn=True)
    model._validate_anndata()
    manager = model.adata_manager
    counts = model.module.likelihood.is_count_likelihood
    doses = doses_to_report(model.largest_doses_, len(model.perturbations))
    compared = Compared.of(manager, guides, doses)
    predicted = _predicted(model, doses, n_samples, n_posterior_samples)
    acts = _acting(model, fdr) & (predicted != 0).any(axis=1)
    genes = gene_effects(manager, compared, counts=counts)
    along = along_effects(manager, compared, genes, predicted, counts=counts)
    tests = sibling_tests(_features(model, compared), compared, acts, fdr)
    columns: dict[str, Any] = {
        "perturbation": np.array(model.perturbations, dtype=object)[guides.perturbation],
        "n_cells": compared.n_cells,
        "acts": acts[guides.perturbation],
    }
    columns |= _rates(model, interval)
    columns |= _efficacy(compared, along, tests, interval)
    table = pd.DataFrame(columns, index=pd.Index(guides.names, name="guide"))
    table.loc[~table["acts"], table.columns[3:-2]] = np.nan
    table.loc[~table["acts"], table.columns[-2:]] = False
    _tell(table)
    if key_added is not None:
        model.adata.uns[key_added] = table.copy()
        model.keep_provenance(model.adata, key_added)
    return table


def _guides_of(model: PerturbationModel) -> Guides:
    if model.adata is None:
        raise SAMSError(
            "The model was loaded without data, but efficacy is measured in cells: load it "
            "with `adata`."
        )
    guides = registered_guides(model.adata_manager)
    if guides is None:
        raise SAMSError(
            "No guides are registered. Name the column of adata.obs with the guides of each cell "
            "in setup_anndata(guide_key=...), and train on these data."
        )
    return guides


def _predicted(
    model: PerturbationModel, doses: np.ndarray, n_samples: int, n_posterior_samples: int
) -> np.ndarray:
    """Effects on responding cells, on the scale of means of logarithms, ``(T, G)``."""
    likelihood = model.module.likelihood
    method: EffectScale = "lognorm" if likelihood.has_laplace_transform else "lograte"
    ate = model.predict_ate(
        dosages=doses.tolist(),
        method=method if likelihood.is_count_likelihood else "mean",
        n_samples=n_samples,
        n_posterior_samples=n_posterior_samples,
        interval=None,
        among="responding",
        key_added=None,
    )
    return np.asarray(ate.X, dtype=np.float64)


def _acting(model: PerturbationModel, fdr: float) -> np.ndarray:
    """Perturbations whose guides can be assessed, ``(T,)``."""
    responses = model.module.responses
    if responses is not None and model.module.has_branches:
        return responses.acts.cpu().numpy()
    q_value = model.test_perturbations(key_added=None)["q_value"].to_numpy()
    return within(np.nan_to_num(q_value, nan=1.0), fdr)


def _features(model: PerturbationModel, compared: Compared) -> np.ndarray:
    """Features on which siblings are compared, computed without labels, cells x features."""
    manager, counts = model.adata_manager, model.module.likelihood.is_count_likelihood
    features = principal_features(manager, strata_of_cells(manager), _N_COMPONENTS, counts=counts)
    features = without_linear(features, continuous_covariates(manager))
    return independent_features(features, np.flatnonzero(compared.guide >= 0))


def _rates(model: PerturbationModel, interval: float) -> dict[str, np.ndarray | float]:
    """Proportions of responding cells of guides, if the model has them."""
    responses = model.module.responses
    n_perturbations = len(model.perturbations)
    names = ("response_rate", "rate_low", "rate_high")
    if responses is None or not model.module.has_branches:
        return dict.fromkeys(names, np.nan)
    log_odds, sd = (
        values.detach().cpu().double().numpy()[n_perturbations:]
        for values in (responses.log_odds(), responses.sd())
    )
    deviations = norm.ppf((1 + interval) / 2)
    bounds = (log_odds, log_odds - deviations * sd, log_odds + deviations * sd)
    return {name: expit(values) for name, values in zip(names, bounds, strict=True)}


def _efficacy(
    compared: Compared,
    along: AlongEffects,
    tests: SiblingTests,
    interval: float,
) -> dict[str, np.ndarray]:
    own = along.of(compared.each_guide(), compared)
    of_siblings = along.of(sibling_weights(compared, tests.put_aside), compared)
    deviations = norm.ppf((1 + interval) / 2)
    low, high = (own.slope + side * deviations * own.standard_error for side in (-1, 1))
    least_of_siblings = of_siblings.slope - deviations * of_siblings.standard_error
    return {
        "effect_size": own.slope,
        "effect_standard_error": own.standard_error,
        "effect_low": low,
        "effect_high": high,
        "agreement": tests.agreement,
        "p_value": tests.p_value,
        "q_value": tests.q_value,
        "does_nothing": (high < NOTHING) & (least_of_siblings > NOTHING) & ~tests.differs,
        "differs_from_siblings": tests.differs,
    }


def _tell(table: pd.DataFrame) -> None:
    for flag, one, several in (
        ("does_nothing", "has almost no effect, unlike its", "have almost no effect, unlike their"),
        ("differs_from_siblings", "has another effect than its", "have other effects than their"),
    ):
        names = table.index[table[flag]]
        if len(names):
            what = counted(len(names), f"guide {one}", f"guides {several}")
            logger.info(f"{what} siblings: {listing(names)}.")
