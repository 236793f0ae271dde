"""The negative binomial log-likelihood of cells that may or may not respond to perturbations.

Like :func:`~scvi_sams.module._negative_binomial.mean_decoded_log_prob`, but with both branches of a
cell together: gradients are weighted by the posterior of the branches, which depends on both.
Branches that a cell does not have, or with almost no weight, are not computed further.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scvi_sams import _torch as _devices
from scvi_sams.module._negative_binomial import chunks_with_counts, inverse_dispersion
from scvi_sams.module._responses import N_BRANCHES, posterior_of_branches
from scvi_sams.module._rising_factorial import rising_factorial_table

_IMPOSSIBLE = -1e20
"""Log-probability below which a cell does not have a branch. It must be below any divergence: early
in training both branches can be above 1,000 nats, and cells would have neither, and no gradient."""
_NO_WEIGHT = 1e-3
"""Posterior probability below which a branch does not enter gradients; also the largest error of
the weight of the other branch."""


def mean_over_branches(
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    log_theta: Tensor,
    size: Tensor,
    direct: Tensor | None,
    of_branches: Tensor,
    *,
    softmax: bool,
    largest: np.ndarray | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-likelihood of counts in both branches, and its mean over their posterior.

    Parameters
    ----------
    x, weight, bias, log_theta, size, softmax, largest
        As in :func:`~scvi_sams.module._negative_binomial.mean_decoded_log_prob`.
    hidden
        Of responding cells, then of the same without a response, ``(2 P, n_cells, n_hidden)``.
    direct
        Added to the output of the last layer of responding cells.
    of_branches
        Log prior of each branch minus its divergences, ``(2 P, n_cells)``, without a gradient.

    Returns
    -------
    Mean over particles and cells, in nats, with fixed posteriors of the branches; and the value of
    each branch, ``(2 P, n_cells)``, without a gradient, 0 for branches that a cell does not have.
    """
    with torch.autocast(x.device.type, enabled=False):
        result: tuple[Tensor, Tensor] = _MeanOverBranches.apply(
            hidden.to(weight.dtype),
            weight,
            bias,
            log_theta,
            x.detach(),
            size.detach(),
            direct,
            of_branches.detach(),
            softmax,
            torch.is_grad_enabled(),
            largest,
        )
    return result


class _MeanOverBranches(torch.autograd.Function):
    """Computes gradients with the values, while all branches of a chunk of cells are in memory."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        log_theta: Tensor,
        x: Tensor,
        size: Tensor,
        direct: Tensor | None,
        of_branches: Tensor,
        softmax: bool,
        with_gradient: bool,
        largest: np.ndarray | None,
    ) -> tuple[Tensor, Tensor]:
        theta = inverse_dispersion(log_theta)
        each = theta.new_zeros(hidden.shape[:-1])
        total = theta.new_zeros(())
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        grad_bias, grad_log_theta = torch.zeros_like(bias), torch.zeros_like(theta)
        table = rising_factorial_table(theta, x, largest)
        n_values = each.numel() // N_BRANCHES
        for cells, chunk in chunks_with_counts(x, theta, size if softmax else None):
            rising, slopes_of_theta = table.read(chunk.counts)
            if with_gradient:
                grad_log_theta += slopes_of_theta.sum(0) / len(x)
            place = _rows(of_branches[:, cells] > _IMPOSSIBLE)
            inner = hidden[:, cells][place]
            logits = torch.nn.functional.linear(inner, weight, bias)
            if direct is not None:
                responds = place[0] < len(hidden) // N_BRANCHES
                logits += direct[cells][place[1]] * responds[:, None]
            if not softmax:
                logits += size[cells][place[1], None].log()
            terms = chunk.of(place[1]).kept_terms(logits[None])[0] + rising[place[1]]
            each[:, cells] = each[:, cells].index_put(place, terms)
            posterior = posterior_of_branches(each[:, cells] + of_branches[:, cells])
            total += (posterior * each[:, cells]).sum() / n_values
            if not with_gradient:
                continue
            weights = posterior[place] / n_values
            counted = _counted(weights * n_values)
            weights, logits, inner = weights[counted], logits[counted], inner[counted]
            some = chunk.of(place[1][counted])
            some.terms_and_slopes(logits[None], weights[None], grad_log_theta)
            grad_bias += logits.sum(0)
            grad_weight.addmm_(logits.T, inner)
            at = place[0][counted], place[1][counted]
            of_chunk = torch.zeros_like(hidden[:, cells]).index_put(at, logits @ weight)
            grad_hidden[:, cells] = of_chunk
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias, grad_log_theta)
        ctx.mark_non_differentiable(each)
        return total, each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *(grad * saved for saved in ctx.saved_tensors), *[None] * 7


def _rows(has_branch: Tensor) -> tuple[Tensor, ...]:
    """Particles and cells to compute; on an accelerator all, to avoid synchronisation."""
    if _devices.is_accelerator(has_branch.device):
        every = torch.arange(has_branch.numel(), device=has_branch.device)
        n_cells = has_branch.shape[1]
        return every // n_cells, every % n_cells
    return has_branch.nonzero(as_tuple=True)


def _counted(posterior: Tensor) -> Tensor:
    """Rows that enter gradients; on an accelerator all."""
    if _devices.is_accelerator(posterior.device):
        return torch.arange(len(posterior), device=posterior.device)
    return (posterior > _NO_WEIGHT).nonzero(as_tuple=True)[0]
