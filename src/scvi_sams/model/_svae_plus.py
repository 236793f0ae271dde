"""SVAE+ as users see it."""

from __future__ import annotations

from typing import Any

from anndata import AnnData

from scvi_sams.model._mechanisms import LatentShiftMixin, MaskMixin
from scvi_sams.model._perturbation_model import PerturbationModel
from scvi_sams.module._perturbation_module import KLEstimator
from scvi_sams.module._settings import given
from scvi_sams.module._svae_plus import SVAEPlusModule


class SVAEPlus(MaskMixin, LatentShiftMixin, PerturbationModel):
    """Sparse VAE of mechanism shifts, SVAE+ (Lopez et al. 2022, arXiv 2211.03553).

    The latent state of a cell is drawn around a sparse mean of its perturbation,
    ``Normal(m_t * mu_t, I)``, and inferred without looking at the perturbation. Means are
    parameters. The probability of every mask entry has a Beta(1, K_2) prior and a point estimate,
    the best one given the mask's posterior; reported bounds hold its log density.

    A cell has one perturbation: each combination is registered as a perturbation of its own, in any
    order of its names, and combinations without training cells cannot be predicted. Doses other
    than 1 are refused: register them as labels of their own.

    Masks are trained from the start, as published: ``dense_fraction`` of the training plan plays no
    part.

    Parameters
    ----------
    adata
        Registered with :meth:`SVAEPlus.setup_anndata`.
    mask_prior_beta
        ``K_2``, above 1 (papers: 2, 5 or 10): a priori a perturbation moves a share of
        ``1 / (1 + K_2)`` of the latent dimensions.
    evidence_cells
        As in :class:`SAMSVAE`. ``None`` by default: the objective as published.
    n_latent, n_hidden, n_layers, gene_likelihood, n_particles, kl_estimator, global_kl_weight
        As in :class:`SAMSVAE`.
    mask_initial_probability, mask_temperature
        As in :class:`SAMSVAE`.
    registry
        Set by :meth:`load` where there is no ``adata``.

    Raises
    ------
    InvalidArgumentError
        If a setting is of the wrong type or out of range, such as ``mask_prior_beta`` not above 1.

    Examples
    --------
    >>> import scvi_sams
    >>> adata = scvi_sams.datasets.simulate_screen(n_genes=100)
    >>> scvi_sams.SVAEPlus.setup_anndata(adata)
    >>> model = scvi_sams.SVAEPlus(adata, n_latent=15)
    >>> model.train(max_epochs=2, enable_progress_bar=False)  # more, without max_epochs

    30 single perturbations, and 15 combinations that are perturbations of their own:

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
