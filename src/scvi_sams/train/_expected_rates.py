"""Expectations of the decoder for the cells of each perturbation, with and without it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch

from scvi_sams._torch import fixed_seed
from scvi_sams.module._direct_effects import DirectEffects
from scvi_sams.module._expected_lognorm import ExpectedLognorm
from scvi_sams.module._minibatch import CellBatch
from scvi_sams.module._perturbation_module import PerturbationModule
from scvi_sams.train._gene_sums import TARGET_SUM, Cells, evenly_in_group, sample_of_groups

Total = Callable[[torch.Tensor], torch.Tensor]
"""Sums numbers over all processes."""

ROWS_AT_ONCE = 64
N_POSTERIOR, N_STATES = 32, 8
"""Posterior samples of the shifts, and basal states for each, over which the decoder is averaged;
states are the same for all perturbations."""
_SEED = 60013
SMALLEST_RATE = 1e-30
"""Smallest rate: a proportion of the library may underflow, and its logarithm is taken."""


class Expected(NamedTuple):
    """Expectations of the decoder for the cells of each group; controls in rows beyond R."""

    without: np.ndarray
    """Rates of the cells without their perturbation or combination, ``(R + 1 + C, G)``."""
    with_shift: np.ndarray
    """The same with the shift, averaged over its posterior."""
    at_mean: np.ndarray
    """The same with the posterior mean of the shift."""
    variance: np.ndarray
    """Posterior variance of the change of the log rate (of the mean, if it is not counts)."""
    dose: np.ndarray
    """Mean dose of the perturbation in its cells, ``(R + 1 + C,)``; 1 for a combination."""
    logged: np.ndarray
    """Mean of logs of counts at the rates of the first three, ``(3, R + 1 + C, G)``; without genes
    if there is no closed form."""
    log_rates: np.ndarray
    """Rates of states of all control cells, and of each context, ``(1 + C, states, genes)``;
    without genes if expression is not counts."""

    @property
    def unchanged(self) -> np.ndarray:
        """Mean rates of the states of all control cells, ``(G,)``."""
        return np.exp(self.log_rates[0].astype(np.float64)).mean(axis=0)

    def of(self, rows: np.ndarray, context: int | None) -> Expected:
        """Expectations for some rows, and for all controls or those of a context."""
        control = 0 if context is None else 1 + context
        n_rows = len(self.dose) - len(self.log_rates)
        chosen = np.append(rows, n_rows + control)
        groups = {name: getattr(self, name)[chosen] for name in _OF_GROUPS}
        logged = self.logged[:, chosen]
        return Expected(**groups, logged=logged, log_rates=self.log_rates[[control]])


_OF_GROUPS = ("without", "with_shift", "at_mean", "variance", "dose")
"""Fields with a row per group."""


@torch.no_grad()
def expected_rates(
    module: PerturbationModule,
    cells: Cells,
    tables: DirectEffects,
    states: torch.Tensor | None = None,
) -> Expected:
    """Decode basal states with the covariates of the cells of each group.

    Basal states are from the prior; if there are contexts, ``states`` are those of each, ``(C,
    N_STATES, L)``.
    """
    generator = torch.Generator().manual_seed(_SEED)
    shape = (N_POSTERIOR, N_STATES, module.n_latent)
    of_prior = torch.randn(shape, generator=generator).to(module.device)
    n_perturbations, n_rows = tables.n_perturbations, tables.n_rows
    n_controls = 1 + module.effect_rows.n_contexts
    n_groups = n_rows + n_controls
    first_pair = n_rows - len(tables.pairs)
    rows = module.effect_rows.measured
    with fixed_seed(_SEED):
        drawn = [
            module.sampled_shifts(some, N_POSTERIOR).expand(N_POSTERIOR, -1, -1)
            for some in rows.split(ROWS_AT_ONCE)
        ]
    shifts = torch.cat(drawn, dim=1)
    # Groups without cells keep rates of 1, whose logarithms are finite.
    shape_of_rates = (3, n_groups, module.likelihood.n_genes)
    rates = np.ones(shape_of_rates, dtype=np.float32)
    variance = np.zeros_like(rates[0])
    dose = np.ones(n_groups)
    is_count = module.likelihood.is_count_likelihood
    mean_of_logs = mean_of_logs_of(module)
    logged = np.zeros((3, n_groups, module.likelihood.n_genes if mean_of_logs else 0), np.float32)

    def basal_states(contexts: torch.Tensor) -> torch.Tensor:
        """States of cells in contexts ``(posterior samples, states)``."""
        if states is None:
            return of_prior
        chosen = torch.arange(N_POSTERIOR * N_STATES).view_as(contexts)
        return states[contexts, chosen].to(module.device)

    def decoded(
        z_basal: torch.Tensor, shift: torch.Tensor, covariates: torch.Tensor | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rates averaged over the states of each posterior sample, and logs over all."""
        logits = module.decode(z_basal, shift, covariates)
        rate = module.likelihood.rate(logits).mean(dim=1)
        if is_count:
            rate.clamp_(min=SMALLEST_RATE)
        of_logs = rate[0, :0] if mean_of_logs is None else mean_of_logs(logits).mean(dim=(0, 1))
        return rate.cpu().numpy(), of_logs.cpu().numpy()

    nothing = shifts.new_zeros(1, 1, shifts.shape[-1])
    plain = None if module.covariates.n_out else decoded(of_prior, nothing, None)
    # Empty slots hold one additional effect, which is zero.
    shifts = torch.cat([shifts, shifts.new_zeros(N_POSTERIOR, 1, shifts.shape[-1])], dim=1)
    samples = torch.arange(N_POSTERIOR, device=module.device)[:, None, None]

    mean_shifts = shifts.mean(dim=0, keepdim=True).expand_as(shifts)

    def shift_of(table: torch.Tensor, codes: torch.Tensor, doses: torch.Tensor) -> torch.Tensor:
        """Sum over slots, ``(posterior samples, states, K)`` to ``(.., S)``."""
        places = torch.where(codes < 0, len(rows), module.effect_rows.places(codes))
        of_slots = table[samples, places]
        return (of_slots * doses[..., None]).sum(dim=2)

    for group, members in sample_of_groups(cells, n_groups, N_POSTERIOR * N_STATES, generator):
        codes, doses, covariates = (
            part[members].unflatten(0, shape[:2]).to(module.device)
            for part in (cells.effects, cells.doses, cells.covariates)
        )
        z_basal = basal_states(cells.contexts[members].unflatten(0, shape[:2]))
        # The perturbation of the group is first; in a group of a combination all are its own.
        is_single = group < n_perturbations or group >= first_pair
        n_own = 1 if is_single else codes.shape[-1]
        own, rest = (
            (codes[..., :n_own], doses[..., :n_own]),
            (codes[..., n_own:], doses[..., n_own:]),
        )
        others, base = nothing, plain
        if base is None or (rest[0] >= 0).any():
            others = shift_of(shifts, *rest)
            base = decoded(z_basal, others, covariates if module.covariates.n_out else None)
        found = [base, base, base]
        if group < n_rows:
            found[1:] = (
                decoded(
                    z_basal,
                    others + shift_of(table, *own),
                    covariates if module.covariates.n_out else None,
                )
                for table in (shifts, mean_shifts)
            )
        if is_single and group < n_rows:
            dose[group] = float(doses[..., 0].mean())
        for place, (rate, of_logs) in enumerate(found):
            rates[place, group], logged[place, group] = rate.mean(axis=0), of_logs
        before, after = found[0][0], found[1][0]
        change = np.log(after) - np.log(before) if is_count else after - before
        variance[group] = change.var(axis=0, ddof=1)
    log_rates = np.zeros((n_controls, 1, 0))
    if is_count:
        of_controls = []
        for group in range(n_rows, n_groups):
            chosen = evenly_in_group(cells, group, N_POSTERIOR * N_STATES).unflatten(0, shape[:2])
            covariates = cells.covariates[chosen].to(module.device)
            logits = module.decode(
                basal_states(cells.contexts[chosen]),
                nothing,
                covariates if module.covariates.n_out else None,
            )
            of_controls.append(module.likelihood.log_rate(logits).flatten(0, 1).cpu().numpy())
        log_rates = np.stack(of_controls)
    without, with_shift, at_mean = rates
    return Expected(without, with_shift, at_mean, variance, dose, logged, log_rates)


