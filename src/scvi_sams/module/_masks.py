"""Sparse masks: q(m_tl) = Bernoulli(sigmoid(logit_tl)), and the priors over them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.distributions import Beta
from torch.distributions.utils import clamp_probs
from torch.nn import functional

from scvi_sams._checks import check_choice
from scvi_sams._torch import generator
from scvi_sams.exceptions import InvalidArgumentError

_LOGIT_OF_EXCLUDED = -20.0
"""Log-odds that are never sampled, but have a finite divergence from the prior."""

NEVER = 1e-4
"""Probability of a mask in a row without masks."""


class MaskPrior(nn.Module, ABC):
    """A prior over the masks, defined by the divergence of a posterior from it.

    To add one, write a subclass and a line in :data:`MASK_PRIORS`.
    """

    log_odds: float
    """Prior probability that an entry is on."""

    @abstractmethod
    def kl(self, logits: Tensor) -> Tensor:
        """KL(q(m) || p(m)) of every entry, in nats, in closed form."""

    @abstractmethod
    def monte_carlo_kl(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Estimate of the same from masks sampled from the posterior."""

    def kl_of_rows(self, kl_estimator: str, logits: Tensor, masks: Tensor) -> Tensor:
        """Divergence of every perturbation by an estimator, ``(n_particles or 1, n_rows)``."""
        if kl_estimator == "closed_form":
            return self.kl(logits).sum(-1)[None]
        return self.monte_carlo_kl(logits, masks).sum(-1)


