"""How well each guide works, and whether guides of one gene do the same."""

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
"""Of the effect of a perturbation: less counts as none."""
_N_COMPONENTS = 30
"""Axes that siblings are compared on. Axes of predicted effects would find more, but what cells of
a guide have by chance is in what was fitted to them: of guides without an effect, most that have a
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
    """Say of each guide how much of the effect of its perturbation its cells show.

    A guide that does not cut or bind leaves its cells as they were; one that acts elsewhere too
    changes them in a way that other guides of the gene do not.

    Parameters
    ----------
    model
        Trained on cells registered with ``guide_key``, and holding them.
    fdr
        False discovery rate over guides of ``differs_from_siblings``.
    interval
        Probability mass of intervals.
    n_samples, n_posterior_samples
        Of ``predict_ate``.
    key_added
        Key of ``adata.uns`` of the training data that the table is written to; ``None`` writes
        nothing.

    Returns
    -------
    One row per guide, in the order of perturbations:

    - ``perturbation``; ``n_cells``, cells that carry it alone (that perturbation, at its largest
      dose, and no second guide) in batches and categories with control cells. All that follows but
      the rate is of these cells.
    - ``acts``: whether the cells of the perturbation differ enough from others for the model to
      tell which of them respond (``responses=True``), or at all (``model.test_perturbations`` at
      ``fdr``). **Where it does not, nothing is known of its guides**: all numbers that follow are
      NaN and both flags are False.
    - ``response_rate``: proportion of the cells of the guide that respond, with ``rate_low`` and
      ``rate_high``, of its posterior on the scale of log-odds, given what other guides say. NaN for
      models made with ``responses=False``.
    - ``effect_size``: slope of the observed effect of the guide over genes on the effect that the
      model predicts of cells that respond to the perturbation, weighted by inverse variances; 1 is
      all of it, 0 none. ``effect_standard_error`` (of means over cells, so that correlations
      between genes count; the prediction is taken as known) and ``effect_low``, ``effect_high``. Of
      models with ``responses=False`` the prediction is that of all cells, and guides that work
      exceed 1 where others do not.
    - ``agreement``: cosine of the observed effects of the guide and of its siblings, the other
      guides of the perturbation taken together, on axes of expression in units in which cells vary
      alike, corrected for errors; NaN where either is mostly error, or there are no siblings.
    - ``p_value``, ``q_value``: whether the effect of the guide is something else than a multiple (0
      or more) of that of its siblings, over all tested guides. NaN with fewer than five cells, or
      20 of the perturbation.
    - ``does_nothing``: it certainly shows less than a quarter of the effect of the perturbation and
      its siblings more than that (by the intervals), and it does not differ in other ways.
    - ``differs_from_siblings``: ``q_value`` is at most ``fdr``, and ``agreement`` below .9: what
      the guide does besides is at least half of what it does as they do. The guide that differs
      most is put aside, and no longer counts as sibling of the others. Of two guides that are left
      both are flagged, as nobody can tell which is right.

    Weaker siblings (fewer cells that respond) are multiples of stronger ones. So is a guide that
    alone of all does something: then the others are said to do nothing, though it may be the one
    that acts elsewhere. Batches and categorical covariates are accounted for; continuous
    covariates in tests only.

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
    The test is Hotelling's of what is left of the effect after the best multiple, on the axes in
    which cells vary most; were all cells to share a covariance, it would be Bartlett's test of a
    second canonical variate. Means of mixtures of cells that respond and do not are collinear,
    whatever is measured of cells. Effects of a weaker shift need not be: where the decoder is
    curved, a guide that works by half may differ from its siblings.

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
            "The model was loaded without data, and how well guides work is seen in cells: load it "
            "with `adata`."
        )
    guides = registered_guides(model.adata_manager)
    if guides is None:
        raise SAMSError(
            "No guides are registered. Name the column of adata.obs that says which guides a cell "
            "carries in setup_anndata(guide_key=...), and train on these data."
        )
    return guides


def _predicted(
    model: PerturbationModel, doses: np.ndarray, n_samples: int, n_posterior_samples: int
) -> np.ndarray:
    """Effects on cells that respond, on the scale of means of logarithms, ``(T, G)``."""
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
    """Perturbations whose guides can be told apart, ``(T,)``."""
    responses = model.module.responses
    if responses is not None and model.module.has_branches:
        return responses.acts.cpu().numpy()
    q_value = model.test_perturbations(key_added=None)["q_value"].to_numpy()
    return within(np.nan_to_num(q_value, nan=1.0), fdr)


def _features(model: PerturbationModel, compared: Compared) -> np.ndarray:
    """What siblings are compared in, found without a look at labels, cells x features."""
    manager, counts = model.adata_manager, model.module.likelihood.is_count_likelihood
    features = principal_features(manager, strata_of_cells(manager), _N_COMPONENTS, counts=counts)
    features = without_linear(features, continuous_covariates(manager))
    return independent_features(features, np.flatnonzero(compared.guide >= 0))


def _rates(model: PerturbationModel, interval: float) -> dict[str, np.ndarray | float]:
    """Proportions of cells of guides that respond, where the model has them."""
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
        ("does_nothing", "shows next to nothing of what its", "show next to nothing of what their"),
        ("differs_from_siblings", "does something else than its", "do something else than their"),
    ):
        names = table.index[table[flag]]
        rest = " do" if flag == "does_nothing" else ""
        what = f"one guide {one}" if len(names) == 1 else f"{len(names)} guides {several}"
        if len(names):
            logger.info(f"{what} siblings{rest}: {listing(names)}.")
