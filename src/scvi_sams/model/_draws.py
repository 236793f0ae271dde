"""Summaries of posterior draws: mean, standard error, and the quantiles that bound an interval."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from scvi_sams import _torch as _devices
from scvi_sams._checks import check_choice, check_integer
from scvi_sams.model import _draws_loops as loops


def check_sampling(n_samples: int, n_posterior_samples: int, basal: str) -> None:
    """Raise an error if draws cannot be made as they were asked for.

    Raises
    ------
    InvalidArgumentError
        Naming the argument.
    """
    check_integer(n_samples=n_samples)
    check_integer(at_least=2, n_posterior_samples=n_posterior_samples)
    check_choice("basal", basal, ("prior", "control"))


def summary(draws: Tensor, interval: float | None) -> list[Tensor]:
    """Summarise at least two draws, ``(n_draws, ...)``.

    Returns
    -------
    Their mean and its standard error, and unless ``interval`` is ``None`` the lower and the upper
    end of the equal-tailed interval.
    """
    if _devices.is_accelerator(draws.device):
        mean = draws.mean(dim=0)
        squares = (draws - mean).square_().sum(dim=0)
        ends = [] if interval is None else [*bounds(draws, interval)]
    else:
        mean, squares, ends = _summary_by_loops(draws, interval)
    return [mean, (squares / ((len(draws) - 1) * len(draws))).sqrt(), *ends]


def _summary_by_loops(draws: Tensor, interval: float | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    columns = draws.reshape(len(draws), -1)
    mean, squares = draws.new_empty(2, *draws.shape[1:])
    of_moments = (mean.view(-1).numpy(), squares.view(-1).numpy())
    if interval is not None and _are_outermost(interval, len(draws)):
        scratch, low, high = _kept_draws(columns)
        arrays = (array.numpy() for array in (scratch, low, high))
        loops.moments_and_outermost(columns.numpy(), *of_moments, *arrays)
        if _is_finite(mean):
            ends = _between(low, high, interval, len(draws))
            return mean, squares, [end.view(mean.shape) for end in ends]
    else:
        loops.moments(columns.numpy(), *of_moments)
    return mean, squares, [] if interval is None else [*_sorted_bounds(draws, interval)]


def bounds(draws: Tensor, interval: float) -> tuple[Tensor, ...]:
    """Return the lower and the upper end of the equal-tailed interval of ``(n_draws, ...)``."""
    is_accelerator = _devices.is_accelerator(draws.device)
    if is_accelerator or not _are_outermost(interval, len(draws)) or not _is_finite(draws):
        return _sorted_bounds(draws, interval)
    columns = draws.reshape(len(draws), -1)
    scratch, low, high = _kept_draws(columns)
    loops.outermost(columns.numpy(), scratch.numpy(), low.numpy(), high.numpy())
    ends = _between(low, high, interval, len(draws))
    return tuple(end.view(draws.shape[1:]) for end in ends)


def _is_finite(values: Tensor) -> bool:
    """Whether there is surely no NaN, which the loops might lose; by a sum, as it is fastest."""
    return math.isfinite(values.sum().item())


def _are_outermost(interval: float, n_draws: int) -> bool:
    """Whether the draws that the ends lie between are among those that the loops keep."""
    return n_draws >= loops.N_KEPT and _place(0.5 - interval / 2, n_draws)[0] + 2 <= loops.N_KEPT


def _kept_draws(columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scratch, and room for the outermost draws at either end."""
    scratch = columns.new_empty(2 * loops.N_KEPT * loops.COLUMNS_AT_ONCE)
    low, high = columns.new_empty(2, loops.N_KEPT, columns.shape[1])
    return scratch, low, high


def _between(low: Tensor, high: Tensor, interval: float, n_draws: int) -> tuple[Tensor, Tensor]:
    below, weight = _place(0.5 - interval / 2, n_draws)
    return (
        torch.lerp(low[below], low[below + 1], weight),
        torch.lerp(high[-1 - below], high[-2 - below], weight),
    )


def _sorted_bounds(draws: Tensor, interval: float) -> tuple[Tensor, ...]:
    return quantiles(draws, (0.5 - interval / 2, 0.5 + interval / 2))


def quantiles(draws: Tensor, probabilities: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Return quantiles over the first dimension, interpolated linearly, as ``torch.quantile`` does.

    On a CPU numpy sorts, which takes a tenth to a twentieth of the time of torch for a hundred
    draws of two thousand genes.
    """
    if _devices.is_accelerator(draws.device):
        return tuple(torch.quantile(draws, draws.new_tensor(probabilities), dim=0))
    ordered = np.array(np.moveaxis(draws.numpy(), 0, -1), order="C")  # a copy, sorted in place
    ordered.sort(axis=-1)
    has_nan = np.isnan(ordered[..., -1])  # which sorts last
    found = []
    for probability in probabilities:
        below, share = _place(probability, len(draws))
        above = min(below + 1, len(draws) - 1)
        weight = ordered.dtype.type(share)
        with np.errstate(invalid="ignore"):  # between two infinities of one sign
            step = weight * (ordered[..., above] - ordered[..., below])
        step = np.where(ordered[..., above] == ordered[..., below], 0, step)
        value = np.where(has_nan, np.nan, ordered[..., below] + step)
        found.append(torch.from_numpy(value.astype(ordered.dtype)))
    return tuple(found)


def _place(probability: float, n_draws: int) -> tuple[int, float]:
    """Between which of the ordered draws a quantile lies: the lower, and how far from it."""
    place = probability * (n_draws - 1)
    below = min(int(place), n_draws - 1)
    return below, place - below
