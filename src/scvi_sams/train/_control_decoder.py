"""Decode stored states of control cells with other shifts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scvi_sams.module._perturbation_module import PerturbationModule
from scvi_sams.train._compared_scale import ComparedScale, Decoded, SameScale, Scale
from scvi_sams.train._expected_rates import (
    N_POSTERIOR,
    N_STATES,
    SMALLEST_RATE,
    mean_of_logs_of,
)


class ShiftEffects(NamedTuple):
    """Effects of shifts, rows x genes, as changes of the log rate."""

    of_shift: np.ndarray
    variance: np.ndarray
    """Variance over posterior samples of shifts."""


class ControlDecoder:
    """Decodes control cells of a context with other shifts.

    Their basal states and covariates are those stored in training.
    """

    def __init__(self, module: PerturbationModule, context: int) -> None:
        kept = module.unmeasured
        assert kept is not None
        self._module = module
        self._states, covariates = kept.states[context], kept.covariates[context]
        self._covariates = covariates if module.covariates.n_out else None
        self._mean_of_logs = mean_of_logs_of(module)
        self._unchanged: dict[int, tuple[Decoded, Tensor]] = {}
        self.scale: Scale = SameScale(module.likelihood.n_genes)
        if module.likelihood.is_count_likelihood:
            nothing = torch.zeros(1, 1, module.n_shift, device=module.device)
            logits = module.decode(*self._cells(N_STATES, nothing))
            log_rates = module.likelihood.log_rate(logits).flatten(0, 1).double().cpu().numpy()
            sizes = module.cell_sizes.double().cpu().numpy()
            self.scale = ComparedScale(module.likelihood, log_rates, sizes)

    def _cells(self, n_states: int, shift: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Basal states, shifts ``(P or 1, 1, S)`` and covariates of some states per sample."""
        shape = (N_POSTERIOR, N_STATES)
        states = self._states.unflatten(0, shape)[:, :n_states]
        covariates = self._covariates
        if covariates is not None:
            covariates = covariates.unflatten(0, shape)[:, :n_states]
        return states, shift, covariates

    def _decoded(self, n_states: int, shift: Tensor) -> tuple[Decoded, Tensor]:
        """Expectations with shifts, and rates of each posterior sample."""
        module = self._module
        logits = module.decode(*self._cells(n_states, shift))
        rates = module.likelihood.rate(logits).mean(dim=1)
        if module.likelihood.is_count_likelihood:
            rates.clamp_(min=SMALLEST_RATE)
        logged = rates[:, :0] if self._mean_of_logs is None else self._mean_of_logs(logits).mean(1)
        means = (values.mean(dim=0)[None].cpu().numpy() for values in (rates, logged))
        return Decoded(*means), rates

    def _base(self, n_states: int) -> tuple[Decoded, Tensor]:
        """Expectations without a shift."""
        if n_states not in self._unchanged:
            nothing = self._states.new_zeros(1, 1, self._module.n_shift)
            self._unchanged[n_states] = self._decoded(n_states, nothing)
        return self._unchanged[n_states]

    def mean_effects(self, shifts: Tensor, n_states: int = N_STATES) -> np.ndarray:
        """Changes of the log rate by shifts ``(R, S)``, rows x genes."""
        base, _ = self._base(n_states)
        changed = [self._decoded(n_states, shift[None, None])[0] for shift in shifts]
        return np.concatenate([of_row.change_from(base, self.scale) for of_row in changed])

    def effects(self, shifts: Tensor, n_states: int = N_STATES) -> ShiftEffects:
        """Effects of posterior samples of shifts, ``(P, R, S)``."""
        base, base_rates = self._base(n_states)
        found = []
        for row in range(shifts.shape[1]):
            shift = shifts[:, [row]]
            changed, rates = self._decoded(n_states, shift)
            change = rates - base_rates
            if isinstance(self.scale, ComparedScale):
                change = rates.log() - base_rates.log()
            of_row = (
                changed.change_from(base, self.scale),
                change.var(dim=0)[None].double().cpu().numpy(),
            )
            found.append(of_row)
        return ShiftEffects(*(np.concatenate(column) for column in zip(*found, strict=True)))
