"""Contexts in which perturbations act, and in which their effects differ."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from scvi_sams._checks import as_names, check_key, check_number
from scvi_sams._constants import RESULT_KEYS
from scvi_sams._fdr import mask_q_values, within
from scvi_sams._plurals import counted, plural
from scvi_sams.exceptions import InvalidArgumentError, SAMSError, UnknownPerturbationError
from scvi_sams.labels._names import check_known, listing
from scvi_sams.model._contexts import PairEffects, effects_of_pairs
from scvi_sams.model._perturbation_tests import q_values_of_pairs

if TYPE_CHECKING:
    from scvi_sams.model._sams_vae import SAMSVAE

logger = logging.getLogger("scvi.sams")

_N_COMPONENTS = 20
"""Arguments of the test on cells, as in ``model.test_perturbations``."""
_LIKELY = 0.5


def context_effects(
    model: SAMSVAE,
    perturbations: Sequence[str] | None = None,
    *,
    fdr: float = 0.05,
    key_added: str | None = RESULT_KEYS.CONTEXT_EFFECTS,
) -> pd.DataFrame:
    """List for each perturbation the contexts in which it acts, and where its effect differs.

    Parameters
    ----------
    model
        Trained on data with contexts, ``setup_anndata(context_key=...)``.
    perturbations
        Perturbations to report, in this order; ``None``: all. Calls are made over the whole screen
        in any case.
    fdr
        False discovery rate of ``acts``, and of ``differs``, over all measured pairs of a
        perturbation and a context.
    key_added
        Key of ``adata.uns`` of the training data to which the table is written; ``None`` writes
        nothing.

    Returns
    -------
    One row per pair, grouped by perturbation:

    - ``perturbation``, ``context``; ``n_cells``: training cells of the pair; ``is_measured``:
      whether it has cells. Other pairs have shared effects, and the prior for specific effects;
      they are never called.
    - ``p_acts``: posterior probability that it shifts some latent dimension there; ``q_value``: of
      a test, independent of the model, whether the cells of the pair differ from otherwise equal
      cells of the context without the perturbation, over all pairs (NaN: not tested).
    - ``p_differs``: posterior probability of a context-specific effect in addition to the shared
      one: an effect in this context only, a stronger or weaker effect, or none.
    - ``acts``: called by ``p_acts`` and by the test. ``differs``: called by ``p_differs``, if the
      test is significant for the perturbation in some context.
    - ``effect``, ``own_effect``: Euclidean norms over latent dimensions of the posterior mean of
      the total effect of a unit dose and of its context-specific part, in SD of basal states.
    - ``own_latents``: dimensions on which a called pair differs with a probability above 0.5,
      joined by ``", "``.
    - ``pattern``, of the perturbation: ``"shared"``: acts, and differs nowhere;
      ``"only in: ..."``: acts in these contexts, probably not in others, and the difference is
      called; ``"differs in: ..."``: acts in others too; ``"none"``: nothing is called;
      ``"unclear"``: acts in some contexts and probably not in others, but no difference is called,
      or it was measured in only one context.

    ``attrs["expected_false"]`` contains the expected proportions of false calls, from their
    probabilities, as ``{"acts": ..., "differs": ...}``; they are logged as well.

    Raises
    ------
    SAMSError
        If no contexts are registered, or the model was loaded without data.
    UnknownPerturbationError
        If a perturbation has no cells in the training data.
    InvalidArgumentError
        If ``perturbations`` is empty, or ``fdr`` is not between 0 and 1.

    Warnings
    --------
    If a pair has few cells, a shared effect is inferred from the cells of other contexts:
    ``p_acts`` may be high and ``acts`` false. Small differences in size are not detected.
    Probabilities and sizes refer to the latent state: direct effects on single genes
    (:meth:`~scvi_sams.SAMSVAE.get_direct_effects`) only affect the test.

    Notes
    -----
    Pairs are called as in :func:`scvi_sams.evaluation.active_at_fdr`, in order of their
    probabilities as long as the expected proportion of false ones is at most ``fdr``. The
    probability of a pair is the largest over its latent dimensions: combining all of them would add
    up prior probabilities of 0.01 to 0.02 from dimensions without information.

    On simulated screens of 50 perturbations with about 27 cells in each of three cell types (nine
    screens, three each with all, half and none of the effects in one type only), at most one in
    forty of the pairs called to act at 5 % was false, and four in five of the true ones were
    found; of pairs called to differ 0 to 10 % were false, all of them in perturbations that do
    differ. Without effects, or with random contexts on the screen of Papalexi et al. (2021),
    nothing was called to differ.

    Examples
    --------
    >>> screen = scvi_sams.datasets.simulate_screen(
    ...     n_genes=50, n_perturbations=3, n_combinations=0, n_cell_types=2
    ... )
    >>> scvi_sams.SAMSVAE.setup_anndata(screen, context_key="cell_type")
    >>> in_contexts = scvi_sams.SAMSVAE(screen, n_latent=4, n_hidden=16)
    >>> in_contexts.train(max_epochs=2, enable_progress_bar=False)
    >>> table = scvi_sams.tl.context_effects(in_contexts)
    >>> table[["perturbation", "context"]].head(2).to_numpy().tolist()
    [['P001', 'type_1'], ['P001', 'type_2']]
    >>> bool(table["p_acts"].between(0, 1).all())
    True
    """
    check_number(fdr=fdr, above=0, below=1)
    check_key(key_added=key_added)
    chosen = _check_model(model, perturbations)
    with torch.inference_mode():
        pairs = effects_of_pairs(model)
    q_value = q_values_of_pairs(model, _N_COMPONENTS)
    is_there = np.nan_to_num(q_value, nan=1.0) <= fdr
    acts = _called(pairs.p_acts, pairs.is_measured, fdr) & is_there
    differs = _called(pairs.p_differs, pairs.is_measured, fdr) & is_there.any(axis=1)[:, None]
    contexts = list(model.contexts)
    columns = {
        "perturbation": np.repeat(model.perturbations, len(contexts)),
        "context": np.tile(contexts, len(model.perturbations)),
        "n_cells": pairs.n_cells,
        "is_measured": pairs.is_measured,
        "p_acts": pairs.p_acts,
        "p_differs": pairs.p_differs,
        "q_value": q_value,
        "acts": acts,
        "differs": differs,
        "effect": np.linalg.norm(pairs.mean, axis=-1),
        "own_effect": np.linalg.norm(pairs.own_mean, axis=-1),
    }
    table = pd.DataFrame({name: np.ravel(values) for name, values in columns.items()})
    table["own_latents"] = _own_latents(pairs.own_masks, differs)
    table["pattern"] = np.repeat(_patterns(pairs, acts, differs, contexts), len(contexts))
    rows = np.array([model.perturbations.index(name) for name in chosen])[:, None]
    table = table.iloc[(rows * len(contexts) + np.arange(len(contexts))).ravel()]
    table = table.reset_index(drop=True)
    table.attrs["expected_false"] = {
        "acts": _expected_false(pairs.p_acts, acts),
        "differs": _expected_false(pairs.p_differs, differs),
    }
    n_act, n_differ = int(acts.any(axis=1).sum()), int(differs.any(axis=1).sum())
    logger.info(
        f"At an FDR of {fdr:g}, {n_act} of {counted(len(acts), 'perturbation')} "
        f"{plural(n_act, 'acts', 'act')} in some context and "
        f"{counted(n_differ, 'differs', 'differ')} between contexts; "
        f"{table.attrs['expected_false']['acts']:.1%} and "
        f"{table.attrs['expected_false']['differs']:.1%} of the calls are expected to be false."
    )
    if key_added is not None:
        model.adata.uns[key_added] = table.copy()
        model.keep_provenance(model.adata, key_added)
    return table


def _check_model(model: SAMSVAE, perturbations: Sequence[str] | None) -> list[str]:
    """Requested perturbations; an error if contexts cannot be compared."""
    if not model.contexts:
        raise SAMSError(
            "The model has no contexts. Name the column of adata.obs with the cell type, donor "
            "or line in SAMSVAE.setup_anndata(context_key=...), and train on these data."
        )
    if model.adata is None:
        raise SAMSError(
            "The model was loaded without data, but calls also use a test on the cells: load it "
            "with `adata`."
        )
    model._check_if_trained(warn=True)
    if perturbations is None:
        return list(model.perturbations)
    chosen = as_names("perturbations", perturbations)
    if not chosen:
        raise InvalidArgumentError("`perturbations` is empty: name some, or pass None for all.")
    without_cells = [name for name in chosen if name in model.unmeasured]
    if without_cells:
        raise UnknownPerturbationError(
            f"There are no cells with {listing(without_cells)}, but tl.context_effects tests cells."
            " For predictions in a context, use model.predict_ate(perturbations, context=)."
        )
    check_known(chosen, model.perturbations)
    return chosen


def _called(probability: np.ndarray, among: np.ndarray, fdr: float) -> np.ndarray:
    """Pairs called at the false discovery rate over the pairs in ``among``."""
    called = np.zeros(among.shape, dtype=bool)
    called[among] = within(mask_q_values(probability[among]), fdr)
    return called


def _expected_false(probability: np.ndarray, called: np.ndarray) -> float:
    return float(1 - probability[called].mean()) if called.any() else 0.0


def _own_latents(own_masks: np.ndarray, differs: np.ndarray) -> list[str]:
    is_own = (own_masks > _LIKELY) & differs[..., None]
    return [
        ", ".join(f"latent_{dimension}" for dimension in np.flatnonzero(row))
        for row in is_own.reshape(-1, is_own.shape[-1])
    ]


def _patterns(
    pairs: PairEffects, acts: np.ndarray, differs: np.ndarray, contexts: Sequence[str]
) -> list[str]:
    """Summarise each perturbation in a word."""
    names = np.array(contexts, dtype=object)
    does_not = pairs.is_measured & ~acts & (pairs.p_acts < _LIKELY)
    return [
        _pattern(names, *rows)
        for rows in zip(acts, does_not, differs, pairs.is_measured, strict=True)
    ]


def _pattern(
    names: np.ndarray,
    acts: np.ndarray,
    does_not: np.ndarray,
    differs: np.ndarray,
    is_measured: np.ndarray,
) -> str:
    if not acts.any() and not differs.any():
        return "none"
    if differs.any():
        is_partial = acts.any() and does_not.any()
        return (
            f"only in: {', '.join(names[acts])}"
            if is_partial
            else (f"differs in: {', '.join(names[differs])}")
        )
    return "unclear" if does_not.any() or is_measured.sum() == 1 else "shared"
