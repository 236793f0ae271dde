"""Effects without cells, estimated on request after training.

For perturbations without cells see :mod:`~scvi_sams.train._feature_effects`. A perturbation that
was measured in some contexts is predicted in another by the average of the model's prediction there
and the mean effect in those contexts. Both have the same weight, because there are no cells to
decide: the model has seen all contexts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from scvi_sams._torch import fixed_seed
from scvi_sams.module._direct_effects import MOST_ENTRIES, Residuals
from scvi_sams.module._perturbation_module import PerturbationModule
from scvi_sams.module._unmeasured import UnmeasuredEffects
from scvi_sams.train._compared_scale import share_of_variance
from scvi_sams.train._control_decoder import ControlDecoder
from scvi_sams.train._expected_rates import N_POSTERIOR, N_STATES, ROWS_AT_ONCE
from scvi_sams.train._gene_sums import Cells, evenly_in_group
from scvi_sams.train._unmeasured_combinations import answer_combinations

_SEED = 60029


@torch.no_grad()
def keep_for_unmeasured(
    module: PerturbationModule, cells: Cells, n_rows: int, states: Tensor | None
) -> None:
    """Store basal states and covariates of control cells, the groups from ``n_rows`` on.

    ``states``, ``(C, S, L)``, are those of contexts; those of all control cells are from the prior.
    For likelihoods of counts whose mean of logs has no closed form nothing is stored, and effects
    without cells are predicted by the model alone.
    """
    likelihood = module.likelihood
    if module.unmeasured is None:
        return
    if likelihood.is_count_likelihood and not likelihood.has_laplace_transform:
        return
    generator = torch.Generator().manual_seed(_SEED)
    n_states = N_POSTERIOR * N_STATES
    of_prior = torch.randn((1, n_states, module.n_latent), generator=generator)
    of_contexts = of_prior[:0] if states is None else states
    covariates = []
    for group in [*range(n_rows + 1, n_rows + 1 + len(of_contexts)), n_rows]:
        covariates.append(cells.covariates[evenly_in_group(cells, group, n_states)])
    module.unmeasured.fill(
        states=torch.cat([of_contexts, of_prior]), covariates=torch.stack(covariates).float()
    )


class Elsewhere:
    """Sums effects of perturbations over contexts, for contexts in which they were not measured.

    ``owners`` are the perturbations of all measured pairs. Perturbations that were measured in
    every context are not stored, and none are if there are too many.
    """

    def __init__(self, owners: np.ndarray, n_contexts: int, n_genes: int) -> None:
        codes, counts = np.unique(owners, return_counts=True)
        self.codes = codes[counts < n_contexts]
        if len(self.codes) * n_genes > MOST_ENTRIES:
            self.codes = self.codes[:0]
        self._n = np.zeros((len(self.codes), 1))
        self._sums, self._squares = np.zeros((2, len(self.codes), n_genes))

    def add(self, owners: np.ndarray, effects: np.ndarray) -> None:
        """Add the effects of some pairs, ``(R, G)``."""
        if not len(self.codes):
            return
        place = np.searchsorted(self.codes, owners).clip(max=len(self.codes) - 1)
        kept = self.codes[place] == owners
        np.add.at(self._n, place[kept], 1)
        np.add.at(self._sums, place[kept], effects[kept])
        np.add.at(self._squares, place[kept], np.square(effects[kept]))

    def keep(self, unmeasured: UnmeasuredEffects) -> None:
        """Store the mean effect of each perturbation, and its variance for another context.

        The variance of a perturbation is shrunken towards that of all, which counts as one context.
        If none was measured in two contexts, an effect may be between 0 and twice the mean.
        """
        mean = self._sums / np.maximum(self._n, 1)
        around = np.maximum(self._squares - self._n * np.square(mean), 0)
        n_free = np.maximum(self._n - 1, 0)
        pooled = np.square(mean)
        if n_free.any():
            pooled = np.broadcast_to(around.sum(axis=0) / n_free.sum(), mean.shape)
        variance = (around + pooled) / (n_free + 1) * (1 + 1 / np.maximum(self._n, 1))
        unmeasured.fill(
            codes=torch.as_tensor(self.codes),
            elsewhere=torch.as_tensor(mean),
            elsewhere_variance=torch.as_tensor(variance),
        )


@torch.no_grad()
def answer_unmeasured(
    module: PerturbationModule, codes: Tensor, doses: Tensor, effects: Tensor
) -> None:
    """Estimate effects of requested labels that have no cells, unless already done.

    ``(B, K)`` each: codes of perturbations, doses, and rows of effects, -1 in empty slots.
    """
    kept = module.unmeasured
    if module.direct is None or kept is None or not kept.is_fitted:
        return
    decoder_of = cache(partial(ControlDecoder, module))
    _answer_effects(module, effects[effects >= 0].unique(), decoder_of)
    answer_combinations(module, codes, doses, effects, decoder_of)


def _answer_effects(
    module: PerturbationModule, rows: Tensor, decoder_of: Callable[[int], ControlDecoder]
) -> None:
    """Estimate the effects without cells among ``rows``."""
    direct, kept = module.direct, module.unmeasured
    assert direct is not None
    assert kept is not None
    known = direct.answers
    wanted = rows[module.effect_rows.places(rows) < 0]
    wanted = wanted[~torch.isin(wanted, known.effects)]
    codes = module.effect_rows.perturbation_of(wanted)
    has_features = codes >= module.effect_rows.n_perturbations
    wanted = wanted[has_features & kept.knows_features | torch.isin(codes, kept.codes)]
    if not len(wanted):
        return
    contexts = module.effect_rows.context_of(wanted)
    found, order = [], []
    for context in contexts.unique().tolist():
        decoder = decoder_of(context)
        places = (contexts == context).nonzero(as_tuple=True)[0]
        for some in places.split(ROWS_AT_ONCE):
            found.append(_answers(module, decoder, wanted[some]))
            order.append(some)
    tables = Residuals(*(torch.cat(column) for column in zip(*found, strict=True)))
    direct.answers = known.with_effects(wanted[torch.cat(order)], tables)


def _shifts_of(module: PerturbationModule, row: Tensor) -> Tensor:
    """Posterior samples of one effect, ``(P, 1, S)``, independent of other requests."""
    with fixed_seed(_SEED):
        return module.sampled_shifts(row[None], N_POSTERIOR)


def _answers(module: PerturbationModule, decoder: ControlDecoder, rows: Tensor) -> Residuals:
    """Additions of predictions to the model's effects of some rows, in one context."""
    kept, scale = module.unmeasured, decoder.scale
    assert kept is not None
    shifts_of_rows = torch.cat([_shifts_of(module, row) for row in rows], dim=1)
    effects = decoder.effects(shifts_of_rows)
    at_mean = decoder.mean_effects(shifts_of_rows.mean(dim=0))
    of_model = scale.compared(effects.of_shift)
    variance_of_model = np.square(scale.relative_slope(effects.of_shift)) * effects.variance
    whole, variance = np.empty((2, *of_model.shape))
    codes = module.effect_rows.perturbation_of(rows)
    is_new = (codes >= module.effect_rows.n_perturbations).cpu().numpy()
    if is_new.any():
        assert module.features is not None
        features = module.features.features[codes[torch.as_tensor(is_new)]]
        around = features[:, :-1] - kept.mean_features
        of_shifts = decoder.mean_effects(kept.mean_shift + around @ kept.shift_coefficients)
        of_features = (kept.mean + around @ kept.coefficients).double().cpu().numpy()
        model, shifts, genes, mean = kept.weights.double().cpu().numpy()
        on_genes = genes * of_features + mean * kept.mean.double().cpu().numpy()
        decoded = model * of_model[is_new] + shifts * scale.compared(of_shifts)
        whole[is_new] = decoded + on_genes / scale.slope
        variance[is_new] = kept.variance.double().cpu().numpy() / np.square(scale.slope)
        if len(kept.target_change):
            targets = kept.target_genes[codes].cpu().numpy()
            at = np.flatnonzero(is_new & (targets >= 0))
            change = np.full((1, len(scale.slope)), float(kept.target_change))
            whole[at, targets[at]] = scale.compared(change)[0, targets[at]]
            variance[at, targets[at]] = float(kept.target_variance)
    is_known = ~is_new
    if is_known.any():
        place = torch.searchsorted(kept.codes, codes[torch.as_tensor(is_known)])
        elsewhere = kept.elsewhere[place].double().cpu().numpy() / scale.slope
        of_others = kept.elsewhere_variance[place].double().cpu().numpy() / np.square(scale.slope)
        whole[is_known] = (of_model[is_known] + elsewhere) / 2
        # Variance of a mixture: at most one of them is correct.
        apart = np.square(of_model[is_known] - elsewhere) / 4
        variance[is_known] = (variance_of_model[is_known] + of_others) / 2 + apart
    squared = share_of_variance(scale.slope, variance, variance_of_model)
    uncertainty = np.sqrt(np.maximum(variance - squared * variance_of_model, 0))
    shift = at_mean + squared * (effects.of_shift - at_mean)
    on_logits, log_sd = scale.log_normal(whole, uncertainty)
    correction, uncertain = (
        torch.as_tensor(values, dtype=torch.float32, device=rows.device)
        for values in (on_logits - shift, log_sd)
    )
    nothing = torch.zeros_like(correction)
    genes = torch.arange(correction.shape[1], dtype=torch.int32, device=rows.device)
    return Residuals(
        torch.as_tensor(np.sqrt(squared[:, 0]), dtype=torch.float32, device=rows.device),
        genes.expand(correction.shape),
        nothing,
        nothing,
        torch.ones_like(correction),
        correction,
        uncertain,
    )
