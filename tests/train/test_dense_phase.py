"""Between the phases: where the origin is, and effects that held-out cells do not confirm."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Normal

from scvi_sams.datasets import simulate_screen
from scvi_sams.train._dense_phase import (
    origin_of_controls,
    unconfirmed_offsets,
    variance_of_states,
)
from train.screens import make_model, make_screen


class Strategy:
    """Of a single process."""

    root_device = torch.device("cpu")

    def batch_to_device(self, batch, device):
        return batch

    def reduce(self, values, reduce_op):
        return values


def trainer_of(model, n_validation=0):
    """Cells that are trained on, and every k-th of them to validate with."""
    cells = np.arange(model.adata.n_obs)
    held_out = cells[:: len(cells) // n_validation] if n_validation else cells[:0]

    def load(indices):
        return model._make_data_loader(model.adata, indices=indices, batch_size=64)

    data = SimpleNamespace(
        train_dataloader=lambda: load(np.setdiff1d(cells, held_out)),
        val_dataloader=lambda: load(held_out),
        val_idx=held_out,
    )
    return SimpleNamespace(datamodule=data, strategy=Strategy())


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = make_model(make_screen(n_perturbations=6), n_latent=3)
    model.module.begin_dense_phase()
    return model


def test_the_origin_is_the_mean_state_of_control_cells(model):
    labels = model.adata.obs["perturbation"].astype(str).to_numpy()
    controls = np.flatnonzero(labels == "control")
    module = model.module
    states = []
    for tensors in model._make_data_loader(model.adata, indices=controls, batch_size=64):
        cells = module.read_batch(tensors)
        no_shift = torch.zeros(1, len(cells.x), 3)
        states.append(module.encode(cells.x, no_shift, cells.covariates).loc[0].detach())
    origin = origin_of_controls(model.module, trainer_of(model))
    torch.testing.assert_close(origin, torch.cat(states).mean(dim=0))


def test_variance_of_states_is_their_mean_over_cells_with_their_shifts(model):
    module = model.module
    effects = module.full_effects().loc[0].detach()
    labels = model.adata.obs["perturbation"].astype(str)
    shifts = torch.stack(
        [
            sum((effects[model.perturbations.index(n)] for n in label.split("+")), torch.zeros(3))
            if label != "control"
            else torch.zeros(3)
            for label in labels
        ]
    )
    tensors = next(iter(model._make_data_loader(model.adata, batch_size=1000, shuffle=False)))
    cells = module.read_batch(tensors)
    expected = module.encode(cells.x, shifts[None], cells.covariates).variance[0].mean(dim=0)
    torch.testing.assert_close(variance_of_states(module, trainer_of(model)), expected.detach())


def test_without_control_cells_there_is_no_origin(model):
    labels = model.adata.obs["perturbation"].astype(str).to_numpy()
    trainer = trainer_of(model)
    trainer.datamodule.train_dataloader = lambda: model._make_data_loader(
        model.adata, indices=np.flatnonzero(labels != "control"), batch_size=64
    )
    assert origin_of_controls(model.module, trainer) is None


def with_offset(module, latent, size):
    """All perturbations have one effect, on one latent, and the decoder answers to it."""
    with torch.no_grad():
        module.effects.head.loc.weight.zero_()
        module.effects.head.loc.bias.zero_()
        module.effects.head.loc.bias[latent] = size


def test_an_effect_that_all_share_in_the_model_only_is_not_confirmed(model):
    """Labels say nothing here: cells with and without a perturbation are alike."""
    rng = np.random.default_rng(0)
    adata = simulate_screen(
        n_genes=25, n_controls=150, n_perturbations=6, cells_per_perturbation=60, n_combinations=0
    )
    adata.obs["perturbation"] = rng.permutation(adata.obs["perturbation"].astype(str))
    model = make_model(adata)
    model.module.begin_dense_phase()
    with_offset(model.module, latent=1, size=1.5)
    found = unconfirmed_offsets(model.module, trainer_of(model, n_validation=300))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.5, 0.0]))


def test_an_effect_that_cells_show_is_confirmed():
    """The decoder raises the first gene along the first latent; so do all perturbations."""
    adata = simulate_screen(
        n_genes=25, n_controls=150, n_perturbations=6, cells_per_perturbation=60, n_combinations=0
    )
    perturbed = (adata.obs["perturbation"] != "control").to_numpy()
    x = adata.X.toarray()
    x[perturbed, 0] += 200
    adata.X = x
    model = make_model(adata, correlated_basal=False)
    module = model.module
    module.begin_dense_phase()
    with_offset(module, latent=0, size=2.0)
    with torch.no_grad():
        # All cells have the basal state 0, as good as surely.
        for linear in (module.encoder.head.loc, module.encoder.head.log_variance):
            linear.weight.zero_()
            linear.bias.zero_()
        module.encoder.head.log_variance.bias.fill_(-8)
        # Eight hidden units with the first coordinate; a state of 2 raises the logit by 3.2.
        module.decoder.from_z.weight.zero_()
        module.decoder.from_z.bias.zero_()
        module.decoder.from_z.weight[:, 0] = 1.0
        module.decoder.to_genes.weight.zero_()
        module.decoder.to_genes.weight[0] = 0.2
    found = unconfirmed_offsets(module, trainer_of(model, n_validation=300))
    assert found.tolist() == [0, 0, 0]


def test_an_effect_that_few_share_is_left_alone(model):
    """The median perturbation has it, two of six have none."""
    with_offset(model.module, latent=1, size=1.5)
    loc = model.module.full_effects().loc.detach().clone()
    loc[0, :2, 1] = 0.1
    model.module.full_effects = lambda: Normal(loc, torch.ones_like(loc))
    found = unconfirmed_offsets(model.module, trainer_of(model, n_validation=100))
    assert found.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("n_perturbations", "n_validation"), [(6, 0), (4, 100)])
def test_nothing_is_unconfirmed_where_nobody_can_say(n_perturbations, n_validation):
    model = make_model(make_screen(n_perturbations=n_perturbations))
    model.module.begin_dense_phase()
    with_offset(model.module, latent=2, size=1.0)
    found = unconfirmed_offsets(model.module, trainer_of(model, n_validation))
    assert (found == 0).all()
