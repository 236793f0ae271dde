"""SAMS-VAE as a Pyro program: the generative model, and the guide that approximates its posterior.

Symbols are those of the paper. ``sams`` is a ``SAMSVAEModule``, which brings the networks and the
values of the parameters; all else is written out here. Both functions take

    x           expression, cells x genes
    d           doses, cells x perturbations; a row of zeros is a control cell
    size        registered size factors, if there are any
    covariates  batch and covariates as numbers, cells x columns, if there are any
    n_cells     N, where the cells are a mini-batch of a screen
"""

import math

import pyro
import pyro.distributions as dist
import torch

from scvi_sams.module import LIKELIHOODS


def model(sams, x, d, size=None, covariates=None, n_cells=None):
    """p(m) p(e) p(z_basal) p(x | z): how cells come about."""
    alpha = math.exp(sams.mask_prior.log_on)
    beta = sams.effect_prior_scale
    zeros = x.new_zeros(sams.n_latent)

    with pyro.plate("perturbations", d.shape[1]):
        m = pyro.sample("m", dist.Bernoulli(zeros + alpha).to_event(1))
        e = pyro.sample("e", dist.Normal(zeros, beta).to_event(1))

    with pyro.plate("cells", n_cells or len(x), subsample=range(len(x))):
        z_basal = pyro.sample("z_basal", dist.Normal(zeros, 1).to_event(1))
        z = z_basal + d @ (m * e)
        pyro.sample("x", expression(sams, z, x, size, covariates).to_event(1), obs=x)


def guide(sams, x, d, size=None, covariates=None, n_cells=None):
    """q(m) q(e | m) q(z_basal | x, s): what is learned from them.

    The four variants differ in what the networks make use of: ``effects`` may read m
    (``correlated_effects``), and ``encode`` the shift s (``correlated_basal``).
    """
    t = torch.arange(d.shape[1])
    logits = sams.masks.log_odds(t)

    with pyro.plate("perturbations", d.shape[1]):
        m = pyro.sample("m", dist.Bernoulli(logits=logits).to_event(1))
        e = pyro.sample("e", normal(sams.effects(t, m[None])).to_event(1))

    with pyro.plate("cells", n_cells or len(x), subsample=range(len(x))):
        s = d @ (m * e)
        pyro.sample("z_basal", normal(sams.encode(x, s, covariates)).to_event(1))


def expression(sams, z, x, size, covariates):
    """p(x | z) of every gene: negative binomial (Gamma-Poisson), Poisson or normal."""
    in_use = ~sams.masks.is_excluded  # latent dimensions that training has not switched off
    f = sams.decoder.to_genes(sams.decoder(z * in_use, covariates))
    if isinstance(sams.likelihood, LIKELIHOODS["normal"]):
        return dist.Normal(f, sams.likelihood.log_scale.exp())
    # Shares of the cell's own total, or rates per unit of size, which need not sum to one.
    mu = x.sum(1)[:, None] * f.softmax(1) if size is None else size[:, None] * f.exp()
    if isinstance(sams.likelihood, LIKELIHOODS["poisson"]):
        return dist.Poisson(mu)
    theta = sams.likelihood.log_inverse_dispersion.exp()
    return dist.GammaPoisson(theta, theta / mu)  # mean mu, variance mu + mu^2 / theta


def normal(posterior):
    """As Pyro's, without the leading dimension, in which a module computes many particles."""
    return dist.Normal(posterior.loc[0], posterior.scale[0])
