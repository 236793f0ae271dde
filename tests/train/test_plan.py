"""The training plan in real trainings by Lightning."""

import logging

import lightning
import numpy as np
import pytest
import scvi
import torch
from scvi.train import SaveCheckpoint

from module.reference import ReferenceELBO, recorded_draws
from scvi_sams import CPAVAE
from scvi_sams._torch import fixed_seed
from scvi_sams.module import LatentSurvey, SAMSVAEModule
from scvi_sams.train import PerturbationTrainingPlan, _dense_phase, _plan
from train.screens import carriers, make_model, make_screen

# After a training scvi-tools leaves the module in eval mode, and says so when the next one starts.
pytestmark = pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")

QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "devices": 1,
}
FROZEN = {"lr": 0.0, "table_lr": 0.0, "dense_fraction": 0.0}
STEADY = {"lr_schedule": "constant", "dense_fraction": 0.0}
VARIANTS = [(False, False), (True, True)]


@pytest.fixture(autouse=True)
def seed():
    scvi.settings.seed = None  # of splits, whatever an earlier test has left there
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def screen():
    return make_screen()


def train(model, max_epochs=1, batch_size=64, **kwargs):
    model.train(max_epochs=max_epochs, batch_size=batch_size, **(QUIET | kwargs))
    return model


def curve(model, name):
    return model.history[name][name].astype(float).to_numpy()


def keep_the_order_of_latents(monkeypatch):
    """For tests that compare the weights, or draws per dimension, of during training with later."""
    monkeypatch.setattr(SAMSVAEModule, "order_latents", lambda self: None)


# Learning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("correlated_basal", "correlated_effects"), VARIANTS)
def test_training_lowers_the_loss(correlated_basal, correlated_effects):
    model = make_model(
        make_screen(decoder_scale=3.0, library_size=5000.0, inverse_dispersion=10.0),
        n_hidden=32,
        correlated_basal=correlated_basal,
        correlated_effects=correlated_effects,
    )
    train(model, max_epochs=10, batch_size=32, plan_kwargs={"lr": 5e-3})
    loss, validation = curve(model, "elbo_train"), curve(model, "elbo_validation")
    assert np.isfinite(loss).all()
    assert len(loss) == len(validation) == 10
    # Epochs differ by about 0.05 from noise alone.
    assert loss[-3:].mean() < loss[0] - 0.4
    assert validation[-1] < validation[0] - 0.4


def test_masks_and_effects_move_as_fast_as_their_learning_rate(screen, monkeypatch):
    """Adam with eps 0.01, the default of scvi-tools, would leave them where they start."""
    model = make_model(screen, correlated_effects=False)
    keep_the_order_of_latents(monkeypatch)
    before = {name: value.clone() for name, value in model.module.named_parameters()}
    train(model, plan_kwargs=STEADY | {"lr": 0.0, "table_lr": 0.01}, train_size=1.0)
    n_steps = -(-screen.n_obs // 64)
    moved = {
        name: (value - before[name]).abs().detach()
        for name, value in model.module.named_parameters()
    }
    for name in ("masks.logits", "effects.log_scale"):
        assert moved[name].median() > 0.2 * 0.01 * n_steps
        assert moved[name].max() < 1.5 * 0.01 * n_steps
    assert all(not moved[name].any() for name in moved if name.startswith(("encoder", "decoder.f")))


def optimizer_of(model, **plan_kwargs):
    plan = PerturbationTrainingPlan(model.module, **(STEADY | plan_kwargs))
    return plan.configure_optimizers()["optimizer"]


@pytest.mark.parametrize("correlated_effects", [False, True])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_tables_have_a_learning_rate_of_their_own(screen, correlated_effects, name):
    model = make_model(screen, correlated_effects=correlated_effects)
    optimizer = optimizer_of(model, optimizer=name, lr=2e-4, table_lr=3e-3, weight_decay=1e-5)
    assert type(optimizer).__name__ == name
    networks, tables = optimizer.param_groups
    assert (networks["lr"], networks["weight_decay"], networks["eps"]) == (2e-4, 1e-5, 1e-8)
    assert (tables["lr"], tables["weight_decay"], tables["eps"]) == (3e-3, 0.0, 1e-8)
    names = {id(parameter): n for n, parameter in model.module.named_parameters()}
    in_tables = {names[id(parameter)] for parameter in tables["params"]}
    in_networks = {names[id(parameter)] for parameter in networks["params"]}
    assert "masks.logits" in in_tables
    assert ({"effects.loc", "effects.log_scale"} <= in_tables) is not correlated_effects
    assert not {n for n in in_tables if n.startswith(("encoder", "decoder"))}
    assert in_tables.isdisjoint(in_networks)
    assert in_tables | in_networks == set(names.values())
    listed = networks["params"] + tables["params"]
    assert len(listed) == len(names)


def test_a_custom_optimizer_is_left_alone(screen):
    model = make_model(screen)
    optimizer = optimizer_of(
        model, optimizer="Custom", optimizer_creator=lambda params: torch.optim.SGD(params, lr=0.5)
    )
    assert isinstance(optimizer, torch.optim.SGD)
    (group,) = optimizer.param_groups
    assert len(group["params"]) == len(list(model.module.parameters()))


class LearningRates(lightning.Callback):
    """Notes the rates of networks and tables at every step."""

    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, *args, **kwargs):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_schedule_of_both_rates(screen, schedule):
    seen = LearningRates()
    plan_kwargs = {"lr": 1e-3, "table_lr": 1e-2, "lr_schedule": schedule, "dense_fraction": 0.0}
    train(make_model(screen), max_epochs=4, callbacks=[seen], plan_kwargs=plan_kwargs)
    progress = np.arange(len(seen.rates)) / len(seen.rates)
    factor = np.cos(np.pi * progress) / 2 + 0.5 if schedule == "cosine" else np.ones(len(progress))
    assert len(seen.rates) >= 16
    np.testing.assert_allclose(seen.rates, factor[:, None] * [1e-3, 1e-2], rtol=1e-6)


