"""The rotation of the latent space in which the effects of perturbations are sparsest.

``z_basal ~ Normal(0, I)`` looks the same in every rotated coordinate system, so encoder and decoder
settle in an arbitrary one, in which the effects are dense even if perturbations act on few
mechanisms each. Gradient descent hardly ever turns the coordinates as a whole. So after a first
phase with all masks on, the rotation that makes the effects sparsest is computed and folded into
the weights; masks are trained from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_N_RESTARTS = 4
_N_STEPS = 400
_N_REFINING_STEPS = 300
_LEARNING_RATE = 0.03
_SMOOTHING = 0.1
"""Where the absolute value is rounded off, relative to the root mean square of the effects."""


@torch.enable_grad()
def sparsest_rotation(effects: Tensor, *, seed: int = 0) -> Tensor:
    """Find the orthogonal matrix Q for which ``effects @ Q`` has the fewest large entries.

    Two descents over the orthogonal group (matrix exponential of a skew-symmetric matrix, Adam).
    The first finds the region: the sum of ``sqrt(x^2 + eps^2)``, the best of several random starts.
    The second refines it: the sum of ``x^2 / (x^2 + c^2)`` (Geman & McClure 1987), a soft count of
    entries, in which neither a few very strong effects nor much noise have the last word. ``c`` is
    half the :func:`effect_scale` of what the first found.

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
            rotation, size = _descend(values, start, _sum_of_sizes, _N_STEPS)
            if size < lowest:
                best, lowest = rotation, size
        half = effect_scale(values @ best) / 2
        best, _ = _descend(values, best, lambda x: _soft_count(x, half), _N_REFINING_STEPS)
    return best.to(effects.dtype)


def effect_scale(effects: Tensor) -> float:
    """Standard deviation of the entries that are not zero, if those are normal.

    ``sqrt(sum(x^4) / (3 sum(x^2)))``: entries that are zero drop out of both sums, so that no one
    need know how many there are, and small ones all but do.
    """
    second = effects.square().sum()
    return float((effects.pow(4).sum() / (3 * second.clamp(min=1e-12))).sqrt().clamp(min=1e-6))


def _sum_of_sizes(values: Tensor) -> Tensor:
    return (values.square() + _SMOOTHING**2).sqrt().sum()


def _soft_count(values: Tensor, scale: float) -> Tensor:
    squares = values.square()
    return (squares / (squares + scale**2)).sum()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of small products: threads that wait for a busy core made them 30 times slower."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _descend(
    values: Tensor, start: Tensor, objective: Callable[[Tensor], Tensor], n_steps: int
) -> tuple[Tensor, float]:
    """Minimise an objective of the turned values over rotations, from one start."""
    generators = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([generators], lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for _ in range(n_steps):
        rotation = start @ torch.matrix_exp(generators - generators.T)
        optimizer.zero_grad()
        objective(values @ rotation).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        rotation = start @ torch.matrix_exp(generators - generators.T)
        return rotation, float(objective(values @ rotation))


def signed_permutation(order: Tensor, signs: Tensor) -> Tensor:
    """Orthogonal matrix Q for which ``(x @ Q)[:, l] = signs[l] * x[:, order[l]]``."""
    rotation = torch.zeros(len(order), len(order), dtype=signs.dtype, device=signs.device)
    rotation[order, torch.arange(len(order), device=order.device)] = signs
    return rotation


def canonical_order(effects: Tensor) -> tuple[Tensor, Tensor]:
    """Strongest latent dimension first, and each so that its effects are positive on average.

    Parameters
    ----------
    effects
        Masked mean effects, ``(n_perturbations, n_latent)``.

    Returns
    -------
    Order (by falling Euclidean norm; ties as they were) and signs of the ordered dimensions.
    """
    order = effects.norm(dim=0).argsort(descending=True, stable=True)
    total = effects[:, order].sum(dim=0)
    return order, torch.where(total < 0, -torch.ones_like(total), torch.ones_like(total))
