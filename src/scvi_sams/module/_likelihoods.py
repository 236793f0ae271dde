"""Likelihoods of expression: convert the decoder's logits to rates, means and samples."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from scvi_sams._checks import check_choice
from scvi_sams._torch import generator
from scvi_sams.module._branched_likelihood import mean_over_branches
from scvi_sams.module._direct_effects import add_to_logits
from scvi_sams.module._negative_binomial import (
    MAX_LOG_MEAN,
    inverse_dispersion,
    mean_decoded_log_prob,
    negative_binomial_log_prob,
)
from scvi_sams.module._responses import N_BRANCHES, posterior_of_branches

_MAX_LOG_MEAN_OF_POISSON = 30.0
"""Largest Poisson mean: a million times the largest count that is accepted."""


_AS_LARGE_AS_ITS_MEAN = 1e15
"""Above this mean a Poisson count equals its mean in single precision."""


class Likelihood(nn.Module, ABC):
    """Interpretation of the decoder's output, the "logits", ``(n_particles, n_cells, n_outputs)``.

    To add one, write a subclass and a line in :data:`LIKELIHOODS`; all other code uses the class.

    Parameters
    ----------
    n_genes
        Number of genes.
    uses_size_factor
        Whether ``size`` is a registered size factor, by which positive rates are multiplied,
        instead of the observed library size, which a softmax over the genes divides.
    """

    is_count_likelihood: ClassVar[bool] = True
    """Whether data must be counts: they are checked, encoded by log1p and normalised for size."""
    outputs_per_gene: ClassVar[int] = 1
    """Outputs of the decoder per gene: ``n_outputs = outputs_per_gene * n_genes``.

    The first ``n_genes`` outputs are logits of the mean, to which direct effects are added."""
    largest_counts: np.ndarray | None = None
    """Largest counts of genes in training cells, ``(G,)``, during training: without them, an
    accelerator would have to be synchronised in each step to find large counts."""

    def __init__(self, n_genes: int, *, uses_size_factor: bool) -> None:
        super().__init__()
        self.n_genes = n_genes
        self.uses_size_factor = uses_size_factor

    @abstractmethod
    def log_prob(self, x: Tensor, logits: Tensor, size: Tensor) -> Tensor:
        """Log-likelihood summed over genes, ``(n_particles, n_cells)``, in nats."""

    def mean_decoded_log_prob(
        self,
        x: Tensor,
        hidden: Tensor,
        to_genes: nn.Linear,
        size: Tensor,
        direct: Tensor | None = None,
        of_branches: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-likelihood of the logits ``to_genes(hidden)``, for training.

        ``direct``, ``(n_cells, n_genes)`` and without a gradient, is added to the logits.

        With ``of_branches``, ``(n_particles, n_cells)``, the first half of the particles is for
        cells that respond to their perturbations, the second half for the same cells without a
        response, which have no direct effects. ``of_branches`` is the log prior minus divergences.

        Returns
        -------
        The mean over particles and cells (over branches by their posterior), and the values
        without gradient, shape ``(n_particles, n_cells)``.
        """
        logits = to_genes(hidden)
        if of_branches is None:
            log_prob = self.log_prob(x, add_to_logits(logits, direct), size)
            return log_prob.mean(), log_prob.detach()
        first, second = logits.chunk(N_BRANCHES)
        log_prob = self.log_prob(x, torch.cat([add_to_logits(first, direct), second]), size)
        weighted = posterior_of_branches((log_prob + of_branches).detach()) * log_prob
        return N_BRANCHES * weighted.mean(), log_prob.detach()

    @abstractmethod
    def sample(self, logits: Tensor, size: Tensor) -> Tensor:
        """Sample expression, ``(n_particles, n_cells, n_genes)``."""

    def log_laplace_transform(self, mean: Tensor, u: Tensor, genes: Tensor) -> Tensor:
        """Log of E[exp(-u x)] for counts x with the given means, ``(len(genes), *shape)``.

        ``mean`` and ``u`` are broadcast against each other. Without it there are no effects on the
        scale ``"lognorm"``.
        """
        raise NotImplementedError

    @property
    def has_laplace_transform(self) -> bool:
        """Whether :meth:`log_laplace_transform` is implemented."""
        return type(self).log_laplace_transform is not Likelihood.log_laplace_transform

    @abstractmethod
    def initialise(self, mean: Tensor, variance: Tensor, inverse_size_mean: float) -> Tensor:
        """Set parameters from moments of the training cells; return the bias ``(n_outputs,)``.

        Parameters
        ----------
        mean, variance
            Moments of ``x / size`` (counts) or of ``x`` (normal) per gene, shape ``(n_genes,)``.
        inverse_size_mean
            Mean of 1 / size over the training cells.
        """

    def rate(self, logits: Tensor) -> Tensor:
        """Expected expression per unit of size: proportions of the library, or rates.

        Rates are finite and positive, like the means in likelihoods, however far from the data they
        are evaluated.
        """
        if self.uses_size_factor:
            return logits.clamp(-MAX_LOG_MEAN, MAX_LOG_MEAN).exp()
        return torch.softmax(logits, dim=-1)

    def rate_slope(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Derivative of rates with respect to logits, as ``slope`` and ``share`` of genes.

        The rate of gene g changes with the logit of gene k by ``slope_g (1[g = k] - share_k)``;
        ``share`` is ``None`` if rates are independent. Only valid for the :meth:`rate` of the same
        class (:attr:`has_rate_slope`).
        """
        if self.uses_size_factor:
            rate = self.rate(logits)
            return torch.where(logits.abs() <= MAX_LOG_MEAN, rate, 0), None
        rate = self.rate(logits)
        return rate, rate

    @property
    def has_rate_slope(self) -> bool:
        """Whether the class that defines :meth:`rate` defines :meth:`rate_slope` as well."""
        rate, slope = (
            next(part for part in type(self).__mro__ if name in vars(part))
            for name in ("rate", "rate_slope")
        )
        return rate is slope

    def log_rate(self, logits: Tensor) -> Tensor:
        """Logarithm of :meth:`rate`."""
        if self.uses_size_factor:
            return logits.clamp(-MAX_LOG_MEAN, MAX_LOG_MEAN)
        return torch.log_softmax(logits, dim=-1)

    def mean(self, logits: Tensor, size: Tensor) -> Tensor:
        """Expected expression of cells of the given size, shape ``(n_cells,)``."""
        return self.rate(logits) * size[:, None]


class NegativeBinomialLikelihood(Likelihood):
    """Counts with one learned inverse dispersion per gene ("Gamma-Poisson" in the paper)."""

    def __init__(self, n_genes: int, *, uses_size_factor: bool) -> None:
        super().__init__(n_genes, uses_size_factor=uses_size_factor)
        self.log_inverse_dispersion = nn.Parameter(torch.zeros(n_genes))

    def log_prob(self, x: Tensor, logits: Tensor, size: Tensor) -> Tensor:
        """See :func:`negative_binomial_log_prob`."""
        if self.uses_size_factor:
            log_mean = logits + size.log()[:, None]
            return negative_binomial_log_prob(x, log_mean, self.log_inverse_dispersion)
        return negative_binomial_log_prob(x, logits, self.log_inverse_dispersion, size)

    def mean_decoded_log_prob(
        self,
        x: Tensor,
        hidden: Tensor,
        to_genes: nn.Linear,
        size: Tensor,
        direct: Tensor | None = None,
        of_branches: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See :func:`mean_decoded_log_prob`: logits of all genes are never in memory at once."""
        layer = (to_genes.weight, to_genes.bias, self.log_inverse_dispersion, size, direct)
        softmax = not self.uses_size_factor
        largest = self.largest_counts if self.training else None
        if of_branches is not None:
            return mean_over_branches(
                x, hidden, *layer, of_branches, softmax=softmax, largest=largest
            )
        return mean_decoded_log_prob(x, hidden, *layer, softmax=softmax, largest=largest)

    def sample(self, logits: Tensor, size: Tensor) -> Tensor:
        """Sample counts from a Poisson with a Gamma-distributed rate."""
        theta = inverse_dispersion(self.log_inverse_dispersion)
        mean = self.mean(logits, size)
        gamma = torch._standard_gamma(theta.expand_as(mean), generator=generator(mean.device))
        return _draw_counts(gamma * (mean / theta))

    def log_laplace_transform(self, mean: Tensor, u: Tensor, genes: Tensor) -> Tensor:
        """``-theta log(1 + mean (1 - exp(-u)) / theta)``."""
        hits = mean * -torch.expm1(-u)
        theta = inverse_dispersion(self.log_inverse_dispersion[genes].to(hits))
        theta = theta.reshape(-1, *[1] * hits.dim())
        return -theta * torch.log1p(hits / theta)

    def initialise(self, mean: Tensor, variance: Tensor, inverse_size_mean: float) -> Tensor:
        """Match the mean rate and, by the method of moments, the dispersion of every gene."""
        rate = _positive(mean)
        # Var(x / l) = rate / l + rate^2 / theta for a cell of size l.
        excess = variance - rate * inverse_size_mean
        theta = torch.where(excess > 0, rate**2 / excess.clamp(min=1e-30), torch.inf)
        self.log_inverse_dispersion.data.copy_(theta.clamp(0.1, 100.0).log())
        return rate.log()


class PoissonLikelihood(Likelihood):
    """Counts whose variance equals their mean."""

    def log_prob(self, x: Tensor, logits: Tensor, size: Tensor) -> Tensor:
        """``sum_g x log(mean) - mean - log(x!)``.

        With a size factor the mean is not bounded, and far from the data, for example at a dose far
        above those seen, its exponential exceeds single precision. From a mean of 1e13 on the mean
        is continued linearly, so that bound and gradient stay finite and the gradient points back.
        """
        log_rate = logits if self.uses_size_factor else torch.log_softmax(logits, dim=-1)
        log_mean = log_rate + size.log()[:, None]
        if self.uses_size_factor:
            below = log_mean.clamp(max=_MAX_LOG_MEAN_OF_POISSON)
            total = (below.exp() * (1 + log_mean - below)).sum(-1)
        else:
            total = size.expand(log_mean.shape[:-1])  # proportions sum to one
        return torch.einsum("pbg,bg->pb", log_mean, x) - total - torch.lgamma(x + 1).sum(-1)

    def sample(self, logits: Tensor, size: Tensor) -> Tensor:
        """Sample counts."""
        return _draw_counts(self.mean(logits, size))

    def log_laplace_transform(self, mean: Tensor, u: Tensor, genes: Tensor) -> Tensor:
        """``-mean (1 - exp(-u))``."""
        hits = mean * torch.expm1(-u)
        return hits.expand(len(genes), *hits.shape)

    def initialise(self, mean: Tensor, variance: Tensor, inverse_size_mean: float) -> Tensor:
        """Match the mean rate of every gene."""
        return _positive(mean).log()


class NormalLikelihood(Likelihood):
    """Values that are already normalised, with one learned scale per gene; size is ignored."""

    is_count_likelihood = False

    def __init__(self, n_genes: int, *, uses_size_factor: bool) -> None:
        super().__init__(n_genes, uses_size_factor=uses_size_factor)
        self.log_scale = nn.Parameter(torch.zeros(n_genes))

    def log_prob(self, x: Tensor, logits: Tensor, size: Tensor) -> Tensor:
        """``sum_g log Normal(x | logits, scale)``."""
        residual = (x - logits) * torch.exp(-self.log_scale)
        constant = self.log_scale.sum() + 0.5 * self.n_genes * math.log(2 * math.pi)
        return -0.5 * residual.square().sum(-1) - constant

    def sample(self, logits: Tensor, size: Tensor) -> Tensor:
        """Sample values."""
        source = generator(logits.device)
        noise = torch.empty_like(logits).normal_(generator=source)
        return logits + self.log_scale.exp() * noise

    def rate(self, logits: Tensor) -> Tensor:
        """The decoder's output is the mean itself."""
        return logits

    def rate_slope(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Means change like the decoder's output."""
        return torch.ones_like(logits), None

    def mean(self, logits: Tensor, size: Tensor) -> Tensor:
        """The decoder's output is the mean itself."""
        return logits

    def initialise(self, mean: Tensor, variance: Tensor, inverse_size_mean: float) -> Tensor:
        """Match mean and variance of every gene; a constant gene gets a small positive scale."""
        self.log_scale.data.copy_(0.5 * variance.clamp(min=1e-4).log())
        return mean


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "nb": NegativeBinomialLikelihood,
    "poisson": PoissonLikelihood,
    "normal": NormalLikelihood,
}
"""Values of ``gene_likelihood``."""

GeneLikelihood = Annotated[str, lambda name, value: check_choice(name, value, list(LIKELIHOODS))]


def _draw_counts(mean: Tensor) -> Tensor:
    """Sample Poisson counts, also for means beyond the integers that torch supports."""
    drawn = torch.poisson(mean.clamp(max=_AS_LARGE_AS_ITS_MEAN), generator=generator(mean.device))
    return torch.where(mean > _AS_LARGE_AS_ITS_MEAN, mean, drawn)


def _positive(mean: Tensor) -> Tensor:
    """Replace zero means (genes without a count) by a tenth of the smallest positive one."""
    smallest = mean[mean > 0].min() if (mean > 0).any() else mean.new_tensor(1.0)
    return mean.clamp(min=0.1 * float(smallest))
