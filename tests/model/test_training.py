"""Training as users call it: splits, defaults, history, going on, and what is recovered."""

import logging

import numpy as np
import pytest
import scvi
import torch

from model.builders import TRAINING, VARIANTS, small_screen, train_small
from scvi_sams import SAMSVAE
from scvi_sams.datasets import simulate_screen, simulated_ate
from scvi_sams.exceptions import InvalidSplitError, SAMSError
from scvi_sams.model._training import _planned_epochs

EMPTY = np.array([], dtype=int)
KL_TERMS = ["kl_z_basal", "kl_masks", "kl_effects"]


@pytest.fixture
def screen():
    return small_screen()


@pytest.fixture
def scvi_seed():
    """Set the seed of scvi-tools in a test; unset it afterwards."""

    def set_seed(seed):
        scvi.settings.seed = seed

    yield set_seed
    scvi.settings.seed = None


def untrained(adata, **kwargs):
    SAMSVAE.setup_anndata(adata)
    return SAMSVAE(adata, n_latent=4, n_hidden=16, effect_n_hidden=8, **kwargs)


def parameters(model):
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def split_of(model):
    return [model.train_indices, model.validation_indices, model.test_indices]


@pytest.mark.parametrize("variant", ["mean field", "both correlated"])
def test_the_same_seed_trains_the_same_model(scvi_seed, variant):
    def train(seed, max_epochs=2):
        scvi_seed(seed)
        model = untrained(small_screen(), **VARIANTS[variant])
        # Two epochs: one dense, one with masks.
        model.train(max_epochs=max_epochs, **(TRAINING | {"plan_kwargs": {}}))
        return model

    first, again, other = train(1), train(1), train(2, max_epochs=1)
    for name, value in parameters(first).items():
        assert torch.equal(value, again.module.state_dict()[name]), name
    np.testing.assert_array_equal(first.train_indices, again.train_indices)
    assert not np.array_equal(first.train_indices, other.train_indices)


