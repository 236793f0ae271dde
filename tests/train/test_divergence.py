"""Training that diverges stops with a clear error, and the model keeps its last good weights."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from scvi.module.base import LossOutput

from model.builders import TRAINING, small_screen
from scvi_sams import CPAVAE, SAMSVAE
from scvi_sams.exceptions import TrainingDivergedError, UnreadableDataError
from scvi_sams.train import _plan
from scvi_sams.train._plan import diverged_term

SIZES = {"n_latent": 3, "n_hidden": 8}
ALL_MASKS = {"dense_fraction": 0.0}


class Spoil(Callback):
    """Puts NaN into a parameter before a step, and notes the weights at the end of each epoch."""

    def __init__(self, parameter, epoch, value=float("nan")):
        self.parameter, self.epoch, self.value = parameter, epoch, value
        self.ends = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            with torch.no_grad():
                dict(pl_module.module.named_parameters())[self.parameter].view(-1)[0] = self.value

    def on_train_epoch_end(self, trainer, pl_module):
        self.ends.append(state_of(pl_module.module))


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(module, expected):
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


def make_model(model_cls=SAMSVAE, **settings):
    adata = small_screen()
    model_cls.setup_anndata(adata)
    torch.manual_seed(0)
    return model_cls(adata, **(SIZES | settings))


def train(model, spoil=None, max_epochs=4, **plan):
    callbacks = [] if spoil is None else [spoil]
    options = TRAINING | {"plan_kwargs": ALL_MASKS | plan, "callbacks": callbacks}
    model.train(max_epochs=max_epochs, **options)


def test_the_error_names_step_epoch_term_and_learning_rates():
    model = make_model(CPAVAE)
    with pytest.raises(TrainingDivergedError) as error:
        train(model, Spoil("decoder.to_genes.bias", epoch=2))
    n_steps = 3  # 135 training cells in batches of 64
    message = str(error.value)
    assert f"step {2 * n_steps + 2} (epoch 3)" in message
    assert "reconstruction_loss is nan" in message
    assert "lr=0.002 and table_lr=0.01" in message
    assert "end of epoch 2" in message


@pytest.mark.parametrize("steps_between_looks", [1, 3, 50])
def test_an_accelerator_is_asked_now_and_then(steps_between_looks, monkeypatch):
    """At some steps, and for its weights at the end of each epoch."""
    monkeypatch.setattr("scvi_sams._torch.is_accelerator", lambda device: True)
    monkeypatch.setattr(_plan, "_STEPS_BETWEEN_LOOKS", steps_between_looks)
    model = make_model(CPAVAE)
    with pytest.raises(TrainingDivergedError) as error:
        train(model, Spoil("decoder.to_genes.bias", epoch=2))
    message = str(error.value)
    step, reason = {
        1: (8, "reconstruction_loss is nan"),
        3: (10, "weights"),
        50: (10, "weights"),
    }[steps_between_looks]
    assert f"step {step} (epoch 3)" in message
    assert reason in message
    assert "end of epoch 2" in message


def test_a_divergence_is_named():
    with pytest.raises(TrainingDivergedError, match=r"kl_z_basal is (nan|inf)"):
        train(make_model(CPAVAE), Spoil("encoder.head.loc.bias", epoch=1, value=1e30))


def test_the_weights_are_those_at_the_end_of_the_last_good_epoch():
    model = make_model(CPAVAE, correlated_basal=False)
    spoil = Spoil("decoder.to_genes.bias", epoch=2)
    with pytest.raises(TrainingDivergedError):
        train(model, spoil)
    with pytest.warns(UserWarning, match="untrained model"):
        before = model.get_elbo(key_added=None)
    with pytest.warns(UserWarning, match="untrained model"):
        effects = model.get_perturbation_effects(key_added=None).mean
    assert np.isfinite(before)
    assert not model.is_trained
    # Latents are brought into their usual order, which changes no effect's size.
    found = torch.as_tensor(effects.to_numpy()).norm(dim=1)
    kept = spoil.ends[1]["effects.loc"].norm(dim=1)
    torch.testing.assert_close(found, kept, rtol=1e-5, atol=1e-6)


def test_in_the_first_epoch_the_weights_are_those_before_training():
    model = make_model()
    before = state_of(model.module)
    with pytest.raises(TrainingDivergedError, match="those before this training"):
        train(model, Spoil("decoder.to_genes.bias", epoch=0))
    assert_same_state(model.module, before)


def test_in_the_dense_phase_training_can_begin_again_with_its_dense_phase():
    model = make_model()
    before = state_of(model.module)
    with pytest.raises(TrainingDivergedError, match="those before this training"):
        train(model, Spoil("decoder.to_genes.bias", epoch=1), dense_fraction=0.5)
    assert_same_state(model.module, before)
    train(model, dense_fraction=0.5)
    assert model.is_trained
    assert model.history["dense_phase"].to_numpy().ravel().tolist() == [1, 1, 0, 0]


def test_a_trained_model_stays_trained_and_as_it_was():
    model = make_model()
    train(model)
    before = state_of(model.module)
    latent = model.get_latent_representation(key_added=None)
    with pytest.raises(TrainingDivergedError, match="those before this training"):
        train(model, Spoil("decoder.to_genes.bias", epoch=0))
    assert model.is_trained
    counts = {"cells_per_perturbation"}
    assert all(torch.equal(model.module.state_dict()[k], before[k]) for k in before.keys() - counts)
    np.testing.assert_array_equal(model.get_latent_representation(key_added=None), latent)


def test_weights_that_overflow_at_the_end_of_an_epoch_are_not_kept():
    class LastStep(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and trainer.is_last_batch:
                with torch.no_grad():
                    pl_module.module.decoder.to_genes.bias[0] = float("inf")

    model = make_model(CPAVAE)
    with pytest.raises(TrainingDivergedError, match=r"weights decoder\.to_genes\.bias .*epoch 1"):
        train(model, LastStep())
    assert all(torch.isfinite(value).all() for value in model.module.state_dict().values())


def test_after_any_other_error_the_model_is_as_it_was():
    class Break(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            raise UnreadableDataError("rows 3 to 5 cannot be read")

    model = make_model()
    before = state_of(model.module)
    with pytest.raises(UnreadableDataError, match="rows 3 to 5"):
        train(model, Break(), dense_fraction=0.5)
    assert_same_state(model.module, before)
    assert not model.is_trained


def test_ten_times_the_learning_rate_trains_or_stops():
    model = make_model()
    try:
        train(model, max_epochs=10, lr=2e-2, table_lr=1e-1)
    except TrainingDivergedError:
        assert not model.is_trained
    assert np.isfinite(model.get_elbo(key_added=None))


@pytest.mark.parametrize("depth", [1, 1_000_000])
def test_libraries_of_one_and_of_a_million_counts_train(depth):
    adata = small_screen(library_size=1000.0)
    rng = np.random.default_rng(0)
    shares = adata.X.toarray() + 0.1
    shares /= shares.sum(axis=1, keepdims=True)
    adata.X = np.stack([rng.multinomial(depth if i % 2 else 300, p) for i, p in enumerate(shares)])
    SAMSVAE.setup_anndata(adata)
    model = SAMSVAE(adata, **SIZES)
    train(model, dense_fraction=0.5)
    assert np.isfinite(model.get_elbo(return_mean=False, key_added=None)).all()


def test_fifty_thousand_genes_train():
    rng = np.random.default_rng(0)
    small = small_screen(n_controls=10, cells_per_perturbation=3, cells_per_combination=2)
    counts = np.zeros((small.n_obs, 50_000), dtype=np.float32)
    for row in counts:
        np.add.at(row, rng.integers(0, 50_000, 3000), 1)
    adata = type(small)(counts, obs=small.obs[["perturbation"]])
    SAMSVAE.setup_anndata(adata)
    model = SAMSVAE(adata, n_latent=2, n_hidden=4)
    train(model, max_epochs=2, dense_fraction=0.5)
    assert np.isfinite(model.get_elbo(return_mean=False, key_added=None)).all()


class Failing(Callback):
    """Makes a step fail by an error of its own, with or without damage to the weights."""

    def __init__(self, error, damages):
        self.error, self.damages = error, damages

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch != 2:
            return
        if self.damages:
            with torch.no_grad():
                pl_module.module.encoder.from_x.weight[0, 0] = float("inf")

        def fail(*args, **kwargs):
            raise self.error

        pl_module.module.inference = fail


@pytest.mark.parametrize("error", [ValueError("expected a number"), RuntimeError("no result")])
def test_an_error_that_broken_weights_cause_says_that_they_are_broken(error):
    with pytest.raises(
        TrainingDivergedError, match=r"weights encoder.from_x.weight are not finite"
    ):
        train(make_model(CPAVAE), Failing(error, damages=True))


@pytest.mark.parametrize("error", [ValueError("expected a number"), RuntimeError("no result")])
def test_an_error_with_good_weights_is_not_taken_for_divergence(error):
    with pytest.raises(type(error), match=str(error)) as raised:
        train(make_model(CPAVAE), Failing(error, damages=False))
    assert raised.value is error


def test_a_sum_that_is_too_large_is_named_where_every_term_is_finite():
    term = torch.tensor([3e38])
    output = LossOutput(
        loss=torch.tensor(float("inf")), reconstruction_loss=term, kl_local={"kl": term}
    )
    assert diverged_term(output) == ("loss", float("inf"))
