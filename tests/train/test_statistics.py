"""What is computed from training cells, against numpy on dense data."""

import numpy as np
import pytest
import torch

from scvi_sams.train import _statistics, training_statistics
from scvi_sams.train._statistics import few_sizes
from train.screens import carriers, make_counts, make_model

# csc matrices are tested because users have them.
pytestmark = pytest.mark.filterwarnings("ignore:Training will be faster when sparse matrix")

TRAIN = np.random.default_rng(1).permutation(60)[:41]
HELD_OUT = np.setdiff1d(np.arange(60), TRAIN)
FORMS = pytest.mark.parametrize("form", ["csr", "csc", "dense"])


def dense(adata):
    x = adata.X if isinstance(adata.X, np.ndarray) else adata.X.toarray()
    return x.astype(np.float64)


def compute(adata, *, counts=True, train=TRAIN, **setup):
    likelihood = "nb" if counts else "normal"
    model = make_model(adata, setup=setup, gene_likelihood=likelihood)
    return training_statistics(model.adata_manager, train, counts=counts)


def assert_moments(statistics, inputs, scaled, size):
    np.testing.assert_allclose(statistics.input_mean, inputs.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(statistics.input_sd, inputs.std(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(statistics.scaled_mean, scaled.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(statistics.scaled_variance, scaled.var(0), rtol=1e-4, atol=1e-12)
    assert statistics.inverse_size_mean == pytest.approx((1 / size).mean(), rel=1e-6)


@FORMS
@pytest.mark.parametrize("rows_per_chunk", [7, 100_000])
@pytest.mark.parametrize("size_factor", [False, True])
def test_moments_of_counts(form, rows_per_chunk, size_factor, monkeypatch):
    monkeypatch.setattr(_statistics, "_ROWS_PER_CHUNK", rows_per_chunk)
    adata = make_counts(form=form)
    statistics = compute(adata, size_factor_key="factor" if size_factor else None)
    x = dense(adata)[TRAIN]
    size = adata.obs["factor"].to_numpy()[TRAIN] if size_factor else x.sum(1)
    assert_moments(statistics, np.log1p(x), x / size[:, None], size)


@FORMS
def test_moments_of_normalised_values(form):
    """Neither logarithm nor size."""
    adata = make_counts(form=form)
    adata.X = adata.X * -0.37
    statistics = compute(adata, counts=False)
    x = dense(adata)[TRAIN]
    assert_moments(statistics, x, x, np.ones(len(x)))


def test_normalised_values_of_cells_that_sum_to_zero():
    """Centred values may, and size plays no part in their likelihood."""
    adata = make_counts(form="dense")
    adata.X -= adata.X.mean(axis=1, keepdims=True)
    adata.X[TRAIN[0]] = 0
    statistics = compute(adata, counts=False)
    np.testing.assert_allclose(statistics.input_sd, dense(adata)[TRAIN].std(0), rtol=1e-5)
    values = {name: value for name, value in vars(statistics).items() if value is not None}
    # There are no contexts and no counts.
    assert values.keys() == vars(statistics).keys() - {"cells_per_pair", "largest_counts"}
    assert all(np.isfinite(np.asarray(value)).all() for value in values.values())


def test_counts_in_a_layer():
    adata = make_counts()
    adata.layers["counts"] = adata.X.copy()
    expected = compute(adata)
    adata.X = adata.X * 0
    statistics = compute(adata, layer="counts")
    assert torch.equal(statistics.input_mean, expected.input_mean)
    assert torch.equal(statistics.scaled_variance, expected.scaled_variance)


@FORMS
def test_only_training_cells_count(form):
    """Held-out cells may hold anything: no number changes."""
    adata = make_counts(form=form)
    expected = compute(adata, size_factor_key="factor")
    x = dense(adata)
    x[HELD_OUT] = 1000 + np.arange(6)
    other = make_counts(form=form)
    other.X = type(other.X)(x.astype(np.float32)) if form != "dense" else x.astype(np.float32)
    other.obs.loc[other.obs_names[HELD_OUT], "factor"] = 99.0
    labels = other.obs["perturbation"].to_numpy().copy()
    labels[HELD_OUT] = "C"
    other.obs["perturbation"] = labels
    actual = compute(other, size_factor_key="factor")
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(actual, name), value, err_msg=name)


@FORMS
def test_largest_counts_of_training_cells(form):
    adata = make_counts(form=form)
    expected = dense(adata)[TRAIN].max(axis=0)
    np.testing.assert_array_equal(compute(adata).largest_counts, expected)
    assert compute(adata, counts=False).largest_counts is None


def test_a_module_knows_largest_counts_in_training_alone(monkeypatch):
    """Of other cells they would be wrong."""
    seen = []

    def spy(self, statistics):
        original(self, statistics)
        seen.append(self.likelihood.largest_counts)

    model = make_model(make_counts())
    original = type(model.module).set_training_statistics
    monkeypatch.setattr(type(model.module), "set_training_statistics", spy)
    model.train(max_epochs=1, accelerator="cpu", train_size=1.0, enable_progress_bar=False)
    np.testing.assert_array_equal(seen[0], dense(model.adata).max(axis=0))
    assert model.module.likelihood.largest_counts is None


def test_order_of_training_cells_plays_no_part():
    adata = make_counts()
    expected = compute(adata)
    actual = compute(adata, train=TRAIN[::-1].copy())
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(actual, name), value, err_msg=name)


def test_cells_per_perturbation():
    """A pair counts for both; a cell at dose zero is a control cell."""
    adata = make_counts()
    counted = compute(adata).cells_per_perturbation
    assert counted.tolist() == carriers(adata, TRAIN, ["A", "B", "C"]).tolist()
    dosed = compute(adata, dosage_key="dose").cells_per_perturbation
    given = TRAIN[adata.obs["dose"].to_numpy()[TRAIN] > 0]
    assert dosed.tolist() == carriers(adata, given, ["A", "B", "C"]).tolist()
    assert (dosed < counted).all()


def test_perturbations_without_training_cells_count_zero():
    adata = make_counts()
    train = np.flatnonzero(adata.obs["perturbation"].isin(["control", "A"]))
    assert compute(adata, train=train).cells_per_perturbation.tolist() == [12, 0, 0]


# Sizes ------------------------------------------------------------------------------------------


def test_three_sizes_stand_for_those_of_the_training_control_cells():
    """Averages of polynomials in the log size, up to the fifth degree, are those over the cells."""
    adata = make_counts()
    is_control = (adata.obs["perturbation"] == "control").to_numpy()[TRAIN]
    for setup in ({}, {"size_factor_key": "factor"}):
        sizes, shares = compute(adata, **setup).cell_sizes.double().numpy()
        factor = adata.obs["factor"].to_numpy()
        of_cells = (factor if setup else dense(adata).sum(1))[TRAIN][is_control]
        center = np.log(of_cells).mean()
        for degree in range(6):
            average = (shares * (np.log(sizes) - center) ** degree).sum()
            expected = ((np.log(of_cells) - center) ** degree).mean()
            assert average == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert len(of_cells) > 5
        assert of_cells.min() < sizes.min() < sizes.max() < of_cells.max()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([500.0] * 10, {500: 1}),
        ([500.0], {500: 1}),
        ([100.0, 100.0, 100.0, 400.0], {100: 0.75, 400: 0.25}),
        ([1.0, 1e6], {1: 0.5, 1e6: 0.5}),
        ([0.1, 1.0, 10.0], {0.1: 1 / 3, 1: 1 / 3, 10: 1 / 3}),
    ],
)
def test_few_different_sizes_stand_for_themselves(sizes, expected):
    found = few_sizes(np.array(sizes))
    assert found.shape == (2, 3)
    assert found[1].sum() == pytest.approx(1)
    for size, share in expected.items():
        is_it = np.isclose(found[0], size, rtol=1e-5)
        assert found[1][is_it].sum() == pytest.approx(share)


