"""CPA-VAE as users see it."""

from __future__ import annotations

from typing import Any

from anndata import AnnData

from scvi_sams.model._additive import AdditiveMixin
from scvi_sams.model._mechanisms import LatentShiftMixin
from scvi_sams.model._perturbation_model import PerturbationModel
from scvi_sams.module._cpa_vae import CPAVAEModule
from scvi_sams.module._perturbation_module import KLEstimator
from scvi_sams.module._settings import given


class CPAVAE(LatentShiftMixin, AdditiveMixin, PerturbationModel):
    """Compositional perturbation VAE, SAMS-VAE without masks :cite:p:`Bereket23`.

    A cell's latent state is a basal part plus the sum of the effects of its perturbations; every
    perturbation moves all latent dimensions. The posterior of effects is mean-field. Training has
    no phase of its own for masks: ``dense_fraction`` of the training plan plays no part.

    Parameters
    ----------
    adata
        Registered with :meth:`CPAVAE.setup_anndata`.
    correlated_basal
        Whether q(z_basal | x, shift) sees the shift of the cell's perturbations: the two variants
        of the paper's table.
    effect_prior_scale
        Standard deviation of effects a priori, in units of the standard deviation of basal states.
    evidence_cells
        As in :class:`SAMSVAE`. ``None`` by default, the ELBO of the paper: there are no masks that
        weak effects would blur.
    n_latent, n_hidden, n_layers, gene_likelihood, n_particles, kl_estimator, global_kl_weight
        As in :class:`SAMSVAE`.
    registry
        Set by :meth:`load` where there is no ``adata``.

    Raises
    ------
    InvalidArgumentError
        If a setting is of the wrong type or out of range.

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
        registry: dict[str, Any] | None = None,
    ) -> None:
        arguments = given(locals())
        super().__init__(**arguments)
        self.init_params_ = self._get_init_params(arguments)
