"""Direct effects and stacking after a training: known truth, simple estimators, what is kept."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from anndata import AnnData

from model.builders import small_screen, train_small
from scvi_sams import SAMSVAE
from scvi_sams.baselines._shrunken import AshMean, EBMean
from scvi_sams.data._field import registered_labels
from scvi_sams.datasets import simulate_screen, simulated_ate
from scvi_sams.metrics._observed import observed_ate
from scvi_sams.module._minibatch import CellBatch
from scvi_sams.train._direct_effects import fit_direct_effects
from scvi_sams.train._gene_sums import gene_sums
from train.screens import SMALL_MODEL, make_counts

N_NULLS = 4
LIBRARY_SIZE = 500.0


class Panel(NamedTuple):
    """A screen of few genes, each perturbation of which silences its own."""

    model: Any
    training: AnnData
    held_out: AnnData
    names: list[str]
    nulls: np.ndarray
    own: np.ndarray
    """Columns of the genes of the perturbations."""


@pytest.fixture(scope="module")
def panel():
    adata = simulate_screen(
        n_genes=70, n_perturbations=14, n_controls=600, cells_per_perturbation=160,
        n_combinations=0, n_latent=5, library_size=LIBRARY_SIZE, knockdown=(0.7, 0.95),
        n_null_perturbations=N_NULLS, seed=2,
    )  # fmt: skip
    is_held_out = np.random.default_rng(0).random(adata.n_obs) < 0.5
    training, held_out = adata[~is_held_out].copy(), adata[is_held_out].copy()
    SAMSVAE.setup_anndata(training)
    torch.manual_seed(0)
    model = SAMSVAE(training, n_latent=6, n_hidden=64)
    model.train(
        max_epochs=80, accelerator="cpu", devices=1, batch_size=128, enable_progress_bar=False
    )
    simulation = adata.uns["simulation"]
    names = list(simulation["perturbations"])
    nulls = ~simulation["true_masks"].any(axis=1)
    assert nulls.sum() == N_NULLS
    assert model.perturbations == names
    return Panel(model, training, held_out, names, nulls, adata.var_names.get_indexer(names))


def ate(panel, **kwargs):
    torch.manual_seed(0)
    return panel.model.predict_ate(panel.names, key_added=None, **kwargs)


def refit(model, cells, held_out=None):
    """Fit direct effects to these cells, as training does."""
    module, adata = model.module, model.adata
    labels = registered_labels(model.adata_manager)
    x = torch.as_tensor(adata.X.toarray(), dtype=torch.float32)
    codes, doses = (torch.as_tensor(part) for part in (labels.codes, labels.doses))

    def sums(some):
        some = torch.as_tensor(some)
        batch = CellBatch(x[some], codes[some].long(), doses[some], None, x[some].sum(dim=1))
        alone = torch.ones(module.direct.n_perturbations, dtype=torch.bool)
        return gene_sums([batch], module.direct, alone, is_count=True)

    fit_direct_effects(module, sums(cells), None if held_out is None else sums(held_out))
    return module.direct


def test_the_own_gene_of_a_perturbation_is_found_silenced(panel):
    found = ate(panel, library_size=LIBRARY_SIZE)
    truth = simulated_ate(panel.training, panel.names, library_size=LIBRARY_SIZE, n_samples=20_000)
    rows = np.flatnonzero(~panel.nulls)
    own = panel.own[rows]
    effects, low, high, true = (
        table[rows, own]
        for table in (
            found.X, found.layers["interval_low"], found.layers["interval_high"], truth.X,
        )
    )  # fmt: skip
    error = truth.layers["standard_error"][rows, own]
    assert (true < -0.1).all()
    assert (effects < 0).all()
    inside = (low - 2 * error <= true) & (true <= high + 2 * error)
    assert inside.sum() >= len(rows) - 2
    assert np.abs(effects - true).mean() < 0.2 * np.abs(true).mean()


def test_no_simple_estimator_predicts_held_out_cells_better(panel):
    observed = observed_ate(panel.held_out, perturbations=panel.names).X

    def error(effects):
        return np.sqrt(np.square(np.asarray(effects) - observed).mean())

    normalised = panel.training.copy()
    counts = normalised.X.toarray()
    normalised.X = np.log2(1 + 1e4 * counts / counts.sum(axis=1, keepdims=True))
    is_control = (normalised.obs["perturbation"] == "control").to_numpy()
    controls = normalised.X[is_control].mean(axis=0)
    of_model = error(ate(panel).X)
    for baseline in (AshMean(), EBMean()):
        predicted = baseline.fit(normalised).predict(panel.names).X
        assert of_model < 1.02 * error(predicted - controls)
    assert of_model < 0.9 * error(0)


def test_perturbations_that_do_nothing_keep_to_zero(panel):
    effects = ate(panel).obs["effect_norm"].to_numpy()
    assert effects[panel.nulls].max() < 0.5 * effects[~panel.nulls].min()
    direct = panel.model.module.direct
    of_nulls, others = direct.mean.numpy()[panel.nulls], direct.mean.numpy()[~panel.nulls]
    assert np.sqrt(np.square(of_nulls).mean()) < 0.15 * np.sqrt(np.square(others).mean())
    # At most one of 280 signs, all of them false, is called.
    assert (direct.sign_error.numpy()[panel.nulls] < 0.05).sum() <= 1


def test_weights_are_those_that_explain_held_out_cells(panel):
    """A model whose effects are those of other perturbations is believed less."""
    module = panel.model.module
    direct = module.direct
    before = {name: value.clone() for name, value in module.state_dict().items()}
    cells = np.random.default_rng(1).permutation(panel.training.n_obs)
    train, held_out = np.array_split(cells, 2)
    fits_direct = module.fits_direct_effects
    try:
        module.fits_direct_effects = False  # which would make up for the wrong effects
        right = refit(panel.model, train, held_out).weights.clone()
        shuffled_effects(module)
        wrong = refit(panel.model, train, held_out).weights.clone()
        assert wrong[0] < 1 / 3
        assert wrong[0] < right[0] - 0.1
        equal = refit(panel.model, cells).weights
        assert equal.tolist() == pytest.approx([1 / 3] * 3)
    finally:
        module.fits_direct_effects = fits_direct
        module.load_state_dict(before)
    assert module.direct is direct


def shuffled_effects(module):
    """Move every effect on to the next perturbation."""
    n_perturbations = module.direct.n_perturbations
    moved = 0
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("masks", "effects")) and len(parameter) == n_perturbations:
                parameter.copy_(parameter.roll(1, dims=0))
                moved += 1
    assert moved


def test_a_perturbation_without_cells_has_no_direct_effects(panel):
    module = panel.model.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    labels = panel.training.obs["perturbation"].astype(str).to_numpy()
    row, other = np.flatnonzero(~panel.nulls)[:2]
    try:
        direct = refit(panel.model, np.flatnonzero(labels != panel.names[row]))
        for name in ("mean", "sd", "correction", "uncertainty"):
            assert not getattr(direct, name)[row].any(), name
            assert getattr(direct, name)[other].any(), name
        assert (direct.sign_error[row] == 1).all()
        assert direct.spread[row] == 1
        assert ((direct.spread > 0) & (direct.spread <= 1)).all()
    finally:
        module.load_state_dict(before)


def test_of_large_tables_the_genes_that_matter_are_kept(panel, monkeypatch):
    module = panel.model.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    cells = np.arange(panel.training.n_obs)
    rows = torch.arange(len(panel.names))
    codes, doses = rows[:, None], torch.ones(len(rows), 1)
    try:
        direct = refit(panel.model, cells)
        means, sds = direct.in_predictions(rows)
        of_cells = direct.of_cells(codes, doses, codes)
        n_kept = 12
        monkeypatch.setattr(
            "scvi_sams.module._direct_effects.MOST_ENTRIES", n_kept * len(panel.names)
        )
        direct = refit(panel.model, cells)
        assert direct.mean.shape == (len(panel.names), n_kept)
        kept = torch.zeros_like(means, dtype=torch.bool).scatter_(1, direct.genes.long(), True)
        found = direct.in_predictions(rows)
        for few, all_ in zip(
            (*found, direct.of_cells(codes, doses, codes)), (means, sds, of_cells), strict=True
        ):
            torch.testing.assert_close(few, all_ * kept)
        perturbed = np.flatnonzero(~panel.nulls)
        assert kept.numpy()[perturbed, panel.own[perturbed]].all()
        # Large screens share the weights of the mixture among perturbations.
        monkeypatch.setattr(
            "scvi_sams.train._direct_effects._MOST_ENTRIES_OF_OWN_PRIORS", n_kept * len(panel.names)
        )
        pooled, _ = refit(panel.model, cells).in_predictions(rows)
        own = (perturbed, panel.own[perturbed])
        np.testing.assert_allclose(pooled.numpy()[own], means.numpy()[own], atol=0.3)
    finally:
        module.load_state_dict(before)


def test_either_can_be_left_out():
    """Without direct effects only predictions change, without stacking only direct effects do."""
    direct, stacked, neither = (
        train_small(small_screen(), spread=False, direct_effects=one, stacking=other).module
        for one, other in ((True, False), (False, True), (False, False))
    )
    assert neither.direct is None
    assert stacked.direct.mean.abs().max() == 0
    assert stacked.direct.in_predictions(torch.arange(4))[0].abs().max() > 0.01
    assert direct.direct.mean.abs().max() > 0.01
    rows = torch.arange(direct.direct.n_rows)
    torch.testing.assert_close(direct.direct.in_predictions(rows)[0], direct.direct.mean)
    for name, value in neither.named_parameters():
        assert torch.equal(value, dict(direct.named_parameters())[name]), name


def test_a_measured_pair_is_predicted_from_its_own_cells():
    """Two of its genes react as no sum does; what other pairs do is unchanged by that."""
    adata = simulate_screen(
        n_genes=80, n_perturbations=6, cells_per_perturbation=80, n_controls=300,
        n_combinations=4, cells_per_combination=150, n_latent=5, library_size=800, seed=4,
    )  # fmt: skip
    bent, additive, *_ = [name for name in adata.obs["perturbation"].unique() if "+" in name]
    genes = np.argsort(-adata.X.toarray().mean(axis=0))[10:12]
    additive_effect = observed_ate(adata)[bent].X[0, genes]
    counts = adata.X.toarray()
    counts[np.ix_(adata.obs["perturbation"] == bent, genes)] *= 4
    adata.X = counts
    SAMSVAE.setup_anndata(adata)
    torch.manual_seed(0)
    model = SAMSVAE(adata, n_latent=6, n_hidden=64)
    model.train(max_epochs=60, accelerator="cpu", devices=1, enable_progress_bar=False)
    observed = observed_ate(adata)[[bent, additive]].X
    torch.manual_seed(0)
    found = model.predict_ate([bent, additive], n_samples=2000, key_added=None)
    assert found.uns["ate"]["combinations_with_own_cells"] == 4
    np.testing.assert_allclose(found.X[0, genes], observed[0, genes], atol=0.3)
    assert (observed[0, genes] > additive_effect + 1).all()
    interaction = model.predict_interactions([bent, additive], n_samples=2000)
    assert (interaction.X[0, genes] > 0.6).all()
    assert np.abs(interaction.X[1]).mean() < 0.1
    # Without its row the sum would be predicted.
    direct = model.module.direct
    direct.combination_doses += 0.5
    torch.manual_seed(0)
    summed = model.predict_ate([bent, additive], n_samples=2000, key_added=None)
    assert (summed.X[0, genes] < found.X[0, genes] - 0.5).all()


@pytest.fixture(scope="module")
def many():
    adata = simulate_screen(
        n_genes=60, n_perturbations=40, cells_per_perturbation=50, n_controls=500,
        n_combinations=0, seed=0,
    )  # fmt: skip
    SAMSVAE.setup_anndata(adata)
    torch.manual_seed(0)
    model = SAMSVAE(adata, n_latent=20, n_hidden=64)
    model.train(max_epochs=60, accelerator="cpu", devices=1, enable_progress_bar=False)
    return model


def test_intervals_hold_the_truth_as_often_as_they_say(many):
    names = many.perturbations
    truth = simulated_ate(many.adata, names, n_samples=4000)
    error = truth.layers["standard_error"]
    torch.manual_seed(0)
    found = many.predict_ate(names, library_size=1e4, key_added=None)
    low, high = found.layers["interval_low"] - error, found.layers["interval_high"] + error
    true = np.asarray(truth.X)
    inside = (low <= true) & (true <= high)
    assert 0.9 < inside.mean() < 0.98


def test_held_out_cells_that_tell_of_nothing_alone_decide_nothing():
    """All of them carry both perturbations, each of which has training cells of its own."""
    adata = make_counts()
    adata.obs["perturbation"] = ["control", "A", "B", "A+B"] * 15
    pairs = np.flatnonzero(adata.obs["perturbation"] == "A+B")
    SAMSVAE.setup_anndata(adata)
    model = SAMSVAE(adata, **SMALL_MODEL)
    split = [np.setdiff1d(np.arange(60), pairs[:3]), pairs[:3], []]
    model.train(
        max_epochs=1,
        accelerator="cpu",
        enable_progress_bar=False,
        datasplitter_kwargs={"external_indexing": split},
    )
    weights = model.module.direct.stacking
    np.testing.assert_allclose(list(weights.values()), 1 / len(weights))
