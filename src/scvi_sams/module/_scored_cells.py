"""Computations for given effects: branches of cells, their likelihood, and importance weights.

Shapes are those of ``_perturbation_module.py``. If cells may have escaped their perturbations,
there are two branches, with and without a response, one after the other instead of P particles.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from scvi.module.base import BaseModuleClass
from torch import Tensor
from torch.distributions import Normal

from scvi_sams.module._direct_effects import DirectEffects
from scvi_sams.module._likelihoods import Likelihood
from scvi_sams.module._minibatch import CellBatch
from scvi_sams.module._networks import log_ratio_to_prior
from scvi_sams.module._responses import N_BRANCHES, Responses, log_mixture, with_branches

N_SAMPLES, FEW_SAMPLES = 8, 2
"""Importance samples of the basal state in either branch for the probability of a response; and
the number if it only decides what else is computed for the cell."""
_SEED = 90211


class ScoredCells(BaseModuleClass):
    """The part of :class:`PerturbationModule` that takes effects as given."""

    likelihood: Likelihood
    direct: DirectEffects | None
    responses: Responses | None
    n_latent: int

    @abstractmethod
    def encode(self, x: Tensor, shift: Tensor, covariates: Tensor | None) -> Normal:
        """q(z_basal | x, shift, covariates), batch shape ``(P or 1, B, L)``."""

    @abstractmethod
    def decode(
        self,
        z_basal: Tensor,
        shift: Tensor,
        covariates: Tensor | None,
        direct: Tensor | None = None,
    ) -> Tensor:
        """Logits, ``(P, B, outputs per gene x G)``."""

    def direct_effect(self, cells: CellBatch) -> Tensor | None:
        """Sum of the direct effects of the perturbations of each cell, ``(B, G)``, if any."""
        if self.direct is None:
            return None
        return self.direct.of_cells(cells.codes, cells.doses, cells.effects)

    @property
    def has_branches(self) -> bool:
        """Whether cells may or may not respond, at the current stage of training."""
        return self.responses is not None and self.responses.has_begun

    def in_branches(
        self, cells: CellBatch, shift: Tensor, n_particles: int
    ) -> tuple[Tensor, Normal]:
        """Shifts of cells, and posteriors of their basal states, in every branch."""
        if not self.has_branches:
            return shift, self.encode(cells.x, shift, cells.covariates)
        shift = with_branches(shift, n_particles)
        qz = self.encode(cells.x, shift, cells.covariates)
        # One posterior for all if the encoder does not depend on the shift.
        loc, scale = (part.expand(len(shift), *part.shape[1:]) for part in (qz.loc, qz.scale))
        return shift, Normal(loc, scale, validate_args=False)

    def basal_states(self, qz: Normal, noise: Tensor) -> Tensor:
        """Samples of basal states from standard normals ``(P, B, L)``, the same in every branch."""
        if self.has_branches:
            noise = noise.repeat(N_BRANCHES, 1, 1)
        return qz.loc + qz.scale * noise

    def log_importance_weights(self, cells: CellBatch, shift: Tensor, noise: Tensor) -> Tensor:
        """Return log p(x | z) + log p(z_basal) - log q(z_basal), one sample per particle, (P, B).

        ``noise`` are standard normals for the basal states, ``(P, B, L)``.
        """
        weights = self._log_weights(cells, shift, noise, self.direct_effect(cells))
        if self.responses is None or not self.has_branches:
            return weights
        return log_mixture(self.responses.log_prior(cells), weights)

    def response_evidence(
        self, cells: CellBatch, shift: Tensor, n_samples: int = N_SAMPLES
    ) -> Tensor:
        """Log likelihood ratio of response and no response, ``(B,)``.

        ``shift`` is ``(1, B, S)``. By antithetic importance samples, which are the same for all
        cells and in both branches. 0 for control cells. Direct effects are excluded: basal states
        were fitted without them, and explain part of them. With direct effects, probabilities were
        off by 0.19 for effects that the model hardly explained.
        """
        same = torch.Generator(shift.device).manual_seed(_SEED)
        shape = (n_samples // 2, 1, self.n_latent)
        noise = torch.randn(shape, generator=same, device=shift.device)
        noise = torch.cat([noise, -noise]).expand(-1, len(cells.x), -1)
        weights = self._log_weights(cells, shift, noise, None).unflatten(0, (N_BRANCHES, -1))
        with_response, without = torch.logsumexp(weights, dim=1)
        return with_response - without

    def response_log_odds(
        self, cells: CellBatch, shift: Tensor, n_samples: int = N_SAMPLES
    ) -> Tensor:
        """Posterior log-odds that cells respond, ``(B,)``; infinite if they cannot escape."""
        assert self.responses is not None
        evidence = self.response_evidence(cells, shift, n_samples)
        log_odds = self.responses.log_odds_of(cells) + evidence
        return torch.where(self.responses.may_escape(cells), log_odds, torch.inf)

    def likelier_branch(self, cells: CellBatch, shift: Tensor) -> tuple[CellBatch, Tensor]:
        """Remove perturbations and shifts of cells that probably do not respond.

        ``shift`` is ``(1, B, S)``. Without responses both are returned unchanged.
        """
        if not self.has_branches:
            return cells, shift
        responds = self.response_log_odds(cells, shift, FEW_SAMPLES) > 0
        return cells.carrying(responds[:, None]), shift * responds[:, None]

    def _log_weights(
        self, cells: CellBatch, shift: Tensor, noise: Tensor, direct: Tensor | None
    ) -> Tensor:
        """Log importance weights in every branch."""
        shift, qz = self.in_branches(cells, shift, len(noise))
        z_basal = self.basal_states(qz, noise)
        if direct is not None and self.has_branches:
            direct = with_branches(direct[None], len(noise))
        logits = self.decode(z_basal, shift, cells.covariates, direct)
        log_px = self.likelihood.log_prob(cells.x, logits, cells.size)
        return log_px - log_ratio_to_prior(qz, z_basal)
