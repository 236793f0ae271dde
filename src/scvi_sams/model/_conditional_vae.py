"""Conditional VAE as users see it."""

from __future__ import annotations

from typing import Any

from anndata import AnnData

from scvi_sams.model._additive import AdditiveMixin
from scvi_sams.model._perturbation_model import PerturbationModel
from scvi_sams.module._conditional_vae import ConditionalVAEModule
from scvi_sams.module._perturbation_module import KLEstimator
from scvi_sams.module._settings import given


class ConditionalVAE(AdditiveMixin, PerturbationModel):
    """VAE whose encoder and decoder are given the dosages of the cell's perturbations.

    The comparator without structure: a perturbation may change the map from latent states to
    expression in any way, so that there are neither masks nor effects to read, and no perturbed
    latent state. The dosages enter the first layers linearly, which is how unmeasured combinations
    are predicted. Perturbations without training cells change nothing.

    There are no global variables, hence no ``global_kl_weight`` nor ``evidence_cells``, and
    ``dense_fraction`` of the training plan plays no part.

    Parameters
    ----------
    adata
        Registered with :meth:`ConditionalVAE.setup_anndata`.
    n_latent, n_hidden, n_layers, gene_likelihood, n_particles, kl_estimator
        As in :class:`SAMSVAE`.
    registry
        Set by :meth:`load` where there is no ``adata``.

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
        registry: dict[str, Any] | None = None,
    ) -> None:
        arguments = given(locals())
        super().__init__(**arguments)
        self.init_params_ = self._get_init_params(arguments)
