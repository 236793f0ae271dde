"""SAMS-VAE, the model of this package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from scvi_sams._checks import check_bool, check_choice, check_integer, check_key, check_number
from scvi_sams._constants import RESULT_KEYS
from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.features._table import as_feature_table
from scvi_sams.model._additive import AdditiveMixin
from scvi_sams.model._basal_states import Basal
from scvi_sams.model._contrast import EffectScale, rate_scale
from scvi_sams.model._counterfactual import make_contrast
from scvi_sams.model._mechanisms import LatentShiftMixin, MaskMixin
from scvi_sams.model._perturbation_model import PerturbationModel
from scvi_sams.model._ranking import (
    OBJECTIVES,
    Objective,
    check_has_features,
    codes_of_candidates,
    unmeasured_pairs,
    unmeasured_singles,
)
from scvi_sams.model._responses import check_has_responses, response_probabilities
from scvi_sams.module._perturbation_module import KLEstimator
from scvi_sams.module._sams_vae import SAMSVAEModule
from scvi_sams.module._settings import given


class SAMSVAE(MaskMixin, LatentShiftMixin, AdditiveMixin, PerturbationModel):
    """Sparse additive mechanism shift VAE :cite:p:`Bereket23`.

    The latent state of a cell is a basal part plus the sum of the effects of its perturbations; a
    sparse mask selects the latent dimensions that each perturbation shifts.

    Parameters
    ----------
    adata
        Registered with :meth:`SAMSVAE.setup_anndata`.
    n_latent
        Number of latent dimensions ("mechanisms"). Use more than you expect: unused dimensions are
        switched off. Use fewer with only a few dozen perturbations.
    n_hidden, n_layers
        Width and number of hidden layers of encoder and decoder.
    correlated_basal
        Whether q(z_basal | x, shift) depends on the shift of the cell's perturbations.
    correlated_effects
        Whether q(e_t | m_t) depends on the mask, through a small network. With ``correlated_basal``
        these two give the four variants of the paper's table.
    gene_likelihood
        ``"nb"`` (counts; the paper's Gamma-Poisson), ``"poisson"`` (counts) or ``"normal"`` (values
        that are already normalised); or the name of one that you added to
        ``scvi_sams.module.LIKELIHOODS``.
    mask_prior_probability
        Expected proportion of latent dimensions that a perturbation shifts. Lower it to be stricter
        with weak entries. On simulated screens with true proportions of 0.02 to 0.3, fitting it to
        the data was no better than 0.1 (benchmarks/RECORD.md).
    mask_prior_concentration
        ``None``: that proportion is fixed. A number: the probability of each mask entry has a Beta
        prior with this concentration (a + b) and that mean.
    effect_prior_scale
        Prior SD of effects, in units of the SD of basal states. Raise it if perturbations move
        cells further than control cells differ from each other (cell lines under strong drugs):
        strong effects are then shrunken less.
    n_particles
        Monte Carlo samples per training step.
    kl_estimator
        ``"closed_form"``, or ``"monte_carlo"`` as in the paper.
    global_kl_weight
        Weight of the KL terms of masks and effects; 1 is the ELBO. Raise it for sparser masks,
        independent of the number of cells.
    evidence_cells
        Upper limit on the number of cells that count as evidence for the mask and effect of a
        perturbation: a coarsened posterior (Miller & Dunson 2019), because latent axes are
        estimates. Training multiplies the KL terms of perturbation t by
        ``1 + N_t / evidence_cells``. Lower it for fewer, more certain mask entries; raise it if
        weak effects matter (of 50, 100 and 200 the default recovered simulated masks best).
        ``None``: the ELBO, as in the paper. Reported bounds are always the ELBO.
    mask_initial_probability
        Inclusion probability before training without a dense phase.
    mask_temperature
        Temperature of the relaxed Bernoulli through which gradients pass.
    effect_n_hidden, effect_n_layers
        Network of the correlated effects.
    mask_prior
        Name of a prior that you added to ``scvi_sams.module.MASK_PRIORS``. ``None``:
        ``"bernoulli"``, or ``"beta_bernoulli"`` if there is a concentration.
    direct_effects
        Whether a perturbation also has effects on single genes, in addition to its latent shift:
        above all on the gene that it targets. They are computed in closed form when training ends
        (see :ref:`direct effects <direct-effects>`). ``False``: the paper's model.
    stacking
        Whether predictions of means average the model and shrunken effects of the training cells,
        with weights set by held-out cells (see :ref:`stacking <stacking>`). ``False``: the paper's
        model.
    responses
        Whether cells may have escaped their perturbations: each cell responds or not, with a
        probability learned for each perturbation or guide (see :ref:`responses <responses>`). A
        cell with several perturbations responds to all of them or to none. ``False``: all respond,
        as in the paper.
    perturbation_features
        Prior knowledge of measured and unmeasured perturbations (see :ref:`features <features>`):
        a DataFrame (perturbations x features), a dict of vectors or of sets of terms, or the key of
        one in ``adata.uns``. Masks and effects then depend on features as far as left-out
        perturbations support it, and perturbations without cells, ``model.unmeasured``, can be
        predicted. See :mod:`scvi_sams.features` for how to read such tables.
    registry
        Set by :meth:`load` if there is no ``adata``.

    Raises
    ------
    InvalidArgumentError
        If a setting, or an argument of a method, has the wrong type or is out of range; raised
        before anything is computed.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulate_screen(n_genes=100)
    >>> scvi_sams.SAMSVAE.setup_anndata(adata, perturbation_key="perturbation", control="control")
    >>> model = scvi_sams.SAMSVAE(adata, n_latent=15)
    >>> model.train(max_epochs=2, enable_progress_bar=False)  # more, without max_epochs
    >>> masks = model.get_perturbation_masks()
    >>> masks.shape
    (30, 15)
    >>> ate = model.predict_ate(["P001", "P001+P002"], n_samples=100)
    >>> list(ate.obs_names)
    ['P001', 'P001+P002']
    """

    _module_cls = SAMSVAEModule
    _has_contexts = True
    _takes_features = True

    def __init__(
        self,
        adata: AnnData | None = None,
        n_latent: int = 50,
        *,
        n_hidden: int = 400,
        n_layers: int = 1,
        correlated_basal: bool = True,
        correlated_effects: bool = True,
        gene_likelihood: str = "nb",
        mask_prior_probability: float = 0.1,
        mask_prior_concentration: float | None = None,
        effect_prior_scale: float = 2.0,
        n_particles: int = 1,
        kl_estimator: KLEstimator = "closed_form",
        global_kl_weight: float = 1.0,
        evidence_cells: float | None = 100.0,
        mask_initial_probability: float = 0.5,
        mask_temperature: float = 1.0,
        effect_n_hidden: int = 200,
        effect_n_layers: int = 2,
        mask_prior: str | None = None,
        direct_effects: bool = True,
        stacking: bool = True,
        responses: bool = False,
        perturbation_features: Any = None,
        registry: dict[str, Any] | None = None,
    ) -> None:
        arguments = given(locals())
        if perturbation_features is not None:
            uns = getattr(adata, "uns", None)  # anything but an AnnData raises below
            arguments["perturbation_features"] = as_feature_table(perturbation_features, uns=uns)
        super().__init__(**arguments)
        self.init_params_ = self._get_init_params(arguments)

    @torch.inference_mode()
    def get_response_probability(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        *,
        key_added: str | None = RESULT_KEYS.RESPONSE,
    ) -> np.ndarray:
        """Return the posterior probability that each cell responded to its perturbations.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.
        key_added
            Column of ``adata.obs`` to which it is written; ``None`` writes nothing.

        Returns
        -------
        ``(n_cells,)``. NaN for control cells, and for cells of perturbations whose effect is too
        small to identify responses: the expression of training cells changes their log-odds by less
        than 1 (root mean square).

        Raises
        ------
        SAMSError
            If the model was made with ``responses=False``, which assumes that all cells respond, or
            is not trained.

        Examples
        --------
        >>> scvi_sams.SAMSVAE.setup_anndata(adata)
        >>> escaping = scvi_sams.SAMSVAE(adata, n_latent=6, n_hidden=16, responses=True)
        >>> escaping.train(max_epochs=4, enable_progress_bar=False)
        >>> probability = escaping.get_response_probability()
        >>> bool(np.isnan(probability[adata.obs["perturbation"] == "control"]).all())
        True
        """
        check_key(key_added=key_added)
        check_has_responses(self)
        cells = self._read(adata, indices, batch_size)
        found = response_probabilities(cells)
        if key_added is not None:
            cells.write(found, "obs", key_added)
        return found

    @torch.inference_mode()
    def rank_unmeasured(
        self,
        candidates: Sequence[str] | None = None,
        *,
        pairs: bool = False,
        objective: Objective = "effect",
        top: int = 100,
        method: EffectScale = "lograte",
        n_samples: int = 200,
        n_posterior_samples: int = 20,
        basal: Basal | None = None,
        library_size: float | None = None,
        target_sum: float = 1e4,
        interval: float = 0.9,
    ) -> pd.DataFrame:
        """Rank perturbations without cells, or pairs with them: which to screen next.

        Doses are 1. Time grows with the number of candidates, and hardly with that of pairs.

        Parameters
        ----------
        candidates
            Names; ``None`` for all of ``model.unmeasured``. With ``pairs``, pairs of these, which
            may include measured perturbations; ``None`` for all perturbations.
        pairs
            Rank pairs that no training cell has alone.
        objective
            ``"effect"``: norm of the mean effect. ``"novelty"``: norm of the residual after
            subtracting the measured effect with the most similar direction, times the non-negative
            factor with the smallest residual; for a pair after subtracting those of both.
            ``"uncertainty"``: proportion of the variance of the predictions from features, over all
            candidates, that measuring it would remove, beyond those ranked above; not for pairs.
        top
            Number of rows to return.
        method, n_samples, n_posterior_samples, basal, library_size, target_sum, interval
            As in :meth:`predict_ate`, with fewer samples: ranks need less precision.

        Returns
        -------
        One row per perturbation, best first: ``perturbation``, ``score``; ``effect_norm``, the
        posterior mean of the norm, which increases with uncertainty, and its interval
        ``effect_norm_low`` and ``effect_norm_high``; ``nearest``, the measured perturbation whose
        effect has the most similar direction, and ``similarity``, the cosine with it. For pairs
        ``first``, ``second`` and ``combination`` instead of ``perturbation``, and
        ``linear_score``, the score if both effects simply added up. ``attrs`` then contains
        ``n_pairs``, ``n_predicted`` and ``largest_linear_score_left_out``.

        Raises
        ------
        UnknownPerturbationError
            If the model has neither cells nor features of a candidate.
        InvalidArgumentError
            If candidates are measured perturbations (without ``pairs``), or fewer than two (with
            them), or pairs are to be ranked by ``"uncertainty"``.
        SAMSError
            If the model has no features of unmeasured perturbations or is not trained; if features
            are uninformative and ``objective`` is ``"uncertainty"``; or if all pairs were measured.

        Notes
        -----
        Only the pairs with the largest ``linear_score``, found exactly among all, are predicted: 20
        for each requested row. Other pairs have a ``linear_score`` of at most
        ``attrs["largest_linear_score_left_out"]``: such a pair would be in the table only if its
        perturbations enhance each other by more than the difference to the last ``score``. The
        novelty of pairs of two measured perturbations is their deviation from additivity, so their
        ``linear_score`` is 0: :meth:`rank_unseen_pairs` ranks them by that. Memory is that of two
        tables of candidates x genes in single precision.

        For ``"uncertainty"``, weights of features are those of linear regressions with a normal
        posterior of covariance C, one for effects and one for log-odds of masks in each latent
        dimension. Measuring t with precision k reduces the variance of s by
        ``(phi_s' C phi_t)**2 / (phi_t' C phi_t + 1 / k)``, whatever the result (Cohn, Ghahramani &
        Jordan 1996, doi:10.1613/jair.295; MacKay 1992, doi:10.1162/neco.1992.4.4.590). These are
        summed over all candidates s and dimensions, weighted by the effect of a shift on genes. The
        number of cells is assumed to be large enough to know the perturbation's own effect. The
        regressions used for stacking are ignored: they use the same features.

        Examples
        --------
        >>> screen = scvi_sams.datasets.simulate_screen(n_genes=50, n_features=5)
        >>> table = screen.uns["perturbation_features"]
        >>> hidden = screen.obs["perturbation"].str.contains("P00[1-5]")
        >>> known = screen[~hidden].copy()
        >>> scvi_sams.SAMSVAE.setup_anndata(known)
        >>> informed = scvi_sams.SAMSVAE(known, n_latent=6, perturbation_features=table)
        >>> informed.train(max_epochs=2, enable_progress_bar=False)
        >>> informed.rank_unmeasured(top=2, n_samples=40).shape
        (2, 7)
        >>> ranking = informed.rank_unmeasured(pairs=True, top=3, n_samples=40)
        >>> ranking["score"].is_monotonic_decreasing, ranking.attrs["n_predicted"]
        (True, 60)
        """
        check_choice("objective", objective, OBJECTIVES)
        check_bool(pairs=pairs)
        check_integer(top=top)
        check_number(above=0, below=1, interval=interval)
        if pairs and objective == "uncertainty":
            raise InvalidArgumentError(
                "Pairs are informative about others only through their single perturbations: rank "
                "these with pairs=False, or pairs by objective='effect' or 'novelty'."
            )
        check_has_features(self)
        codes = codes_of_candidates(self, candidates, pairs=pairs)
        method = rate_scale(self.module.likelihood, method)
        contrast, _ = make_contrast(
            self, method, n_samples, n_posterior_samples, basal, library_size, target_sum, interval
        )
        rank = unmeasured_pairs if pairs else unmeasured_singles
        return rank(self, codes, objective, int(top), contrast, interval)