class Phases(lightning.Callback):
    """Notes, at the start of each epoch, if all masks are on and if Adam has momenta."""

    def __init__(self):
        self.dense, self.momenta = [], []

    def on_train_batch_start(self, trainer, plan, batch, batch_idx):
        if batch_idx == 0:
            self.dense.append(bool(plan.module.masks.is_dense))
            self.momenta.append(len(trainer.optimizers[0].state) > 0)


def test_masks_are_all_on_in_the_dense_phase(screen):
    """Then the axes turn, and momenta along the old ones are forgotten; once in a model's life."""
    model = make_model(screen)
    first, second = Phases(), Phases()
    train(model, max_epochs=4, callbacks=[first], plan_kwargs={"dense_fraction": 0.5})
    assert first.dense == [True, True, False, False]
    assert first.momenta == [False, True, False, True]
    train(model, max_epochs=2, callbacks=[second], plan_kwargs={"dense_fraction": 0.5})
    assert second.dense == [False, False]
    assert second.momenta == [False, True]


def test_masks_can_be_trained_from_the_start(screen):
    phases = Phases()
    train(make_model(screen), max_epochs=3, callbacks=[phases], plan_kwargs={"dense_fraction": 0.0})
    assert phases.dense == [False, False, False]
    assert phases.momenta == [False, True, True]


class StopAfter(lightning.Callback):
    """Ends training after a number of epochs, as a time limit would."""

    def __init__(self, n_epochs):
        self.n_epochs = n_epochs

    def on_train_epoch_end(self, trainer, plan):
        trainer.should_stop = trainer.current_epoch + 1 >= self.n_epochs


@pytest.mark.parametrize(("fraction", "n_epochs"), [(0.5, 3), (1.0, 20)])
def test_masks_are_in_use_however_training_ends(screen, fraction, n_epochs):
    """Also where it ends within the dense phase."""
    model = make_model(screen)
    train(
        model,
        max_epochs=20,
        callbacks=[StopAfter(n_epochs)],
        plan_kwargs={"lr": 0.0, "table_lr": 0.0, "dense_fraction": fraction},
    )
    assert (curve(model, "dense_phase") == np.ones(n_epochs)).all()
    assert not model.module.masks.is_dense
    assert (model.module.masks.inclusion_probability < 1).any()


# A model that does not learn: its bound is one in the dense phase, and a worse one after, because
# masks that are as good as impossible a priori cost much.
STILL = {"lr": 0.0, "table_lr": 0.0, "dense_fraction": 0.5}
COSTLY = {"mask_prior_probability": 1e-300}


