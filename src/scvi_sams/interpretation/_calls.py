"""Which perturbations and mask entries to call: what the masks say, and a test that knows none."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scvi_sams._checks import check_number, check_table
from scvi_sams._fdr import active_at_fdr
from scvi_sams.labels._names import check_has

if TYPE_CHECKING:
    from scvi_sams.model._mechanisms import MaskMixin

logger = logging.getLogger("scvi.sams")


def called_masks(
    model: MaskMixin, *, fdr: float = 0.05, tests: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Call mask entries that both the masks and a test on the cells speak for.

    An entry is called if the masks call it at the false discovery rate
    (:func:`scvi_sams.evaluation.active_at_fdr`), and if the cells of its perturbation differ from
    control cells at that rate, whatever the model has learned
    (:meth:`~scvi_sams.SAMSVAE.test_perturbations`). Masks alone are right as far as the model is.

    Parameters
    ----------
    model
        Trained model with masks.
    fdr
        False discovery rate over all entries, and over all perturbations.
    tests
        Of ``model.test_perturbations``, if they are at hand; ``None`` tests.

    Returns
    -------
    Booleans, perturbations x latent dimensions. Nothing is called of a perturbation that could not
    be tested. ``attrs["expected_false"]`` is the expected share of false entries among those
    called, by their inclusion probabilities; it is logged as well.

    Raises
    ------
    MissingKeyError
        If ``tests`` has no q-values.
    SAMSError
        If ``fdr`` is not between 0 and 1.

    Examples
    --------
    >>> called = scvi_sams.tl.called_masks(model)
    >>> called.shape, called.dtypes.unique().tolist()
    ((8, 6), [dtype('bool')])
    """
    check_number(fdr=fdr, above=0, below=1)
    masks = model.get_perturbation_masks(key_added=None)
    if tests is not None:
        check_table(tests=tests)
        check_has("`tests` has no column", {"q_value"} - {*tests.columns}, tests.columns, "")
    else:
        tests = model.test_perturbations(key_added=None)
    differs = (tests["q_value"] <= fdr).reindex(masks.index, fill_value=False)
    called = active_at_fdr(masks, fdr).mul(differs, axis=0)
    is_called = called.to_numpy()
    false = float(1 - masks.to_numpy()[is_called].mean()) if is_called.any() else 0.0
    called.attrs["expected_false"] = false
    logger.info(
        f"{int(is_called.sum())} mask entries of {int(is_called.any(axis=1).sum())} of "
        f"{len(called)} perturbations are called at an FDR of {fdr:g}; {false:.1%} of them are "
        f"expected to be false. By the test, {int(np.sum(differs))} perturbations differ from "
        "control cells."
    )
    return called
