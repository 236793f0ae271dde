"""The rotation of the latent space in which the effects of perturbations are sparsest.

``z_basal ~ Normal(0, I)`` is the same in every rotated coordinate system, so encoder and decoder
settle in an arbitrary one, in which effects are dense even if perturbations act on few mechanisms
each. Gradient descent hardly ever rotates the coordinates as a whole. Therefore, after a first
phase with all masks on, the rotation that makes effects sparsest is computed and folded into the
weights; masks are then trained from there.

The optimiser is our own L-BFGS on the orthogonal group. That of torch, with an orthogonal
parametrisation (Cayley map), finds axes of the same quality (mask F1 at three seeds 0.77, 0.72,
0.76; ours 0.77, 0.69, 0.76), but takes 3 CPU s instead of 0.7 for 50 latents, 8 instead of 0.5 for
100, and had not finished after 100 s for 200, where ours takes 4 (benchmarks/RECORD.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_MAX_PERTURBATIONS = 2000
"""The strongest are used. All of 10,000 increased the F1 of masks by 0.002 at four times the time,
and decreased it by 0.026 if 19 of 20 had no effect."""
_MAX_STARTS, _AGREEING_STARTS = 8, 4
_MAX_STEPS, _MAX_HALVINGS, _N_REMEMBERED = 300, 12, 8
_SAME, _CONVERGED = 1e-4, 1e-6
"""Relative differences of starts with the same optimum, and of the last two steps of a descent."""
_SMOOTHING = 0.1
"""Smoothing of the absolute value, relative to the root mean square of the effects."""
_FIRST_ANGLE, _LARGEST_ANGLE = 0.1, 0.5
"""Limits in radians: of the first step in a plane of two axes, of any step per axis."""
_N_RESAMPLES = 20

Objective = Callable[[Tensor], tuple[float, Tensor]]
"""Maps rotated effects to a value and its derivatives."""


@torch.no_grad()
def sparsest_rotation(effects: Tensor, *, seed: int = 0) -> Tensor:
    """Find the orthogonal matrix Q for which ``effects @ Q`` has the fewest large entries.

    Two descents over the orthogonal group. The first finds the region: it minimises the sum of
    ``sqrt(x^2 + eps^2)`` from the current axes and from random ones, until the lowest value has
    been reached four times or after eight starts. The second refines it: it minimises the sum of
    ``x^2 / (x^2 + c^2)`` (Geman & McClure 1987), a soft count of entries that is not dominated by a
    few very strong effects or by noise. ``c`` is half the :func:`effect_scale` of the first
    result.

    Uses the 2,000 strongest perturbations. Runs on the CPU in double precision on every device.

    Parameters
    ----------
    effects
        Shape ``(n_perturbations, n_latent)``.
    seed
        Seed of the random starts. The global random state is not changed.

    Returns
    -------
    Orthogonal matrix of shape ``(n_latent, n_latent)``, with the type and device of ``effects``.
    """
    values = _standardised(_strongest(effects))
    with _one_thread():
        refined = _refined(values, _best_of_starts(values, seed))
    # A product of many rotations is one up to rounding; its orthogonal factor is the nearest.
    left, _, right = torch.linalg.svd(refined)
    return (left @ right).to(effects)


@torch.no_grad()
def resampled_rotations(
    effects: Tensor, perturbations: Tensor | None = None, *, seed: int = 0
) -> Iterator[Tensor]:
    """Yield rotations of sparse axes to those of 20 samples of the perturbations.

    Sampled with replacement, as many as there are (at most 2,000, the strongest). Each descent
    starts from the current axes, for which ``effects`` come from :func:`sparsest_rotation`.
    ``perturbations``, ``(n_rows,)`` is the perturbation of every row, if perturbations have several
    rows, which are sampled together.
    """
    values = _strongest(effects)
    members = None if perturbations is None else _members(effects, perturbations)
    generator = torch.Generator().manual_seed(seed)
    axes = torch.eye(values.shape[1], dtype=values.dtype)
    for _ in range(_N_RESAMPLES):
        n_units = len(values) if members is None else len(members)
        rows = torch.randint(n_units, (n_units,), generator=generator)
        if members is not None:
            rows = torch.cat([members[unit] for unit in rows.tolist()])
        with _one_thread():
            rotation = _refined(_standardised(values[rows]), axes)
        yield rotation.to(effects)


def _strongest(effects: Tensor) -> Tensor:
    values = effects.detach().cpu().double()
    return values[_order_of_strength(values)]


def _order_of_strength(values: Tensor) -> Tensor:
    return values.norm(dim=1).argsort(descending=True)[:_MAX_PERTURBATIONS]


def _members(effects: Tensor, perturbations: Tensor) -> list[Tensor]:
    """Positions of the rows of each perturbation among the strongest."""
    values = effects.detach().cpu().double()
    units = perturbations.cpu()[_order_of_strength(values)].unique(return_inverse=True)[1]
    return list(units.argsort(stable=True).split(torch.bincount(units).tolist()))


def _standardised(values: Tensor) -> Tensor:
    return values / values.square().mean().sqrt().clamp(min=1e-12)


def _refined(values: Tensor, axes: Tensor) -> Tensor:
    """Descend to the lowest soft count of entries from the given axes."""
    half = effect_scale(values @ axes) / 2
    return _descend(values, axes, lambda turned: _soft_count(turned, half))[0]


def effect_scale(effects: Tensor) -> float:
    """SD of the non-zero entries if these are normal.

    ``sqrt(sum(x^4) / (3 sum(x^2)))``: zero entries drop out of both sums, so their number need not
    be known, and small ones have little weight.
    """
    second = effects.square().sum()
    return float((effects.pow(4).sum() / (3 * second.clamp(min=1e-12))).sqrt().clamp(min=1e-6))


def _sum_of_sizes(values: Tensor) -> tuple[float, Tensor]:
    sizes = (values.square() + _SMOOTHING**2).sqrt()
    return float(sizes.sum()), values / sizes


def _soft_count(values: Tensor, scale: float) -> tuple[float, Tensor]:
    squares = values.square()
    shares = squares / (squares + scale**2)
    return float(shares.sum()), 2 * scale**2 * values / (squares + scale**2).square()


@contextmanager
def _one_thread() -> Iterator[None]:
    """For hundreds of small products: threads waiting for a busy core made them 30 times slower."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _best_of_starts(values: Tensor, seed: int) -> Tensor:
    """Return the rotation with the lowest sum of sizes."""
    n_latent = values.shape[1]
    generator = torch.Generator().manual_seed(seed)
    start = torch.eye(n_latent, dtype=values.dtype)
    found: list[tuple[Tensor, float]] = []
    for _ in range(_MAX_STARTS):
        found.append(_descend(values, start, _sum_of_sizes))
        lowest = min(size for _, size in found)
        if sum(size <= lowest * (1 + _SAME) for _, size in found) == _AGREEING_STARTS:
            break
        noise = torch.randn(n_latent, n_latent, generator=generator, dtype=values.dtype)
        start = torch.linalg.qr(noise).Q
    return min(found, key=lambda result: result[1])[0]


