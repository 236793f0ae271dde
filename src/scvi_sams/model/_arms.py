"""The two arms of a counterfactual comparison: the same cells with a perturbation and without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from scvi_sams._arguments import refuse_other_choices, refuse_other_than_number
from scvi_sams._random import fixed_seed
from scvi_sams.exceptions import SAMSError
from scvi_sams.module import Likelihood, PerturbationModule

_MAX_ELEMENTS = 2**24
"""Numbers in the largest array (draws x genes) of a step: 64 MB in float32."""

Method = Literal["lognorm", "lograte", "mean"]


class Arms:
    """Effects of shifts on given basal states, by common random numbers.

    Parameters
    ----------
    module
        Whose decoder is asked.
    statistic
        f, which is averaged in both arms.
    z_basal, covariates
        Basal states ``(n_posterior, n_basal, n_latent)``, covariates to go with them.

    Attributes
    ----------
    control
        Mean of f over the basal states of each posterior sample, ``(n_posterior, n_genes)``.
    """

    def __init__(
        self,
        module: PerturbationModule,
        statistic: Statistic,
        z_basal: torch.Tensor,
        covariates: torch.Tensor | None,
    ) -> None:
        self.module = module
        self.statistic = statistic
        self.z_basal = z_basal
        self.covariates = covariates
        # Counts of every arm are drawn from the same numbers, so equal shifts give equal effects.
        self._seed = int(torch.randint(2**31, ()))
        self.control = self.mean(z_basal.new_zeros(len(z_basal), module.n_shift))

    def mean(self, shift: torch.Tensor) -> torch.Tensor:
        """Average f over the basal states of every posterior sample, moved by ``shift``.

        ``shift`` is ``(n_posterior, n_shift)``, the result ``(n_posterior, n_genes)``.
        """
        if self.z_basal.shape[1] == 1:
            return torch.cat([values.squeeze(1) for values in self._values(shift)])
        return torch.cat([values.mean(dim=1) for values in self._values(shift)])

    def every_state(self, shift: torch.Tensor) -> torch.Tensor:
        """Return f of every basal state, moved by ``shift``, ``(n_states, n_genes)``."""
        return torch.cat([values.flatten(0, 1) for values in self._values(shift)])

    def _values(self, shift: torch.Tensor) -> Iterator[torch.Tensor]:
        n_posterior, n_basal, _ = self.z_basal.shape
        n_chunk = max(1, _MAX_ELEMENTS // (n_basal * self.module.likelihood.n_genes))
        for part in torch.arange(n_posterior, device=shift.device).split(n_chunk):
            of_part = None if self.covariates is None else self.covariates[part]
            logits = self.module.decode(self.z_basal[part], shift[part, None], of_part)
            with fixed_seed(self._seed + int(part[0]), shift.device):
                yield self.statistic(logits)

    def effect(self, shift: torch.Tensor) -> torch.Tensor:
        """Return by how much ``shift`` changes the mean of f, ``(n_posterior, n_genes)``."""
        return self.mean(shift) - self.control


class Statistic:
    """f(x) of the average treatment effect, as an expectation or of drawn expression."""

    def __init__(
        self,
        likelihood: Likelihood,
        method: Method,
        library_size: float,
        target_sum: float,
        device: torch.device,
    ) -> None:
        refuse_other_choices("method", method, ("lognorm", "lograte", "mean"))
        refuse_other_than_number(above=0, library_size=library_size, target_sum=target_sum)
        if method != "mean" and not likelihood.is_count_likelihood:
            raise SAMSError("A normal likelihood has no counts to normalise: use method='mean'.")
        self.likelihood = likelihood
        self.method = method
        self.library_size = library_size
        self.target_sum = target_sum
        self.size = torch.tensor([library_size], dtype=torch.float32, device=device)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Map logits ``(..., n_genes)`` to f of the same shape."""
        if self.method != "lognorm":
            return expected_expression(self.likelihood, logits, self.method, self.target_sum)
        x = self.likelihood.sample(logits, self.size)
        if self.likelihood.uses_size_factor:
            size = self.size
        else:
            size = x.sum(-1, keepdim=True).clamp(min=1)  # a cell drawn without counts has f = 0
        return torch.log2(1 + self.target_sum * x / size)

    def description(self) -> dict[str, str | float]:
        """What the numbers are, for ``uns``."""
        is_count = self.likelihood.is_count_likelihood
        return {
            "method": self.method,
            "units": units(self.likelihood, self.method),
            "target_sum": self.target_sum if is_count else "none",
            "library_size": self.library_size,
        }


def expected_expression(
    likelihood: Likelihood, logits: torch.Tensor, method: Method, target_sum: float
) -> torch.Tensor:
    """Return ``target_sum * rate`` (``"mean"``) or ``log2(1 + target_sum * rate)``.

    A normal likelihood has its mean, on whatever scale its data are.
    """
    rate = likelihood.rate(logits)
    if not likelihood.is_count_likelihood:
        return rate
    return target_sum * rate if method == "mean" else torch.log2(1 + target_sum * rate)


def units(likelihood: Likelihood, method: Method) -> str:
    """Name the units of f."""
    if not likelihood.is_count_likelihood:
        return "units of the data"
    return {
        "mean": "counts per target_sum",
        "lograte": "log2(1 + expected counts per target_sum)",
        "lognorm": "log2(1 + counts per target_sum)",
    }[method]
