"""Computations of :class:`PerturbationModel`: sampled shifts, effects, interactions and cells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from anndata.utils import make_index_unique
from scipy import sparse

from scvi_sams._checks import check_integer, check_number
from scvi_sams._scale import size_factor_record
from scvi_sams.data._field import registered_labels
from scvi_sams.exceptions import InvalidArgumentError, SAMSError
from scvi_sams.labels._labels import (
    Labels,
    combinations_as_perturbations,
    distinct_combinations,
    parts_of_combination,
)
from scvi_sams.labels._parsing import encode_labels
from scvi_sams.labels._rows import rows_as_asked
from scvi_sams.model._basal_states import (
    ALL_CELLS,
    Basal,
    CellsToCompare,
    basal_states,
    contexts_of_effects,
    where_states_are_from,
)
from scvi_sams.model._cell_model import CellModel
from scvi_sams.model._cells import CellReader
from scvi_sams.model._contrast import (
    CellSizes,
    Contrast,
    DrawnEffect,
    EffectScale,
    Statistic,
    bounds,
    norms,
    summary,
)
from scvi_sams.model._descriptions import levels_of_effects, parts_of_predictions
from scvi_sams.model._doses import warn_beyond_measured
from scvi_sams.model._noise import by_blocks, new_seed, number_of, sample_of_cells
from scvi_sams.module._minibatch import positions_in, sum_of_rows
from scvi_sams.module._perturbation_module import PerturbationModule
from scvi_sams.train._unmeasured import answer_unmeasured

_SHIFTS_AT_ONCE = 2**20
"""Numbers in an array (labels x samples x latent dimensions): four megabytes."""

_PAIRS_PER_CHUNK = 32
"""Combinations processed at a time, with their single effects."""

_VALUES_KEPT = 2**26
"""Samples of effects of single perturbations that are stored for later pairs: 256 MB."""


def encode_requested(
    model: CellModel, labels: Sequence[str], dosages: Sequence[float | str] | None = None
) -> Labels:
    """Encode requested labels; if effects add up, including unseen combinations."""
    if dosages is not None and (isinstance(dosages, str) or not isinstance(dosages, Iterable)):
        raise InvalidArgumentError(f"`dosages` must be a list, one per label, not {dosages!r}.")
    singles = encode_labels(
        pd.Series([str(label) for label in labels]),
        None if dosages is None else pd.Series(list(dosages), dtype=object),
        spelling=model._spelling,
        vocabulary=[*model.perturbations, *model.unmeasured] if model._additive else None,
    )
    if model._additive:
        warn_beyond_measured(model.largest_doses_, singles)
        return singles
    return combinations_as_perturbations(singles, vocabulary=model.perturbations)


def make_contrast(
    model: CellModel,
    method: EffectScale,
    n_samples: int,
    n_posterior_samples: int,
    basal: Basal | None,
    library_size: float | None,
    target_sum: float,
    interval: float | None,
    cells: CellsToCompare = ALL_CELLS,
) -> tuple[Contrast, dict[str, Any]]:
    """Sample basal states for comparisons, as requested in ``predict_ate``, and describe them."""
    check_integer(n_samples=n_samples)
    check_integer(at_least=2, n_posterior_samples=n_posterior_samples)
    basal = where_states_are_from(model, basal, cells)
    if interval is not None:
        check_number(above=0, below=1, interval=interval)
    model._check_if_trained(warn=True)
    module = model.module
    sizes = CellSizes.of(module, library_size)
    statistic = Statistic(module.likelihood, method, sizes, target_sum, module.device)
    n_basal = max(1, round(n_samples / n_posterior_samples))
    states = basal_states(model, basal, n_posterior_samples, n_basal, cells)
    description = {
        **statistic.description(),
        **size_factor_record(model._setup_arguments["size_factor_key"]),
        **levels_of_effects(model),
        "interval": "none" if interval is None else interval,  # not every anndata writes None
        "n_samples": n_posterior_samples * n_basal,
        "n_posterior_samples": n_posterior_samples,
        "basal": basal,
        **contexts_of_effects(model, cells),
        **parts_of_predictions(module),
    }
    return Contrast(module, statistic, states), description


def drawn_effects(
    module: PerturbationModule,
    requested: Labels,
    n_draws: int,
    seed: int,
    contexts: torch.Tensor | None = None,
) -> Iterator[DrawnEffect]:
    """Yield the effect of each label in ``n_draws`` posterior samples, by ``seed``.

    In each of the ``contexts``, by number, if these are registered.
    """
    codes, doses = (
        torch.as_tensor(part, device=module.device)
        for part in (requested.codes.astype(np.int64), np.array(requested.doses))
    )
    answer_unmeasured(module, *in_contexts(module, codes, doses, contexts))
    noise = noise_on_genes(module, n_draws, seed)
    shifts = _drawn_shifts(module, requested, n_draws, seed, contexts)
    for shift, codes, doses in zip(shifts, requested.codes, requested.doses, strict=True):
        carried = codes >= 0
        on_genes = drawn_on_genes(module, codes[carried], doses[carried], noise, contexts)
        yield DrawnEffect(shift, on_genes)


def noise_on_genes(module: PerturbationModule, n_draws: int, seed: int) -> torch.Tensor | None:
    """Standard normals ``(n_draws, n_genes)`` with an exact mean, for direct effects.

    A single sample, which has no interval, is the mean itself.
    """
    if module.direct is None or not module.direct.is_estimated:
        return None
    drawn = torch.Generator(module.device).manual_seed(seed)
    shape = (n_draws, module.likelihood.n_genes)
    noise = torch.randn(shape, generator=drawn, device=module.device)
    noise -= noise.mean(dim=0)
    return noise / noise.square().mean(dim=0).sqrt() if n_draws > 1 else noise


def drawn_on_genes(
    module: PerturbationModule,
    codes: np.ndarray,
    doses: np.ndarray,
    noise: torch.Tensor | None,
    contexts: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Posterior samples of the joint additions of perturbations to the logits of genes.

    For each context, ``(n_draws, n_contexts or 1, n_genes)``. A perturbation has the same noise in
    every label: that of ``noise``, shifted cyclically by its number. Combinations, or perturbations
    in a context, with a row of their own have other noise.
    """
    if module.direct is None or noise is None or not len(codes):
        return None
    label = (torch.as_tensor(part.copy(), device=module.device)[None] for part in (codes, doses))
    codes_of_label, doses_of_label = label
    found, weights = module.direct.rows_of_cells(
        *in_contexts(module, codes_of_label.long(), doses_of_label, contexts)
    )
    samples = [
        _samples_on_genes(module, rows[rows >= 0].long(), factors[rows >= 0], noise)
        for rows, factors in zip(found, weights, strict=True)
    ]
    return torch.stack(samples, dim=1)


