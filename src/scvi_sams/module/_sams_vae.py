"""SAMS-VAE (Bereket & Karaletsos 2023): its latent space is found in two phases."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributions import Normal

from scvi_sams.module._axis_errors import variance_of_axes
from scvi_sams.module._contexts import ContextEffects
from scvi_sams.module._curvature import LatentSurvey, curvature, following
from scvi_sams.module._mask_starts import (
    shrunken_totals,
    starting_log_odds,
    starts_in_contexts,
)
from scvi_sams.module._masked_effects import MaskedEffectsModule
from scvi_sams.module._minibatch import CellBatch, positions_in, sum_over_slots
from scvi_sams.module._rotation import sparsest_rotation

_LEAST_KNOWN = 0.01
"""Smallest proportion of the variance of a dimension that a cell's expression must explain."""


class SAMSVAEModule(MaskedEffectsModule):
    """SAMS-VAE: masked effects on latent dimensions, sparse after masks are initialised."""

    has_dense_phase = True

    @torch.no_grad()
    def begin_dense_phase(self) -> None:
        """Switch all masks on until :meth:`start_masks`."""
        self._switch_all_on(True)

    def _switch_all_on(self, on: bool) -> None:
        self.masks.switch_all_on(on)
        if self.contexts is not None:
            self.contexts.masks.switch_all_on(on)

    @torch.no_grad()
    def find_sparse_axes(self) -> None:
        """Rotate the latent space so that effects are sparsest; all masks are still on."""
        shared, own, place = self._dense_effects()
        totals = (
            shared if own is None else shrunken_totals(shared, own, place, self.effect_prior_scale)
        )
        self.rotate(sparsest_rotation(totals))

    @torch.no_grad()
    def start_masks(self, state_variance: Tensor | None = None) -> None:
        """End the dense phase: initialise masks from effects on sparse axes.

        See :mod:`~scvi_sams.module._mask_starts`. ``state_variance``, ``(n_latent,)``, is the mean
        posterior variance of basal states. In a dimension in which expression leaves a proportion
        s^2 of the prior variance undetermined, a cell counts as ``1 - s^2`` of a cell with a known
        state, and 1 / ``evidence_cells`` is divided by that.
        """
        known = 1.0 if state_variance is None else (1 - state_variance).clamp(min=_LEAST_KNOWN)
        coarsened = 0.0 if self.evidence_cells is None else 1 / (self.evidence_cells * known)
        if self.contexts is not None:
            self._start_masks_of_contexts(self.contexts, coarsened)
        else:
            q_e = self.full_effects()
            effects, variance = q_e.loc[0], q_e.variance[0] + coarsened
            variance = variance + variance_of_axes(effects, variance, self.effect_prior_scale)
            codes = self.effect_rows.measured
            if self.features is not None:
                self.features.fit(effects, variance, codes)
            self.masks.logits.copy_(starting_log_odds(effects, variance, *self.prior_of(codes)))
        self._switch_all_on(False)

    def _dense_effects(self) -> tuple[Tensor, Normal | None, Tensor]:
        """With all masks on: mean effects of perturbations with cells, ``(T', L)``.

        With contexts also the posterior of context-specific effects, ``(R, L)``; and the
        perturbation of each measured row, ``(R,)``.
        """
        rows = self.effect_rows.measured
        owners, place = self.effect_rows.perturbation_of(rows).unique(return_inverse=True)
        full = torch.ones_like(self.masks.logits)[owners][None]
        shared = self.effects(owners, full).loc[0]
        if self.contexts is None:
            return shared, None, place
        own = self.contexts.posterior(rows)[2]
        return shared, Normal(own.loc[0], own.scale[0], validate_args=False), place

    def _start_masks_of_contexts(self, contexts: ContextEffects, coarsened: Tensor | float) -> None:
        shared, own, place = self._dense_effects()
        assert own is not None
        found = starts_in_contexts(
            shared,
            own,
            place,
            contexts.n_cells > 0,
            coarsened,
            self.mask_prior_probability,
            self.effect_prior_scale,
        )
        owners = self.effect_rows.perturbation_of(self.effect_rows.measured).unique()
        if self.features is not None:
            self.features.fit(found.effects, found.variance, owners)
        contexts.prior.set_to(*found.probabilities)
        self.masks.logits.fill_(self.mask_prior.log_odds)
        self.masks.logits[owners] = found.shared
        contexts.masks.logits.copy_(found.own)
        contexts.effects.loc.copy_(found.own_effects)

    @torch.no_grad()
    def survey_latents(self, cells: Iterable[CellBatch]) -> LatentSurvey:
        """Curvature of each dimension given the others, and information of cells on each."""
        rows = self.effect_rows.measured
        means = self.shift_moments(rows)[0][None]
        basal, variances, shifts, codes = [], [], [], []
        for batch in cells:
            shift = sum_over_slots(means, positions_in(rows, batch.effects), batch.doses)
            batch, shift = self.likelier_branch(batch, shift)
            posterior = self.encode(batch.x, shift, batch.covariates)
            basal.append(posterior.loc[0].cpu())
            variances.append(posterior.variance[0].cpu())
            shifts.append(shift[0].cpu())
            codes.append(batch.effects.sort(dim=1).values.cpu())
        groups = torch.unique(torch.cat(codes), dim=0, return_inverse=True)[1]
        return LatentSurvey(
            curvature(torch.cat(basal), torch.cat(shifts), groups).to(self.device),
            torch.cat(variances).mean(dim=0).to(self.device),
            following(means[0]),
        )

    @torch.no_grad()
    def switch_off_latents(self, is_off: Tensor) -> None:
        """Switch off latent dimensions, ``(n_latent,)``, from now on.

        Perturbations do not shift them, cells do not differ in them (posterior and prior are
        equal), and nothing is decoded from them.
        """
        self.masks.is_excluded.copy_(is_off)
        if self.contexts is not None:
            self.contexts.masks.is_excluded.copy_(is_off)

    def encode(self, x: Tensor, shift: Tensor, covariates: Tensor | None) -> Normal:
        """q(z_basal | x, shift, covariates); the prior in dimensions that are switched off."""
        posterior = super().encode(x, shift, covariates)
        # Products: `masked_fill` with a mask of the last dimension is three times as slow.
        is_off = self.masks.is_excluded.to(posterior.scale.dtype)
        is_on = 1 - is_off
        scale = torch.addcmul(is_off, posterior.scale, is_on)
        return Normal(posterior.loc * is_on, scale, validate_args=False)

    def decode_hidden(self, z_basal: Tensor, shift: Tensor, covariates: Tensor | None) -> Tensor:
        """Last hidden layer of the decoder at ``z = z_basal + shift``, without what is off."""
        is_on = (~self.masks.is_excluded).to(z_basal.dtype)
        return super().decode_hidden(z_basal * is_on, shift, covariates)

    def diagnostics(self) -> dict[str, float]:
        """Whether this is the dense phase, and the proportion of masks more likely on than off."""
        on = self.masks.inclusion_probability > 0.5
        if self.contexts is not None:
            rows = self.effect_rows.measured
            is_own = self.contexts.inclusion_probability(rows) > 0.5
            on = on[self.effect_rows.perturbation_of(rows)] | is_own
        return {"dense_phase": float(self.masks.all_on), "active_masks": float(on.float().mean())}

    def rotate(self, rotation: Tensor) -> None:
        """Fold a rotation of the latent space into encoder, decoder and effects.

        Exact for everything that is decoded from posterior means, as long as all masks are on; the
        diagonal posterior variances are rotated approximately (see ``NormalHead.rotate``).
        """
        self.encoder.rotate(rotation)
        self.decoder.rotate(rotation)
        self.effects.rotate(rotation)
        if self.contexts is not None:
            self.contexts.effects.rotate(rotation)

    @torch.no_grad()
    def translate(self, origin: Tensor) -> None:
        """Move the origin of the latent space to a point of it, ``(n_latent,)``.

        It is subtracted from the effect of each perturbation: basal states of cells with a unit
        dose of one perturbation do not change, as long as all masks are on, and neither do values
        decoded from their posterior means. Control cells move in the opposite direction. Their
        encoder is not exact: it distinguishes them from perturbed cells only by the shift, which
        enters in more than one place.
        """
        self.encoder.translate(origin)
        self.decoder.translate(origin)
        self.effects.translate(origin)