class BernoulliMaskPrior(MaskPrior):
    """m_tl ~ Bernoulli(alpha) (paper, section 3), ``alpha`` being ``probability``."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.log_on = math.log(probability)
        self.log_off = math.log1p(-probability)
        self.log_odds = self.log_on - self.log_off

    def kl(self, logits: Tensor) -> Tensor:
        """``q log(q / alpha) + (1 - q) log((1 - q) / (1 - alpha))``."""
        return _bernoulli_kl(logits, self.log_on, self.log_off)

    def monte_carlo_kl(self, logits: Tensor, masks: Tensor) -> Tensor:
        """``log q(m) - log p(m)`` at the sampled masks (the paper's estimate)."""
        log_prior = masks * self.log_on + (1 - masks) * self.log_off
        return _log_probability(logits, masks) - log_prior


class RowwiseMaskPrior(MaskPrior):
    """Prior in which some rows have no masks at all; set by :meth:`set_to`, and saved.

    ``a_r ~ Bernoulli(rho)``, ``m_rl | a_r ~ Bernoulli(pi)`` in rows with masks, and almost never
    (:data:`NEVER`) on in others. Given q(m_r) the optimal q(a_r) is inserted directly, so it has no
    parameters::

        KL = -log(rho exp(-KL(q || pi)) + (1 - rho) exp(-KL(q || NEVER)))

    with divergences of all masks of the row.
    """

    logits: Tensor

    def __init__(self, row_probability: float, probability: float) -> None:
        super().__init__()
        self.register_buffer("logits", torch.zeros(2))
        self.set_to(row_probability, probability)

    def set_to(self, row_probability: float, probability: float) -> None:
        """Set ``rho`` and ``pi``."""
        both = torch.tensor([row_probability, probability], dtype=torch.float64)
        self.logits.copy_(torch.logit(both))

    @property
    def probabilities(self) -> tuple[float, float]:
        """``rho`` and ``pi``."""
        row, entry = torch.sigmoid(self.logits).tolist()
        return row, entry

    def marginal_log_odds(self) -> Tensor:
        """Marginal prior log-odds of a mask."""
        row, entry = torch.sigmoid(self.logits)
        return torch.logit(row * entry + (1 - row) * NEVER)

    def chance_of_any(self, n_masks: int) -> Tensor:
        """Prior probability that a row of so many masks has at least one on."""
        row, entry = torch.sigmoid(self.logits)
        return 1 - row * (1 - entry) ** n_masks - (1 - row) * (1 - NEVER) ** n_masks

    def kl(self, logits: Tensor) -> Tensor:
        """Divergence of every row, ``(n_rows,)``."""
        log_on, log_off = (
            functional.logsigmoid(self.logits[1]),
            functional.logsigmoid(-self.logits[1]),
        )
        divergences = (
            _bernoulli_kl(logits, log_on, log_off).sum(dim=-1),
            _bernoulli_kl(logits, math.log(NEVER), math.log1p(-NEVER)).sum(dim=-1),
        )
        return -self._mixed(*divergences)

    def monte_carlo_kl(self, logits: Tensor, masks: Tensor) -> Tensor:
        """``log q(m) - log p(m)`` of every row at the sampled masks, ``(n_particles, n_rows)``."""
        never = math.log(NEVER) - math.log1p(-NEVER)
        costs = (
            -_log_probability(self.logits[1], masks).sum(dim=-1),
            -_log_probability(self.logits.new_tensor(never), masks).sum(dim=-1),
        )
        return _log_probability(logits, masks).sum(dim=-1) - self._mixed(*costs)

    def _mixed(self, if_some: Tensor, if_none: Tensor) -> Tensor:
        """Log of the mixture of the exponentials of minus both."""
        return torch.logaddexp(
            functional.logsigmoid(self.logits[0]) - if_some,
            functional.logsigmoid(-self.logits[0]) - if_none,
        )

    def kl_of_rows(self, kl_estimator: str, logits: Tensor, masks: Tensor) -> Tensor:
        """Divergence of every row by an estimator, ``(n_particles or 1, n_rows)``."""
        if kl_estimator == "closed_form":
            return self.kl(logits)[None]
        return self.monte_carlo_kl(logits, masks)


class PointEstimateMaskPrior(MaskPrior):
    """m_tl | pi_tl ~ Bernoulli(pi_tl), pi_tl ~ Beta(1, b) with a point estimate of pi (SVAE+).

    Given q(m_tl = 1) = q the optimal estimate is ``q / b``; it is inserted directly, so it has no
    parameters. The cost is ``KL(q(m) || Bernoulli(q / b)) - log Beta(q / b | 1, b)``: a density,
    not a probability, so it can be negative. An entry that is on costs
    ``log b - (b - 1) log(1 - 1 / b)`` more than one that is off: 1.4, 2.5 and 3.3 nats for the
    papers' 2, 5 and 10. ``beta`` is b, above 1; the prior probability is ``1 / (1 + b)``.
    """

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta
        self.log_odds = -math.log(beta)

    def kl(self, logits: Tensor) -> Tensor:
        """Return the cost at the optimal estimate of the probability."""
        log_on, log_off = self._best_estimate(logits.double())
        density = self._log_density(log_off).to(logits.dtype)
        return _bernoulli_kl(logits, log_on, log_off) - density

    def monte_carlo_kl(self, logits: Tensor, masks: Tensor) -> Tensor:
        """``log q(m) - log p(m | pi) p(pi)`` at the sampled masks and the optimal estimate."""
        log_on, log_off = self._best_estimate(logits)
        log_prior = masks * log_on + (1 - masks) * log_off
        return _log_probability(logits, masks) - log_prior - self._log_density(log_off)

    def _best_estimate(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the estimate and of its complement."""
        log_on = functional.logsigmoid(logits) - math.log(self.beta)
        return log_on, torch.log1p(-torch.sigmoid(logits) / self.beta)

    def _log_density(self, log_off: Tensor) -> Tensor:
        return math.log(self.beta) + (self.beta - 1) * log_off


class BetaBernoulliMaskPrior(MaskPrior):
    """m_tl | pi_tl ~ Bernoulli(pi_tl), pi_tl ~ Beta(a, b).

    Given q(m_tl = 1) = q the optimal q(pi_tl) is Beta(a + q, b + 1 - q); it is inserted directly,
    so it has no parameters and the bound is as tight as a factorised posterior allows:
    ``KL = -H(q) - log(B(a + q, b + 1 - q) / B(a, b))``.
    """

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a = a
        self.b = b
        self.log_odds = math.log(a) - math.log(b)

    def kl(self, logits: Tensor) -> Tensor:
        """Return the bound with q(pi) at its optimum."""
        # In float64: log-gammas of a large concentration nearly cancel.
        wide = logits.double()
        on, off = torch.sigmoid(wide), torch.sigmoid(-wide)
        negative_entropy = _bernoulli_kl(wide, 0.0, 0.0)
        evidence = torch.lgamma(self.a + on) + torch.lgamma(self.b + off)
        prior = math.lgamma(self.a) + math.lgamma(self.b)
        total = math.lgamma(self.a + self.b + 1) - math.lgamma(self.a + self.b)
        return (negative_entropy - (evidence - prior - total)).to(logits.dtype)

    def monte_carlo_kl(self, logits: Tensor, masks: Tensor) -> Tensor:
        """``log q(m) q(pi) - log p(m | pi) p(pi)`` at sampled masks and probabilities."""
        on = torch.sigmoid(logits)
        posterior = Beta(self.a + on, self.b + 1 - on, validate_args=False)
        prior = Beta(logits.new_tensor(self.a), logits.new_tensor(self.b), validate_args=False)
        # Away from 0 and 1 by the resolution of float32, so that the logarithms stay finite.
        probability = _draw_beta(posterior, masks.shape[: masks.dim() - logits.dim()])
        probability = probability.clamp(1e-6, 1 - 1e-6)
        log_conditional = masks * probability.log() + (1 - masks) * torch.log1p(-probability)
        divergence = posterior.log_prob(probability) - prior.log_prob(probability)
        return _log_probability(logits, masks) - log_conditional + divergence


def _draw_beta(posterior: Beta, shape: torch.Size) -> Tensor:
    """Sample from a Beta distribution as ``rsample`` does, which does not take a generator."""
    on, off = posterior.concentration1, posterior.concentration0
    source = generator(on.device)
    if source is None:
        return posterior.rsample(shape)
    both = torch.stack([on, off], dim=-1).detach().expand(*shape, *on.shape, 2)
    return torch._sample_dirichlet(both, generator=source)[..., 0]


def _beta_bernoulli(probability: float, concentration: float | None) -> BetaBernoulliMaskPrior:
    if concentration is None:
        raise InvalidArgumentError("A Beta prior of masks needs `mask_prior_concentration`.")
    return BetaBernoulliMaskPrior(concentration * probability, concentration * (1 - probability))


MASK_PRIORS: dict[str, Callable[[float, float | None], MaskPrior]] = {
    "bernoulli": lambda probability, _: BernoulliMaskPrior(probability),
    "beta_bernoulli": _beta_bernoulli,
}
"""Values of ``mask_prior``, constructed from the prior probability and the concentration."""

MaskPriorName = Annotated[str, lambda name, value: check_choice(name, value, list(MASK_PRIORS))]


class MaskPosterior(nn.Module):
    """q(m_tl) = Bernoulli(sigmoid(logit_tl)), sampled by a straight-through relaxation.

    Every entry starts at ``initial_probability``; gradients pass through a relaxed Bernoulli of
    ``temperature``.

    Attributes
    ----------
    is_dense
        While true every mask is on, at no cost: the dense phase of training. Saved with the module;
        set by :meth:`switch_all_on`.
    is_excluded
        Latent dimensions that are switched off for all perturbations, ``(n_latent,)``.
    """

    is_dense: Tensor
    is_excluded: Tensor

    def __init__(
        self,
        n_perturbations: int,
        n_latent: int,
        *,
        initial_probability: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        logit = math.log(initial_probability) - math.log1p(-initial_probability)
        self.logits = nn.Parameter(torch.full((n_perturbations, n_latent), logit))
        self.register_buffer("is_dense", torch.tensor(False))
        self._is_dense = False
        self.register_buffer("is_excluded", torch.zeros(n_latent, dtype=torch.bool))
        self.temperature = temperature

    @property
    def all_on(self) -> bool:
        """Whether every mask is on: ``is_dense``, without reading it from the device."""
        return self._is_dense

    def switch_all_on(self, on: bool) -> None:
        """Begin or end the phase in which every mask is on."""
        self.is_dense.fill_(on)
        self._is_dense = on

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_dense = bool(self.is_dense)

    def log_odds(self, rows: Tensor) -> Tensor:
        """Logits of the posterior, ``(n_rows, n_latent)``; very low if a latent is excluded."""
        return torch.where(self.is_excluded, _LOGIT_OF_EXCLUDED, self.logits[rows])

    def permute(self, order: Tensor) -> None:
        """Reorder the latent dimensions: the new ``l`` is the old ``order[l]``."""
        self.logits.copy_(self.logits[:, order])
        self.is_excluded.copy_(self.is_excluded[order])

    def sample(self, rows: Tensor, n_particles: int) -> Tensor:
        """Sample zeros and ones of shape ``(n_particles, n_rows, n_latent)`` for perturbations."""
        logits = self.log_odds(rows)
        if self.all_on:
            return torch.ones_like(logits).expand(n_particles, *logits.shape)
        return self.sample_by(logits, n_particles)

    def sample_by(self, logits: Tensor, n_particles: int) -> Tensor:
        """Sample zeros and ones by their log-odds, ``(n_particles, *logits.shape)``."""
        # Same as `pyro.distributions.RelaxedBernoulliStraightThrough`, which always checks its
        # arguments, and so would synchronise with the accelerator in every step.
        shape = (n_particles, *logits.shape)
        source = generator(logits.device)
        uniform = torch.rand(shape, generator=source, dtype=logits.dtype, device=logits.device)
        uniform = clamp_probs(uniform)
        soft = torch.sigmoid((torch.logit(uniform) + logits) / self.temperature)
        return soft + (soft.round() - soft).detach()

    @property
    def inclusion_probability(self) -> Tensor:
        """Posterior probability that a perturbation shifts a latent, perturbations x latents."""
        if self.all_on:
            return torch.ones_like(self.logits)
        rows = torch.arange(len(self.logits), device=self.logits.device)
        return torch.sigmoid(self.log_odds(rows))


def kl_to_log_odds(
    kl_estimator: str, logits: Tensor, masks: Tensor, prior_log_odds: Tensor
) -> Tensor:
    """Divergence of perturbations from masks with these log-odds, ``(n_particles or 1, R)``."""
    if kl_estimator == "closed_form":
        prior = functional.logsigmoid(prior_log_odds), functional.logsigmoid(-prior_log_odds)
        return _bernoulli_kl(logits, *prior).sum(-1)[None]
    ratio = _log_probability(logits, masks) - _log_probability(prior_log_odds, masks)
    return ratio.sum(-1)


def _bernoulli_kl(
    logits: Tensor, prior_log_on: float | Tensor, prior_log_off: float | Tensor
) -> Tensor:
    # In float64: in float32 a sigmoid has no gradient beyond a logit of 16.
    wide = logits.double()
    on, off = torch.sigmoid(wide), torch.sigmoid(-wide)
    log_on, log_off = functional.logsigmoid(wide), functional.logsigmoid(-wide)
    return (on * (log_on - prior_log_on) + off * (log_off - prior_log_off)).to(logits.dtype)


def _log_probability(logits: Tensor, masks: Tensor) -> Tensor:
    return masks * functional.logsigmoid(logits) + (1 - masks) * functional.logsigmoid(-logits)
