"""What masks start from: the angle by which axes are off, from three sources, on simulated screens.

At the end of the dense phase masks start from the same effects three times: without an error of the
axes, with that of the bootstrap as it is, and with one angle per axis (what training does). Printed
are the false share and the recall of what masks alone call at 5 % FDR there, before any training
with masks, which then hardly moves what is clear.

    python benchmarks/mask_starts.py [--screens svae 40x50x60] [--seeds 0]
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from copy import deepcopy
from unittest.mock import patch

import numpy as np
import pandas as pd
import scvi
import torch
from torch import Tensor

import scvi_sams
from _common import print_conditions
from error_rates import SCREENS, Screen, be_quiet, parser_of
from scvi_sams import evaluation
from scvi_sams.module import _axis_errors, _sams_vae
from scvi_sams.module._rotation import resampled_rotations
from scvi_sams.module._sams_vae import SAMSVAEModule


class _DensePhaseEnded(Exception):
    """What follows is not looked at."""


def none(effects: Tensor, variance: Tensor, prior_scale: float) -> Tensor:
    """Axes are where they should be."""
    return torch.zeros_like(effects)


def bootstrap(effects: Tensor, variance: Tensor, prior_scale: float) -> Tensor:
    """What other perturbations would have given."""
    wide = effects.double()
    squares = [(wide @ turn - wide).square() for turn in resampled_rotations(wide)]
    return torch.stack(squares).mean(dim=0).to(effects)


ANGLES: dict[str, Callable[..., Tensor]] = {
    "none": none,
    "bootstrap": bootstrap,
    "one angle per axis": _axis_errors.variance_of_axes,
}


def starts(screen: Screen, seed: int, epochs: int | None) -> dict[str, str]:
    """False share and recall by the source of the angle."""
    start_masks = SAMSVAEModule.start_masks
    probabilities: dict[str, np.ndarray] = {}

    def start_with_each(module: SAMSVAEModule, state_variance: Tensor) -> None:
        for name, angle in ANGLES.items():
            started = deepcopy(module)
            with patch.object(_sams_vae, "variance_of_axes", angle):
                start_masks(started, state_variance)
            probabilities[name] = started.masks.inclusion_probability.detach().numpy()
        raise _DensePhaseEnded

    scvi.settings.seed = seed
    scvi_sams.SAMSVAE.setup_anndata(screen.adata, **screen.setup)
    model = scvi_sams.SAMSVAE(screen.adata)
    started = patch.object(SAMSVAEModule, "start_masks", start_with_each)
    with started, contextlib.suppress(_DensePhaseEnded):
        model.train(epochs, enable_progress_bar=False)
    truth = screen.adata.uns["simulation"]
    true_masks = pd.DataFrame(truth["true_masks"], index=truth["perturbations"])
    found = {}
    for name, probability in probabilities.items():
        active = evaluation.active_at_fdr(pd.DataFrame(probability, index=model.perturbations))
        scores = evaluation.mask_recovery(active.astype(float), true_masks)
        found[name] = f"{1 - scores['precision']:.2f} / {scores['recall']:.2f}"
    return found


def main() -> None:
    """Print one line per screen and seed."""
    screens = ["40x50x400", "40x50x60", "demo", "svae"]
    arguments = parser_of(__doc__, screens, [0]).parse_args()
    be_quiet()
    print_conditions()
    for name in arguments.screens:
        for seed in arguments.seeds:
            print(
                f"{name}, seed {seed}: {starts(SCREENS[name](seed), seed, arguments.epochs)}",
                flush=True,
            )


if __name__ == "__main__":
    main()