def test_without_control_cells_all_sizes_count():
    """In the training part of a split; a normal likelihood has no sizes."""
    adata = make_counts()
    perturbed = np.flatnonzero(adata.obs["perturbation"] != "control")
    found = compute(adata, train=perturbed).cell_sizes
    np.testing.assert_allclose(found, few_sizes(dense(adata)[perturbed].sum(1)), rtol=1e-6)
    sizes, shares = compute(adata, counts=False).cell_sizes
    np.testing.assert_allclose(sizes[shares > 0], 1)


def test_a_few_genes_that_make_up_the_size_of_cells_are_named(caplog):
    adata = make_counts(n_cells=200, n_genes=40, form="dense")
    warned = {}
    for name, total, setup in (
        ("even", 25, {}),
        ("dominated", 250, {}),
        ("size factor", 250, {"size_factor_key": "factor"}),
    ):
        counts = adata.X.copy()
        counts[:, [7, 3]] = [total, total + 50]
        adata.X = counts
        caplog.clear()
        make_model(adata, setup=setup).train(max_epochs=1, enable_progress_bar=False)
        warned[name] = [m for m in caplog.messages if "size_factor_key" in m]
    assert not warned["even"]
    assert not warned["size factor"]
    (message,) = warned["dominated"]
    assert message.startswith("65% of the counts are from 3, 7, and")
    assert "whole transcriptome" in message


