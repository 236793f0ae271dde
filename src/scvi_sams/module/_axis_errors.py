"""Error of sparse axes, and its consequences for effects.

Axes are estimates. If they are off by a few degrees, a strong effect on one mechanism appears as
weak effects on others, its shadows, which do not vanish with more cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scvi_sams.module._rotation import resampled_rotations

_SMALLEST, _LARGEST, _N_ANGLES = 0.005, 0.8, 40
"""Largest angle of the grid, in radians."""
_LOG_SD = 0.5
"""Prior SD of the log angle around the bootstrap angle: a factor of 1.6."""
_SHARES_ON = (0.01, 0.03, 0.08, 0.13, 0.18, 0.24, 0.29, 0.34, 0.39, 0.45, 0.5, 0.55, 0.6)
"""Number of the largest effects on an axis used for the likelihood."""
_NO_ANGLE = 1e-12


@torch.no_grad()
def variance_of_axes(
    effects: Tensor,
    variance: Tensor,
    prior_scale: float,
    *,
    resampled: Sequence[Tensor] | None = None,
) -> Tensor:
    """Variance of effects on sparse axes that is due to the uncertainty of the axes.

    1. A bootstrap over perturbations (:func:`resampled_rotations`) estimates how effects differ
       between these axes and those that other perturbations would have given. It ignores model
       misspecification, and overestimates the error if there are few perturbations per axis
       (El Karoui & Purdom 2018).
    2. The effects on each axis estimate its error. With an angle k an effect e_t is normal with
       variance ``v_t + k^2 s_t``, where ``s_t`` is the sum of the squared effects of t on all other
       axes, or with that plus the variance of true effects. The estimate is the k with the highest
       posterior density; the median of its prior is the mean angle of the bootstrap.

    Parameters
    ----------
    effects
        Effects on axes from :func:`sparsest_rotation`, shape ``(n_perturbations, n_latent)``.
    variance
        Their variance from all other sources, of the same shape.
    prior_scale
        SD of true effects.
    resampled
        Rotations to other axes, if they cannot be computed from ``effects``; by default
        ``resampled_rotations(effects)``.

    Returns
    -------
    Variance of every effect, with the shape, type and device of ``effects``: that of the bootstrap,
    scaled on each axis to its estimated angle. 0 for a perturbation whose effects are all 0.

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
    """Angle with the highest posterior density for each axis, ``(n_latent,)``."""
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
