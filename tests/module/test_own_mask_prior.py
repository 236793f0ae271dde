"""A prior of masks of one's own is one class and one line of registration."""

import numpy as np
import pytest
import torch

from model.builders import TRAINING, copy_without_registration, small_screen
from scvi_sams import SAMSVAE
from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.module import MASK_PRIORS, MaskPrior
from scvi_sams.module._masks import BernoulliMaskPrior


class PricePrior(MaskPrior):
    """A fixed price, in nats, for every entry that is on: its energy, less a constant."""

    def __init__(self, price):
        super().__init__()
        self.price = price
        self.log_odds = -price

    def kl(self, logits):
        return self.price * torch.sigmoid(logits)

    def monte_carlo_kl(self, logits, masks):
        return self.price * masks


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(MASK_PRIORS, "price", lambda share, price: PricePrior(price or 1 / share))


def trained(**settings):
    torch.manual_seed(0)
    adata = small_screen()
    SAMSVAE.setup_anndata(adata)
    model = SAMSVAE(adata, n_latent=3, n_hidden=8, mask_prior="price", **settings)
    model.train(max_epochs=2, **TRAINING)
    return model


@pytest.mark.parametrize("kl_estimator", ["closed_form", "monte_carlo"])
def test_masks_pay_its_price(kl_estimator):
    cheap, dear = (
        trained(mask_prior_concentration=price, kl_estimator=kl_estimator) for price in (0.1, 1e3)
    )
    assert isinstance(cheap.module.mask_prior, PricePrior)
    assert dear.get_perturbation_masks().to_numpy().mean() < cheap.get_perturbation_masks().mean(
        axis=None
    )
    rows = torch.arange(len(dear.perturbations))
    paid = dear.module.global_posterior(rows, 1).kl["masks"].detach()
    if kl_estimator == "closed_form":
        on = torch.tensor(dear.get_perturbation_masks().to_numpy())
        torch.testing.assert_close(paid[0], 1e3 * on.sum(1))


def test_it_is_saved_and_loaded(tmp_path):
    model = trained()
    model.save(tmp_path / "model")
    data = copy_without_registration(model.adata)
    loaded = SAMSVAE.load(tmp_path / "model", data, accelerator="cpu")
    assert loaded.module.mask_prior.price == pytest.approx(10)
    np.testing.assert_array_equal(loaded.get_perturbation_masks(), model.get_perturbation_masks())


def test_unknown_names_and_lacking_settings_are_named():
    adata = small_screen()
    SAMSVAE.setup_anndata(adata)
    with pytest.raises(InvalidArgumentError, match=r"'bernoulli', 'beta_bernoulli', 'price'"):
        SAMSVAE(adata, mask_prior="horseshoe")
    with pytest.raises(InvalidArgumentError, match="mask_prior_concentration"):
        SAMSVAE(adata, mask_prior="beta_bernoulli")
    assert isinstance(SAMSVAE(adata).module.mask_prior, BernoulliMaskPrior)
    beta = SAMSVAE(adata, mask_prior_concentration=4.0).module.mask_prior
    assert (beta.a, beta.b) == pytest.approx((0.4, 3.6))
