"""What a perturbation without cells does to its own gene."""

from types import SimpleNamespace

import numpy as np
import pytest

from scvi_sams.train._compared_scale import SameScale
from scvi_sams.train._target_effects import TargetGenes, fit_target_effect

N_GENES = 60


def targets(effects, errors):
    """Of the first genes."""
    found = TargetGenes.unknown(N_GENES)
    found.effects[: len(effects)], found.errors[: len(effects)] = effects, errors
    return found


def test_one_change_fits_all_targets_and_its_variance_is_that_between_them():
    rng = np.random.default_rng(0)
    errors = rng.uniform(0.1, 0.4, size=50)
    effects = rng.normal(-1.5, 0.5, size=50)
    observed = targets(effects + errors * rng.normal(size=50), errors)
    found = fit_target_effect(observed, SameScale(N_GENES), np.zeros(N_GENES))
    noise = np.square(errors)
    precision = 1 / (noise + (np.square(observed.effects[:50]) - noise).mean())
    mean = np.average(observed.effects[:50], weights=precision)
    step = 2 * np.abs(observed.effects).max() / 200
    assert found.log_change == pytest.approx(mean, abs=step / 2 + 1e-9)
    # A target that is predicted by 49 others is missed by 50 / 49 of its distance from the mean.
    around = np.square((observed.effects[:50] - mean) * 50 / 49) - noise
    assert found.variance == pytest.approx(around.mean(), rel=0.05)
    assert found.variance == pytest.approx(0.25, rel=0.4)


def test_a_change_is_fitted_where_effects_are_compared():
    # Effects are bounded: genes that are hardly expressed cannot fall by more.
    floor = np.linspace(-0.2, -2, N_GENES)
    scale = SimpleNamespace(
        slope=np.linspace(0.5, 2, N_GENES),
        compared=lambda change: np.maximum(change, floor),
        log_change=lambda effects: effects,
    )
    effects = np.maximum(-1.3, floor)[:20]
    found = fit_target_effect(targets(effects, 0.01), scale, np.zeros(N_GENES))
    bound = floor[19]  # all that these genes tell is that they fell by as much as they can
    assert found.log_change <= bound + 0.02
    assert found.variance < 1e-3


@pytest.mark.parametrize("n", [4, 5])
def test_five_targets_are_needed(n):
    found = fit_target_effect(
        targets(np.linspace(-1.4, -1.6, n), 0.1), SameScale(N_GENES), np.zeros(N_GENES)
    )
    assert (found is None) == (n < 5)


def test_targets_that_do_not_change_and_such_as_are_predicted_better_are_left_alone():
    rng = np.random.default_rng(1)
    scale = SameScale(N_GENES)
    nothing = targets(0.3 * rng.normal(size=40), 0.3)
    assert fit_target_effect(nothing, scale, np.zeros(N_GENES)) is None
    # Of both signs, as if some genes were knocked down and others induced.
    mixed = targets(np.tile([-1.0, 1.0], 20), 0.1)
    assert fit_target_effect(mixed, scale, np.zeros(N_GENES)) is None
    known = targets(rng.normal(-1, 1, size=40), 0.1)
    assert fit_target_effect(known, scale, np.zeros(N_GENES)) is not None
    assert fit_target_effect(known, scale, known.effects) is None
    assert fit_target_effect(TargetGenes.unknown(N_GENES), scale, np.zeros(N_GENES)) is None


def test_null_screens_hardly_ever_have_an_effect():
    """Two standard errors, one-sided: at most a few per cent of screens without effects."""
    rng = np.random.default_rng(2)
    found = [
        fit_target_effect(
            targets(0.3 * rng.normal(size=20), 0.3), SameScale(N_GENES), np.zeros(N_GENES)
        )
        for _ in range(200)
    ]
    assert sum(one is not None for one in found) <= 10