def mean_of_logs_of(module: PerturbationModule) -> ExpectedLognorm | None:
    """Mean of log2(1 + TARGET_SUM x / size) of counts, by logit."""
    if not module.likelihood.has_laplace_transform:
        return None
    sizes = module.cell_sizes.double().cpu().numpy()
    return ExpectedLognorm(module.likelihood, sizes, TARGET_SUM, module.device)


def over_processes(expected: Expected, cells: Cells, total: Total) -> Expected:
    """Average expectations of groups over processes, each of its own cells; ``total`` adds up."""
    own = torch.bincount(cells.group, minlength=len(expected.dose)).float()
    everywhere = total(own).numpy()

    def average(values: np.ndarray) -> np.ndarray:
        own_weight = own.reshape(-1, *[1] * (values.ndim - 1))
        weight = everywhere.reshape(own_weight.shape)
        summed = total(own_weight * torch.as_tensor(values, dtype=torch.float32)).numpy()
        return np.where(weight > 0, summed / np.maximum(weight, 1), values)

    averaged = {name: average(getattr(expected, name)) for name in _OF_GROUPS}
    logged = np.stack([average(values) for values in expected.logged])
    return expected._replace(**averaged, logged=logged)


@torch.no_grad()
def states_of_contexts(
    module: PerturbationModule, batches: Iterable[CellBatch]
) -> torch.Tensor | None:
    """Basal states of control cells of each context, ``(C, N_STATES, L)``; ``None`` without any.

    For contexts without control cells they are from the prior.
    """
    if not module.effect_rows.n_contexts:
        return None
    generator = torch.Generator().manual_seed(_SEED)
    n_states = N_POSTERIOR * N_STATES
    shape = (module.effect_rows.n_contexts, n_states, module.n_latent)
    states = torch.randn(shape, generator=generator)
    found: list[list[torch.Tensor]] = [[] for _ in states]
    nothing = torch.zeros(1, 1, module.n_shift, device=module.device)
    for cells in batches:
        assert cells.contexts is not None
        qz = module.encode(cells.x, nothing, cells.covariates)
        is_control = (cells.codes < 0).all(dim=1)
        for context in cells.contexts[is_control].unique().tolist():
            chosen = is_control & (cells.contexts == context)
            found[context].append(torch.stack([qz.loc[0][chosen], qz.scale[0][chosen]]).cpu())
    for of_context, parts in zip(states, found, strict=True):
        if parts:
            loc, scale = torch.cat(parts, dim=1)
            chosen = torch.randint(len(loc), (n_states,), generator=generator)
            of_context.mul_(scale[chosen]).add_(loc[chosen])
    return states
