"""Agreement of masks between runs, and consensus masks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple, Protocol

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score

from scvi_sams._checks import check_integer, check_table
from scvi_sams._fdr import active_at_fdr
from scvi_sams.exceptions import SAMSError
from scvi_sams.interpretation._perturbations import unit_rows
from scvi_sams.metrics._profiles import ratio
from scvi_sams.metrics._recovery import check_same_rows

_REPRODUCIBLE = 0.5
"""Mean Jaccard index of active entries below which masks are reported as not reproducible."""
_ODD = 0.25
"""Difference of a run's agreement from that of the others at which it is reported."""
_N_WORST = 5


class MaskedModel(Protocol):
    """A trained model with masks and effects."""

    def get_perturbation_masks(self, *, key_added: str | None = ...) -> pd.DataFrame:
        """Return inclusion probabilities, perturbations x latent."""

    def get_perturbation_effects(
        self, *, key_added: str | None = ...
    ) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Return mean and SD of the masked effects, perturbations x latent."""


@dataclass(frozen=True, eq=False)
class MaskStability:
    """Agreement of runs on the latent dimensions that each perturbation shifts.

    Attributes
    ----------
    pairs
        One row per pair of runs, ``first`` and ``second`` (their positions): ``jaccard`` of the
        active entries of matched latents (entries of unmatched latents count as disagreement),
        ``cosine`` of the mean effects, and ``adjusted_rand_index`` of the groups of perturbations
        with the same strongest active latent. The last does not require matching.
    perturbations
        Per perturbation: ``jaccard`` of its active latents, averaged over pairs (two empty masks
        agree: 1), and ``n_active``, their number, averaged over runs.
    latents
        Per latent of the first run: ``cosine``, the absolute cosine similarity of its effects with
        those of its match, averaged over the other runs (0 without a match; NaN for a latent
        without effects in the first run), and ``n_active`` perturbations in the first run.
    runs
        Per run: ``jaccard``, its mean over the pairs with the run, and ``n_active`` entries. Use it
        to detect a bad run, and to choose the reference of :func:`consensus_masks`.
    """

    pairs: pd.DataFrame
    perturbations: pd.DataFrame
    latents: pd.DataFrame
    runs: pd.DataFrame


class ConsensusMasks(NamedTuple):
    """Consensus of runs: perturbations of the first run x latents of the reference run.

    Attributes
    ----------
    masks
        Inclusion probability, averaged over the runs.
    effects
        Mean effect with the sign of the reference run, averaged over the runs.
    support
        Proportion of runs in which the entry is active.
    """

    masks: pd.DataFrame
    effects: pd.DataFrame
    support: pd.DataFrame


class _Run(NamedTuple):
    masks: pd.DataFrame
    effects: pd.DataFrame
    active: pd.DataFrame

    def matched_to(self, reference: _Run) -> _Matching:
        """Match latents by their mean effects; those without active entries are not matched.

        Their values are noise. With few perturbations, noise can by chance be more similar to other
        noise than effects of two runs are, and would take their matches.
        """
        if self is reference:
            n_latent = self.masks.shape[1]
            return _Matching(np.arange(n_latent), np.ones(n_latent, dtype=int), np.ones(n_latent))
        live = (
            np.where(run.active.any(axis=0), run.effects, 0).astype(np.float64)
            for run in (self, reference)
        )
        return _match(*live)


class _Matching(NamedTuple):
    """Match of every latent of a reference: position (-1: none), sign and cosine (0: none)."""

    positions: np.ndarray
    signs: np.ndarray
    cosines: np.ndarray

    def place(self, table: pd.DataFrame) -> np.ndarray:
        """Reorder a table as in the reference; 0 for latents without a match."""
        values = table.to_numpy(np.float64)
        padded = np.column_stack([values, np.zeros(len(values))])
        return padded[:, self.positions]


def align_latents(effects: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """Match the latent dimensions of a run one to one with those of a reference run.

    Latent dimensions have no order and no sign: another run may find the same ones in another order
    and with opposite signs. The matching has the largest sum of absolute cosine similarities
    between columns, by the Hungarian algorithm.

    Parameters
    ----------
    effects, reference
        Perturbations x latent, of the same perturbations: mean effects (or masks, which have no
        sign). The numbers of latents may differ. Set latents without active entries to 0
        (see :func:`active_at_fdr`), otherwise their noise may be matched with noise.

    Returns
    -------
    One row per latent of ``reference``, in its order: ``latent``, the column of ``effects`` that
    matches it (``None`` if none does), ``sign`` (1 or -1; 0 if none) and ``cosine``, their absolute
    cosine similarity. Zero columns, and columns with a similarity of 0 to all remaining ones, are
    not matched.

    Raises
    ------
    UnknownPerturbationError
        If a perturbation is in one table only.
    SAMSError
        If an effect is not finite.

    Examples
    --------
    The second run has the same two latents in another order, and one with the opposite sign:

    >>> reference = pd.DataFrame({"a": [1.0, 0.0, 2.0], "b": [0.0, 3.0, 0.0]})
    >>> effects = pd.DataFrame({"x": [0.0, 2.0, 0.0], "y": [-1.0, 0.0, -2.0]})
    >>> scvi_sams.evaluation.align_latents(effects, reference)
      latent  sign  cosine
    a      y    -1     1.0
    b      x     1     1.0
    """
    check_table(effects=effects, reference=reference)
    sides = "the effects and the reference"
    check_same_rows(effects.index, reference.index, sides, "perturbations")
    matching = _match(
        effects.loc[reference.index].to_numpy(np.float64), reference.to_numpy(np.float64)
    )
    partners = [None if p < 0 else effects.columns[p] for p in matching.positions]
    return pd.DataFrame(
        {
            "latent": pd.Series(partners, index=reference.columns, dtype=object),
            "sign": matching.signs,
            "cosine": matching.cosines,
        },
        index=reference.columns,
    )


def mask_stability(models: Sequence[MaskedModel], *, fdr: float = 0.05) -> MaskStability:
    """Measure the reproducibility of masks between models trained with different seeds.

    It concerns the masks themselves: the test of :func:`scvi_sams.tl.called_masks`, which is the
    same in each run, is not used.

    Entries are active at a false discovery rate (:func:`active_at_fdr`); latents are matched
    between each pair of runs by their mean effects (:func:`align_latents`), except latents without
    any active entry, which are not matched.

    Parameters
    ----------
    models
        At least two trained models with the same perturbations; their numbers of latents may
        differ. With different random splits of the cells, sampling of cells is included.
    fdr
        False discovery rate of each run's active entries.

    Returns
    -------
    Agreement per pair of runs, per perturbation and per latent.

    Raises
    ------
    SAMSError
        If there are fewer than two models, ``fdr`` is not between 0 and 1, or masks or effects are
        not finite.
    UnknownPerturbationError
        If the models have different perturbations.

    Warns
    -----
    UserWarning
        If one of three or more runs differs from the others (its mean Jaccard index is lower by
        0.25 than theirs with one another), the mean over pairs is below 0.5, or no run has an
        active entry.

    Examples
    --------
    Models of one screen with different seeds; here a model and itself:

    >>> stability = scvi_sams.evaluation.mask_stability([model, model])
    >>> stability.pairs[["first", "second", "jaccard"]].values.tolist()
    [[0.0, 1.0, 1.0]]
    """
    runs = _read_runs(models, fdr)
    pairs, jaccards, cosines = [], [], []
    for first, second in combinations(range(len(runs)), 2):
        matching = runs[second].matched_to(runs[first])
        agreement, jaccard = _compare(runs[first], runs[second], matching)
        pairs.append({"first": first, "second": second, **agreement})
        jaccards.append(jaccard)
        if first == 0:
            cosines.append(matching.cosines)
    names = runs[0].masks.index
    perturbations = pd.DataFrame(
        {
            "jaccard": np.mean(jaccards, axis=0),
            "n_active": np.mean([run.active.sum(axis=1) for run in runs], axis=0),
        },
        index=names,
    )
    n_active = runs[0].active.sum(axis=0)
    cosine = np.where(n_active > 0, np.mean(cosines, axis=0), np.nan)
    latents = pd.DataFrame({"cosine": cosine, "n_active": n_active})
    of_pairs = pd.DataFrame(pairs)
    of_runs = pd.DataFrame(
        {
            "jaccard": [
                of_pairs.loc[_has(of_pairs, run), "jaccard"].mean() for run in range(len(runs))
            ],
            "n_active": [int(run.active.to_numpy().sum()) for run in runs],
        },
        index=pd.RangeIndex(len(runs), name="run"),
    )
    stability = MaskStability(of_pairs, perturbations, latents, of_runs)
    for message in (_odd_run(stability), _instability(stability, fdr)):
        if message is not None:
            warnings.warn(message, UserWarning, stacklevel=2)
    return stability


def consensus_masks(
    models: Sequence[MaskedModel], *, reference: int = 0, fdr: float = 0.05
) -> ConsensusMasks:
    """Average masks and effects over runs, in the latent dimensions of one of them.

    Latents of every run are matched with those of the reference run as in :func:`mask_stability`,
    and get their sign. A run without a match for a latent contributes 0 to it.

    Parameters
    ----------
    models, fdr
        As for :func:`mask_stability`; a run supports the entries that are active.
    reference
        Position of the run whose latents are kept, in ``models``.

    Returns
    -------
    Mean inclusion probabilities, mean effects and support. Call entries by
    ``scvi_sams.tl.called_masks(models[reference], masks=consensus.masks)``.

    Raises
    ------
    SAMSError
        As for :func:`mask_stability`, and if there is no model at ``reference``.
    UnknownPerturbationError
        If the models have different perturbations.

    Examples
    --------
    >>> consensus = scvi_sams.evaluation.consensus_masks([model, model])
    >>> consensus.masks.shape, consensus.support.shape
    ((8, 6), (8, 6))
    """
    check_integer(at_least=None, reference=reference)
    runs = _read_runs(models, fdr)
    if not 0 <= reference < len(runs):
        raise SAMSError(
            f"`reference` is the position of one of the {len(runs)} models, not {reference}."
        )
    kept = runs[reference]
    totals = [np.zeros(kept.masks.shape) for _ in ConsensusMasks._fields]
    for run in runs:
        matching = run.matched_to(kept)
        placed = (
            matching.place(run.masks),
            matching.place(run.effects) * matching.signs,
            matching.place(run.active),
        )
        for total, values in zip(totals, placed, strict=True):
            total += values / len(runs)
    return ConsensusMasks(
        *(pd.DataFrame(t, index=kept.masks.index, columns=kept.masks.columns) for t in totals)
    )


def _read_runs(models: Sequence[MaskedModel], fdr: float) -> list[_Run]:
    models = list(models)
    if len(models) < 2:
        raise SAMSError(
            f"Runs can only be compared if there are at least two; there is {len(models)}. Train "
            "the model again with another scvi.settings.seed."
        )
    tables = [model.get_perturbation_masks(key_added=None) for model in models]
    names = tables[0].index
    for position, table in enumerate(tables):
        check_same_rows(names, table.index, f"run 0 and run {position}", "perturbations")
    effects = [model.get_perturbation_effects(key_added=None)[0] for model in models]
    return [
        _Run(masks.loc[names], mean.loc[names], active_at_fdr(masks.loc[names], fdr))
        for masks, mean in zip(tables, effects, strict=True)
    ]


def _match(effects: np.ndarray, reference: np.ndarray) -> _Matching:
    if not (np.isfinite(effects).all() and np.isfinite(reference).all()):
        raise SAMSError("Some effects are not finite: training diverged. Remove that run.")
    cosine = unit_rows(reference.T) @ unit_rows(effects.T).T
    rows, columns = linear_sum_assignment(np.abs(cosine), maximize=True)
    found = cosine[rows, columns] != 0
    rows, columns = rows[found], columns[found]
    n_reference = reference.shape[1]
    positions, cosines = np.full(n_reference, -1), np.zeros(n_reference)
    positions[rows], cosines[rows] = columns, cosine[rows, columns]
    return _Matching(positions, np.sign(cosines).astype(int), np.abs(cosines))


def _compare(first: _Run, second: _Run, matching: _Matching) -> tuple[dict[str, float], np.ndarray]:
    """Return the agreement of two matched runs, and the Jaccard index of each perturbation."""
    shared = (first.active.to_numpy() & (matching.place(second.active) > 0)).sum(axis=1)
    # Active entries of unmatched latents are in the union but not in the intersection.
    union = first.active.sum(axis=1).to_numpy() + second.active.sum(axis=1).to_numpy() - shared
    product = np.vdot(first.effects, matching.place(second.effects) * matching.signs)
    agreement = {
        "jaccard": float(_jaccard(shared.sum(), union.sum())),
        "cosine": ratio(product, np.linalg.norm(first.effects) * np.linalg.norm(second.effects)),
        "adjusted_rand_index": float(adjusted_rand_score(_groups(first), _groups(second))),
    }
    return agreement, _jaccard(shared, union)


def _jaccard(shared: np.ndarray, union: np.ndarray) -> np.ndarray:
    return np.where(union > 0, shared / np.maximum(union, 1), 1.0)


def _groups(run: _Run) -> np.ndarray:
    """Group perturbations by their strongest active latent; -1 for those without one."""
    strength = run.effects.abs().where(run.active, -1).to_numpy()
    return np.where(run.active.any(axis=1), strength.argmax(axis=1), -1)


def _has(pairs: pd.DataFrame, run: int) -> pd.Series:
    return (pairs["first"] == run) | (pairs["second"] == run)


def _odd_run(stability: MaskStability) -> str | None:
    """Describe a run that does not agree with the others, if the others agree."""
    run = int(stability.runs["jaccard"].to_numpy().argmin())
    is_of_run = _has(stability.pairs, run)
    if is_of_run.all():
        return None
    of_run = stability.pairs.loc[is_of_run, "jaccard"].mean()
    of_others = stability.pairs.loc[~is_of_run, "jaccard"].mean()
    if of_run > of_others - _ODD:
        return None
    return (
        f"Run {run} differs from the others: it shares {of_run:.2f} of the active entries with "
        f"them, and they share {of_others:.2f} with one another (Jaccard index). It has "
        f"{stability.runs['n_active'][run]} active entries, the others "
        f"{stability.runs['n_active'].drop(run).median():g}. Do not interpret that run: remove it, "
        "or keep the entries that most runs support (consensus_masks, with another run as "
        "`reference`)."
    )


def _instability(stability: MaskStability, fdr: float) -> str | None:
    """Describe that masks are not reproducible, or that there are none."""
    jaccard = stability.pairs["jaccard"].mean()
    if not stability.perturbations["n_active"].any():
        return (
            f"No run has an active mask entry at a false discovery rate of {fdr:g}, so agreement "
            "of the runs means nothing. Train for longer, on more cells, or allow a higher rate."
        )
    if jaccard >= _REPRODUCIBLE:
        return None
    worst = stability.perturbations["jaccard"].sort_values(kind="stable").head(_N_WORST)
    listed = ", ".join(f"{name} ({value:.2f})" for name, value in worst[worst < 1].items())
    return (
        f"The masks are not reproducible: runs share {jaccard:.2f} of their active entries "
        f"(Jaccard index, mean over {len(stability.pairs)} pairs). It is lowest for {listed}. "
        "Do not interpret single masks of one run: keep entries that most runs support "
        "(consensus_masks), or measure more cells of these perturbations."
    )
