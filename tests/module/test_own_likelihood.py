"""A likelihood of one's own is one class and one line of registration, with what a model does."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import NegativeBinomial, StudentT
from torch.nn.functional import logsigmoid

from model.builders import TRAINING, copy_without_registration, small_screen
from scvi_sams import CPAVAE, SAMSVAE
from scvi_sams.exceptions import InvalidCountsError, SAMSError
from scvi_sams.module import LIKELIHOODS, Likelihood
from scvi_sams.module._likelihoods import NegativeBinomialLikelihood

DEGREES = 4.0


class StudentTLikelihood(Likelihood):
    """Normalised values with heavy tails, and one learned scale per gene."""

    is_count_likelihood = False

    def __init__(self, n_genes, *, uses_size_factor):
        super().__init__(n_genes, uses_size_factor=uses_size_factor)
        self.log_scale = nn.Parameter(torch.zeros(n_genes))

    def log_prob(self, x, logits, size):
        return StudentT(DEGREES, logits, self.log_scale.exp()).log_prob(x).sum(-1)

    def sample(self, logits, size):
        return StudentT(DEGREES, logits, self.log_scale.exp()).sample()

    def rate(self, logits):
        return logits

    def mean(self, logits, size):
        return logits

    def initialise(self, mean, variance, inverse_size_mean):
        self.log_scale.data.copy_(0.5 * (variance.clamp(min=1e-4) / 2).log())
        return mean


class ZeroInflatedLikelihood(NegativeBinomialLikelihood):
    """Counts that are lost with a probability that the decoder says too, of every gene."""

    outputs_per_gene = 2

    def counts(self, logits, size):
        """Before any is lost."""
        theta = self.log_inverse_dispersion.exp()
        mean = size[:, None] * logits.chunk(2, dim=-1)[0].softmax(-1)
        return NegativeBinomial(theta, logits=(mean / theta).log())

    def log_prob(self, x, logits, size):
        lost = logits.chunk(2, dim=-1)[1]
        kept = logsigmoid(-lost) + self.counts(logits, size).log_prob(x)
        return torch.where(x == 0, torch.logaddexp(logsigmoid(lost), kept), kept).sum(-1)

    def mean_decoded_log_prob(self, x, hidden, to_genes, size, direct=None):
        return Likelihood.mean_decoded_log_prob(self, x, hidden, to_genes, size, direct)

    def sample(self, logits, size):
        kept = torch.sigmoid(-logits.chunk(2, dim=-1)[1])
        return self.counts(logits, size).sample() * torch.bernoulli(kept)

    def rate(self, logits):
        means, lost = logits.chunk(2, dim=-1)
        return means.softmax(-1) * torch.sigmoid(-lost)

    log_laplace_transform = Likelihood.log_laplace_transform

    def initialise(self, mean, variance, inverse_size_mean):
        bias = super().initialise(mean, variance, inverse_size_mean)
        return torch.cat([bias, torch.full_like(bias, -3.0)])


OWN = {
    "student_t": (StudentTLikelihood, {"layer": "normalised"}),
    "zinb": (ZeroInflatedLikelihood, {}),
}


@pytest.fixture(params=OWN)
def own(request, monkeypatch):
    """Register a likelihood under its name; returns the name and what to register the data with."""
    likelihood, setup = OWN[request.param]
    monkeypatch.setitem(LIKELIHOODS, request.param, likelihood)
    return request.param, setup


@pytest.fixture
def model(own):
    return trained(SAMSVAE, *own)


def trained(model_cls, name, setup):
    torch.manual_seed(0)
    adata = small_screen()
    model_cls.setup_anndata(adata, **setup)
    model = model_cls(adata, n_latent=3, n_hidden=8, gene_likelihood=name)
    model.train(max_epochs=1, **TRAINING)
    return model


def test_it_is_trained_and_predicts(model, own):
    likelihood = OWN[own[0]][0]
    assert type(model.module.likelihood) is likelihood
    width = likelihood.outputs_per_gene * model.adata.n_vars
    assert model.module.decoder.to_genes.out_features == width
    n_cells, n_genes = model.adata.shape
    assert model.get_normalized_expression(return_numpy=True).shape == (n_cells, n_genes)
    assert model.predict(["P001"], output="counts").shape[1] == n_genes
    effects = model.predict_ate(["P001", "P001+P002"], method="mean", n_samples=100)
    assert effects.shape == (2, n_genes)
    assert np.isfinite(effects.X).all()
    assert np.abs(effects.X).max() > 0
    assert np.isfinite(model.get_iwelbo(n_samples=3))


def test_every_other_model_has_it_too(own):
    assert np.isfinite(trained(CPAVAE, *own).get_elbo())


def test_it_is_saved_and_loaded(model, tmp_path):
    model.save(tmp_path / "model")
    data = copy_without_registration(model.adata)
    loaded = SAMSVAE.load(tmp_path / "model", data, accelerator="cpu")
    assert loaded.gene_likelihood == model.gene_likelihood
    torch.manual_seed(1)
    expected = model.get_elbo(return_mean=False)
    torch.manual_seed(1)
    np.testing.assert_allclose(loaded.get_elbo(return_mean=False), expected, rtol=1e-5)


def test_data_are_checked_and_effects_scaled_by_what_it_says(model, own):
    if own[0] == "student_t":
        with pytest.raises(SAMSError, match="method='mean'"):
            model.predict_ate(["P001"], method="lograte")
        return
    with pytest.raises(SAMSError, match="method='lograte'"):
        model.predict_ate(["P001"], method="lognorm")
    assert np.isfinite(model.predict_ate(["P001"], method="lograte", n_samples=100).X).all()
    adata = small_screen()
    SAMSVAE.setup_anndata(adata, layer="normalised")
    with pytest.raises(InvalidCountsError):
        SAMSVAE(adata, gene_likelihood=own[0])


def test_losing_counts_lowers_the_mean_and_nothing_else():
    """Closed form: E[x] = (1 - pi) size share, and p(0) = pi + (1 - pi) NB(0)."""
    likelihood = ZeroInflatedLikelihood(2, uses_size_factor=False)
    logits = torch.tensor([[[0.0, math.log(3.0), 0.0, -math.log(3.0)]]])
    rate = likelihood.rate(logits)
    torch.testing.assert_close(rate, torch.tensor([[[0.25 * 0.5, 0.75 * 0.75]]]))
    size = torch.tensor([4.0])
    found = likelihood.log_prob(torch.zeros(1, 2), logits, size)
    nb = torch.tensor([1 / (1 + 1.0), 1 / (1 + 3.0)])  # theta = 1
    lost = torch.tensor([0.5, 0.25])
    torch.testing.assert_close(found, (lost + (1 - lost) * nb).log().sum().reshape(1, 1))