def in_contexts(
    module: PerturbationModule,
    codes: torch.Tensor,
    doses: torch.Tensor,
    contexts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels in every context, contexts fastest: codes, doses and rows of effects."""
    if contexts is None:
        return codes, doses, codes
    n_contexts = len(contexts)
    codes, doses = (values.repeat_interleave(n_contexts, dim=0) for values in (codes, doses))
    where = contexts.repeat(len(codes) // n_contexts)
    return codes, doses, module.effect_rows.of_cells(codes, where)


def _samples_on_genes(
    module: PerturbationModule, rows: torch.Tensor, factors: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Posterior samples of the weighted sum of rows of the direct effects, ``(n_draws, G)``."""
    assert module.direct is not None
    means, sds = module.direct.in_predictions(rows)
    n_draws, n_genes = noise.shape
    total = noise.new_zeros(n_draws, n_genes)
    has_excess = module.likelihood.is_count_likelihood and n_draws > 1
    excess = 0.5 * module.direct.are_mean_rates(rows) * has_excess
    numbers = module.direct.numbers_of(rows)
    of_rows = (part.tolist() for part in (numbers, factors, excess))
    for number, factor, above, mean, sd in zip(*of_rows, means, sds, strict=True):
        moved = noise.roll((number % n_draws, number // n_draws % n_genes), dims=(0, 1))
        total += factor * (mean + sd * moved) - above * (factor * sd) ** 2
    return total


def sampled_shifts(
    module: PerturbationModule, rows: torch.Tensor, n_draws: int, seed: int
) -> torch.Tensor:
    """Posterior samples of effects for predictions, ``(n_draws or 1, R, S)``."""
    (shifts,) = by_blocks(
        lambda some: [module.sampled_shifts(some, n_draws, for_predictions=True)],
        *(rows, module.effect_rows, seed),
    )
    return shifts


def _drawn_shifts(
    module: PerturbationModule,
    requested: Labels,
    n_draws: int,
    seed: int,
    contexts: torch.Tensor | None,
) -> Iterator[torch.Tensor]:
    """Yield the total shift of each label in ``n_draws`` posterior samples of every context."""
    device = module.device
    codes = torch.as_tensor(requested.codes.astype(np.int64), device=device)
    doses = torch.tensor(requested.doses, device=device)  # a copy: they are stored
    _, doses, effects = in_contexts(module, codes, doses, contexts)
    rows = effects[effects >= 0].unique()
    # Stored, because labels may share perturbations.
    table = sampled_shifts(module, rows, n_draws, seed).transpose(0, 1).flatten(1)
    n_shift, n_contexts = module.n_shift, 1 if contexts is None else len(contexts)
    n_labels = max(1, _SHIFTS_AT_ONCE // (n_draws * n_shift * n_contexts)) * n_contexts
    for start in range(0, len(effects), n_labels):
        labels = slice(start, start + n_labels)
        shifts = sum_of_rows(table, positions_in(rows, effects[labels]), doses[labels])
        of_labels = shifts.unflatten(1, (-1, n_shift)).expand(-1, n_draws, -1)
        yield from of_labels.unflatten(0, (-1, n_contexts)).transpose(1, 2)


class Interaction(NamedTuple):
    """Samples of a combination's effect and of its additive expectation, ``(n_draws, n_genes)``."""

    effect: torch.Tensor
    additive: torch.Tensor

    def summary(self, interval: float) -> dict[str, float]:
        """Columns of ``obs`` in a table of interactions."""
        effect, additive = self.effect.mean(dim=0), self.additive.mean(dim=0)
        direction = additive / norms(additive).clamp(min=torch.finfo(additive.dtype).tiny)
        draws = (self.effect - self.additive) @ direction
        low, high = bounds(draws, interval)
        return {
            "score": float(draws.mean()),
            "score_low": float(low),
            "score_high": float(high),
            "additive_score": float(norms(additive)),
            "effect_norm": float(norms(effect)),
            "interaction_norm": float(norms(effect - additive)),
        }


def interactions_of_labels(
    model: CellModel, contrast: Contrast, labels: list[str], interval: float
) -> AnnData:
    """Interactions, combinations x genes, as returned by ``predict_interactions``."""
    check_number(above=0, below=1, interval=interval)
    spelling = model._spelling
    parts = [parts_of_combination(spelling.canonical(label), spelling) for label in labels]
    names = ("X", "effect", "additive", "standard_error", "interval_low", "interval_high")
    genes = pd.Index(model.get_var_names())
    tables = {name: np.empty((len(labels), len(genes)), np.float32) for name in names}
    rows, seed = [], new_seed()
    of_single: dict[str, torch.Tensor] = {}
    for start in range(0, len(labels), _PAIRS_PER_CHUNK):
        chunk = slice(start, start + _PAIRS_PER_CHUNK)
        found = _drawn_interactions(model, contrast, labels[chunk], parts[chunk], seed, of_single)
        for place, drawn in enumerate(found, start):
            mean, *uncertainty = summary(drawn.effect - drawn.additive, interval)
            means = (mean, drawn.effect.mean(0), drawn.additive.mean(0))
            for name, value in zip(names, (*means, *uncertainty), strict=True):
                tables[name][place] = value.cpu().numpy()
            rows.append(drawn.summary(interval))
    obs = rows_as_asked(labels, None, spelling).rename_axis("combination")
    return AnnData(
        tables.pop("X"),
        obs=obs.assign(**pd.DataFrame(rows, index=obs.index)),
        var=pd.DataFrame(index=genes),
        layers=tables,
    )


def _drawn_interactions(
    model: CellModel,
    contrast: Contrast,
    labels: list[str],
    parts: list[list[str]],
    seed: int,
    of_single: dict[str, torch.Tensor],
) -> list[Interaction]:
    """Interactions of a chunk; updates ``of_single``, the effects of single perturbations."""
    wanted = {name for names in parts for name in names}
    n_kept = max(len(wanted), _VALUES_KEPT // contrast.control.numel())
    others = [name for name in of_single if name not in wanted]
    for name in others[: max(0, len(others) + len(wanted) - n_kept)]:
        del of_single[name]
    singles = sorted(wanted - set(of_single))
    requested = encode_requested(model, [*singles, *labels])
    n_draws = len(contrast.z_basal)
    drawn = drawn_effects(model.module, requested, n_draws, seed, contrast.contexts)
    for name, single in zip(singles, islice(drawn, len(singles)), strict=True):
        of_single[name] = contrast.effect(single)
    return [
        Interaction(contrast.effect(joint), torch.stack([of_single[p] for p in names]).sum(0))
        for names, joint in zip(parts, drawn, strict=True)
    ]


def measured_combinations(model: CellModel) -> list[str]:
    """Canonical labels of the combinations in the training data, sorted."""
    model._check_has_data("combinations")
    spelling, vocabulary = model._spelling, model.perturbations
    codes = registered_labels(model.adata_manager).codes
    cells, _ = distinct_combinations(codes, vocabulary)
    if not model._additive:  # a combination is the only perturbation of a cell
        joint = spelling.delimiter or "+"
        cells = [name.split(joint) for names in cells for name in names]
    found = sorted({spelling.join(parts) for parts in cells if len(parts) > 1})
    if not found:
        raise SAMSError(
            "The training data has no combinations. Name some in `combinations`; "
            "rank_unseen_pairs ranks all pairs."
        )
    return found


def counterfactual_expression(
    cells: CellReader, requested: Labels, output: str, target_sum: float, rates: np.ndarray
) -> np.ndarray:
    """Expression of cells under every label, ``(n_labels, n_cells, n_genes)``.

    ``rates``, ``(n_labels,)``: the proportion of cells that respond to a label.
    """
    module = cells.module
    contexts, context_of_cell = cells.contexts
    targets = list(drawn_effects(module, requested, 1, cells.seed, contexts))
    names = [_number_of(requested, label) for label in range(len(targets))]
    values = np.empty((len(targets), len(cells), cells.adata.n_vars), dtype=np.float32)
    for place, read, _, qz, _ in cells.encoded(cells.drawn(1).shifts):
        z_basal = cells.basal_states(qz, place, 1)
        level = cells.levels_of_responses(place, 1)[..., None]
        for label, (shift, direct) in enumerate(targets):
            responds = (level <= float(rates[label])).to(z_basal)
            where = context_of_cell[place]
            on_genes = None if direct is None else direct[:, where] * responds
            logits = module.decode(z_basal, shift[:, where] * responds, read.covariates, on_genes)
            if output == "counts":
                seeds = cells.noise.seeds(place, names[label])
                expression = sample_of_cells(module.likelihood, logits, read.size, seeds)
            else:
                expression = module.likelihood.rate(logits)
                if output == "lognorm":
                    expression = torch.log1p(target_sum * expression)
            values[label, place] = expression[0].cpu().numpy()
    return values


def _number_of(requested: Labels, row: int) -> int:
    """A number for a label with its doses, independent of the other labels."""
    given = requested.codes[row] >= 0
    text = repr([requested.codes[row, given].tolist(), requested.doses[row, given].tolist()])
    return number_of(text.encode())


def counterfactual_cells(
    values: np.ndarray, rows: pd.DataFrame, cells: CellReader, *, sparsely: bool
) -> AnnData:
    """Arrange expression under every label as (labels x cells) x genes, labels slowest."""
    n_labels, n_cells, n_genes = values.shape
    sources = np.tile(np.asarray(cells.adata.obs_names)[cells.positions], n_labels)
    obs = rows.iloc[np.repeat(np.arange(n_labels), n_cells)]
    flat = values.reshape(n_labels * n_cells, n_genes)
    # Annotations of the cells are kept, except for their perturbations.
    known = cells.adata.obs.iloc[cells.positions[np.tile(np.arange(n_cells), n_labels)]]
    of_others = [name for name in known if name in obs or str(name).startswith("_scvi")]
    known = known.drop(columns=[*of_others, *known.columns.intersection(["source_cell"])])
    labelled = [f"{name}:{source}" for name, source in zip(obs.index, sources, strict=True)]
    return AnnData(
        sparse.csr_matrix(flat) if sparsely else flat,
        # A cell may be requested twice.
        obs=pd.concat(
            [obs.assign(source_cell=sources).reset_index(drop=True), known.reset_index(drop=True)],
            axis=1,
        ).set_axis(make_index_unique(pd.Index(labelled))),
        var=pd.DataFrame(index=cells.adata.var_names),
    )
