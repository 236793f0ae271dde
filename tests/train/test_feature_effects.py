"""How far features tell of effects: against ridge regression and least squares of others."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.linear_model import Ridge
from torch import nn

from scvi_sams.module._feature_prior import FeaturePrior
from scvi_sams.module._unmeasured import UnmeasuredEffects
from scvi_sams.train import _feature_effects
from scvi_sams.train._feature_effects import (
    _Observed,
    _Scores,
    _weights,
    fit_to_features,
)
from scvi_sams.train._ridge import _STRENGTHS, Line, _Sums, fit_ridge

N_GENES = 7
NO_TARGETS = np.full(40, -1)


class Observed:
    """Effects of perturbations as they are observed, in blocks of four, at a dose of 2."""

    dose = 2.0

    def __init__(self, effects, errors, slope=None):
        self.effects, self.errors = effects, errors
        self.scale = SimpleNamespace(slope=np.ones(N_GENES) if slope is None else slope)

    def blocks(self, rows):
        for start in range(rows.start, rows.stop, 4):
            block = slice(start, min(start + 4, rows.stop))
            effects, errors = self.effects[block], self.errors[block]
            yield SimpleNamespace(
                rows=block,
                observed=self.dose * effects,
                error=self.dose * errors,
                dose=np.full((len(effects), 1), self.dose),
            )


def screen(n_perturbations=40, share=1.0, seed=0, n_features=3, noise=0.3):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n_perturbations, n_features))
    truth = rng.normal(size=(n_features, N_GENES))
    errors = noise * rng.uniform(0.5, 2, size=(n_perturbations, N_GENES))
    effects = 0.8 + share * features @ truth + errors * rng.normal(size=errors.shape)
    slope = rng.uniform(0.5, 1.5, size=N_GENES)
    folds = rng.permutation(n_perturbations) % 5
    return features, Observed(effects, errors, slope), folds


def weights_of(scores):
    return scores.signal / (scores.signal + scores.of_rows)


def ridge_of(observed, scores, features, folds):
    """Regression of observed effects, in blocks, with all genes for its strength."""

    def read():
        for block in observed.blocks(range(len(folds))):
            yield block.rows, observed.scale.slope * block.observed / block.dose

    settings = weights_of(scores), features, folds, scores.precision, np.arange(N_GENES)
    return fit_ridge(read, *settings)


def by_sklearn(features, effects, weights, strength):
    return Ridge(alpha=strength).fit(features, effects, sample_weight=weights)


def test_scores_are_sums_over_what_is_known():
    _, observed, _ = screen(6)
    observed.errors[2, 1] = np.inf
    observed.effects[2, 1] = 100.0
    scores = _Scores.of(_Observed(observed, 6, NO_TARGETS))
    known = np.isfinite(observed.errors)
    effects = observed.scale.slope * observed.effects
    errors = observed.scale.slope * np.where(known, observed.errors, 0)
    squares = (np.square(effects) * known).sum(axis=0)
    noise = np.square(errors).sum(axis=0)
    np.testing.assert_allclose(scores.squares, squares)
    np.testing.assert_allclose(scores.noise, noise)
    np.testing.assert_array_equal(scores.n_known, known.sum(axis=0))
    signal = (squares.sum() - noise.sum()) / known.sum()
    assert scores.signal == pytest.approx(signal)
    np.testing.assert_allclose(scores.precision, 1 / (noise / known.sum(axis=0) + signal))


@pytest.mark.parametrize("strength", [0.1, 30.0])
def test_a_line_is_ridge_regression_around_weighted_means(strength):
    rng = np.random.default_rng(1)
    features, effects = rng.normal(size=(12, 3)), rng.normal(size=(12, N_GENES))
    weights = rng.uniform(size=12)
    line = Line.fit(_Sums.of(weights, features, effects), strength)
    other = by_sklearn(features, effects, weights, strength)
    np.testing.assert_allclose(line.coefficients, other.coef_.T)
    new = rng.normal(size=(4, 3))
    np.testing.assert_allclose(line(new), other.predict(new))


def test_ridge_of_each_fold_is_that_of_the_other_perturbations():
    features, observed, folds = screen()
    observed.errors[5] = np.inf  # no cells
    scores = _Scores.of(_Observed(observed, 40, NO_TARGETS))
    ridge = ridge_of(observed, scores, features, folds)
    slope = observed.scale.slope
    effects = slope * observed.effects
    weights = scores.signal / (scores.signal + np.square(slope * observed.errors).mean(axis=1))
    np.testing.assert_allclose(weights_of(scores), weights)
    assert weights[5] == 0
    # Features tell of everything: hardly anything is taken off.
    (strength,) = [
        strength
        for strength in _STRENGTHS
        if np.allclose(
            by_sklearn(features, effects, weights, strength).coef_.T, ridge.whole.coefficients
        )
    ]
    assert strength < 10
    predicted, means = ridge.held_out(features, folds)
    for fold in range(5):
        own, others = folds == fold, folds != fold
        other = by_sklearn(features[others], effects[others], weights[others], strength)
        np.testing.assert_allclose(predicted[own], other.predict(features[own]), rtol=1e-6)
        mean = np.average(effects[others], axis=0, weights=weights[others])
        np.testing.assert_allclose(means[own], np.tile(mean, (own.sum(), 1)))


def test_features_that_say_nothing_are_all_but_left_out():
    features, observed, folds = screen(share=0.0)
    ridge = ridge_of(observed, _Scores.of(_Observed(observed, 40, NO_TARGETS)), features, folds)
    assert np.abs(ridge.whole.coefficients).max() < 1e-3


def test_no_ridge_where_a_single_fold_has_cells():
    features, observed, folds = screen()
    observed.errors[folds != 2] = np.inf
    assert (
        ridge_of(observed, _Scores.of(_Observed(observed, 40, NO_TARGETS)), features, folds) is None
    )


def products_of(parts, precision):
    """``(T, 4, 4)`` of predictions and observed effects, ``(4, T, G)``."""
    return np.einsum("itg,jtg,g->tij", parts, parts, precision)


def simulated_parts(mixture, noise=0.1, n_perturbations=200):
    rng = np.random.default_rng(2)
    parts = rng.normal(size=(4, n_perturbations, N_GENES))
    parts[2] = parts[2, 0]  # the mean
    observed = np.einsum("i,itg->tg", mixture, parts[:3])
    parts[3] = observed + noise * rng.normal(size=observed.shape)
    return parts, rng.uniform(0.5, 2, size=N_GENES)


@pytest.mark.parametrize("mixture", [[0.5, 0.3, 0.2], [-0.6, 0.9, 0.4], [0, 1, 0]])
def test_weights_are_those_of_least_squares_without_negative_ones(mixture):
    parts, precision = simulated_parts(mixture)
    root = np.sqrt(precision)
    design = (parts[:3] * root).reshape(3, -1).T
    expected, _ = nnls(design, (parts[3] * root).ravel())
    found = _weights(products_of(parts, precision))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (found >= 0).all()


@pytest.mark.parametrize(("sign", "expected"), [(1, 0.7), (-1, 0.0)])
def test_the_mean_is_left_where_nothing_else_tells(sign, expected):
    parts, precision = simulated_parts([0, 0, sign * 0.7], noise=1.0)
    found = _weights(products_of(parts, precision))
    assert found[:2].tolist() == [0, 0]
    target = (precision * parts[2] * parts[3]).sum() / (precision * parts[2] ** 2).sum()
    assert found[2] == pytest.approx(max(target, 0), rel=1e-4)
    assert found[2] == pytest.approx(expected, abs=0.1)


def test_predictions_of_nothing_have_no_weight():
    parts, precision = simulated_parts([0.5, 0.3, 0.2])
    parts[:3] = 0
    assert _weights(products_of(parts, precision)).tolist() == [0, 0, 0]


class Module(nn.Module):
    """What is fitted, of a module."""

    device = torch.device("cpu")

    def __init__(self, features):
        super().__init__()
        prior = {"n_perturbations": len(features), "n_latent": 2, "log_odds": -2.0, "scale": 2.0}
        self.features = FeaturePrior(features, **prior)
        self.features.is_fitted.fill_(True)
        self.unmeasured = UnmeasuredEffects()
        self.unmeasured.fill(states=torch.zeros(1, 4, 2))

    def shared_moments(self, rows):
        """Shifts that their features tell of."""
        noise = torch.randn(len(rows), 2, generator=torch.Generator().manual_seed(0))
        shifts = self.features.features[rows, :2] + 0.3 * noise
        return shifts, torch.ones_like(shifts)


DECODER = np.random.default_rng(8).normal(size=(2, N_GENES))
"""What shifts do, in a model whose decoder is linear."""


def fit(features, observed, of_model, monkeypatch, targets=NO_TARGETS):
    """Fit, where the model would predict ``of_model`` of left out perturbations."""
    module = Module(features)
    module.unmeasured.fill(target_genes=torch.as_tensor(targets))
    folds = module.features.folds.numpy()
    # The prior of left out perturbations says which these are.
    module.features.held_out[1] = torch.arange(len(features))[:, None]

    class Decoder:
        scale = SimpleNamespace(
            slope=observed.scale.slope,
            compared=lambda changes: changes,
            log_change=lambda effects: effects,
        )

        def __init__(self, module, context):
            assert context == -1

        def effects(self, rows, n_states):
            return SimpleNamespace(of_shift=of_model[rows])

        def mean_effects(self, shifts, n_states):
            return shifts.double().numpy() @ DECODER

    monkeypatch.setattr(_feature_effects, "ControlDecoder", Decoder)
    monkeypatch.setattr(
        _feature_effects, "_samples", lambda prior, module: prior.mean[:, 0].int().tolist()
    )
    fit_to_features(module, observed)
    return module.unmeasured, folds


def test_weights_and_variance_come_from_left_out_perturbations(monkeypatch):
    features, observed, _ = screen(share=0.6, noise=0.5)
    observed.errors[7, 2] = np.inf
    rng = np.random.default_rng(4)
    # The model knows a part of what the features do not tell, and not all of it.
    of_model, unknown = rng.normal(size=(2, *observed.effects.shape))
    observed.effects += of_model + unknown
    kept, folds = fit(features, observed, of_model, monkeypatch)
    values = features.astype(np.float32).astype(float)
    scores = _Scores.of(_Observed(observed, 40, NO_TARGETS))
    ridge = ridge_of(observed, scores, values, folds)
    slope, known = observed.scale.slope, np.isfinite(observed.errors)
    every = torch.arange(40)
    shifts = Module(features).shared_moments(every)[0].double().numpy()
    of_shifts = fit_ridge(
        lambda: iter([(slice(None), shifts)]),
        *(weights_of(scores), values, folds, np.ones(2), np.arange(2)),
    )
    by_shifts = of_shifts.held_out(values, folds)[0] @ DECODER
    on_genes = ridge.held_out(values, folds)
    parts = np.stack([slope * of_model, slope * by_shifts, *on_genes, slope * observed.effects])
    parts = np.where(known, parts, 0)
    weights = _weights(products_of(parts, scores.precision))
    np.testing.assert_allclose(kept.weights, weights, rtol=1e-4)
    assert weights[0] > 0.1
    assert weights[1:].sum() > 0.1
    squared = np.square(parts[-1] - np.einsum("i,itg->tg", weights, parts[:-1])).sum(axis=0)
    squared -= scores.noise
    # Five perturbations of the mean over genes.
    mean = squared.sum() / known.sum()
    expected = (np.maximum(squared, 0) + 5 * mean) / (known.sum(axis=0) + 5)
    np.testing.assert_allclose(kept.variance, expected, rtol=1e-4)
    np.testing.assert_allclose(kept.mean, ridge.whole.mean, rtol=1e-4)
    np.testing.assert_allclose(kept.coefficients, ridge.whole.coefficients, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(kept.mean_shift, of_shifts.whole.mean, rtol=1e-3, atol=1e-6)
    coefficients = of_shifts.whole.coefficients
    np.testing.assert_allclose(kept.shift_coefficients, coefficients, rtol=1e-3, atol=1e-6)


def test_what_perturbations_do_to_their_own_genes_is_learned_apart(monkeypatch):
    features, observed, _ = screen(share=0.6, noise=0.5)
    of_model = np.random.default_rng(4).normal(size=observed.effects.shape)
    targets = np.where(np.arange(40) % 6 == 0, np.arange(40) // 6, -1)  # of seven perturbations
    own = np.flatnonzero(targets >= 0), targets[targets >= 0]
    of_others = Observed(observed.effects.copy(), observed.errors.copy(), observed.scale.slope)
    of_others.effects[own], of_others.errors[own] = 0, np.inf
    without, _ = fit(features, of_others, of_model, monkeypatch)
    assert not len(without.target_change)
    observed.effects[own], observed.errors[own] = np.linspace(-9.1, -8.9, 7), 0.1
    found, _ = fit(features, observed, of_model, monkeypatch, targets)
    for name in ("mean", "coefficients", "weights", "variance"):
        torch.testing.assert_close(getattr(found, name), getattr(without, name))
    assert float(found.target_change) == pytest.approx(-9, abs=0.1)
    assert float(found.target_variance) < 0.1


def test_without_states_of_control_cells_nothing_is_learned():
    features, observed, _ = screen()
    module = Module(features)
    module.unmeasured = UnmeasuredEffects()
    fit_to_features(module, observed)
    assert not module.unmeasured.knows_features


def test_masks_that_never_are_on_leave_finite_weights(monkeypatch):
    features, observed, _ = screen()

    def moments(self, rows):
        # No effect in any sample, so that there is no variance, but of every fourth perturbation.
        has_effect = (rows % 4 == 0)[:, None].float().expand(-1, 2)
        return 3 * has_effect, 0.1 * has_effect

    monkeypatch.setattr(Module, "shared_moments", moments, raising=False)
    init = Module.__init__

    def without_a_fit(self, features):
        init(self, features)
        self.features.is_fitted.fill_(False)

    monkeypatch.setattr(Module, "__init__", without_a_fit)
    module_fit = {}
    fit_prior = FeaturePrior.fit

    def record(self, effects, variance, codes):
        module_fit["variance"] = variance
        fit_prior(self, effects, variance, codes)

    monkeypatch.setattr(FeaturePrior, "fit", record)
    kept, _ = fit(features, observed, observed.effects, monkeypatch)
    assert (module_fit["variance"] > 0).all()
    assert torch.isfinite(kept.weights).all()
