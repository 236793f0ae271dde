"""The rotation of the latent space in which the effects of perturbations are sparsest.

``z_basal ~ Normal(0, I)`` looks the same in every rotated coordinate system, so encoder and decoder
settle in an arbitrary one, in which the effects are dense even if perturbations act on few
mechanisms each. Gradient descent hardly ever turns the coordinates as a whole. So after a first
phase with all masks on, the rotation that makes the effects sparsest is computed and folded into
the weights; masks are trained from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_N_RESTARTS = 4
_N_STEPS = 400
_LEARNING_RATE = 0.03
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
    best, lowest = torch.eye(n_latent, dtype=values.dtype, device=values.device), float("inf")
    with _one_thread():
        for _ in range(_N_RESTARTS):
            noise = torch.randn(n_latent, n_latent, generator=generator, dtype=values.dtype)
            start = torch.linalg.qr(noise.to(values.device)).Q
            rotation, size = _descend(values, start)
            if size < lowest:
                best, lowest = rotation, size
    return best.to(effects.dtype)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of small products: threads that wait for a busy core made them 30 times slower."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _descend(values: Tensor, start: Tensor) -> tuple[Tensor, float]:
    """Minimise the sum of sizes over rotations, from one start."""
    generators = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([generators], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _N_STEPS)
    for _ in range(_N_STEPS):
        rotation = start @ torch.matrix_exp(generators - generators.T)
        size = ((values @ rotation).square() + _SMOOTHING**2).sqrt().sum()
        optimizer.zero_grad()
        size.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        rotation = start @ torch.matrix_exp(generators - generators.T)
        size = ((values @ rotation).square() + _SMOOTHING**2).sqrt().sum()
    return rotation, float(size)
