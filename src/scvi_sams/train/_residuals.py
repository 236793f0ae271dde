"""Rows of the tables of direct effects, from estimates of a block of effects."""

from __future__ import annotations

import numpy as np
import torch

from scvi_sams.module._direct_effects import DirectEffects, Residuals
from scvi_sams.train._compared_scale import Scale, share_of_variance
from scvi_sams.train._observed_effects import Block
from scvi_sams.train._stacking import Components, Start

_MOST_SIGN_ERRORS = 0.05
"""Largest local false sign rate of a direct effect. The model has explained smaller effects by the
basal states of the cells, and scored held-out cells 0.8 nats lower with them."""


def residuals(
    tables: DirectEffects,
    scale: Scale,
    block: Block,
    start: Start,
    found: Components,
    whole: np.ndarray,
    variance: np.ndarray,
) -> Residuals:
    """Additions to the model's effects on the logits, per unit dose, for the stored genes."""
    has_cells = np.isfinite(block.error)
    # Predictions sample the model's effects with at most the variance of the total effect; the
    # remaining variance is added. The mean of a rate depends on this variance.
    of_model = np.square(scale.relative_slope(block.of_model)) * block.variance_of_model
    squared = start.squared_spread
    if squared is None:
        squared = share_of_variance(scale.slope, variance, of_model)
    on_logits = scale.log_change(whole)
    uncertainty = np.sqrt(np.maximum(variance - squared * of_model, 0))
    uncertainty = scale.log_sd(whole, uncertainty)
    # The shift, and with it the direct effect; small direct effects are set to zero.
    shift = block.model_at_mean + squared * (block.of_model - block.model_at_mean)
    without = block.of_model + start.direct
    with_direct = scale.log_change(scale.compared(without) + found.direct.mean)
    is_sure = (found.direct.lfsr < _MOST_SIGN_ERRORS) & (found.direct.mean != 0)
    direct = start.direct + np.where(is_sure, with_direct - without, 0)
    sd = scale.log_sd(scale.compared(with_direct), found.direct.sd)
    columns = [direct, sd, found.direct.lfsr, on_logits - shift - direct, uncertainty]
    for place in (0, 1, 3, 4):
        columns[place] = np.where(has_cells, columns[place] / block.dose, 0)
    columns[2] = np.where(has_cells, columns[2], 1)
    if tables.n_kept == tables.n_genes:
        genes = np.broadcast_to(np.arange(tables.n_genes), whole.shape)
    else:
        matters = scale.slope * (np.abs(columns[0] + columns[3]) + columns[-1])
        genes = np.argpartition(-matters, tables.n_kept, axis=1)[:, : tables.n_kept]
        genes = np.sort(genes, axis=1)
        columns = [np.take_along_axis(values, genes, axis=1) for values in columns]
    spread = np.where(has_cells.any(axis=1), np.sqrt(squared[:, 0]), 1)
    return Residuals(
        torch.as_tensor(spread.astype(np.float32)),
        torch.as_tensor(genes.astype(np.int32)),
        *(torch.as_tensor(values.astype(np.float32)) for values in columns),
    )
