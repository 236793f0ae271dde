"""The same cells with and without a perturbation: statistics, and summaries of samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from scvi_sams import _torch as _devices
from scvi_sams._checks import check_choice, check_number
from scvi_sams.exceptions import SAMSError
from scvi_sams.model._basal_states import BasalStates
from scvi_sams.module._expected_lognorm import ExpectedLognorm
from scvi_sams.module._likelihoods import Likelihood
from scvi_sams.module._perturbation_module import PerturbationModule

_VALUES_AT_ONCE = 2**18
"""Numbers in an array (samples x genes) of a step: one megabyte, which fits into a CPU cache."""

_VALUES_AT_ONCE_ON_ACCELERATORS = 2**24

_ASSUMED_SIZE = 1e4
"""Cell size for models that were saved without the sizes of their cells."""

_RANK_TOLERANCE = 1e-5
"""Relative to the largest singular value of shifts: smaller ones are rounding errors."""

EffectScale = Literal["lognorm", "lograte", "mean"]


class DrawnEffect(NamedTuple):
    """Posterior samples of the effect of a label, with its doses."""

    shift: Tensor
    """Sum of the shifts in each context, ``(n_posterior, n_contexts or 1, n_shift)``."""
    direct: Tensor | None
    """Additions to the logits of genes, ``(n_posterior, n_contexts or 1, n_genes)``; ``None`` for
    none."""

    def __add__(self, other: DrawnEffect) -> DrawnEffect:  # type: ignore[override]
        """Samples of two labels together."""
        direct = self.direct
        if direct is None or other.direct is None:
            direct = other.direct if direct is None else direct
        else:
            direct = direct + other.direct
        return DrawnEffect(self.shift + other.shift, direct)


class Contrast:
    """Treated against control cells with the same basal states, by common random numbers.

    ``statistic`` is f, whose expectation is averaged on both sides over basal states. ``control``
    is its mean over the untreated states of each posterior sample, ``(n_posterior, n_genes)``.
    ``contexts``, ascending, are those in which effects must be sampled; ``None`` if none are
    registered.
    """

    def __init__(
        self,
        module: PerturbationModule,
        statistic: Statistic,
        states: BasalStates,
    ) -> None:
        self.module = module
        self.statistic = statistic
        self.z_basal, self.covariates, contexts = states
        self.contexts: Tensor | None = None
        self._place: Tensor | None = None
        if contexts is not None:
            self.contexts, self._place = contexts.unique(return_inverse=True)
        nothing = self.z_basal.new_zeros(len(self.z_basal), 1, module.n_shift)
        self.control = self.mean(DrawnEffect(nothing, None))

    def _of_states(self, values: Tensor, part: slice) -> Tensor:
        """Values of the context of each basal state, ``(n, n_basal or 1, ...)``."""
        if self._place is None or values.shape[1] == 1:
            return values[part]
        place = self._place[part]
        return values[part].gather(1, place[..., None].expand(-1, -1, values.shape[-1]))

    def mean(self, drawn: DrawnEffect) -> Tensor:
        """Average f over the basal states of every posterior sample, ``(n_posterior, n_genes)``."""
        only_one = self.z_basal.shape[1] == 1
        means = [
            values.squeeze(1) if only_one else values.mean(dim=1) for values in self._values(drawn)
        ]
        return means[0] if len(means) == 1 else torch.cat(means)

    def _values(self, drawn: DrawnEffect) -> Iterator[Tensor]:
        shift, direct = drawn
        n_posterior, n_basal, _ = self.z_basal.shape
        n_values = (
            _VALUES_AT_ONCE_ON_ACCELERATORS
            if _devices.is_accelerator(shift.device)
            else _VALUES_AT_ONCE
        )
        n_chunk = max(1, n_values // (n_basal * self.module.likelihood.n_genes))
        for start in range(0, n_posterior, n_chunk):
            part = slice(start, start + n_chunk)
            of_part = None if self.covariates is None else self.covariates[part]
            on_genes = None if direct is None else self._of_states(direct, part)
            of_states = self._of_states(shift, part)
            logits = self.module.decode(self.z_basal[part], of_states, of_part, on_genes)
            yield self.statistic(logits)

    def effect(self, drawn: DrawnEffect) -> Tensor:
        """Return the change of the mean of f, ``(n_posterior, n_genes)``."""
        return self.mean(drawn).sub_(self.control)


class Statistic:
    """Expectation of f(x) over the expression x of a cell, given its state."""

    def __init__(
        self,
        likelihood: Likelihood,
        method: EffectScale,
        sizes: CellSizes,
        target_sum: float,
        device: torch.device,
    ) -> None:
        check_choice("method", method, get_args(EffectScale))
        check_number(above=0, target_sum=target_sum)
        if method != "mean" and not likelihood.is_count_likelihood:
            raise SAMSError("A normal likelihood has no counts to normalise: use method='mean'.")
        if method == "lognorm" and not likelihood.has_laplace_transform:
            raise SAMSError(
                f"{type(likelihood).__name__} has no closed form of E[log(1 + x)]: use "
                "method='lograte'."
            )
        self.likelihood = likelihood
        self.method = method
        self.sizes = sizes
        self.target_sum = target_sum
        self._lognorm = (
            ExpectedLognorm(likelihood, sizes.table, target_sum, device)
            if method == "lognorm"
            else None
        )

    def __call__(self, logits: Tensor) -> Tensor:
        """Map logits ``(..., n_genes)`` to E[f(x)], of the same shape."""
        if self._lognorm is not None:
            return self._lognorm(logits)
        return expected_expression(self.likelihood, logits, self.method, self.target_sum)

    def description(self) -> dict[str, Any]:
        """Description of the values, for ``uns``."""
        is_count = self.likelihood.is_count_likelihood
        return {
            "method": self.method,
            "units": units(self.likelihood, self.method, self.target_sum),
            "target_sum": self.target_sum if is_count else "none",
            **(self.sizes.description() if self.method == "lognorm" else _NO_SIZES),
        }


_NO_SIZES = {"library_size": "none", "library_size_of": "none: f depends on no size"}


class CellSizes(NamedTuple):
    """Sizes of predicted cells: those of the training data, unless the user sets one."""

    table: np.ndarray
    """Sizes, and the proportion of cells of each, ``(2, n_sizes)``."""
    origin: str

    @classmethod
    def of(cls, module: PerturbationModule, library_size: float | None) -> CellSizes:
        """Return cells with the given size, or with those that the module was trained on."""
        if library_size is not None:
            check_number(above=0, library_size=library_size)
            return cls(np.array([[library_size], [1.0]]), "given")
        table = module.cell_sizes.double().cpu().numpy()
        if not table[1].any():
            return cls(np.array([[_ASSUMED_SIZE], [1.0]]), "assumed: the model knows no sizes")
        return cls(table, "training data")

    def description(self) -> dict[str, Any]:
        """Record of the sizes that were used, for ``uns``."""
        sizes, shares = self.table
        if len(sizes) == 1:
            return {"library_size": float(sizes[0]), "library_size_of": self.origin}
        return {
            "library_size": sizes,
            "library_size_shares": shares,
            "library_size_of": self.origin,
        }


def rate_scale(likelihood: Likelihood, method: EffectScale) -> EffectScale:
    """``method``; for data on their own scale ``"lograte"`` stands for the mean."""
    return "mean" if method == "lograte" and not likelihood.is_count_likelihood else method


def expected_expression(
    likelihood: Likelihood, logits: Tensor, method: EffectScale, target_sum: float
) -> Tensor:
    """Return ``target_sum * rate`` (``"mean"``) or ``log2(1 + target_sum * rate)``.

    A normal likelihood returns its mean, on the scale of the data.
    """
    rate = likelihood.rate(logits)
    if not likelihood.is_count_likelihood:
        return rate
    expected = rate.mul_(target_sum)  # in place, as below: half the time of new arrays
    return expected if method == "mean" else expected.add_(1).log2_()


def units(likelihood: Likelihood, method: EffectScale, target_sum: float) -> str:
    """Name the units of differences of f, in words."""
    if not likelihood.is_count_likelihood:
        return "units of the data"
    total = f"{target_sum:,.10g}"
    return {
        "mean": f"change of counts per {total}",
        "lograte": f"log2 fold change of 1 + expected counts per {total}",
        "lognorm": f"mean log2 fold change of 1 + counts per {total}",
    }[method]


def summary(
    draws: Tensor, interval: float | None, *, caused_by: DrawnEffect | None = None
) -> list[Tensor]:
    """Summarise at least two samples, ``(n_draws, ...)``.

    If they are effects ``(n_draws, n_genes)`` that are ``caused_by`` samples with exact means, the
    part that is linear in these does not add to the error of the mean (control variates).

    Returns
    -------
    Their mean and its standard error, and unless ``interval`` is ``None`` the lower and the upper
    end of the equal-tailed interval.
    """
    mean = draws.mean(dim=0)
    error = _standard_error(draws - mean, caused_by)
    if not error.isfinite().all():  # squares exceed single precision
        error = _standard_error(draws.double() - mean, caused_by).to(mean)
    return [mean, error, *([] if interval is None else bounds(draws, interval))]


def norms(values: Tensor) -> Tensor:
    """Euclidean norms over the last dimension, also if squares exceed single precision."""
    found = values.norm(dim=-1)
    return found if found.isfinite().all() else values.double().norm(dim=-1).to(found)


def _standard_error(rest: Tensor, caused_by: DrawnEffect | None) -> Tensor:
    """Standard error of the mean of samples with deviations ``rest``, which are overwritten."""
    n_draws, n_known = len(rest), 0
    if caused_by is not None:
        rest, n_known = _not_linear_in(caused_by, rest)
    squares = rest.square_().sum(dim=0)
    return (squares / ((n_draws - 1 - n_known) * n_draws)).sqrt()


def _not_linear_in(cause: DrawnEffect, rest: Tensor) -> tuple[Tensor, int]:
    """Residuals of a regression on shifts and additions to each gene; number of coefficients.

    Unchanged if there are too few samples.
    """
    shift = cause.shift.flatten(1)
    axes, sizes, _ = torch.linalg.svd(shift - shift.mean(dim=0), full_matrices=False)
    axes = axes[:, sizes > _RANK_TOLERANCE * sizes[0]].to(rest)
    n_known = axes.shape[1] + (cause.direct is not None)
    if 2 * n_known >= len(rest):
        return rest, 0
    rest = rest - axes @ (axes.T @ rest)
    if cause.direct is not None:
        added = cause.direct.mean(dim=1)
        added = (added - added.mean(dim=0)).to(rest)
        added -= axes @ (axes.T @ added)
        size = added.square().sum(dim=0).clamp(min=torch.finfo(added.dtype).tiny)
        rest -= added * ((added * rest).sum(dim=0) / size)
    return rest, n_known


def bounds(draws: Tensor, interval: float) -> tuple[Tensor, ...]:
    """Return the lower and the upper end of the equal-tailed interval of ``(n_draws, ...)``."""
    return quantiles(draws, (0.5 - interval / 2, 0.5 + interval / 2))


def quantiles(draws: Tensor, probabilities: tuple[float, ...]) -> tuple[Tensor, ...]:
    """Return quantiles over the first dimension, interpolated linearly, as ``torch.quantile`` does.

    On a CPU numpy sorts, which takes a tenth to a twentieth of the time of torch for a hundred
    samples of two thousand genes. Compiled loops that selected only the outermost samples took a
    tenth of that, but made no visible difference to a whole analysis.
    """
    if _devices.is_accelerator(draws.device):
        return tuple(torch.quantile(draws, draws.new_tensor(probabilities), dim=0))
    ordered = np.array(np.moveaxis(draws.numpy(), 0, -1), order="C")  # a copy, sorted in place
    ordered.sort(axis=-1)
    has_nan = np.isnan(ordered[..., -1])  # NaN is sorted last
    found = []
    for probability in probabilities:
        place = probability * (len(draws) - 1)
        below = min(int(place), len(draws) - 1)
        above = min(below + 1, len(draws) - 1)
        weight = ordered.dtype.type(place - below)
        with np.errstate(invalid="ignore"):  # between two infinities of the same sign
            step = weight * (ordered[..., above] - ordered[..., below])
        step = np.where(ordered[..., above] == ordered[..., below], 0, step)
        value = np.where(has_nan, np.nan, ordered[..., below] + step)
        found.append(torch.from_numpy(value.astype(ordered.dtype)))
    return tuple(found)
