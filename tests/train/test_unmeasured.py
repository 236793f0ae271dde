"""Effects that no cell shows, as they are estimated when they are asked for."""

import copy

import numpy as np
import pytest
import scvi
import torch

from model.builders import TRAINING, small_screen
from scvi_sams import SAMSVAE
from scvi_sams.module._unmeasured import COMPONENTS_OF_UNMEASURED, UnmeasuredEffects
from scvi_sams.train._control_decoder import ControlDecoder
from scvi_sams.train._unmeasured import Elsewhere, answer_unmeasured


def kept_of(elsewhere):
    kept = UnmeasuredEffects()
    elsewhere.keep(kept)
    return kept.codes.tolist(), kept.elsewhere.numpy(), kept.elsewhere_variance.numpy()


def test_mean_and_variance_in_other_contexts():
    # 0 was measured in all of three contexts, 1 in two of them, 4 in one.
    owners = np.array([0, 0, 0, 1, 1, 4])
    elsewhere = Elsewhere(owners, 3, 2)
    elsewhere.add(np.array([0, 1, 4]), np.array([[9.0, 9], [1, 2], [5, -3]]))
    elsewhere.add(np.array([1, 0]), np.array([[3.0, 2], [7, 7]]))
    codes, mean, variance = kept_of(elsewhere)
    assert codes == [1, 4]
    np.testing.assert_allclose(mean, [[2, 2], [5, -3]])
    # Around its mean perturbation 1 has a sum of squares of 2 and 0, with one degree of freedom,
    # which is all that is known of any. Its own counts as much as that; then the error of a mean of
    # two; of one context, twice.
    np.testing.assert_allclose(variance, [[(2 + 2) / 2 * 1.5, 0], [2 * 2, 0]])


def test_where_none_has_two_contexts_an_effect_may_be_nothing_or_twice_as_large():
    elsewhere = Elsewhere(np.array([2, 5]), 2, 2)
    elsewhere.add(np.array([5, 2]), np.array([[1.0, -2], [0, 3]]))
    codes, mean, variance = kept_of(elsewhere)
    assert codes == [2, 5]
    np.testing.assert_allclose(mean, [[0, 3], [1, -2]])
    np.testing.assert_allclose(variance, 2 * np.square(mean))


def test_variances_of_perturbations_are_shrunken_towards_that_of_all():
    rng = np.random.default_rng(0)
    n_contexts = [2, 3, 4]
    owners = np.repeat([0, 1, 2], n_contexts)
    effects = rng.normal(size=(len(owners), 3))
    elsewhere = Elsewhere(owners, 5, 3)
    elsewhere.add(owners, effects)
    _, mean, variance = kept_of(elsewhere)
    groups = [effects[owners == owner] for owner in range(3)]
    around = np.array([np.square(g - g.mean(axis=0)).sum(axis=0) for g in groups])
    pooled = around.sum(axis=0) / sum(n - 1 for n in n_contexts)
    for owner, n in enumerate(n_contexts):
        np.testing.assert_allclose(mean[owner], groups[owner].mean(axis=0), rtol=1e-6)
        expected = (around[owner] + pooled) / n * (1 + 1 / n)
        np.testing.assert_allclose(variance[owner], expected, rtol=1e-5)


def test_nothing_is_kept_of_too_many(monkeypatch):
    monkeypatch.setattr("scvi_sams.train._unmeasured.MOST_ENTRIES", 5)
    elsewhere = Elsewhere(np.array([0, 1, 2]), 2, 2)
    elsewhere.add(np.array([0, 1]), np.ones((2, 2)))
    codes, mean, _ = kept_of(elsewhere)
    assert codes == []
    assert mean.shape == (0, 2)


def features_of(names, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=3) for name in names}


def trained(setup=None, *, likelihood="nb", **changes):
    adata = small_screen(n_combinations=0, n_perturbations=12, **changes)
    others = ["U1", "U2", "U3"]
    names = sorted(set(adata.obs["perturbation"].astype(str)) - {"control"})
    if setup and "context_key" in setup:
        # Not in every type.
        is_new = (adata.obs["perturbation"] == "P002") & (adata.obs["cell_type"] == "type_1")
        adata = adata[~is_new.to_numpy()].copy()
    SAMSVAE.setup_anndata(adata, **(setup or {}))
    torch.manual_seed(0)
    model = SAMSVAE(
        adata,
        n_latent=4,
        n_hidden=16,
        effect_n_hidden=8,
        gene_likelihood=likelihood,
        perturbation_features=features_of([*names, *others]),
    )
    model.train(max_epochs=4, **{k: v for k, v in TRAINING.items() if k != "plan_kwargs"})
    return model


@pytest.fixture(scope="module")
def plain():
    return trained()


@pytest.fixture(scope="module")
def with_sizes():
    """Rates that are no shares: none changes with another."""
    return trained({"size_factor_key": "transcriptome"})