# What the module makes of them ------------------------------------------------------------------


def initialise(adata, **setup):
    model = make_model(adata, setup=setup)
    module = model.module
    module.set_training_statistics(training_statistics(model.adata_manager, TRAIN, counts=True))
    return module


def encoder_inputs(module, x):
    """What the network behind the standardisation sees."""
    seen = []
    handle = module.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module.encode(torch.as_tensor(x, dtype=torch.float32), torch.zeros(1, len(x), 3), None)
    handle.remove()
    return seen[0].numpy()


def test_encoder_inputs_have_mean_zero_and_sd_one_on_training_cells():
    adata = make_counts()
    module = initialise(adata)
    inputs = encoder_inputs(module, dense(adata)[TRAIN])
    varying = [0, 1, 3, 5]
    np.testing.assert_allclose(inputs.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(inputs[:, varying].std(0), 1, rtol=1e-4)
    np.testing.assert_allclose(inputs[:, [2, 4]], 0, atol=1e-5)


def test_a_gene_that_never_varies_in_training_gives_no_nan():
    """Nor where it does vary in a held-out cell."""
    adata = make_counts()
    module = initialise(adata)
    x = dense(adata)[HELD_OUT]
    x[0, 2], x[0, 4] = 50, 0
    inputs = encoder_inputs(module, x)
    assert np.isfinite(inputs).all()
    assert np.abs(inputs).max() < 20
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


@pytest.mark.parametrize("value", [0.1, 7.3, 1000.1])
def test_a_constant_value_is_not_taken_for_a_varying_one(value):
    """The variance as a difference of large numbers is not exactly zero."""
    adata = make_counts(n_cells=3000, form="dense")
    adata.X[:, 1] = value
    model = make_model(adata, gene_likelihood="normal")
    model.module.set_training_statistics(
        training_statistics(model.adata_manager, np.arange(3000), counts=False)
    )
    inputs = encoder_inputs(model.module, adata.X)
    np.testing.assert_allclose(inputs[:, 1], 0, atol=0.01)
    assert model.module.input_sd[1] == 1


def test_an_untrained_module_predicts_the_mean_shares_of_training_cells():
    adata = make_counts()
    module = initialise(adata)
    x = dense(adata)[TRAIN]
    shares = (x / x.sum(1, keepdims=True)).mean(0)
    rate = module.likelihood.rate(module.decoder.to_genes.bias).detach().numpy()
    # The gene without counts gets a tenth of the smallest share; the others shrink a little.
    expected = np.where(shares > 0, shares, 0.1 * shares[shares > 0].min())
    np.testing.assert_allclose(rate, expected / expected.sum(), rtol=1e-4)


@pytest.mark.parametrize("library_log_sd", [0.0, 0.5])
def test_the_starting_dispersion_is_near_the_truth(library_log_sd):
    """Moments of simulated counts whose library sizes vary as real ones do."""
    rng = np.random.default_rng(3)
    theta = np.array([0.5, 1.0, 3.0, 10.0, 3.0, 1.0])
    mean = np.array([5, 50, 5, 50, 1, 1.0])
    adata = make_counts(n_cells=50_000, form="dense")
    factor = np.exp(rng.normal(scale=library_log_sd, size=50_000))
    mean = factor[:, None] * mean
    adata.X = rng.negative_binomial(theta, theta / (theta + mean)).astype(np.float32) + 0.0
    adata = adata[adata.X.sum(axis=1) > 0].copy()
    adata.obs["factor"] = factor[adata.obs_names.str[4:].astype(int)]
    model = make_model(adata, setup={"size_factor_key": "factor"})
    statistics = training_statistics(model.adata_manager, np.arange(adata.n_obs), counts=True)
    model.module.set_training_statistics(statistics)
    estimate = model.module.likelihood.log_inverse_dispersion.exp().detach().numpy()
    np.testing.assert_allclose(estimate, theta, rtol=0.15)


def test_later_calls_only_update_plate_counts_and_sizes():
    """Training goes on, perhaps on other cells: what has been learned stays."""
    adata = make_counts()
    module = initialise(adata)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    model = make_model(adata)
    others = np.arange(20)
    second = training_statistics(model.adata_manager, others, counts=True)
    module.set_training_statistics(second)
    changed = [
        name for name, value in module.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert changed == ["cells_per_perturbation", "cell_sizes"]
    assert torch.equal(module.cell_sizes, second.cell_sizes)
    assert module.cells_per_perturbation.tolist() == carriers(adata, others, list("ABC")).tolist()
