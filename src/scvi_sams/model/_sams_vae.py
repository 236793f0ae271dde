"""SAMS-VAE as users see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from anndata import AnnData

from scvi_sams._checks import check_key
from scvi_sams._constants import RESULT_KEYS
from scvi_sams.features._table import as_feature_table
from scvi_sams.model._additive import AdditiveMixin
from scvi_sams.model._mechanisms import LatentShiftMixin, MaskMixin
from scvi_sams.model._perturbation_model import PerturbationModel
from scvi_sams.model._responses import check_has_responses, response_probabilities
from scvi_sams.module._perturbation_module import KLEstimator
from scvi_sams.module._sams_vae import SAMSVAEModule
from scvi_sams.module._settings import given


class SAMSVAE(MaskMixin, LatentShiftMixin, AdditiveMixin, PerturbationModel):
    """Sparse additive mechanism shift VAE :cite:p:`Bereket23`.

    A cell's latent state is a basal part plus the sum of the effects of its perturbations; a sparse
    mask says which latent dimensions each perturbation moves.

    Parameters
    ----------
    adata
        Registered with :meth:`SAMSVAE.setup_anndata`.
    n_latent
        Latent dimensions ("mechanisms"). Take more than you expect: those that are not needed stay
        off. Fewer where there are only some tens of perturbations.
    n_hidden, n_layers
        Width and number of hidden layers of encoder and decoder.
    correlated_basal
        Whether q(z_basal | x, shift) sees the shift of the cell's perturbations.
    correlated_effects
        Whether q(e_t | m_t) sees the mask, through a small network. With ``correlated_basal`` these
        two give the four variants of the paper's table.
    gene_likelihood
        ``"nb"`` (counts; the paper's Gamma-Poisson), ``"poisson"`` (counts) or ``"normal"`` (values
        that are already normalised); or the name of one that you added to
        ``scvi_sams.module.LIKELIHOODS``.
    mask_prior_probability
        Share of latent dimensions that a perturbation is expected to move. Lower it to be stricter
        with weak entries. On simulated screens with true shares of .02 to .3 a share fitted to
        the data was no better than .1 (benchmarks/RECORD.md).
    mask_prior_concentration
        ``None``: that share is known. A number: the probability of each mask entry is itself drawn
        from a Beta distribution with this concentration (a + b) and that mean.
    effect_prior_scale
        Standard deviation of effects a priori, in units of the standard deviation of basal states.
        Raise it where perturbations move cells further than cells differ among themselves (cell
        lines under strong drugs): strong effects are then shrunken less.
    n_particles
        Monte-Carlo samples per training step.
    kl_estimator
        ``"closed_form"``, or ``"monte_carlo"`` as in the paper.
    global_kl_weight
        Factor of the divergences of masks and effects; 1 is the ELBO. Raise it for sparser masks
        whatever the number of cells.
    evidence_cells
        What the cells of a perturbation say about its masks and effects counts as at most what this
        many cells would say: a coarsened posterior (Miller & Dunson 2019), for latent axes that are
        learned and never exactly the true ones. Training charges the divergences of perturbation t
        ``1 + N_t / evidence_cells`` times. Lower it for fewer, surer mask entries; raise it where
        weak effects matter (of 50, 100 and 200 the default recovered simulated masks best).
        ``None``: the ELBO, as in the paper. Reported bounds are always the ELBO.
    mask_initial_probability
        Inclusion probability before training.
    mask_temperature
        Of the relaxed Bernoulli that gradients pass through.
    effect_n_hidden, effect_n_layers
        Network of the correlated effects.
    mask_prior
        Name of a prior that you added to ``scvi_sams.module.MASK_PRIORS``. ``None``:
        ``"bernoulli"``, or ``"beta_bernoulli"`` where there is a concentration.
    direct_effects
        Whether a perturbation also has effects on single genes, beside its latent shift: above all
        on the gene that it targets. They are found in closed form when training ends (see
        :ref:`direct effects <direct-effects>`). ``False``: the paper's model.
    stacking
        Whether predictions of means average the model with shrunken effects of the training cells,
        by weights that held-out cells decide on (see :ref:`stacking <stacking>`). ``False``: the
        paper's model.
    responses
        Whether cells may have escaped their perturbations: each responds or does not, with a
        probability that is learned for each perturbation, or guide (see
        :ref:`responses <responses>`). A cell with several perturbations responds to all of them or
        to none. ``False``: all do, as in the paper.
    perturbation_features
        What is known of perturbations, measured ones and others (see :ref:`features <features>`):
        a DataFrame (perturbations x features), a dict of vectors or of sets of terms, or the key of
        one in ``adata.uns``. The prior of masks and effects then follows the features as far as the
        screen shows that it should, and perturbations that no cell carries, ``model.unmeasured``,
        can be predicted. See :mod:`scvi_sams.features` for how such tables are read.
    registry
        Set by :meth:`load` where there is no ``adata``.

    Raises
    ------
    InvalidArgumentError
        If a setting, or an argument of a method, is of the wrong type or out of range: before
        anything is computed.

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
            uns = getattr(adata, "uns", None)  # what is no AnnData raises below
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
            Column of ``adata.obs`` that it is written to; ``None`` writes nothing.

        Returns
        -------
        ``(n_cells,)``. NaN for control cells, which have nothing to respond to, and for cells of
        perturbations whose effect, as far as the model knows it, is too small to tell by: what
        training cells express then changes their log-odds by less than 1 (root mean square).

        Raises
        ------
        SAMSError
            If the model was made with ``responses=False``, and so takes it that all cells respond,
            or is not trained.

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