def _descend(values: Tensor, rotation: Tensor, objective: Objective) -> tuple[Tensor, float]:
    """Minimise an objective of the rotated values over rotations, from one start: L-BFGS.

    A step is a skew-symmetric matrix S that rotates the current axes by the Cayley transform
    ``(I - S / 2)^-1 (I + S / 2)``. Steps and gradients are in the axes of their iteration, and can
    be used in later iterations without change.
    """
    size, gradient = _evaluate(values @ rotation, objective)
    remembered: list[tuple[Tensor, Tensor]] = []
    for _ in range(_MAX_STEPS):
        step = _quasi_newton_step(gradient, remembered)
        step *= min(1.0, _LARGEST_ANGLE / max(float(step.norm(dim=1).max()), 1e-12))
        # Each plane of two axes is in both triangles of the matrices.
        expected_fall = -float((gradient * step).sum()) / 2
        for _ in range(_MAX_HALVINGS):
            turned = rotation @ _cayley(step)
            new_size, new_gradient = _evaluate(values @ turned, objective)
            if new_size <= size - 1e-4 * expected_fall:
                break
            step, expected_fall = step / 2, expected_fall / 2
        else:
            break  # no decrease beyond rounding
        change = new_gradient - gradient
        if (step * change).sum() > 1e-10 * step.norm() * change.norm():
            remembered = [*remembered, (step, change)][-_N_REMEMBERED:]
        fall = size - new_size
        rotation, size, gradient = turned, new_size, new_gradient
        if fall <= _CONVERGED * size:
            break
    return rotation, size


def _evaluate(turned: Tensor, objective: Objective) -> tuple[float, Tensor]:
    """Value, and its derivative by the angle in each plane of two axes (skew-symmetric)."""
    size, slopes = objective(turned)
    products = turned.T @ slopes
    return size, products - products.T


def _cayley(step: Tensor) -> Tensor:
    one = torch.eye(len(step), dtype=step.dtype)
    return torch.linalg.solve(one - step / 2, one + step / 2)


def _quasi_newton_step(gradient: Tensor, remembered: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Two-loop recursion of L-BFGS (Nocedal 1980) over remembered steps and gradient changes."""
    if not remembered:
        return -gradient * (_FIRST_ANGLE / gradient.abs().max().clamp(min=1e-12))
    direction = -gradient
    weights = []
    for step, change in reversed(remembered):
        weights.append((step * direction).sum() / (step * change).sum())
        direction = direction - weights[-1] * change
    step, change = remembered[-1]
    direction = direction * ((step * change).sum() / change.square().sum())
    for (step, change), weight in zip(remembered, reversed(weights), strict=True):
        direction = direction + step * (weight - (change * direction).sum() / (step * change).sum())
    return direction


def signed_permutation(order: Tensor, signs: Tensor) -> Tensor:
    """Orthogonal matrix Q for which ``(x @ Q)[:, l] = signs[l] * x[:, order[l]]``."""
    rotation = torch.zeros(len(order), len(order), dtype=signs.dtype, device=signs.device)
    rotation[order, torch.arange(len(order), device=order.device)] = signs
    return rotation


def canonical_order(effects: Tensor) -> tuple[Tensor, Tensor]:
    """Strongest latent dimension first, each signed so that its effects are positive on average.

    From masked mean effects, ``(n_perturbations, n_latent)``: the order, by decreasing Euclidean
    norm (ties in their order), and signs of the ordered dimensions.
    """
    order = effects.norm(dim=0).argsort(descending=True, stable=True)
    total = effects[:, order].sum(dim=0)
    return order, torch.where(total < 0, -torch.ones_like(total), torch.ones_like(total))
