"""The rotation of the latent space in which the effects of perturbations are sparsest.

``z_basal ~ Normal(0, I)`` looks the same in every rotated coordinate system, so encoder and decoder
settle in an arbitrary one, in which the effects are dense even if perturbations act on few
mechanisms each. Gradient descent hardly ever turns the coordinates as a whole. So after a first
phase with all masks on, the rotation that makes the effects sparsest is computed and folded into
the weights; masks are trained from there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

_N_RESTARTS = 4
_N_STEPS = 400
_SMOOTHING = 0.1
"""Where the absolute value is rounded off, relative to the root mean square of the effects."""


@torch.enable_grad()
def sparsest_rotation(effects: Tensor, *, seed: int = 0) -> Tensor:
    """Find the orthogonal matrix Q for which ``effects @ Q`` has the smallest sum of sizes.

    The sum of sqrt(x^2 + eps^2) is minimised over the orthogonal group (matrix exponential of a
    skew-symmetric matrix, Adam) from several random starts; the best is returned.

    Parameters
    ----------
    effects
        Shape ``(n_perturbations, n_latent)``.
    seed
        Of the random starts. The global random state is left alone.

    Returns
    -------
    Orthogonal matrix of shape ``(n_latent, n_latent)``.
    """
    values = effects.detach().double()
    n_latent = values.shape[1]
    scale = values.square().mean().sqrt().clamp(min=1e-12)
    values = values / scale
    generator = torch.Generator().manual_seed(seed)
    best, lowest = torch.eye(n_latent, dtype=values.dtype), float("inf")
    for _ in range(_N_RESTARTS):
        start = torch.linalg.qr(
            torch.randn(n_latent, n_latent, generator=generator, dtype=values.dtype)
        ).Q.to(values.device)
        turn = parametrizations.orthogonal(
            nn.Linear(n_latent, n_latent, bias=False, device=values.device, dtype=values.dtype),
            orthogonal_map="matrix_exp",
        )
        optimizer = torch.optim.Adam(turn.parameters(), lr=0.03)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _N_STEPS)
        turned = values @ start
        for _ in range(_N_STEPS):
            loss = (turn(turned).square() + _SMOOTHING**2).sqrt().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            total = (turn(turned).square() + _SMOOTHING**2).sqrt().sum().item()
            if total < lowest:
                best, lowest = start @ turn.weight.T, total
    return best.detach().to(effects.dtype)
