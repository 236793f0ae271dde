"""Effects of combinations with perturbations that have no cells.

The effect of a perturbation without cells is a mean over what it may be. It is a small mean also
for a gene that control cells do not express and that few perturbations induce, but then a large
change of the log rate. In a combination with a perturbation that induces this gene, a sum of log
rates would multiply the two. Means of effects add up on the scale on which effects are compared, so
these combinations are predicted by that sum; measured perturbations count as one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scvi_sams._torch import fixed_seed
from scvi_sams.module._combinations import Combinations
from scvi_sams.module._direct_effects import MOST_ENTRIES, Residuals
from scvi_sams.module._perturbation_module import PerturbationModule
from scvi_sams.train._compared_scale import ComparedScale
from scvi_sams.train._control_decoder import ControlDecoder
from scvi_sams.train._expected_rates import N_POSTERIOR, ROWS_AT_ONCE

_SEED = 60077


def answer_combinations(
    module: PerturbationModule,
    codes: Tensor,
    doses: Tensor,
    effects: Tensor,
    decoder_of: Callable[[int], ControlDecoder],
) -> None:
    """Estimate requested combinations with perturbations whose estimates come from features.

    ``(B, K)`` each, as in :func:`~scvi_sams.train._unmeasured.answer_unmeasured`. Predictions that
    are not stacked, and those of expression that is not counts, are sums already.
    """
    direct = module.direct
    assert direct is not None
    if not (direct.is_stacked and module.likelihood.is_count_likelihood):
        return
    is_new = codes >= module.effect_rows.n_perturbations
    answers = direct.answers
    estimated = (is_new & (answers.place_of(effects) >= 0)).any(dim=1)
    requested, _ = Combinations.of_cells(effects[estimated], doses[estimated]).of_several()
    lacks = answers.combinations.rows_of(requested) < 0
    if not bool(lacks.any()):
        return
    if (len(answers.combinations.codes) + int(lacks.sum())) * direct.n_genes > MOST_ENTRIES:
        answers = answers.without_combinations()
    else:
        requested = requested.at(lacks.nonzero(as_tuple=True)[0])
    contexts = module.effect_rows.context_of(requested.codes[:, 0])
    found, order = [], []
    for context in contexts.unique().tolist():
        places = (contexts == context).nonzero(as_tuple=True)[0]
        of_parts = _Parts(module, decoder_of(context))
        for some in places.split(ROWS_AT_ONCE):
            found.append(_answers(of_parts, requested.at(some)))
            order.append(some)
    tables = Residuals(*(torch.cat(column) for column in zip(*found, strict=True)))
    direct.answers = answers.with_combinations(requested.at(torch.cat(order)), tables)


class _Part(NamedTuple):
    """A part of a combination: an estimated perturbation, or the measured ones together."""

    shifts: Tensor
    """Posterior samples, ``(P, 1, S)``."""
    effect: np.ndarray
    """Mean effect on the compared scale, ``(1, G)``."""
    variance: np.ndarray
    direct_mean: Tensor
    """Direct effects, ``(G,)``, and their variance."""
    direct_variance: Tensor


class _Parts:
    """Parts of combinations in one context; those of several combinations are computed once."""

    def __init__(self, module: PerturbationModule, decoder: ControlDecoder) -> None:
        assert isinstance(decoder.scale, ComparedScale)
        self.module, self.decoder, self.scale = module, decoder, decoder.scale
        self._known: dict[tuple[float, ...], _Part] = {}

    def of(self, effects: Tensor, doses: Tensor) -> list[_Part]:
        """Parts of one combination, from its rows of effects and doses, ``(K,)``."""
        rows = self.module.effect_rows
        is_new = rows.perturbation_of(effects) >= rows.n_perturbations
        parts = [slice(place, place + 1) for place in is_new.nonzero().flatten().tolist()]
        if not is_new.all():  # codes are in descending order
            parts.append(slice(int(is_new.sum()), len(effects)))
        return [self._part(effects[part], doses[part]) for part in parts]

    def _part(self, effects: Tensor, doses: Tensor) -> _Part:
        key = (*effects.tolist(), *doses.tolist())
        if key not in self._known:
            self._known[key] = self._computed(effects, doses)
        return self._known[key]

    def _computed(self, effects: Tensor, doses: Tensor) -> _Part:
        module, scale = self.module, self.scale
        direct = module.direct
        assert direct is not None
        codes = module.effect_rows.perturbation_of(effects)
        found, weights = direct.rows_of_cells(codes[None], doses[None], effects[None])
        rows, factors = found[found >= 0].long(), weights[found >= 0][:, None]
        means, sds = direct.in_predictions(rows)
        variances = (factors * sds).square()
        excess = 0.5 * direct.are_mean_rates(rows)[:, None] * variances
        on_genes = (factors * means - excess).sum(dim=0), variances.sum(dim=0).sqrt()
        shifts = torch.zeros(N_POSTERIOR, 1, module.n_shift, device=module.device)
        for effect, dose in zip(effects, doses, strict=True):
            with fixed_seed(_SEED + int(effect)):
                sampled = module.sampled_shifts(effect[None], N_POSTERIOR, for_predictions=True)
            shifts = shifts + dose * sampled
        of_shift, variance_of_shift = self.decoder.effects(shifts)
        mean, sd = (part.double().cpu().numpy()[None] for part in on_genes)
        effect_mean, variance = scale.moments(of_shift + mean, sd)
        variance += np.square(scale.relative_slope(of_shift + mean)) * variance_of_shift
        return _Part(
            shifts,
            effect_mean,
            variance,
            (factors * direct.of_rows(rows, "mean")).sum(dim=0),
            (factors * direct.of_rows(rows, "sd")).square().sum(dim=0),
        )


def _answers(of_parts: _Parts, combinations: Combinations) -> Residuals:
    """Additions of predictions to the model's effects of some combinations."""
    scale = of_parts.scale
    rows = []
    for effects, doses in zip(*combinations, strict=True):
        given = effects >= 0
        rows.append(of_parts.of(effects[given], doses[given]))
    shifts = torch.cat([_total([part.shifts for part in parts]) for parts in rows], dim=1)
    of_shifts, variance_of_shifts = of_parts.decoder.effects(shifts)
    whole, variance = (
        np.concatenate([np.sum(column, axis=0) for column in columns])
        for columns in (
            [[part.effect for part in parts] for parts in rows],
            [[part.variance for part in parts] for parts in rows],
        )
    )
    slope = scale.relative_slope(scale.log_change(whole))
    rest = np.maximum(variance - np.square(slope) * variance_of_shifts, 0)
    on_logits, log_sd = scale.log_normal(whole, np.sqrt(rest))
    mean = torch.stack([_total([part.direct_mean for part in parts]) for parts in rows])
    sd = torch.stack([_total([part.direct_variance for part in parts]) for parts in rows]).sqrt()
    correction, uncertainty = (
        torch.as_tensor(values, dtype=mean.dtype, device=mean.device)
        for values in (on_logits - of_shifts, log_sd)
    )
    genes = torch.arange(mean.shape[1], dtype=torch.int32, device=mean.device)
    return Residuals(
        torch.ones_like(mean[:, 0]),
        genes.expand(mean.shape),
        mean,
        sd,
        torch.ones_like(mean),
        correction - mean,
        uncertainty,
    )


def _total(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum(dim=0)