def assert_worse_with_masks(model, n_dense):
    score = curve(model, "elbo_validation")
    assert (curve(model, "dense_phase") == (np.arange(len(score)) < n_dense)).all()
    assert score[n_dense:].min() > score[:n_dense].max() + 1e-3
    return score


@pytest.mark.parametrize("patience", [1, 3])
def test_early_stopping_begins_with_the_masks(screen, patience):
    model = make_model(screen, **COSTLY)
    train(
        model,
        max_epochs=20,
        early_stopping=True,
        early_stopping_patience=patience,
        train_size=0.8,
        plan_kwargs=STILL,
    )
    score = assert_worse_with_masks(model, n_dense=10)
    # The first epoch with masks is the best, and none of the next ones is better.
    assert len(score) == 10 + 1 + patience
    (stopping,) = model.trainer.early_stopping_callbacks
    assert float(stopping.best_score) == pytest.approx(score[10])


def test_a_model_without_a_dense_phase_may_stop_at_once(screen):
    CPAVAE.setup_anndata(screen)
    model = CPAVAE(screen, n_latent=3, n_hidden=8)
    train(
        model,
        max_epochs=20,
        early_stopping=True,
        early_stopping_patience=2,
        train_size=0.8,
        plan_kwargs=STILL,
    )
    assert len(curve(model, "elbo_validation")) == 3
    assert "dense_phase" not in model.history
    assert "active_masks" not in model.history


def test_the_best_checkpoint_has_masks(screen, tmp_path):
    model = make_model(screen, **COSTLY)
    checkpoints = SaveCheckpoint(
        dirpath=str(tmp_path), monitor="elbo_validation", load_best_on_end=True
    )
    train(
        model,
        max_epochs=6,
        enable_checkpointing=True,
        callbacks=[checkpoints],
        train_size=0.8,
        plan_kwargs=STILL,
    )
    score = assert_worse_with_masks(model, n_dense=3)
    assert float(checkpoints.best_model_score) == pytest.approx(score[3])
    assert "epoch=3" in checkpoints.best_model_path
    assert not model.module.masks.is_dense


def test_a_plateau_is_one_of_the_phase_with_masks(screen):
    model = make_model(screen, **COSTLY)
    train(
        model,
        max_epochs=8,
        train_size=0.8,
        plan_kwargs=STILL | {"reduce_lr_on_plateau": True, "lr_patience": 30},
    )
    score = assert_worse_with_masks(model, n_dense=4)
    (configuration,) = model.trainer.lr_scheduler_configs
    assert configuration.scheduler.best == pytest.approx(score[4])
    assert configuration.scheduler.num_bad_epochs == 3


def test_history_shows_the_phases_and_the_share_of_active_masks(screen):
    model = make_model(screen)
    train(model, max_epochs=4, plan_kwargs={"dense_fraction": 0.5})
    assert curve(model, "dense_phase").tolist() == [1, 1, 0, 0]
    active = curve(model, "active_masks")
    assert active[:2].tolist() == [1, 1]
    probability = model.get_perturbation_masks(key_added=None).to_numpy()
    assert active[3] == pytest.approx((probability > 0.5).mean())
    assert model.history["dense_phase"].index.tolist() == [0, 1, 2, 3]


def test_no_warm_up_unless_asked_for(screen):
    plan = PerturbationTrainingPlan(make_model(screen).module)
    assert plan.kl_weight == 1.0
    warmed = PerturbationTrainingPlan(make_model(screen).module, n_epochs_kl_warmup=10)
    assert warmed.kl_weight == 0.0


# Plate counts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("train_size", [None, 0.6, 1.0])
def test_plates_count_the_training_cells_of_the_split(screen, train_size):
    model = train(make_model(screen), train_size=train_size)
    counts = model.module.cells_per_perturbation.tolist()
    assert counts == carriers(screen, model.train_indices, model.perturbations).tolist()
    everything = carriers(screen, np.arange(screen.n_obs), model.perturbations).tolist()
    assert (counts == everything) is (train_size == 1.0)


def test_plates_of_a_split_from_outside(screen):
    """Also where a perturbation has no training cells at all."""
    model = make_model(screen)
    unseen = screen.obs["perturbation"].astype(str).str.contains(model.perturbations[1]).to_numpy()
    cells = np.random.default_rng(0).permutation(np.flatnonzero(~unseen))
    split = [cells[:150], np.flatnonzero(unseen), cells[150:]]
    train(model, datasplitter_kwargs={"external_indexing": split})
    counts = model.module.cells_per_perturbation
    assert counts.tolist() == carriers(screen, split[0], model.perturbations).tolist()
    assert counts[1] == 0
    assert np.isfinite(curve(model, "elbo_validation")).all()
    assert all(torch.isfinite(parameter).all() for parameter in model.module.parameters())
    assert (model.module.masks.logits[1] == model.module.masks.logits[1, 0]).all()


