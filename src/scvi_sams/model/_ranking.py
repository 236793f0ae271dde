"""Rank perturbations, or pairs of them, to screen next, by predictions for all.

For many pairs, the linear part of their effects, the sum of both effects, is computed first; only
pairs with a large sum are predicted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations_with_replacement, product
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch

from scvi_sams._checks import as_names
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams._plurals import counted, plural
from scvi_sams.data._field import PerturbationField, registered_labels
from scvi_sams.exceptions import InvalidArgumentError, SAMSError
from scvi_sams.labels._labels import Labels
from scvi_sams.labels._names import check_known, listing
from scvi_sams.model._average_effects import norm_columns
from scvi_sams.model._contrast import Contrast, DrawnEffect, norms
from scvi_sams.model._counterfactual import (
    Interaction,
    drawn_effects,
    drawn_on_genes,
    in_contexts,
    noise_on_genes,
    sampled_shifts,
)
from scvi_sams.model._noise import new_seed
from scvi_sams.model._screen_model import ScreenModel
from scvi_sams.model._strongest_sums import strongest_sums
from scvi_sams.model._variance_reduction import most_telling, regressions_of_features
from scvi_sams.module._direct_effects import DirectEffects
from scvi_sams.module._masked_effects import MaskedEffectsModule

logger = logging.getLogger("scvi.sams")

_PERTURBATIONS_PER_BLOCK = 32
"""Perturbations in a block; pairs between two blocks are processed at a time."""
_ENTRIES_PER_BLOCK = 2**21
"""Labels x contexts x genes predicted at a time: estimates for unmeasured perturbations take about
ten arrays of 8 megabytes, and a decoder pass of seconds."""
_SHORTLISTED = 20
"""Number of predicted pairs for each requested row."""
_ROWS_AT_ONCE = 1024

Objective = Literal["effect", "novelty", "uncertainty"]
OBJECTIVES = get_args(Objective)


# Pairs of measured perturbations ---------------------------------------------------------------


def rows_of(model: ScreenModel, perturbations: Sequence[str] | None) -> list[int]:
    """Codes of at least two measured perturbations, ascending."""
    names = as_names(
        "perturbations", model.perturbations if perturbations is None else perturbations
    )
    check_known(names, model.perturbations)
    rows = pd.Index(model.perturbations).get_indexer(pd.Index(names))
    if len(set(rows)) < 2:
        raise SAMSError("Pairs need at least two perturbations.")
    return sorted({int(row) for row in rows})


def _warn_of_unmeasured_singles(model: ScreenModel, rows: list[int]) -> None:
    """Log a warning that names perturbations without cells that have them alone."""
    codes = registered_labels(model.adata_manager).codes
    alone = codes[(codes >= 0).sum(axis=1) == 1].max(axis=1, initial=-1)
    missing = [model.perturbations[row] for row in sorted(set(rows) - set(alone.tolist()))]
    if missing:
        logger.warning(
            f"{len(missing)} of {counted(len(rows), 'perturbation')} "
            f"{plural(len(missing), 'has', 'have')} no cells with them alone: "
            f"{listing(missing, limit=20)}. Their effects are known only from combinations, and "
            "scores of pairs with them are not reliable. To rank the others, name them as "
            "`perturbations`."
        )


def measured_pairs(model: ScreenModel) -> np.ndarray:
    """Codes of pairs that registered cells have alone, ``(M, 2)``, ascending."""
    model._check_has_data("perturbations")
    codes = registered_labels(model.adata_manager).codes
    pairs = codes[(codes >= 0).sum(axis=1) == 2]
    return np.unique(np.sort(pairs, axis=1)[:, -2:], axis=0).reshape(-1, 2)


def unseen_pairs(
    model: ScreenModel, rows: list[int], by: str, contrast: Contrast, interval: float
) -> pd.DataFrame:
    """Table of unmeasured pairs, as returned by ``rank_unseen_pairs``."""
    measured = {(int(a), int(b)) for a, b in measured_pairs(model)}
    _warn_of_unmeasured_singles(model, rows)
    n_posterior_samples = len(contrast.z_basal)
    seed, asked = new_seed(), torch.as_tensor(rows, device=model.module.device)[:, None]
    where = contrast.contexts
    effects = in_contexts(model.module, asked, torch.ones_like(asked), where)[2][:, 0]
    table = sampled_shifts(model.module, effects, n_posterior_samples, seed)
    table = table.expand(n_posterior_samples, -1, -1).unflatten(1, (len(rows), -1))
    noise = noise_on_genes(model.module, n_posterior_samples, seed)

    def drawn(place: int) -> DrawnEffect:
        row = np.array([rows[place]])
        on_genes = drawn_on_genes(model.module, row, np.ones(1), noise, where)
        return DrawnEffect(table[:, place], on_genes)

    blocks = [
        range(start, min(start + _PERTURBATIONS_PER_BLOCK, len(rows)))
        for start in range(0, len(rows), _PERTURBATIONS_PER_BLOCK)
    ]
    places, summaries = [], []
    for left, right in combinations_with_replacement(blocks, 2):
        pairs = [
            (i, j) for i, j in product(left, right) if i < j and (rows[i], rows[j]) not in measured
        ]
        members = {i: drawn(i) for i in {*(k for pair in pairs for k in pair)}}
        singles = {i: contrast.effect(member) for i, member in members.items()}
        for i, j in pairs:
            effect = contrast.effect(members[i] + members[j])
            summaries.append(Interaction(effect, singles[i] + singles[j]).summary(interval))
            places.append((rows[i], rows[j]))
    if not places:
        raise SAMSError("All pairs of these perturbations were measured.")
    codes = np.array(places)
    counts = model._state(REGISTRY_KEYS.PERTURBATIONS)[PerturbationField.CELLS_PER_PERTURBATION_KEY]
    support = pd.Series(np.asarray(counts)[codes].min(axis=1), name="n_cells")
    found = pd.concat([_names_of(model, codes), pd.DataFrame(summaries), support], axis=1)
    strength = found["effect_norm"] if by == "effect" else found["score"].abs()
    order = np.argsort(-strength.to_numpy(), kind="stable")
    return found.iloc[order].reset_index(drop=True)


def _names_of(model: ScreenModel, codes: np.ndarray) -> pd.DataFrame:
    """Columns with the names of labels ``(N, 1)`` or ``(N, 2)``."""
    names = np.array([*model.perturbations, *model.unmeasured], dtype=object)[codes]
    if codes.shape[1] == 1:
        return pd.DataFrame(names, columns=["perturbation"])
    pairs = pd.DataFrame(names, columns=["first", "second"])
    pairs["combination"] = [model._spelling.join(sorted(pair)) for pair in names]
    return pairs


# Perturbations without cells -------------------------------------------------------------------


def check_has_features(model: ScreenModel) -> None:
    """Raise unless the model is trained with features of perturbations."""
    if not model.module.effect_rows.n_unmeasured:
        raise SAMSError(
            "The model has only measured perturbations: make it with `perturbation_features` of "
            "others as well. rank_unseen_pairs ranks pairs of measured ones."
        )
    if not model.is_trained:
        raise SAMSError("The model is not trained: there is nothing to rank by. Call train first.")


def codes_of_candidates(
    model: ScreenModel, candidates: Sequence[str] | None, *, pairs: bool
) -> np.ndarray:
    """Codes of candidates, ascending: unmeasured perturbations, or any for pairs."""
    known = [*model.perturbations, *model.unmeasured]
    if candidates is None:
        return np.arange(0 if pairs else len(model.perturbations), len(known))
    names = as_names("candidates", candidates)
    check_known(names, known)
    codes = np.unique(pd.Index(known).get_indexer(pd.Index(names)))
    if pairs and len(codes) < 2:
        raise InvalidArgumentError("Pairs need at least two `candidates`.")
    if not len(codes):
        raise InvalidArgumentError("`candidates` is empty: name some, or pass None for all.")
    measured = [known[code] for code in codes if code < len(model.perturbations)]
    if measured and not pairs:
        raise InvalidArgumentError(
            f"`candidates` contains {listing(measured)}, which were measured. Remove "
            "perturbations in model.perturbations, or pass pairs=True for pairs with them."
        )
    return codes


class _Predicted(NamedTuple):
    """Mean effects on genes of N labels, and columns of their norms."""

    effects: np.ndarray
    """``(N, G)``, single precision."""
    columns: pd.DataFrame


class _Predictor:
    """Predicts labels at unit doses; estimates made for one call are dropped afterwards."""

    def __init__(self, model: ScreenModel, contrast: Contrast, interval: float) -> None:
        self._model, self._contrast, self._interval = model, contrast, interval
        self._seed = new_seed()

    def blocks(self, codes: np.ndarray) -> Iterator[tuple[slice, _Predicted]]:
        """Predict labels, ``(N, K)``, in blocks."""
        module, contrast = self._model.module, self._contrast
        n_draws = len(contrast.z_basal)
        vocabulary = (*self._model.perturbations, *self._model.unmeasured)
        labels = Labels(codes, (codes >= 0).astype(np.float32), vocabulary, self._model._spelling)
        n_genes = module.likelihood.n_genes
        n_contexts = 1 if contrast.contexts is None else len(contrast.contexts)
        n_block = max(1, _ENTRIES_PER_BLOCK // (n_genes * n_contexts))
        for start in range(0, len(codes), n_block):
            part = slice(start, min(start + n_block, len(codes)))
            effects = np.empty((part.stop - start, n_genes), np.float32)
            of_draws = torch.empty(n_draws, len(effects), device=module.device)
            drawn = drawn_effects(module, labels[part], n_draws, self._seed, contrast.contexts)
            with _forgetting(module.direct):
                for row, cause in enumerate(drawn):
                    effect = contrast.effect(cause)
                    effects[row] = effect.mean(dim=0).cpu().numpy()
                    of_draws[:, row] = norms(effect)
            columns = pd.DataFrame(norm_columns(of_draws, self._interval))
            yield part, _Predicted(effects, columns)

    def all(self, codes: np.ndarray) -> _Predicted:
        """Predict single perturbations, ``(N,)``, possibly none."""
        effects = np.empty((len(codes), self._model.module.likelihood.n_genes), np.float32)
        columns = [pd.DataFrame()]
        for part, predicted in self.blocks(codes[:, None]):
            effects[part] = predicted.effects
            columns.append(predicted.columns)
        return _Predicted(effects, pd.concat(columns, ignore_index=True))


@contextmanager
def _forgetting(direct: DirectEffects | None) -> Iterator[None]:
    """Drop estimates made inside, whose memory grows; earlier ones are kept."""
    before = None if direct is None else direct.answers
    try:
        yield
    finally:
        if direct is not None and before is not None:
            direct.answers = before


class _Nearest(NamedTuple):
    """Measured effect with the most similar direction to each effect, and its factor."""

    place: np.ndarray
    similarity: np.ndarray
    """Cosine."""
    factor: np.ndarray
    """Factor of the measured effect with the smallest distance; never negative."""

    @classmethod
    def of(cls, effects: np.ndarray, measured: np.ndarray) -> _Nearest:
        """Find them for ``(N, G)`` among ``(T, G)``."""
        found = []
        sizes = np.linalg.norm(measured, axis=1).clip(np.finfo(np.float32).tiny)
        directions = measured / sizes[:, None]
        for start in range(0, len(effects), _ROWS_AT_ONCE):
            part = effects[start : start + _ROWS_AT_ONCE]
            along = part @ directions.T
            place = along.argmax(axis=1)
            along = along[np.arange(len(part)), place]
            own = np.linalg.norm(part, axis=1).clip(np.finfo(np.float32).tiny)
            found.append((place, along / own, along.clip(min=0) / sizes[place]))
        return cls(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def shown(self, measured: np.ndarray, rows: np.ndarray | slice) -> np.ndarray:
        """Parts of effects in some rows explained by measured perturbations, ``(R, G)``."""
        return self.factor[rows, None] * measured[self.place[rows]]


def unmeasured_singles(
    model: ScreenModel,
    codes: np.ndarray,
    objective: Objective,
    top: int,
    contrast: Contrast,
    interval: float,
) -> pd.DataFrame:
    """Table of perturbations, as returned by ``rank_unmeasured``."""
    predictor = _Predictor(model, contrast, interval)
    telling = None
    if objective == "uncertainty":
        chosen, telling = _most_telling(model, codes, top, contrast)
        codes = codes[chosen]
    measured = predictor.all(np.arange(len(model.perturbations))).effects
    effects, columns = predictor.all(codes)
    nearest = _Nearest.of(effects, measured)
    if telling is not None:
        order, score = np.arange(len(codes)), telling
    else:
        shown = nearest.shown(measured, slice(None)) if objective == "novelty" else 0.0
        score = np.linalg.norm(effects - shown, axis=1)
        order = np.argsort(-score, kind="stable")[:top]
    found = _names_of(model, codes[:, None]).assign(score=score.astype(np.float64))
    return _table(model, found, columns, nearest, order)


def unmeasured_pairs(
    model: ScreenModel,
    codes: np.ndarray,
    objective: Objective,
    top: int,
    contrast: Contrast,
    interval: float,
) -> pd.DataFrame:
    """Table of pairs, as returned by ``rank_unmeasured``."""
    left_out = _positions_of_pairs(measured_pairs(model), codes)
    n_pairs = len(codes) * (len(codes) - 1) // 2 - len(left_out)
    if not n_pairs:
        raise SAMSError("All pairs of these perturbations were measured.")
    predictor = _Predictor(model, contrast, interval)
    measured = predictor.all(np.arange(len(model.perturbations))).effects
    is_measured = codes < len(measured)
    parts = np.empty((len(codes), measured.shape[1]), np.float32)
    parts[is_measured] = measured[codes[is_measured]]
    parts[~is_measured] = predictor.all(codes[~is_measured]).effects
    of_parts = _Nearest.of(parts, measured)
    if objective == "novelty":
        for start in range(0, len(parts), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            parts[rows] -= of_parts.shown(measured, rows)
        parts[is_measured] = 0  # exactly, without rounding error
    shortlist = strongest_sums(parts, min(n_pairs, _SHORTLISTED * top), left_out)
    # Pairs with a perturbation in common are adjacent, so that it is estimated once.
    order = np.lexsort([shortlist.second, shortlist.first])
    first, second = shortlist.first[order], shortlist.second[order]
    score = np.empty(len(order))
    columns, nearest = [], []
    for part, predicted in predictor.blocks(codes[np.stack([first, second], axis=1)]):
        effects = predicted.effects
        nearest.append(_Nearest.of(effects, measured))
        columns.append(predicted.columns)
        if objective == "novelty":
            effects = effects - of_parts.shown(measured, first[part])
            effects -= of_parts.shown(measured, second[part])
        score[part] = np.linalg.norm(effects, axis=1)
    found = _names_of(model, codes[np.stack([first, second], axis=1)])
    table = _table(
        model,
        found.assign(score=score, linear_score=shortlist.norms[order]),
        pd.concat(columns, ignore_index=True),
        _Nearest(*(np.concatenate(column) for column in zip(*nearest, strict=True))),
        np.argsort(-score, kind="stable")[:top],
    )
    table.attrs = {
        "n_pairs": n_pairs,
        "n_predicted": len(order),
        "largest_linear_score_left_out": shortlist.largest_left_out,
    }
    return table


def _positions_of_pairs(pairs: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Positions in ``codes`` of the pairs that are in it."""
    place = np.searchsorted(codes, pairs).clip(max=len(codes) - 1)
    return place[(codes[place] == pairs).all(axis=1)]


