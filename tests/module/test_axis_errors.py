"""How far sparse axes are off, by resampled perturbations and by the effects themselves."""

import math

import numpy as np
import pytest
import torch

from module.builders import make_module
from scvi_sams.module._axis_errors import variance_of_axes
from scvi_sams.module._rotation import resampled_rotations, sparsest_rotation

NOISE = 0.1


def sparse_effects(n_perturbations: int, seed: int, n_latent: int = 6) -> torch.Tensor:
    """One or two of the latents each, seen with noise."""
    rng = np.random.default_rng(seed)
    effects = rng.normal(scale=2, size=(n_perturbations, n_latent))
    effects[rng.random(effects.shape) > 0.25] = 0
    return torch.as_tensor(effects + NOISE * rng.normal(size=effects.shape))


def variance_of(effects: torch.Tensor, **kwargs) -> torch.Tensor:
    return variance_of_axes(effects, torch.full_like(effects, NOISE**2), 2.0, **kwargs)


def turned_by(angle: float) -> torch.Tensor:
    """Each axis leans towards the next by the angle."""
    skew = torch.zeros(6, 6, dtype=torch.double)
    skew[torch.arange(0, 6, 2), torch.arange(1, 6, 2)] = angle
    return torch.matrix_exp(skew - skew.T)


def test_axes_that_many_perturbations_agree_on_are_sure():
    few, many = (variance_of(sparse_effects(number, seed=1)).mean() for number in (15, 300))
    assert many < few / 3


def test_variance_is_that_of_a_turn():
    """Twice the effects of a perturbation turn by four times the variance, none by none."""
    effects = sparse_effects(60, seed=2)
    effects[0], effects[1], effects[2] = 0, effects[3], 2 * effects[3]
    variance = variance_of(effects)
    assert (variance[0] == 0).all()
    torch.testing.assert_close(variance[1], variance[3])
    torch.testing.assert_close(variance[2], 4 * variance[3])


def test_shadows_of_axes_that_are_off_are_seen_by_the_effects():
    """No resampling moves axes of which all perturbations say the same, right or wrong."""
    effects = sparse_effects(200, seed=3)
    off = effects @ turned_by(0.2)
    bootstrap = torch.stack(
        [(off @ rotation - off).square() for rotation in resampled_rotations(off)]
    ).mean()
    right, wrong = variance_of(effects).mean(), variance_of(off).mean()
    assert wrong > 3 * right
    # The descent of the bootstrap finds the way back, so that it knows the error as well here.
    assert bootstrap > right


def test_angles_are_as_large_as_the_axes_are_off():
    """Of the shadows of strong effects, the variance that is added is their square on average."""
    effects = sparse_effects(300, seed=4)
    angle = 0.15
    off = effects @ turned_by(angle)
    is_null = effects.abs() < 4 * NOISE
    shadows = (off - effects)[is_null].square().mean()
    assert variance_of(off)[is_null].mean().item() == pytest.approx(shadows.item(), rel=0.6)


def test_of_few_perturbations_strong_effects_are_kept_all_the_same():
    effects = torch.tensor([[3.0, 0, 0], [0, 3, 0], [0, 0, 3], [3, 3, 0]], dtype=torch.double)
    variance = variance_of(effects)
    assert torch.isfinite(variance).all()
    assert (effects.square() > 9 * variance)[effects > 0].all()


def test_sampling_perturbations_leaves_the_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = variance_of(sparse_effects(20, seed=5))
    torch.testing.assert_close(torch.rand(3), expected)
    torch.testing.assert_close(variance_of(sparse_effects(20, seed=5)), first)


def test_rotations_of_samples_are_rotations():
    effects = sparse_effects(40, seed=6)
    effects = effects @ sparsest_rotation(effects)
    rotations = list(resampled_rotations(effects))
    assert len(rotations) == 20
    for rotation in rotations:
        torch.testing.assert_close(
            rotation @ rotation.T, torch.eye(6, dtype=torch.double), atol=1e-6, rtol=0
        )


def dense_module(effects: torch.Tensor):
    """In the dense phase, with these effects, each with a posterior variance of .01."""
    module = make_module(
        correlated_effects=False,
        mask_prior_probability=0.1,
        effect_prior_scale=2.0,
        evidence_cells=25.0,
    )
    with torch.no_grad():
        module.effects.loc.copy_(effects)
        module.effects.log_scale.fill_(math.log(0.1))
    module.begin_dense_phase()
    return module


def test_masks_start_with_the_variance_of_axes():
    module = dense_module(sparse_effects(5, seed=7, n_latent=3).float())
    module.find_sparse_axes()
    effects = module.effects.loc.detach().clone()
    module.start_masks()
    v = torch.full_like(effects, 0.01 + 1 / 25)
    v = v + variance_of_axes(effects, v, 2.0)
    expected = (
        math.log(1 / 9) + effects.square() / v / (2 + v / 2) - 0.5 * torch.log1p(4 / v)
    ).clamp(-4.6, 4.6)
    torch.testing.assert_close(module.masks.logits.detach(), expected)
    assert not module.masks.is_dense


def test_cells_that_say_little_of_a_dimension_are_little_evidence():
    effects = torch.zeros(5, 3)
    effects[0] = 1.0
    module = dense_module(effects)
    module.start_masks(torch.tensor([0.0, 0.5, 1.0]))
    e = module.effects.loc.detach()
    v = 0.01 + 1 / (25 * torch.tensor([1.0, 0.5, 0.01])).expand_as(e)
    v = v + variance_of_axes(e, v, 2.0)
    expected = math.log(1 / 9) + e.square() / v / (2 + v / 2) - 0.5 * torch.log1p(4 / v)
    torch.testing.assert_close(module.masks.logits.detach(), expected.clamp(-4.6, 4.6))
    first = module.masks.logits[0]
    assert first[0] > first[1] > first[2]