def test_plates_follow_a_second_training(screen):
    model = train(make_model(screen), train_size=0.9)
    bias = model.module.decoder.to_genes.bias.detach().clone()
    half = np.arange(0, screen.n_obs, 2)[:120]
    split = [half, np.setdiff1d(np.arange(screen.n_obs), half), np.array([], dtype=int)]
    train(model, datasplitter_kwargs={"external_indexing": split}, plan_kwargs=FROZEN)
    counts = model.module.cells_per_perturbation.tolist()
    assert counts == carriers(screen, half, model.perturbations).tolist()
    assert torch.equal(model.module.decoder.to_genes.bias, bias)


# Validation -------------------------------------------------------------------------------------


def test_validation_of_frozen_weights_never_changes(screen):
    """The training score does, because it is drawn anew."""
    model = train(make_model(screen), max_epochs=4, train_size=0.7, plan_kwargs=FROZEN)
    assert len(set(curve(model, "elbo_validation"))) == 1
    assert len(set(curve(model, "reconstruction_loss_validation"))) == 1
    assert len(set(curve(model, "elbo_train"))) == 4


class WatchRandomState(lightning.Callback):
    """Notes whether validation steps leave the global generator as it was."""

    def __init__(self):
        self.disturbed = []

    def on_validation_batch_start(self, *args, **kwargs):
        self.state = torch.random.get_rng_state()

    def on_validation_batch_end(self, *args, **kwargs):
        self.disturbed.append(not torch.equal(self.state, torch.random.get_rng_state()))


def test_validation_does_not_disturb_the_random_numbers_of_training(screen):
    watch = WatchRandomState()
    train(make_model(screen), max_epochs=2, train_size=0.6, callbacks=[watch], plan_kwargs=STEADY)
    assert len(watch.disturbed) >= 4
    assert not any(watch.disturbed)


@pytest.mark.parametrize(("correlated_basal", "correlated_effects"), VARIANTS)
@pytest.mark.parametrize("batch_size", [17, 512])
def test_validation_score_by_the_reference(
    screen, monkeypatch, correlated_basal, correlated_effects, batch_size
):
    """Mean over validation cells of minus the ELBO, with plates of the TRAINING cells."""
    model = make_model(
        screen,
        correlated_basal=correlated_basal,
        correlated_effects=correlated_effects,
        n_particles=2,
        global_kl_weight=5.0,
    )
    keep_the_order_of_latents(monkeypatch)
    with torch.no_grad():  # divergences that matter, so that a wrong weight shows
        model.module.masks.logits.normal_()
    train(model, train_size=0.75, batch_size=batch_size, plan_kwargs=FROZEN, max_epochs=2)
    plates = carriers(screen, model.train_indices, model.perturbations)
    np.testing.assert_array_equal(model.module.cells_per_perturbation, plates)

    model.module.eval()
    total = global_terms = 0.0
    loader = model._make_data_loader(
        screen, indices=model.validation_indices, batch_size=batch_size
    )
    for index, tensors in enumerate(loader):
        seed = fixed_seed(_plan._VALIDATION_SEED + index)
        with seed, recorded_draws(model.module) as draws:
            model.module(tensors)
        reference = ReferenceELBO(model.module, tensors, draws)
        total += reference.reconstruction.sum() + sum(kl.sum() for kl in reference.kl.values())
        global_terms += reference.kl["kl_masks"].sum() + reference.kl["kl_effects"].sum()
    n_cells = len(model.validation_indices)
    assert curve(model, "elbo_validation")[-1] == pytest.approx(total / n_cells, rel=1e-5)
    assert global_terms / n_cells > 1e-3 * total / n_cells


# Bends of the latent space -----------------------------------------------------------------------


