"""How far sparse axes are off, and what that does to effects.

Axes are estimates. Those that are a few degrees off show a strong effect on one mechanism as a weak
one on others too, its shadows, which no number of cells makes go away.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scvi_sams.module._rotation import resampled_rotations

_SMALLEST, _LARGEST, _N_ANGLES = 0.005, 0.8, 40
"""Of the grid of angles, radians."""
_LOG_SD = 0.5
"""Of the log of an angle around what the bootstrap says, a priori: a factor of 1.6."""
_SHARES_ON = (0.01, 0.03, 0.08, 0.13, 0.18, 0.24, 0.29, 0.34, 0.39, 0.45, 0.5, 0.55, 0.6)
"""Of the effects on an axis, the largest likelihood over which counts."""
_NO_ANGLE = 1e-12


@torch.no_grad()
def variance_of_axes(
    effects: Tensor,
    variance: Tensor,
    prior_scale: float,
    *,
    resampled: Sequence[Tensor] | None = None,
) -> Tensor:
    """Variance that effects on sparse axes have because the axes are uncertain.

    1. A bootstrap over perturbations (:func:`resampled_rotations`) says how each effect differs
       between the axes as they are and those that other perturbations would have given. It does not
       know in what the model is wrong, and it exaggerates where there are few perturbations per
       axis (El Karoui & Purdom 2018).
    2. The effects on an axis say how far this one is off. With an angle k an effect e_t is normal
       with variance ``v_t + k^2 s_t``, ``s_t`` the sum of the squares of the effects of t on all
       other axes, or that plus the variance of true effects. The k of highest posterior density
       counts, the mean angle of the bootstrap being the median of its prior.

    Parameters
    ----------
    effects
        On axes from :func:`sparsest_rotation`, shape ``(n_perturbations, n_latent)``.
    variance
        Their variance for all other reasons, of the same shape.
    prior_scale
        Standard deviation of true effects.
    resampled
        Rotations to other axes, where those of ``effects`` do not tell; by default
        ``resampled_rotations(effects)``.

    Returns
    -------
    Variance of every effect, of the shape and type, and on the device, of ``effects``: that of the
    bootstrap, scaled on each axis to its angle. 0 for a perturbation whose effects are all 0.

    References
    ----------
    Efron (1979), Annals of Statistics 7, 1-26. El Karoui & Purdom (2018), Journal of Machine
    Learning Research 19, 1-66.
    """
    wide, noise = effects.double(), variance.double()
    rotations = resampled_rotations(wide) if resampled is None else resampled
    of_bootstrap = torch.stack(
        [(wide @ rotation.to(wide) - wide).square() for rotation in rotations]
    ).mean(dim=0)
    others = wide.square().sum(dim=1, keepdim=True) - wide.square()
    squared_angle = of_bootstrap.sum(dim=0) / others.sum(dim=0).clamp(min=_NO_ANGLE)
    likely = _likely_angles(wide, noise, others, prior_scale, squared_angle.sqrt())
    scale = likely.square() / squared_angle.clamp(min=_NO_ANGLE)
    return (of_bootstrap * scale).to(effects)


def _likely_angles(
    effects: Tensor, noise: Tensor, others: Tensor, prior_scale: float, expected: Tensor
) -> Tensor:
    """Angle of highest posterior density of each axis, ``(n_latent,)``."""
    angles = torch.linspace(0, 1, _N_ANGLES, dtype=effects.dtype, device=effects.device)
    angles = _SMALLEST * (_LARGEST / _SMALLEST) ** angles
    shares = torch.tensor(_SHARES_ON, dtype=effects.dtype, device=effects.device)[:, None, None]
    likelihoods = []
    for angle in angles:
        off = noise + angle.square() * others
        log_off, log_on = (
            -0.5 * (variance.log() + effects.square() / variance)
            for variance in (off, off + prior_scale**2)
        )
        of_entries = torch.logaddexp(shares.log() + log_on, torch.log1p(-shares) + log_off)
        likelihoods.append(of_entries.sum(dim=1).max(dim=0).values)
    distance = (angles[:, None] / expected.clamp(_SMALLEST, _LARGEST)).log() / _LOG_SD
    return angles[(torch.stack(likelihoods) - distance.square() / 2).argmax(dim=0)]