def test_the_seed_decides_where_parameters_start(scvi_seed):
    weights = []
    for seed in (1, 1, 2):
        scvi_seed(seed)
        SAMSVAE.setup_anndata(adata := small_screen())
        weights.append(SAMSVAE(adata, n_latent=4, n_hidden=16).module.decoder.to_genes.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_split_is_stratified_and_disjoint(screen):
    model = train_small(screen, train={"train_size": 0.5, "validation_size": 0.2})
    parts = split_of(model)
    together = np.concatenate(parts)
    np.testing.assert_array_equal(np.sort(together), np.arange(screen.n_obs))
    labels = screen.obs["perturbation"].astype(str).to_numpy()
    for label in np.unique(labels):
        n_cells = (labels == label).sum()
        for part, share in zip(parts, (0.5, 0.2, 0.3), strict=True):
            assert abs((labels[part] == label).sum() - share * n_cells) <= 1, label


def test_every_combination_keeps_a_training_cell(screen):
    model = train_small(screen, train={"train_size": 0.02})
    labels = screen.obs["perturbation"].astype(str).to_numpy()
    assert set(labels[model.train_indices]) == set(labels)
    assert len(model.validation_indices) == screen.n_obs - len(model.train_indices)


@pytest.mark.parametrize(
    ("train", "validation"), [(0.9, 0.1), (0.7, 0.3), (0.6, None), (None, None)]
)
def test_shares_that_leave_no_test_cells(screen, train, validation):
    model = train_small(screen, train={"train_size": train, "validation_size": validation})
    assert len(model.test_indices) == 0
    n_train = (train or 0.9) * screen.n_obs
    # Rounded up or down in each of seven groups.
    assert abs(len(model.train_indices) - n_train) < 7


def test_no_validation(screen):
    model = train_small(screen, train={"train_size": 1.0})
    np.testing.assert_array_equal(np.sort(model.train_indices), np.arange(screen.n_obs))
    assert len(model.validation_indices) == 0
    assert "elbo_train" in model.history
    assert "elbo_validation" not in model.history
    assert np.isfinite(model.get_elbo(key_added=None))


def test_a_split_from_outside_is_used_as_it_is(screen):
    order = np.random.default_rng(5).permutation(screen.n_obs)
    split = [order[:90], order[90:130], order[130:]]
    model = train_small(screen, train={"datasplitter_kwargs": {"external_indexing": list(split)}})
    for found, expected in zip(split_of(model), split, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_arguments_are_not_changed(screen):
    everything = np.arange(screen.n_obs)
    split = [everything]
    datasplitter_kwargs = {"external_indexing": split}
    plan_kwargs = {"dense_fraction": 0.0}
    train_small(
        screen, train={"datasplitter_kwargs": datasplitter_kwargs, "plan_kwargs": plan_kwargs}
    )
    assert len(split) == 1
    assert datasplitter_kwargs == {"external_indexing": split}
    assert plan_kwargs == {"dense_fraction": 0.0}


def test_cells_in_sequence_if_not_shuffled(screen):
    model = train_small(screen, train={"train_size": 0.8, "shuffle_set_split": False})
    assert np.ptp(model.train_indices) == len(model.train_indices) - 1
    assert len(model.train_indices) == 120
    assert "elbo_validation" in model.history


def test_history_has_every_term(screen):
    model = train_small(screen, max_epochs=3, train={"log_every_n_steps": 1})
    for part in ("train", "validation"):
        for name in ("elbo", "reconstruction_loss", *KL_TERMS):
            values = model.history[f"{name}_{part}"].to_numpy(dtype=float)
            assert len(values) == 3
            assert np.isfinite(values).all()
        terms = sum(model.history[f"{name}_{part}"].to_numpy() for name in KL_TERMS)
        elbo = model.history[f"reconstruction_loss_{part}"].to_numpy() + terms
        found = model.history[f"elbo_{part}"].to_numpy()
        # Terms are averaged over mini-batches, of which the last is smaller.
        np.testing.assert_allclose(found.astype(float), elbo.astype(float), rtol=0.02)
    assert (model.history["kl_weight"] == 1).all(axis=None)


def test_elbo_validation_is_minus_the_elbo_of_validation_cells(screen):
    model = train_small(screen, max_epochs=2, spread=False)
    torch.manual_seed(0)
    elbo = model.get_elbo(indices=model.validation_indices, n_samples=400, key_added=None)
    assert model.history["elbo_validation"].iloc[-1].item() == pytest.approx(-elbo, rel=0.02)


def test_defaults_of_the_optimiser(screen):
    model = untrained(screen)
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, log_every_n_steps=1)
    assert model.trainer.gradient_clip_val == 100
    (optimizer,) = model.trainer.optimizers
    assert isinstance(optimizer, torch.optim.Adam)
    for group in optimizer.param_groups:
        assert group["eps"] == 1e-8
    assert model.trainer.train_dataloader.sampler.batch_size == 512
    assert (model.history["kl_weight"] == 1).all(axis=None)


def test_settings_of_the_user_win(screen):
    model = untrained(screen)
    model.train(
        max_epochs=1,
        gradient_clip_val=3.0,
        plan_kwargs={"lr": 0.5, "table_lr": 0.25, "lr_schedule": "constant", "eps": 1e-4},
        batch_size=32,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
    )
    assert model.trainer.gradient_clip_val == 3
    (optimizer,) = model.trainer.optimizers
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert {group["eps"] for group in optimizer.param_groups} == {1e-4}
    assert model.trainer.train_dataloader.sampler.batch_size == 32


def test_a_trainer_config_of_the_user_wins(screen):
    model = untrained(screen)
    model.train(
        trainer_config={"gradient_clip_val": 3.0, "check_val_every_n_epoch": 2},
        max_epochs=4,
        **TRAINING,
    )
    assert model.trainer.gradient_clip_val == 3
    assert len(model.history["elbo_validation"].dropna()) == 2


@pytest.mark.parametrize(
    ("n_cells", "expected"), [(200, 100), (3_750, 80), (15_000, 40), (60_000, 20), (10**6, 10)]
)
def test_epochs_by_default_fall_with_the_number_of_cells(n_cells, expected):
    assert _planned_epochs(n_cells) == expected


def test_the_default_number_of_epochs_is_used(screen):
    model = untrained(screen)
    # Nothing learned, so that it stops at once.
    frozen = {"lr": 0.0, "table_lr": 0.0, "dense_fraction": 0.0}
    training = TRAINING | {"plan_kwargs": frozen}
    model.train(early_stopping=True, early_stopping_patience=1, **training)
    assert model.trainer.max_epochs == 100
    assert len(model.history["elbo_train"]) == 2


def test_early_stopping_stops(screen):
    model = train_small(
        screen,
        max_epochs=300,
        spread=False,
        train={
            "early_stopping": True,
            "early_stopping_patience": 3,
            "plan_kwargs": {"lr": 0.02, "lr_schedule": "constant", "dense_fraction": 0.0},
        },
    )
    elbo = model.history["elbo_validation"].to_numpy(dtype=float).ravel()
    assert len(elbo) < 300
    assert elbo.argmin() == len(elbo) - 1 - 3
    assert elbo.min() < elbo[0]


def test_training_that_ends_early_still_has_masks(screen):
    """Masks are trained only in the second phase, which early stopping must not skip."""
    model = train_small(
        screen,
        max_epochs=300,
        spread=False,
        train={
            "early_stopping": True,
            "early_stopping_patience": 3,
            "plan_kwargs": {"lr": 0.02, "lr_schedule": "constant"},
        },
    )
    assert len(model.history["elbo_train"]) < 300
    assert model.get_perturbation_masks(key_added=None).to_numpy().max() < 1


def test_sparse_mini_batches_train_the_same_model():
    models = []
    for load_sparse_tensor in (False, True):
        torch.manual_seed(0)
        models.append(
            train_small(
                small_screen(), spread=False, train={"load_sparse_tensor": load_sparse_tensor}
            )
        )
    for name, value in parameters(models[0]).items():
        torch.testing.assert_close(models[1].module.state_dict()[name], value, msg=name)


def warnings_about_cells(caplog):
    """All of the package, but the one that a training of few epochs ends with."""
    messages = [r.getMessage() for r in caplog.records if r.name == "scvi.sams"]
    return [message for message in messages if not message.startswith("All masks are off")]


def test_perturbations_without_training_cells_are_named(screen, caplog):
    labels = screen.obs["perturbation"].astype(str)
    held_out = labels.str.contains("P003").to_numpy()
    train, rest = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    with caplog.at_level(logging.WARNING, logger="scvi.sams"):
        model = train_small(
            screen, train={"datasplitter_kwargs": {"external_indexing": [train, rest, EMPTY]}}
        )
    (message,) = warnings_about_cells(caplog)
    assert "P003" in message
    assert "P001" not in message
    assert np.isfinite(model.get_elbo(indices=rest, key_added=None))


def test_untrained_perturbations_are_named_in_a_split_in_sequence(screen, caplog):
    # scvi-tools takes the first cells for validation, those that follow for training.
    first = screen.obs["perturbation"].astype(str).str.contains("P003").to_numpy()
    ordered = screen[np.argsort(~first, kind="stable")].copy()
    with caplog.at_level(logging.WARNING, logger="scvi.sams"):
        train_small(ordered, train={"shuffle_set_split": False, "train_size": 1 - first.mean()})
    assert any("P003" in record.getMessage() for record in caplog.records)


def test_no_warning_if_each_perturbation_has_training_cells(screen, caplog):
    with caplog.at_level(logging.WARNING, logger="scvi.sams"):
        train_small(screen)
    assert not warnings_about_cells(caplog)


@pytest.mark.parametrize(
    "wrong",
    [
        {"datasplitter_kwargs": {"external_indexing": [EMPTY, np.arange(150), EMPTY]}},
        {"train_size": 0.0},
        {"train_size": 1.2},
        {"train_size": 0.8, "validation_size": 0.3},
        {"train_size": -0.1},
    ],
    ids=["empty training set", "0", "1.2", "0.8 + 0.3", "-0.1"],
)
def test_splits_that_cannot_be_are_refused(screen, wrong):
    with pytest.raises(InvalidSplitError):
        train_small(screen, train=wrong)


def test_a_second_call_goes_on_from_the_first(screen):
    model = train_small(screen, max_epochs=3, spread=False)
    before = parameters(model)
    frozen = {"lr": 0.0, "table_lr": 0.0, "dense_fraction": 0.5}
    model.train(max_epochs=2, **(TRAINING | {"plan_kwargs": frozen}))
    for name, value in model.module.state_dict().items():
        # Direct effects are fitted anew to the same cells, whose sums have another order.
        tolerance = 1e-5 if name.startswith("direct.") else 0
        torch.testing.assert_close(value, before[name], rtol=tolerance, atol=tolerance, msg=name)
    model.train(max_epochs=2, **TRAINING)
    assert len(model.history["elbo_train"]) == len(model.history["elbo_validation"]) == 7
    assert list(model.history["elbo_train"].index) == list(range(7))
    assert not torch.equal(model.module.decoder.to_genes.weight, before["decoder.to_genes.weight"])
    assert model.history["elbo_train"].iloc[3].item() < model.history["elbo_train"].iloc[0].item()


@pytest.mark.parametrize(
    ("setup", "kwargs"),
    [
        (None, {"gene_likelihood": "poisson"}),
        ({"layer": "normalised"}, {"gene_likelihood": "normal"}),
        ({"size_factor_key": "transcriptome"}, {}),
        (None, {"kl_estimator": "monte_carlo", "n_particles": 3}),
        (None, {"mask_prior_concentration": 2.0, "n_layers": 2}),
    ],
    ids=["poisson", "normal", "size factor", "monte carlo", "beta prior"],
)
def test_training_lowers_the_validation_loss(screen, setup, kwargs):
    model = train_small(
        screen,
        setup,
        max_epochs=20,
        spread=False,
        **kwargs,
    )
    elbo = model.history["elbo_validation"].to_numpy(dtype=float)
    assert np.isfinite(elbo).all()
    assert elbo[-1] < elbo[0] - 0.2


def test_a_constant_gene_and_a_gene_without_counts_train_to_finite_numbers(screen):
    x = screen.X.toarray()
    x[:, 0], x[:, 1] = 0, 5
    screen.X = x
    model = train_small(screen, max_epochs=5, spread=False)
    for name, value in model.module.state_dict().items():
        assert torch.isfinite(value.float()).all(), name
    share = model.get_normalized_expression(n_samples=20)["gene_0001"]
    assert (share > 0).all()
    assert share.max() < 1e-3


@pytest.mark.parametrize("variant", ["mean field", "both correlated"])
def test_effects_of_a_simulated_screen_are_recovered(scvi_seed, variant):
    """The floor is far above what a model that learned nothing, or mixed labels up, reaches."""
    scvi_seed(0)
    adata = simulate_screen(
        n_genes=100,
        n_controls=250,
        n_perturbations=6,
        cells_per_perturbation=80,
        n_combinations=3,
        cells_per_combination=60,
        n_latent=5,
        mask_probability=0.3,
        library_size=2000.0,
        seed=1,
    )
    SAMSVAE.setup_anndata(adata)
    model = SAMSVAE(adata, n_latent=5, n_hidden=64, effect_n_hidden=32, **VARIANTS[variant])
    model.train(max_epochs=30, **(TRAINING | {"batch_size": 128, "plan_kwargs": {}}))
    unseen = "P001+P002+P003"
    labels = [*model.perturbations, unseen]
    predicted = model.predict_ate(labels, key_added=None).X
    truth = simulated_ate(adata, labels, n_samples=1000).X
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in zip(predicted, truth, strict=True)]
    # Six perturbations say little about axes, so that masks of weak effects stay off.
    assert np.median(correlations) > 0.65
    assert np.corrcoef(predicted.ravel(), truth.ravel())[0, 1] > 0.7
    shuffled = np.roll(truth, 1, axis=0)
    assert np.corrcoef(predicted.ravel(), shuffled.ravel())[0, 1] < 0.5


