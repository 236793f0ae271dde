"""In which contexts perturbations act, and where they do something else than elsewhere."""

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
from scvi_sams.exceptions import InvalidArgumentError, SAMSError, UnknownPerturbationError
from scvi_sams.labels._names import check_known, listing
from scvi_sams.model._contexts import PairEffects, effects_of_pairs
from scvi_sams.model._perturbation_tests import q_values_of_pairs

if TYPE_CHECKING:
    from scvi_sams.model._sams_vae import SAMSVAE

logger = logging.getLogger("scvi.sams")

_N_COMPONENTS = 20
"""Of the test on cells, as in ``model.test_perturbations``."""
_LIKELY = 0.5


def context_effects(
    model: SAMSVAE,
    perturbations: Sequence[str] | None = None,
    *,
    fdr: float = 0.05,
    key_added: str | None = RESULT_KEYS.CONTEXT_EFFECTS,
) -> pd.DataFrame:
    """Say of each perturbation in which contexts it acts, and where it differs from the others.

    Parameters
    ----------
    model
        Trained on data with contexts, ``setup_anndata(context_key=...)``.
    perturbations
        Which to report, in this order; ``None`` for all. Calls are made over the whole screen
        whichever are asked for.
    fdr
        False discovery rate of ``acts``, and of ``differs``, over all measured pairs of a
        perturbation and a context.
    key_added
        Key of ``adata.uns`` of the training data that the table is written to; ``None`` writes
        nothing.

    Returns
    -------
    One row per pair, those of a perturbation together:

    - ``perturbation``, ``context``; ``n_cells``: training cells of the pair; ``is_measured``:
      whether it has cells. Of other pairs probabilities and effects are what contexts share and
      what the prior says, and nothing is called.
    - ``p_acts``: posterior probability that it moves some latent dimension there; ``q_value``: of a
      test whether the cells of the pair differ from cells of the context that lack nothing but the
      perturbation, whatever the model has learned, over all pairs (NaN: not tested).
    - ``p_differs``: posterior probability of an effect of the context's own, beside what contexts
      share: there is one there only, a stronger or weaker one, or none.
    - ``acts``: called by ``p_acts`` and by the test. ``differs``: called by ``p_differs``, where
      the test finds the perturbation in some context.
    - ``effect``, ``own_effect``: Euclidean norms over latent dimensions of the posterior mean of
      the whole effect of a unit dose and of the context's own part, in standard deviations of basal
      states.
    - ``own_latents``: dimensions on which a called pair differs, those that are more likely than
      not, joined by ``", "``.
    - ``pattern``, of the perturbation: ``"shared"``: acts, and differs nowhere; ``"only in: ..."``:
      acts in these contexts, probably not in others, and the difference is called;
      ``"differs in: ..."``: acts in others too; ``"none"``: nothing is called; ``"unclear"``: acts
      in some contexts and probably not in others, but no difference is called, or it was measured
      in one context only.

    ``attrs["expected_false"]`` has the expected shares of false ones among those called, by their
    probabilities, as ``{"acts": ..., "differs": ...}``; they are logged as well.

    Raises
    ------
    SAMSError
        If no contexts are registered, or the model was loaded without data.
    UnknownPerturbationError
        If no cell of the training data carries a perturbation.
    InvalidArgumentError
        If ``perturbations`` is empty, or ``fdr`` is not between 0 and 1.

    Warnings
    --------
    Where a pair has few cells, a shared effect is inferred from the cells of other contexts:
    ``p_acts`` may be high and ``acts`` false. A small difference in size is taken for none.
    Probabilities and sizes are those of the latent state: what a perturbation does to single genes
    beside that (:meth:`~scvi_sams.SAMSVAE.get_direct_effects`) is seen by the test alone.

    Notes
    -----
    Pairs are called as by :func:`scvi_sams.evaluation.active_at_fdr`, in the order of their
    probabilities as long as the expected share of false ones is at most ``fdr``. The probability of
    a pair is the largest of those of its latent dimensions: the product of all would count, for
    each, the hundredth or two that is left of the prior where cells say nothing.

    On simulated screens of 50 perturbations with some 27 cells in each of three cell types (nine
    screens, three each with all, half and none of the effects in one type only) none or one in
    forty of the pairs called to act at 5 % were false, and four in five of the true ones were
    found; of those called to differ 0 - 10 %, all of them in perturbations that do differ. Without
    effects, or with contexts drawn at random on the screen of Papalexi et al. (2021), nothing was
    called to differ.

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
    logger.info(
        f"At an FDR of {fdr:g}, {int(acts.any(axis=1).sum())} of {len(acts)} perturbations act in "
        f"some context and {int(differs.any(axis=1).sum())} differ between contexts; "
        f"{table.attrs['expected_false']['acts']:.1%} and "
        f"{table.attrs['expected_false']['differs']:.1%} of the calls are expected to be false."
    )
    if key_added is not None:
        model.adata.uns[key_added] = table.copy()
        model.keep_provenance(model.adata, key_added)
    return table


def _check_model(model: SAMSVAE, perturbations: Sequence[str] | None) -> list[str]:
    """Which perturbations are asked for; an error where nothing can be told of contexts."""
    if not model.contexts:
        raise SAMSError(
            "The model knows no contexts. Name the column of adata.obs with the cell type, donor "
            "or line in SAMSVAE.setup_anndata(context_key=...), and train on these data."
        )
    if model.adata is None:
        raise SAMSError(
            "The model was loaded without data, and calls rest on a test on the cells too: load it "
            "with `adata`."
        )
    model._check_if_trained(warn=True)
    if perturbations is None:
        return list(model.perturbations)
    chosen = as_names("perturbations", perturbations)
    if not chosen:
        raise InvalidArgumentError("`perturbations` is empty: name some, or None for all.")
    without_cells = [name for name in chosen if name in model.unmeasured]
    if without_cells:
        raise UnknownPerturbationError(
            f"No cell carries {listing(without_cells)}, and tl.context_effects tests cells. For "
            "what the model predicts in a context, use model.predict_ate(perturbations, context=)."
        )
    check_known(chosen, model.perturbations)
    return chosen


def _called(probability: np.ndarray, among: np.ndarray, fdr: float) -> np.ndarray:
    """Pairs that are called at the false discovery rate over those ``among`` which."""
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
    """Sum up each perturbation in a word."""
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
