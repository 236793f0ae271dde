"""Computations common to all models: inference, generation and the plated ELBO.

A model adds what perturbations are (:meth:`PerturbationModule.global_posterior`) and how they act
(:meth:`PerturbationModule.encode` and :meth:`PerturbationModule.decode`)::

    z_basal_i ~ Normal(0, I)                                 one per cell
    s_t       ~ the model's prior over shifts                one per perturbation
    x_i       ~ likelihood(decode(z_basal_i, sum_t d_it s_t, covariates_i), size_i)

Shapes: P particles, B cells in the mini-batch, K slots for perturbations of a cell, R perturbations
that occur in the mini-batch, L latent dimensions, S width of a shift, G genes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from scvi.module.base import LossOutput
from torch import Tensor
from torch.distributions import Normal

from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams._torch import generator
from scvi_sams.module._direct_effects import DirectEffects, add_to_logits
from scvi_sams.module._effect_rows import EffectRows
from scvi_sams.module._likelihoods import LIKELIHOODS, GeneLikelihood
from scvi_sams.module._minibatch import (
    CellBatch,
    CovariateEncoding,
    perturbations_of_batch,
    sum_over_slots,
)
from scvi_sams.module._networks import (
    BasalEncoder,
    Decoder,
    divergence_from_prior,
    log_ratio_to_prior,
    standard_normals,
)
from scvi_sams.module._plates import Plates
from scvi_sams.module._responses import Branches, Responses, add_to_branches
from scvi_sams.module._settings import (
    NotNegative,
    PositiveNumber,
    WholeNumber,
    check_settings,
)
from scvi_sams.module._training_statistics import TrainingStatistics
from scvi_sams.module._unmeasured import UnmeasuredEffects

KLEstimator = Literal["closed_form", "monte_carlo"]


class GlobalDraw(NamedTuple):
    """One sample per particle of the variables shared by all cells, for R effects."""

    shifts: Tensor
    """Shift per unit dose, ``(P or 1, R, S)``."""
    kl: dict[str, Tensor]
    """Divergence of every global variable from its prior, ``(P or 1, R)``, in nats; empty without
    global variables."""


class PerturbationModule(Plates):
    """Base of the modules: everything except what perturbations are and how they act.

    Parameters
    ----------
    n_genes, n_perturbations
        Size of the data.
    n_batch, n_categories, n_continuous
        Number of batches, of categories of each categorical covariate, of continuous covariates.
    uses_size_factor
        Whether a size factor is registered; otherwise the library size is the sum of the counts.
    n_latent, n_hidden, n_layers, gene_likelihood, correlated_basal
        As in :class:`~scvi_sams.SAMSVAE`.
    n_particles, kl_estimator, global_kl_weight, evidence_cells
        As there (see :meth:`evidence_weights`).
    direct_effects, stacking
        As there. The tables of both are one :class:`DirectEffects`, ``direct``.
    responses
        As there, in models that support them. ``responses`` is then a :class:`Responses`.
    perturbation_of_guides
        Code of the perturbation of every guide; empty if none are registered.
    n_contexts, pairs_of_contexts, n_unmeasured
        See :class:`EffectRows`, in models with contexts or features of perturbations.
    """

    def __init__(
        self,
        *,
        n_genes: int,
        n_perturbations: int,
        n_latent: WholeNumber,
        n_hidden: WholeNumber,
        n_layers: WholeNumber,
        n_batch: int,
        n_categories: list[int],
        n_continuous: int,
        gene_likelihood: GeneLikelihood,
        uses_size_factor: bool,
        correlated_basal: bool,
        n_particles: WholeNumber,
        kl_estimator: KLEstimator,
        global_kl_weight: NotNegative,
        evidence_cells: PositiveNumber | None,
        direct_effects: bool = False,
        stacking: bool = False,
        responses: bool = False,
        perturbation_of_guides: Sequence[int] = (),
        n_contexts: int = 0,
        pairs_of_contexts: Sequence[int] = (),
        n_unmeasured: int = 0,
    ) -> None:
        super().__init__()
        self.n_latent = n_latent
        self.n_particles = n_particles
        self.kl_estimator = kl_estimator
        self.global_kl_weight = global_kl_weight
        self.evidence_cells = evidence_cells
        self.uses_size_factor = uses_size_factor
        self.covariates = CovariateEncoding(n_batch, n_categories, n_continuous, n_contexts)
        self.effect_rows = EffectRows(n_perturbations, n_contexts, pairs_of_contexts, n_unmeasured)
        shape = {"n_layers": n_layers, "n_hidden": n_hidden}
        self.encoder = BasalEncoder(
            n_genes, n_latent, self.covariates.n_out, sees_shift=correlated_basal, **shape
        )
        likelihood = LIKELIHOODS[gene_likelihood]
        n_outputs = likelihood.outputs_per_gene * n_genes
        self.decoder = Decoder(n_latent, n_outputs, self.covariates.n_out, **shape)
        self.likelihood = likelihood(n_genes, uses_size_factor=uses_size_factor)
        self.fits_direct_effects = direct_effects
        self.direct = (
            DirectEffects(n_perturbations, n_genes, is_stacked=stacking)
            if direct_effects or stacking
            else None
        )
        predicts_unmeasured = stacking and bool(n_contexts or n_unmeasured)
        self.unmeasured = UnmeasuredEffects() if predicts_unmeasured else None
        self.responses = Responses(n_perturbations, perturbation_of_guides) if responses else None
        self.register_buffer("cells_per_perturbation", torch.zeros(n_perturbations))
        self.register_buffer("input_mean", torch.zeros(n_genes))
        self.register_buffer("input_sd", torch.ones(n_genes))
        # Proportions of zero: before training, and in models that were saved without sizes.
        self.register_buffer("cell_sizes", torch.zeros(2, 3))
        self.register_buffer("is_initialised", torch.tensor(False))

    @classmethod
    def check_settings(cls, **settings: object) -> None:
        """Raise if a setting does not fit the annotation in the signature."""
        for part in cls.__mro__:
            if issubclass(part, PerturbationModule) and "__init__" in vars(part):
                check_settings(vars(part)["__init__"], settings)

    # What a model adds ------------------------------------------------------------------------

    @property
    @abstractmethod
    def n_shift(self) -> int:
        """S, the width of a shift."""

    @abstractmethod
    def global_posterior(self, rows: Tensor, n_particles: int) -> GlobalDraw:
        """Sample the shifts of the effects ``rows`` and compute the cost of the posterior."""

    @abstractmethod
    def decode_hidden(self, z_basal: Tensor, shift: Tensor, covariates: Tensor | None) -> Tensor:
        """Last hidden layer of the decoder, ``(P, B, n_hidden)``."""

    def table_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters that are not network weights: per gene, and per perturbation.

        They have a larger learning rate.
        """
        tables = list(self.likelihood.parameters())
        return tables if self.responses is None else tables + list(self.responses.parameters())

    @abstractmethod
    def shift_moments(self, rows: Tensor, n_samples: int = 500) -> tuple[Tensor, Tensor]:
        """Posterior mean and SD of the shifts, each ``(R, S)``."""

    def sampled_shifts(
        self, rows: Tensor, n_samples: int, *, for_predictions: bool = False
    ) -> Tensor:
        """Posterior samples of the shifts around their posterior mean, ``(n_samples or 1, R, S)``.

        Several samples are shifted so that their mean is exact: the sampling error of uncertain
        masks would otherwise be an error of every predicted effect. For stacked predictions their
        scale is reduced (see :class:`DirectEffects`).
        """
        shifts = self.global_posterior(rows, n_samples).shifts
        spread = None
        if for_predictions and self.direct is not None:
            spread = self.direct.spread_of(self.effect_rows.perturbation_of(rows), rows)
        if len(shifts) == 1 and spread is None:
            return shifts
        mean = self.shift_moments(rows)[0]
        around = shifts - shifts.mean(dim=0) if len(shifts) > 1 else shifts - mean
        return mean + (around if spread is None else around * spread[:, None])

    def order_latents(self) -> None:
        """Order latent dimensions and choose their signs, if shifts are latent."""

    has_dense_phase: ClassVar[bool] = False
    """Whether training begins with a phase before :meth:`find_sparse_axes`."""

    def begin_dense_phase(self) -> None:
        """Prepare for the phase before :meth:`find_sparse_axes`; no effect without masks."""

    def find_sparse_axes(self) -> None:
        """Rotate to coordinates in which effects are sparse; no effect without masks."""

    def diagnostics(self) -> dict[str, float]:
        """State of the module at the end of an epoch, by names in ``history``."""
        return {}

    # Before training --------------------------------------------------------------------------

    @torch.no_grad()
    def set_training_statistics(self, statistics: TrainingStatistics) -> None:
        """Store sizes; the first time also standardise inputs and start at the data's mean.

        Later calls (training continues) do not change learned parameters.
        """
        self.cells_per_perturbation.copy_(statistics.cells_per_perturbation)
        self.cell_sizes.copy_(statistics.cell_sizes)
        self.likelihood.largest_counts = statistics.largest_counts
        if self.responses is not None:
            self.responses.n_cells.fill_(statistics.n_cells)
        if self.is_initialised:
            return
        self.input_mean.copy_(statistics.input_mean)
        # A gene that never varies contains no information: divide by one, not by zero.
        sd = statistics.input_sd
        self.input_sd.copy_(torch.where(sd > 1e-6, sd, torch.ones_like(sd)))
        bias = self.likelihood.initialise(
            statistics.scaled_mean.to(self.device),
            statistics.scaled_variance.to(self.device),
            statistics.inverse_size_mean,
        )
        self.decoder.to_genes.bias.copy_(bias)
        self.is_initialised.fill_(True)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Models saved by versions that did not store the sizes of cells load without them.
        state_dict.setdefault(f"{prefix}cell_sizes", torch.zeros_like(self.cell_sizes))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # Inference: q(z_basal, globals | x) --------------------------------------------------------

    def read_batch(self, tensors: dict[str, Tensor]) -> CellBatch:
        """Convert what a data loader yields."""
        x = tensors[REGISTRY_KEYS.X]
        codes, doses = tensors[REGISTRY_KEYS.PERTURBATIONS].chunk(2, dim=1)
        covariates = self.covariates(
            tensors[REGISTRY_KEYS.BATCH],
            tensors.get(REGISTRY_KEYS.CATEGORICAL_COVARIATES),
            tensors.get(REGISTRY_KEYS.CONTINUOUS_COVARIATES),
            tensors.get(REGISTRY_KEYS.CONTEXTS),
        )
        if self.uses_size_factor:
            size = tensors[REGISTRY_KEYS.SIZE_FACTOR].squeeze(1)
        else:
            size = x.sum(dim=1)
        codes, rows, contexts = codes.long(), None, None
        if self.effect_rows.n_contexts:
            contexts = tensors[REGISTRY_KEYS.CONTEXTS].long().squeeze(1)
            rows = self.effect_rows.of_cells(codes, contexts)
        guides = tensors.get(REGISTRY_KEYS.GUIDES)
        guides = None if guides is None else guides.long()
        return CellBatch(x, codes, doses, covariates, size, guides, rows, contexts)

    def _get_inference_input(
        self, tensors: dict[str, Tensor], **kwargs: object
    ) -> dict[str, CellBatch]:
        return {"cells": self.read_batch(tensors)}

    def inference(self, cells: CellBatch, n_particles: int | None = None) -> dict[str, Any]:
        """Sample global variables and basal states.

        Returns
        -------
        ``shift`` (P or 1, B, S), ``qz`` (posterior of the basal states), ``z_basal`` (P, B, L),
        ``global_kl``: every cell's part of the global divergences, (P or 1, B) by name, and
        ``global_penalty``: the same with training weights, (P or 1, B). If cells may or may not
        respond, the first three have both branches, 2 P instead of P.
        """
        n_particles = n_particles or self.n_particles
        rows, slots = perturbations_of_batch(cells.effects, len(self.effect_rows))
        draw = self.global_posterior(rows, n_particles)
        shift = sum_over_slots(draw.shifts, slots, cells.doses)
        shift, qz = self.in_branches(cells, shift, n_particles)
        z_basal = self.basal_states(qz, standard_normals(n_particles, qz.loc))
        return self.explained(cells, rows, slots, draw, shift, qz, z_basal)

    def explained(
        self,
        cells: CellBatch,
        rows: Tensor,
        slots: Tensor,
        draw: GlobalDraw,
        shift: Tensor,
        qz: Normal,
        z_basal: Tensor,
    ) -> dict[str, Any]:
        """Output of :meth:`inference` from samples for perturbations and cells.

        ``rows`` are the effects of ``draw``, ``slots`` the positions of each cell's among them.
        """
        of_rows = [kl * self.plate_weights(rows, name) for name, kl in draw.kl.items()]
        weights = [self.evidence_weights(rows, name) for name in draw.kl]
        charged = [kl * weight for kl, weight in zip(of_rows, weights, strict=True)]
        of_rows.append(sum(charged, start=torch.zeros(1, len(rows)).to(draw.shifts)))
        of_cells = sum_over_slots(torch.stack(torch.broadcast_tensors(*of_rows), dim=-1), slots)
        *global_kl, penalty = of_cells.unbind(dim=-1)
        return {
            "cells": cells,
            "shift": shift,
            "qz": qz,
            "z_basal": z_basal,
            "global_kl": dict(zip(draw.kl, global_kl, strict=True)),
            "global_penalty": penalty,
        }

    def standardised(self, x: Tensor) -> Tensor:
        """Encoder input: log1p of counts, standardised per gene."""
        if self.likelihood.is_count_likelihood:
            # Exact for integers, and takes a third of the time of `log1p`.
            return (x + 1).log_().sub_(self.input_mean).div_(self.input_sd)
        return (x - self.input_mean).div_(self.input_sd)

    # Generation: p(x | z) ----------------------------------------------------------------------

    def _get_generative_input(
        self, tensors: dict[str, Tensor], inference_outputs: dict, **kwargs: object
    ) -> dict[str, Any]:
        return {
            "z_basal": inference_outputs["z_basal"],
            "shift": inference_outputs["shift"],
            "covariates": inference_outputs["cells"].covariates,
        }

    def generative(
        self, z_basal: Tensor, shift: Tensor, covariates: Tensor | None
    ) -> dict[str, Tensor]:
        """Decode up to the last hidden layer; returns ``hidden`` of shape (P, B, n_hidden)."""
        return {"hidden": self.decode_hidden(z_basal, shift, covariates)}

    def decode(
        self,
        z_basal: Tensor,
        shift: Tensor,
        covariates: Tensor | None,
        direct: Tensor | None = None,
    ) -> Tensor:
        """Logits, ``(P, B, outputs per gene x G)``, which the likelihood interprets.

        ``direct`` effects on genes, ``(P or 1, B or 1, G)`` or ``(B, G)``, are added to them.
        """
        logits = self.decoder.to_genes(self.decode_hidden(z_basal, shift, covariates))
        return add_to_logits(logits, direct)

    # The objective -----------------------------------------------------------------------------

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict,
        generative_outputs: dict[str, Tensor],
        kl_weight: float | Tensor = 1.0,
    ) -> LossOutput:
        """Minus the mini-batch ELBO of the paper's appendix A.1, per cell, mean over particles.

        Every cell pays a part ``1 / N_t`` of the global divergences of its perturbations, so the
        mean over an epoch, times the number of cells, is the ELBO of the whole training data. These
        parts count as local terms, so that ``elbo_validation`` also weights them by training
        counts. The ELBO is reported; the loss multiplies the global divergences by
        ``global_kl_weight`` and :meth:`evidence_weights`.
        """
        cells: CellBatch = inference_outputs["cells"]
        kl_z = self.normal_kl(inference_outputs["qz"], inference_outputs["z_basal"])
        log_prior = of_branches = None
        if self.responses is not None and self.has_branches:
            log_prior = self.responses.log_prior(cells)
            of_branches = add_to_branches(log_prior, -kl_z)
        mean_log_px, log_px = self.likelihood.mean_decoded_log_prob(
            cells.x,
            generative_outputs["hidden"],
            self.decoder.to_genes,
            cells.size,
            self.direct_effect(cells),
            *(() if of_branches is None else (of_branches,)),
        )
        local = {"kl_z_basal": kl_z}
        penalty = self.global_kl_weight * inference_outputs["global_penalty"]
        if self.responses is not None:  # always: DDP needs gradients of all parameters
            penalty = penalty + self.responses.penalty()
        if self.responses is not None and log_prior is not None:
            branches = Branches.of(log_prior, log_px - kl_z)
            log_px = branches.mean(log_px)
            local = {
                "kl_z_basal": branches.mean(kl_z),
                "kl_responses": branches.divergence(),
            }
        objective = mean_log_px - kl_weight * (sum(local.values()) + penalty).mean()

        local |= {f"kl_{name}": kl for name, kl in inference_outputs["global_kl"].items()}
        local = {name: kl.mean(0) for name, kl in local.items()}
        return LossOutput(
            loss=-objective,
            reconstruction_loss=-log_px.mean(0),
            kl_local=local,
        )

    def normal_kl(
        self, posterior: Normal, draws: Tensor, prior_scale: float | Tensor = 1.0
    ) -> Tensor:
        """Divergence from Normal(0, prior_scale) by ``kl_estimator``, over the last dimension."""
        if self.kl_estimator == "closed_form":
            return divergence_from_prior(posterior, prior_scale)
        return log_ratio_to_prior(posterior, draws, prior_scale)

    def sample(self, tensors: dict[str, Tensor], n_samples: int = 1) -> Tensor:
        """Posterior predictive expression of the cells, ``(n_samples, B, G)``."""
        cells = self.read_batch(tensors)
        rows, slots = perturbations_of_batch(cells.effects, len(self.effect_rows))
        shifts = self.global_posterior(rows, n_samples).shifts
        shift = sum_over_slots(shifts, slots, cells.doses)
        direct = self.direct_effect(cells)
        if self.has_branches:
            mean = shift.mean(dim=0, keepdim=True)
            chance = torch.sigmoid(self.response_log_odds(cells, mean)).expand(n_samples, -1)
            responds = torch.bernoulli(chance, generator=generator(chance.device))[..., None]
            shift = shift * responds
            direct = None if direct is None else direct * responds
        qz = self.encode(cells.x, shift, cells.covariates)
        z_basal = qz.loc + qz.scale * standard_normals(n_samples, qz.loc)
        logits = self.decode(z_basal, shift, cells.covariates, direct)
        return self.likelihood.sample(logits, cells.size)
