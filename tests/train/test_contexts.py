"""Training in contexts: what is counted, phases, checkpoints, and effects that one of three has."""

import numpy as np
import pytest
import scvi
import torch
from lightning.pytorch import Callback

from scvi_sams import SAMSVAE
from scvi_sams.datasets import simulate_screen, simulated_ate
from scvi_sams.train._gene_sums import gene_sums
from train.screens import SMALL_MODEL, make_screen

SHIFTS_ONLY = {"direct_effects": False, "stacking": False}
TRAINING = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "batch_size": 64}


@pytest.fixture(autouse=True)
def no_seed_afterwards():
    yield
    scvi.settings.seed = None


def untrained(**changes):
    scvi.settings.seed = 3
    adata = make_screen()
    rng = np.random.default_rng(2)
    adata.obs["line"] = rng.choice(["K", "M", "T"], adata.n_obs, p=[0.5, 0.3, 0.2])
    only = adata.obs["perturbation"] == "P002"
    adata.obs.loc[only, "line"] = "T"  # and in combinations in others, perhaps
    SAMSVAE.setup_anndata(adata, context_key="line")
    return SAMSVAE(adata, **(SMALL_MODEL | SHIFTS_ONLY | changes))


def test_training_cells_of_pairs_are_counted():
    model = untrained()
    model.train(max_epochs=1, train_size=0.7, **TRAINING)
    obs = model.adata.obs.iloc[model.train_indices]
    rows = model.module.effect_rows.measured
    for row, n_cells in zip(rows.tolist(), model.module.contexts.n_cells.tolist(), strict=True):
        name, line = model.perturbations[row // 4], ["K", "M", "T"][row % 4]
        carries = [name in label.split("+") for label in obs["perturbation"]]
        assert n_cells == (carries & (obs["line"] == line).to_numpy()).sum()
    totals = torch.zeros(4).index_add_(0, rows // 4, model.module.contexts.n_cells)
    torch.testing.assert_close(totals, model.module.cells_per_perturbation)


@pytest.mark.parametrize("dense_fraction", [0.0, 0.5, 1.0])
def test_phases_end_for_both_parts(dense_fraction):
    model = untrained()
    phases = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, plan):
            module = plan.module
            phases.append((module.masks.all_on, module.contexts.masks.all_on))

    model.train(
        max_epochs=4,
        plan_kwargs={"dense_fraction": dense_fraction},
        callbacks=[Watch()],
        **TRAINING,
    )
    n_dense = round(4 * dense_fraction)
    assert phases == [(True, True)] * n_dense + [(False, False)] * (4 - n_dense)
    assert not model.module.masks.all_on
    assert not model.module.contexts.masks.all_on
    assert all(value.isfinite().all() for value in model.module.state_dict().values())
    if dense_fraction == 0:
        assert model.module.contexts.prior.probabilities == pytest.approx((0.5, 0.05))
    else:
        assert model.module.contexts.prior.probabilities != pytest.approx((0.5, 0.05))


class Stop(Callback):
    """Fail in an epoch (from 0), in the middle of its steps."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_start(self, trainer, plan, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            raise ZeroDivisionError


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_training_goes_on_from_a_checkpoint_to_the_same_weights(tmp_path, epoch):
    whole, path = untrained(), tmp_path / "run.ckpt"
    whole.train(max_epochs=4, **TRAINING)
    with pytest.raises(ZeroDivisionError):
        untrained().train(max_epochs=4, checkpoint_path=path, callbacks=[Stop(epoch)], **TRAINING)
    resumed = untrained()
    torch.manual_seed(99)
    resumed.train(max_epochs=4, checkpoint_path=path, **TRAINING)
    # Last bits hang on where arrays lie in memory; other random numbers would change far more.
    for name, value in whole.module.state_dict().items():
        found = resumed.module.state_dict()[name]
        torch.testing.assert_close(found, value, rtol=2e-3, atol=2e-3, msg=name)


@pytest.mark.parametrize("gene_likelihood", ["nb", "poisson", "normal"])
def test_direct_effects_and_stacking_of_any_likelihood(gene_likelihood):
    model = untrained(direct_effects=True, stacking=True, gene_likelihood=gene_likelihood)
    model.train(max_epochs=2, **TRAINING)
    found = model.predict_ate(context=model.contexts, method="mean", n_samples=50, key_added=None)
    assert np.isfinite(found.X).all()
    assert sum(model.stacking.values()) == pytest.approx(1)


def test_each_group_of_direct_effects_has_its_cells():
    """Perturbations, combinations, controls, pairs with contexts, and controls of these."""
    model = untrained(direct_effects=True, stacking=True)
    model.train(max_epochs=1, **TRAINING)
    tables, obs = model.module.direct, model.adata.obs
    cells = (batch for _, batch in model._read(None, None, 50).cells())
    sums = gene_sums(cells, tables, torch.ones(4, dtype=torch.bool), is_count=True, n_contexts=3)
    lines, labels = ["K", "M", "T"], obs["perturbation"].astype(str)
    together = [
        "+".join(sorted(model.perturbations[code] for code in codes if code >= 0))
        for codes in tables.combinations.tolist()
    ]
    groups = [(label, None) for label in [*model.perturbations, *together]]
    groups += [(model.perturbations[row // 4], lines[row % 4]) for row in tables.pairs.tolist()]
    groups += [("control", None), *(("control", line) for line in lines)]
    counts = model.adata.X.toarray()
    assert len(together) == 2
    assert len(tables.pairs) > 8
    for place, (label, line) in enumerate(groups):
        is_there = (labels == label) & (True if line is None else obs["line"] == line)
        assert sums.n[place] == is_there.sum()
        np.testing.assert_allclose(sums.x[place], counts[is_there].sum(axis=0))
    assert len(groups) == len(sums.n)


@pytest.mark.parametrize("gene_likelihood", ["nb", "normal"])
def test_a_context_of_which_no_cell_is_held_out(gene_likelihood):
    first = untrained()
    first.train(max_epochs=1, train_size=0.98, **TRAINING)
    adata = first.adata
    adata.obs.iloc[first.validation_indices, adata.obs.columns.get_loc("line")] = "K"
    scvi.settings.seed = 3
    SAMSVAE.setup_anndata(adata, context_key="line")
    model = SAMSVAE(adata, gene_likelihood=gene_likelihood, **SMALL_MODEL)
    model.train(max_epochs=2, train_size=0.98, **TRAINING)
    assert set(adata.obs["line"].iloc[model.validation_indices]) == {"K"}
    found = model.predict_ate(context="T", method="mean", n_samples=50, key_added=None)
    assert np.isfinite(found.X).all()


@pytest.mark.parametrize(
    ("estimator", "correlated_effects"), [("closed_form", True), ("monte_carlo", False)]
)
def test_the_bound_rises(estimator, correlated_effects):
    model = untrained(kl_estimator=estimator, correlated_effects=correlated_effects)
    model.train(max_epochs=30, **TRAINING)
    history = model.history["elbo_train"].iloc[:, 0].to_numpy(dtype=float)
    assert np.isfinite(history).all()
    assert history[-5:].mean() < history[:3].mean() - 0.2


def test_effects_that_one_of_three_cell_types_has_not_are_found():
    """By the mean squared error of effects in every cell type, with contexts and without."""
    adata = simulate_screen(
        n_genes=40,
        n_controls=300,
        n_perturbations=8,
        cells_per_perturbation=100,
        n_combinations=0,
        n_latent=4,
        mask_probability=0.3,
        n_cell_types=3,
        cell_type_specific_share=0.4,
        cell_type_log_sd=0.3,
        library_size=2000.0,
        seed=2,
    )
    types = [str(name) for name in adata.uns["simulation"]["cell_types"]]
    names = [f"P{number:03d}" for number in range(1, 9)]
    truth = {
        name: simulated_ate(adata, names, cell_type=name, n_samples=1000, library_size=2000).X
        for name in types
    }
    errors = []
    for setup in ({"categorical_covariate_keys": ["cell_type"]}, {"context_key": "cell_type"}):
        scvi.settings.seed = 0
        SAMSVAE.setup_anndata(adata, **setup)
        model = SAMSVAE(adata, n_latent=6, n_hidden=32, **SHIFTS_ONLY)
        model.train(max_epochs=50, **TRAINING)
        error = 0.0
        for name in types:
            found = model.predict_ate(
                names,
                context=name if model.contexts else None,
                library_size=2000,
                n_samples=400,
                n_posterior_samples=20,
                key_added=None,
            )
            error += ((found.X - truth[name]) ** 2).sum()
        errors.append(error)
    without, within = errors
    everything = sum((values**2).sum() for values in truth.values())
    assert within < 0.6 * without
    assert within < 0.25 * everything
    responds = np.asarray(adata.uns["simulation"]["true_response"]).astype(bool)
    found = [
        np.linalg.norm(model.get_perturbation_effects(context=t, key_added=None).mean, axis=1)
        for t in types
    ]
    moved = np.linalg.norm(np.stack(list(truth.values())), axis=2)  # types x perturbations
    strong = np.array(found)[moved > 0.5 * moved.max()]
    none = np.array(found)[~responds.T & (moved.max(axis=0) > 0.5 * moved.max())]
    assert len(none)
    assert np.median(none) < 0.5 * np.median(strong)