def say_that_the_second_dimension_bends(monkeypatch, seen):
    def survey(self, cells):
        seen.append(sum(len(batch.x) for batch in cells))
        n_others = self.n_latent - 2
        curvature, variance = [0.1, 0.9] + [0.0] * n_others, [0.1] * self.n_latent
        return LatentSurvey(
            torch.tensor(curvature), torch.tensor(variance), torch.zeros(self.n_latent)
        )

    monkeypatch.setattr(SAMSVAEModule, "survey_latents", survey)


def test_bends_are_switched_off_once_masks_begin(screen, monkeypatch, caplog):
    seen = []
    say_that_the_second_dimension_bends(monkeypatch, seen)
    keep_the_order_of_latents(monkeypatch)
    with caplog.at_level(logging.INFO, logger="scvi.sams"):
        model = train(make_model(screen), max_epochs=2, plan_kwargs={"dense_fraction": 0.5})
    assert seen == [len(model.train_indices)]
    barred = model.module.masks.is_excluded
    assert barred.tolist() == [False, True] + [False] * (len(barred) - 2)
    masks = model.get_perturbation_masks(key_added=None).to_numpy()
    assert (masks[:, 1] < 1e-6).all()
    assert (masks[:, 0] > 1e-6).all()
    latent = model.get_latent_representation(key_added=None)
    assert (latent[:, 1] == 0).all()
    assert (latent[:, 0] != 0).all()
    assert "Switched off 1 latent dimension that is a curved function" in caplog.text


def test_of_many_cells_some_are_surveyed(screen, monkeypatch):
    seen = []
    say_that_the_second_dimension_bends(monkeypatch, seen)
    monkeypatch.setattr(_dense_phase, "_CELLS_FOR_CURVATURE", 10)
    train(make_model(screen), max_epochs=2, batch_size=8, plan_kwargs={"dense_fraction": 0.5})
    assert seen == [16]


def test_nothing_is_switched_off_that_tells_more_than_the_rest(screen, monkeypatch):
    def survey(self, cells):
        curvature = torch.tensor([0.9] * (self.n_latent - 1) + [0.0])
        return LatentSurvey(curvature, torch.full_like(curvature, 0.1), torch.zeros_like(curvature))

    monkeypatch.setattr(SAMSVAEModule, "survey_latents", survey)
    model = train(make_model(screen), max_epochs=2, plan_kwargs={"dense_fraction": 0.5})
    assert not model.module.masks.is_excluded.any()


def test_nothing_is_switched_off_where_nobody_asks(screen, monkeypatch):
    seen = []
    say_that_the_second_dimension_bends(monkeypatch, seen)
    plan = {"dense_fraction": 0.5, "max_curvature": None}
    model = train(make_model(screen), max_epochs=2, plan_kwargs=plan)
    assert seen == []
    assert not model.module.masks.is_excluded.any()


def test_mechanisms_of_a_trained_model_stay_on():
    """The module's own measure, on real training batches."""
    model = train(make_model(make_screen()), max_epochs=4, plan_kwargs={"dense_fraction": 0.5})
    cells = [batch for _, batch in model._read(None, model.train_indices, 64).cells()]
    shares, variances, _ = model.module.survey_latents(cells)
    assert ((variances > 0) & (variances < 1.5)).all()
    assert torch.isfinite(shares).all()
    assert (shares < 1).all()
    assert torch.equal(model.module.masks.is_excluded, torch.zeros_like(shares, dtype=torch.bool))


# Masks that say nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logits", "told"),
    [
        ([-3.0, -3.0], "All masks are off"),
        ([3.0, 3.0], "All masks are on"),
        ([3.0, -3.0], None),
    ],
)
def test_masks_that_are_all_alike_are_warned_of(screen, logits, told, caplog):
    model = make_model(screen)
    with torch.no_grad():
        model.module.masks.logits[:, 0] = logits[0]
        model.module.masks.logits[:, 1:] = logits[1]
    with caplog.at_level(logging.WARNING, logger="scvi.sams"):
        train(model, max_epochs=1, plan_kwargs=FROZEN)
    warnings = [r.getMessage() for r in caplog.records if "All masks" in r.getMessage()]
    assert [message.split(":")[0] for message in warnings] == ([told] if told else [])


def test_a_model_without_masks_is_not_warned_of(screen, caplog):
    CPAVAE.setup_anndata(screen)
    with caplog.at_level(logging.WARNING, logger="scvi.sams"):
        train(CPAVAE(screen, n_latent=3, n_hidden=8), max_epochs=1, plan_kwargs=FROZEN)
    assert "All masks" not in caplog.text
