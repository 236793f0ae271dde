"""The comparators: conditional VAE, CPA-VAE and SVAE+."""

from __future__ import annotations

from typing import Any

from anndata import AnnData

from scvi_sams.model._additive import AdditiveMixin
from scvi_sams.model._mechanisms import LatentShiftMixin, MaskMixin
from scvi_sams.model._perturbation_model import PerturbationModel
from scvi_sams.module._comparators import ConditionalVAEModule, CPAVAEModule, SVAEPlusModule
from scvi_sams.module._perturbation_module import KLEstimator
from scvi_sams.module._settings import given


class ConditionalVAE(AdditiveMixin, PerturbationModel):
    """VAE whose encoder and decoder receive the dosages of the cell's perturbations.

    The comparator without structure: a perturbation may change the map from latent states to
    expression in any way, so there are no masks, no effects and no perturbed latent state. The
    dosages enter the first layers linearly, which determines predictions of unmeasured
    combinations. Perturbations without training cells change nothing.

    There are no global variables, hence no ``global_kl_weight`` or ``evidence_cells``, and
    ``dense_fraction`` of the training plan has no effect.

    Parameters
    ----------
    adata
        Registered with :meth:`ConditionalVAE.setup_anndata`.
    n_latent, n_hidden, n_layers, gene_likelihood, n_particles, kl_estimator, registry
        As in :class:`SAMSVAE`.
    direct_effects, stacking
        As in :class:`SAMSVAE`. ``False`` for the comparator of the paper.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulate_screen(n_genes=100)
    >>> scvi_sams.ConditionalVAE.setup_anndata(adata)
    >>> model = scvi_sams.ConditionalVAE(adata, n_latent=15)
    >>> model.train(max_epochs=2, enable_progress_bar=False)  # more, without max_epochs
    >>> model.predict_ate(["P001+P002"], n_samples=100).shape
    (1, 100)
    """

    _module_cls = ConditionalVAEModule

    def __init__(
        self,
        adata: AnnData | None = None,
        n_latent: int = 50,
        *,
        n_hidden: int = 400,
        n_layers: int = 1,
        gene_likelihood: str = "nb",
        n_particles: int = 1,
        kl_estimator: KLEstimator = "closed_form",
        direct_effects: bool = True,
        stacking: bool = True,
        registry: dict[str, Any] | None = None,
    ) -> None:
        arguments = given(locals())
        super().__init__(**arguments)
        self.init_params_ = self._get_init_params(arguments)


class CPAVAE(LatentShiftMixin, AdditiveMixin, PerturbationModel):
    """Compositional perturbation VAE, SAMS-VAE without masks :cite:p:`Bereket23`.

    The latent state of a cell is a basal part plus the sum of the effects of its perturbations;
    every perturbation shifts all latent dimensions. The posterior of effects is mean-field. There
    is no separate phase for masks: ``dense_fraction`` of the training plan has no effect.

    Parameters
    ----------
    adata
        Registered with :meth:`CPAVAE.setup_anndata`.
    correlated_basal
        Whether q(z_basal | x, shift) depends on the shift of the cell's perturbations: the two
        variants in the paper's table.
    effect_prior_scale
        Prior SD of effects, in units of the SD of basal states.
    evidence_cells
        As in :class:`SAMSVAE`. ``None`` by default, the ELBO of the paper: there are no masks that
        weak effects could blur.
    n_latent, n_hidden, n_layers, gene_likelihood, n_particles, kl_estimator, global_kl_weight
        As in :class:`SAMSVAE`.
    direct_effects, stacking
        As in :class:`SAMSVAE`. ``False`` for the comparator of the paper.
    registry
        Set by :meth:`load` if there is no ``adata``.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulate_screen(n_genes=100)
    >>> scvi_sams.CPAVAE.setup_anndata(adata)
    >>> model = scvi_sams.CPAVAE(adata, n_latent=15)
    >>> model.train(max_epochs=2, enable_progress_bar=False)  # more, without max_epochs
    >>> model.get_perturbation_effects().mean.shape
    (30, 15)
    """

    _module_cls = CPAVAEModule

    def __init__(
        self,
        adata: AnnData | None = None,
        n_latent: int = 50,
        *,
        n_hidden: int = 400,
        n_layers: int = 1,
        correlated_basal: bool = True,
        gene_likelihood: str = "nb",
        effect_prior_scale: float = 2.0,
        n_particles: int = 1,
        kl_estimator: KLEstimator = "closed_form",
        global_kl_weight: float = 1.0,
        evidence_cells: float | None = None,
        direct_effects: bool = True,
        stacking: bool = True,
        registry: dict[str, Any] | None = None,
    ) -> None:
        arguments = given(locals())
        super().__init__(**arguments)
        self.init_params_ = self._get_init_params(arguments)


class SVAEPlus(MaskMixin, LatentShiftMixin, PerturbationModel):
    """Sparse VAE of mechanism shifts, SVAE+ (Lopez et al. 2022, arXiv 2211.03553).

    The latent state of a cell is sampled around a sparse mean of its perturbation,
    ``Normal(m_t * mu_t, I)``, and inferred without the perturbation. Means are parameters. The
    probability of every mask entry has a Beta(1, K_2) prior and a point estimate, the optimal one
    given the mask's posterior; reported bounds include its log density.

    A cell has one perturbation: each combination is registered as a separate perturbation, with its
    names in any order, and combinations without training cells cannot be predicted. Doses other
    than 1 raise an error: register them as separate labels.

    Masks are trained from the start, as published: ``dense_fraction`` of the training plan has no
    effect. There are neither direct effects nor stacking.

    Parameters
    ----------
    adata
        Registered with :meth:`SVAEPlus.setup_anndata`.
    mask_prior_beta
        ``K_2``, above 1 (papers: 2, 5 or 10): the prior proportion of latent dimensions that a
        perturbation shifts is ``1 / (1 + K_2)``.
    evidence_cells
        As in :class:`SAMSVAE`. ``None`` by default: the objective as published.
    n_latent, n_hidden, n_layers, gene_likelihood, n_particles, kl_estimator, global_kl_weight
        As in :class:`SAMSVAE`.
    mask_initial_probability, mask_temperature, registry
        As in :class:`SAMSVAE`.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulate_screen(n_genes=100)
    >>> scvi_sams.SVAEPlus.setup_anndata(adata)
    >>> model = scvi_sams.SVAEPlus(adata, n_latent=15)
    >>> model.train(max_epochs=2, enable_progress_bar=False)  # more, without max_epochs

    30 single perturbations, and 15 combinations as separate perturbations:

    >>> model.get_perturbation_masks().shape
    (45, 15)
    """

    _module_cls = SVAEPlusModule

    def __init__(
        self,
        adata: AnnData | None = None,
        n_latent: int = 50,
        *,
        n_hidden: int = 400,
        n_layers: int = 1,
        gene_likelihood: str = "nb",
        mask_prior_beta: float = 5.0,
        n_particles: int = 1,
        kl_estimator: KLEstimator = "closed_form",
        global_kl_weight: float = 1.0,
        evidence_cells: float | None = None,
        mask_initial_probability: float = 0.5,
        mask_temperature: float = 1.0,
        registry: dict[str, Any] | None = None,
    ) -> None:
        arguments = given(locals())
        super().__init__(**arguments)
        self.init_params_ = self._get_init_params(arguments)