@pytest.mark.parametrize("variant", ["mean field", "both correlated"])
def test_latents_are_ordered_and_signed_by_their_effects(scvi_seed, variant):
    scvi_seed(3)
    model = untrained(small_screen(), **VARIANTS[variant])
    model.train(max_epochs=20, **(TRAINING | {"plan_kwargs": {}}))
    effects = model.get_perturbation_effects(key_added=None).mean
    norms = np.linalg.norm(effects, axis=0)
    assert norms[0] > 1e-3
    # Means of correlated effects are averages over draws of masks, which the order changes.
    tolerance = 1e-5 * norms[0] if variant == "mean field" else 0.1 * norms[0]
    assert (np.diff(norms) <= tolerance).all()
    assert (effects.sum(axis=0) >= -tolerance * len(effects)).all()


@pytest.mark.parametrize("evidence_cells", [0, -5.0, float("nan")])
def test_evidence_of_no_cells_is_refused(evidence_cells):
    with pytest.raises(SAMSError, match="evidence_cells"):
        untrained(small_screen(), evidence_cells=evidence_cells)


def test_evidence_of_few_cells_switches_fewer_masks_on(scvi_seed):
    """Where evidence hardly counts, no mask is far from its prior."""
    on = {}
    screen = simulate_screen(
        n_genes=60,
        n_controls=200,
        n_perturbations=12,
        cells_per_perturbation=60,
        n_combinations=0,
        n_latent=4,
        effect_scale=4.0,
    )
    for evidence_cells in (None, 1.0):
        scvi_seed(0)
        model = untrained(screen.copy(), evidence_cells=evidence_cells)
        model.train(max_epochs=30, **(TRAINING | {"batch_size": 64, "plan_kwargs": {}}))
        masks = model.get_perturbation_masks(key_added=None).to_numpy()
        on[evidence_cells] = (masks > 0.5).sum()
    assert on[1.0] < on[None]
