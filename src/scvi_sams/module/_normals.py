"""Diagonal normal posteriors beside priors of mean zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Normal


def draw_particles(posterior: Normal, n_particles: int) -> Tensor:
    """Draw ``(n_particles, ...)`` from a posterior of batch shape ``(n_particles or 1, ...)``."""
    noise = torch.randn(
        (n_particles, *posterior.loc.shape[1:]),
        dtype=posterior.loc.dtype,
        device=posterior.loc.device,
    )
    return posterior.loc + posterior.scale * noise


def divergence_from_prior(posterior: Normal, prior_scale: float) -> Tensor:
    """KL(posterior || Normal(0, prior_scale)), summed over the last dimension, in nats.

    ``sum_l ((loc^2 + sd^2) / prior_scale^2 - 1) / 2 - log(sd / prior_scale)``
    """
    # `torch.distributions.kl_divergence` would want arrays full of the prior's zeros and ones.
    squares = (posterior.loc.square() + posterior.variance) / prior_scale**2 - 1
    return 0.5 * squares.sum(-1) - (posterior.scale.log() - math.log(prior_scale)).sum(-1)


def log_ratio_to_prior(posterior: Normal, draws: Tensor, prior_scale: float = 1.0) -> Tensor:
    """``log q(draws) - log p(draws)``, summed over the last dimension: its mean is the KL."""
    prior = Normal(
        torch.zeros_like(posterior.loc),
        torch.full_like(posterior.scale, prior_scale),
        validate_args=False,
    )
    return (posterior.log_prob(draws) - prior.log_prob(draws)).sum(-1)