@pytest.fixture(scope="module")
def in_contexts():
    return trained({"context_key": "cell_type"}, n_cell_types=2)


def answers(module, *calls):
    """Tables after some calls, by rows of effects."""
    module = copy.deepcopy(module)
    module.direct.forget()
    for rows in calls:
        ask(module, torch.tensor(rows))
    rows, _, tables = module.direct.answers
    assert rows.tolist() == sorted(rows.tolist())
    return {row: [column[place] for column in tables] for place, row in enumerate(rows.tolist())}


def ask(module, rows):
    """Ask for single effects at unit doses."""
    codes = module.effect_rows.perturbation_of(rows)[:, None]
    answer_unmeasured(module, codes, torch.ones(codes.shape), rows[:, None])


@pytest.mark.parametrize("fixture", ["plain", "in_contexts"])
def test_answers_do_not_depend_on_what_else_is_asked_for(fixture, request):
    model = request.getfixturevalue(fixture)
    module = model.module
    of_context = module.effect_rows.per_perturbation
    n_measured = len(model.perturbations) * of_context
    # All of the last three perturbations, and P002 where no cell has it.
    rows = list(range(n_measured, n_measured + 3 * of_context))
    if of_context > 1:
        rows = [of_context * 1, *rows]
    together = answers(module, rows)
    assert list(together) == rows
    apart = answers(module, *[[row] for row in reversed(rows)])
    some = answers(module, [rows[-1]], [rows[0], rows[-1]])
    assert list(some) == sorted({rows[0], rows[-1]})
    for found in (apart, some):
        for row, columns in found.items():
            for one, other in zip(columns, together[row], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_cells_show_is_not_estimated_anew(in_contexts):
    module = copy.deepcopy(in_contexts.module)
    module.direct.forget()
    ask(module, module.effect_rows.measured)
    assert not len(module.direct.answers.effects)
    assert module.direct.answers.tables is None


def copy_with(model, **tables):
    """Copy a model, with some tables of what was learned replaced."""
    changed = copy.deepcopy(model)
    changed.module.direct.forget()
    changed.module.unmeasured.fill(**{name: torch.as_tensor(v) for name, v in tables.items()})
    return changed


def effect_of(model, name, **arguments):
    scvi.settings.seed = 0
    samples = {"n_samples": 12_800, "n_posterior_samples": 200, "key_added": None}
    return model.predict_ate([name], **samples, **arguments)


def by_features(model, name):
    """Ridge regression and the mean of perturbations, by hand."""
    kept = model.module.unmeasured
    row = [*model.perturbations, *model.unmeasured].index(name)
    features = model.module.features.features[row, :-1].numpy()
    mean = kept.mean.numpy()
    around = features - kept.mean_features.numpy()
    return mean + around @ kept.coefficients.numpy(), mean


@pytest.mark.parametrize("weights", [[0, 0, 0, 0.6], [0, 0, 0.8, 0], [0, 0, 0.5, 0.3]])
def test_predictions_are_the_weighted_sum_of_their_components(with_sizes, weights):
    rng = np.random.default_rng(1)
    model = copy_with(
        with_sizes,
        weights=np.array(weights),
        variance=np.zeros(24),
        coefficients=0.3 * rng.normal(size=(3, 24)),
        mean=0.3 * rng.normal(size=24),
    )
    ridge, mean = by_features(model, "U2")
    expected = weights[2] * ridge + weights[3] * mean
    found = effect_of(model, "U2")
    np.testing.assert_allclose(found.X[0], expected, atol=0.03)
    # Without an error nothing is uncertain but the basal states that effects are averaged over.
    width = found.layers["interval_high"] - found.layers["interval_low"]
    assert width.max() < 0.25


@pytest.mark.parametrize("sd", [0.2, 0.8])
def test_an_error_widens_predictions_and_does_not_move_them(with_sizes, sd):
    rng = np.random.default_rng(1)
    tables = {"weights": np.array([0, 0, 0, 1.0]), "mean": 0.6 * rng.normal(size=24)}
    model = copy_with(with_sizes, variance=np.full(24, sd**2), **tables)
    found = effect_of(model, "U2")
    _, mean = by_features(model, "U2")
    is_expressed = with_sizes.adata.X.toarray().mean(axis=0) > 5
    assert is_expressed.sum() > 5
    np.testing.assert_allclose(found.X[0], mean, atol=0.05 + 0.05 * sd)
    # Of which the model's own part differs between genes.
    above = (found.layers["interval_high"] - found.X)[0, is_expressed]
    assert np.sqrt(np.square(above).mean()) == pytest.approx(1.96 * sd, rel=0.3)


def test_the_model_alone_predicts_where_it_has_all_of_the_weight(with_sizes):
    model = copy_with(with_sizes, weights=np.array([1.0, 0, 0, 0]), variance=np.full(24, 0.01))
    with torch.no_grad():
        model.module.features.effect_weights.normal_(generator=torch.Generator().manual_seed(0))
        model.module.features.effect_covariance.zero_()
        model.module.features.mask_weights.fill_(3.0)
    stacked = effect_of(model, "U1")
    model.stacking = False
    alone = effect_of(model, "U1")
    assert alone.uns["ate"]["stacking"] == "none"
    assert np.linalg.norm(alone.X) > 0.3
    np.testing.assert_allclose(stacked.X, alone.X, atol=0.15 * np.abs(alone.X).max())


def test_shifts_by_regression_are_decoded(with_sizes):
    """The model with the same shift, put there by its prior, says the same."""
    rng = np.random.default_rng(2)
    tables = {
        "mean_shift": 0.3 * rng.normal(size=4),
        "shift_coefficients": 0.2 * rng.normal(size=(3, 4)),
        "variance": np.zeros(24),
    }
    by_shifts = copy_with(with_sizes, weights=np.array([0, 1.0, 0, 0]), **tables)
    by_prior = copy_with(with_sizes, weights=np.array([1.0, 0, 0, 0]), **tables)
    kept, prior = by_prior.module.unmeasured, by_prior.module.features
    with torch.no_grad():
        prior.effect_weights[:-1] = kept.shift_coefficients
        prior.effect_weights[-1] = kept.mean_shift - kept.mean_features @ kept.shift_coefficients
        prior.effect_covariance.zero_()
        prior.unexplained.fill_(1e-6)
        prior.mask_weights.zero_()
        prior.mask_weights[-1] = 30.0
    found, expected = (effect_of(one, "U3").X for one in (by_shifts, by_prior))
    assert np.linalg.norm(expected) > 0.1
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_without_stacking_features_reach_predictions_by_masks_and_effects_only(plain):
    rng = np.random.default_rng(1)
    plain_effect, changed_effect = [], []
    for found, tables in (
        (plain_effect, {}),
        (changed_effect, {"weights": np.ones(4), "mean": rng.normal(size=24)}),
    ):
        model = copy_with(plain, **tables)
        model.stacking = False
        found.append(effect_of(model, "U1").X)
    np.testing.assert_array_equal(plain_effect[0], changed_effect[0])


def test_elsewhere_counts_as_much_as_the_model(in_contexts):
    model = in_contexts
    kept = model.module.unmeasured
    place = kept.codes.tolist().index(model.perturbations.index("P002"))
    moves = np.random.default_rng(0).normal(scale=0.5, size=(2, 24)) * [[0], [1]]
    means = []
    for moved in moves:
        elsewhere = kept.elsewhere.clone()
        elsewhere[place] += torch.as_tensor(moved)
        changed = copy_with(model, elsewhere=elsewhere, elsewhere_variance=0 * elsewhere)
        ate = effect_of(changed, "P002", context="type_1")
        assert not ate.obs["measured"].any()
        means.append(ate.X[0])
    # But for a constant, which is the same shares of a library.
    slope, _ = np.polyfit(moves[1], means[1] - means[0], 1)
    assert slope == pytest.approx(0.5, abs=0.05)
    assert np.corrcoef(moves[1], means[1] - means[0])[0, 1] > 0.95


def test_names_of_the_weights(plain):
    kept = plain.module.unmeasured
    assert list(kept.stacking) == list(COMPONENTS_OF_UNMEASURED)
    assert list(kept.stacking.values()) == kept.weights.tolist()
    record = plain.predict_ate(["U1"], n_samples=200).uns["ate"]
    assert record["stacking_of_unmeasured"] == kept.stacking
    assert UnmeasuredEffects().stacking is None


def test_states_are_those_of_control_cells_of_each_context(in_contexts):
    kept = in_contexts.module.unmeasured
    # Of all control cells together they are from the prior.
    assert kept.states.shape[0] == 3
    assert kept.states[-1].mean().abs() < 0.1
    assert kept.states[-1].std() == pytest.approx(1, abs=0.1)


def test_samples_of_rates_have_the_mean_and_quantile_of_the_effect(with_sizes):
    with torch.no_grad():
        scale = ControlDecoder(with_sizes.module, 0).scale
    rng = np.random.default_rng(0)
    mean, sd = rng.normal(scale=0.5, size=(3, 24)), rng.uniform(0.05, 0.8, size=(3, 24))
    centre, log_sd = scale.log_normal(mean, sd)
    at = np.linspace(-5, 5, 401)
    density = np.exp(-np.square(at) / 2)
    sampled = [scale.compared(centre + log_sd * x) for x in at]
    found = np.einsum("x,xrg->rg", density / density.sum(), np.stack(sampled))
    np.testing.assert_allclose(found, mean, atol=0.02)
    high = scale.compared(centre + 1.96 * log_sd)
    # Rates that cannot be lower have more of the error above the mean.
    assert (high > mean + 1.5 * sd).mean() > 0.9
