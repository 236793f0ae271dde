"""Call mask entries, based on the masks and on a test that does not depend on the model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from anndata import AnnData

from scvi_sams._checks import as_numbers, check_key, check_number, check_table
from scvi_sams._constants import RESULT_KEYS
from scvi_sams._fdr import active_at_fdr, mask_q_values, within
from scvi_sams._plurals import counted, plural
from scvi_sams.interpretation._stored import MASKS, TESTS, result_of
from scvi_sams.labels._names import check_has

if TYPE_CHECKING:
    from scvi_sams.model._mechanisms import MaskMixin

logger = logging.getLogger("scvi.sams")

_FEW_OF_THEM = 0.1
"""Proportion of perturbations called by masks in which the test may disagree without a warning."""


def entry_q_values(
    model: MaskMixin | AnnData,
    *,
    masks: pd.DataFrame | None = None,
    tests: pd.DataFrame | None = None,
    key_added: str | None = RESULT_KEYS.Q_VALUES,
) -> pd.DataFrame:
    """Return a q-value for each mask entry, from the masks and a test on the cells.

    The larger of two: the expected proportion of false entries among all that are at least as
    probable (:func:`scvi_sams.evaluation.active_at_fdr`), and the q-value of the test whether the
    cells of the perturbation differ from control cells, which does not depend on the model
    (:meth:`~scvi_sams.SAMSVAE.test_perturbations`).

    Parameters
    ----------
    model
        Trained model with masks; or an AnnData in whose ``uns`` its masks and tests are stored, to
        which nothing is written.
    masks
        Inclusion probabilities instead of those of the model, such as the consensus of several runs
        (:func:`scvi_sams.evaluation.consensus_masks`).
    tests
        Result of ``model.test_perturbations``; ``None`` computes it.
    key_added
        Key of ``adata.uns`` of the training data to which the table is written; ``None`` writes
        nothing.

    Returns
    -------
    Perturbations x latent dimensions, from 0 to 1. 1 if a perturbation could not be tested.

    Warnings
    --------
    The test is about the perturbation as a whole. Which of its latent dimensions are shifted
    depends on the model alone (:doc:`measured error rates </identifiability>`).

    Raises
    ------
    MissingKeyError
        If ``tests`` has no q-values, or ``masks`` has perturbations that ``tests`` lacks, or the
        AnnData does not contain them.
    SAMSError
        If ``masks`` are not probabilities.

    Examples
    --------
    >>> q_values = scvi_sams.tl.entry_q_values(model)
    >>> q_values.shape
    (8, 6)
    >>> (q_values <= 0.05).equals(scvi_sams.tl.called_masks(model))
    True
    """
    check_key(key_added=key_added)
    if masks is None:
        masks = result_of(model, MASKS)
    check_table(masks=masks)
    if tests is None:
        tests = result_of(model, TESTS)
    check_table(tests=tests)
    check_has("`tests` has no column", ["q_value"], tests.columns)
    untested = masks.index.difference(tests.index)
    check_has("`tests` has no perturbation", untested, tests.index)
    of_masks = mask_q_values(as_numbers("masks", masks))
    of_test = tests["q_value"].loc[masks.index].fillna(1).to_numpy(dtype=np.float64)
    values = np.maximum(of_masks, of_test[:, None])
    q_values = pd.DataFrame(values, index=masks.index, columns=masks.columns)
    if key_added is not None and not isinstance(model, AnnData) and model.adata is not None:
        model.adata.uns[key_added] = q_values.copy()
        model.keep_provenance(model.adata, key_added)
    return q_values


def called_masks(
    model: MaskMixin | AnnData,
    *,
    fdr: float = 0.05,
    masks: pd.DataFrame | None = None,
    tests: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Call mask entries that both the masks and a test on the cells support.

    An entry is called if its q-value (:func:`entry_q_values`) is at most ``fdr``: the masks call it
    at this false discovery rate, and the cells of its perturbation differ from control cells at
    this rate, by a test that does not depend on the model. Masks alone are only correct if the
    model is.

    Parameters
    ----------
    model
        Trained model with masks; or an AnnData, as for :func:`entry_q_values`.
    fdr
        False discovery rate over all entries, and over all perturbations.
    masks, tests
        As for :func:`entry_q_values`.

    Returns
    -------
    Booleans, perturbations x latent dimensions. Perturbations that could not be tested have no
    calls. ``attrs["expected_false"]`` is the expected proportion of false entries among those
    called, from their inclusion probabilities; it is logged as well. A warning is logged if the
    cells of more than one in ten perturbations with masks do not differ from controls: the model
    then finds effects that do not exist, and other entries may be false too.

    Raises
    ------
    MissingKeyError
        If ``tests`` has no q-values, or ``masks`` has perturbations that ``tests`` lacks, or the
        AnnData does not contain them.
    SAMSError
        If ``fdr`` is not between 0 and 1, or ``masks`` are not probabilities.

    Examples
    --------
    >>> called = scvi_sams.tl.called_masks(model)
    >>> called.shape, called.dtypes.unique().tolist()
    ((8, 6), [dtype('bool')])

    Consensus of five runs, in the latent dimensions of the first:

    >>> consensus = scvi_sams.evaluation.consensus_masks(models)  # doctest: +SKIP
    >>> scvi_sams.tl.called_masks(models[0], masks=consensus.masks)  # doctest: +SKIP
    """
    check_number(fdr=fdr, above=0, below=1)
    if masks is None:
        masks = result_of(model, MASKS)
    q_values = entry_q_values(model, masks=masks, tests=tests, key_added=None)
    is_called = within(q_values.to_numpy(), fdr)
    called = pd.DataFrame(is_called, index=masks.index, columns=masks.columns)
    _warn_of_made_up_effects(active_at_fdr(masks, fdr).any(axis=1), called.any(axis=1))
    false = float(1 - masks.to_numpy()[is_called].mean()) if is_called.any() else 0.0
    called.attrs["expected_false"] = false
    n_called = int(is_called.sum())
    logger.info(
        f"{counted(n_called, 'mask entry', 'mask entries')} of "
        f"{int(is_called.any(axis=1).sum())} of {counted(len(called), 'perturbation')} "
        f"{plural(n_called, 'is', 'are')} called at an FDR of {fdr:g}; {false:.1%} of them are "
        "expected to be false."
    )
    return called


def _warn_of_made_up_effects(by_masks: pd.Series, called: pd.Series) -> None:
    """Log a warning if masks call many perturbations that the test does not."""
    doubtful = by_masks.index[by_masks & ~called]
    if len(doubtful) > max(1, _FEW_OF_THEM * by_masks.sum()):
        logger.warning(
            f"The masks of {len(doubtful)} of {counted(int(by_masks.sum()), 'perturbation')}, such "
            f"as {doubtful[0]!r}, are on although their cells do not differ from control cells. "
            "They are not called, but the model finds effects where there are none: entries of the "
            "others may be false too. Compare runs of several seeds "
            "(scvi_sams.evaluation.mask_stability), or count calls of decoys "
            "(scvi_sams.tl.decoy_check)."
        )