def _most_telling(
    model: ScreenModel, codes: np.ndarray, top: int, contrast: Contrast
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the candidates that are most informative about all, and by how much."""
    module = model.module
    assert isinstance(module, MaskedEffectsModule)
    assert module.features is not None
    of_shifts = [
        contrast.effect(DrawnEffect(shift.expand(len(contrast.z_basal), 1, -1), None)).mean(dim=0)
        for shift in torch.eye(module.n_shift, device=module.device)
    ]
    squares = torch.stack(of_shifts).square().sum(dim=1).double().cpu().numpy()
    is_used = ~module.masks.is_excluded.cpu().numpy()
    regressions = regressions_of_features(module.features, codes, is_used, squares)
    chosen, shares = most_telling(regressions, top)
    if not shares.any():
        raise SAMSError(
            "Features are uninformative about masks and effects in this screen, so no "
            "perturbation is informative about others: use objective='effect' or 'novelty', or "
            "other features."
        )
    return chosen, shares


def _table(
    model: ScreenModel,
    found: pd.DataFrame,
    columns: pd.DataFrame,
    nearest: _Nearest,
    order: np.ndarray,
) -> pd.DataFrame:
    table = pd.concat([found, columns], axis=1).assign(
        nearest=np.array(model.perturbations, dtype=object)[nearest.place],
        similarity=nearest.similarity.astype(np.float64),
    )
    return table.iloc[order].reset_index(drop=True)
