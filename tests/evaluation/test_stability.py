"""Matching of latents and agreement of runs: by hand, invariances, and runs of known truth."""

import itertools
import warnings
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch

from model.builders import TRAINING, small_screen, train_small
from scvi_sams import SAMSVAE
from scvi_sams.evaluation import active_at_fdr, align_latents, consensus_masks, mask_stability
from scvi_sams.exceptions import SAMSError, UnknownPerturbationError

NAMES = ["A", "B", "C", "D"]


class FixedRun(NamedTuple):
    """A model that found these masks and effects."""

    masks: pd.DataFrame
    effects: pd.DataFrame

    def get_perturbation_masks(self, *, key_added="written"):
        assert key_added is None
        return self.masks

    def get_perturbation_effects(self, *, key_added="written"):
        assert key_added is None
        return self.effects, self.effects.abs()


def table(columns, names=NAMES):
    return pd.DataFrame(np.column_stack(columns), index=names).add_prefix("latent_")


def run_of(*columns, names=NAMES):
    """A run that is sure of its effects: masks of 0.99 where they are not zero, else 0.01."""
    effects = table(columns, names).astype(float)
    return FixedRun(effects.ne(0) * 0.98 + 0.01, effects)


def random_run(seed, n_perturbations=12, n_latent=5):
    rng = np.random.default_rng(seed)
    shape = (n_perturbations, n_latent)
    effects = np.where(rng.random(shape) < 0.4, rng.normal(size=shape), 0)
    return run_of(*effects.T, names=[f"P{i}" for i in range(n_perturbations)])


def shuffled(run, seed=0):
    """The same run in another order, its latents mirrored and renamed."""
    rng = np.random.default_rng(seed)
    rows, columns = (rng.permutation(n) for n in run.masks.shape)
    signs = rng.choice([-1, 1], len(columns))
    masks, effects = run.masks.iloc[rows, columns], run.effects.iloc[rows, columns] * signs
    names = [f"z{i}" for i in range(len(columns))]
    return FixedRun(masks.set_axis(names, axis=1), effects.set_axis(names, axis=1))


X, Y, ZERO = [1, 0, 2, 0], [0, 3, 0, -1], [0, 0, 0, 0]


def test_partners_signs_and_cosines_by_hand():
    reference = table([X, ZERO, Y])
    # -Y, something that is neither, X of other length, and nothing.
    effects = table([np.negative(Y), ZERO, [2, 0, 1, 0]]).set_axis(["a", "b", "c"], axis=1)
    found = align_latents(effects.iloc[::-1], reference)
    assert found.index.tolist() == reference.columns.tolist()
    assert found["latent"].tolist() == ["c", None, "a"]
    assert found["sign"].tolist() == [1, 0, -1]
    np.testing.assert_allclose(found["cosine"], [4 / 5, 0, 1])


def test_the_matching_has_the_largest_sum_of_cosines():
    rng = np.random.default_rng(0)
    effects, reference = rng.normal(size=(2, 6, 4))
    found = align_latents(table(effects.T, range(6)), table(reference.T, range(6)))
    unit, unit_reference = (t / np.linalg.norm(t, axis=0) for t in (effects, reference))
    cosine = np.abs(unit_reference.T @ unit)
    best = max(cosine[range(4), list(order)].sum() for order in itertools.permutations(range(4)))
    assert found["cosine"].sum() == pytest.approx(best)


@pytest.mark.parametrize(("n_effects", "n_reference"), [(2, 4), (4, 2)])
def test_different_numbers_of_latents(n_effects, n_reference):
    columns = np.eye(4) + 0.1
    found = align_latents(table(columns[:n_effects]), table(columns[:n_reference]))
    assert found["latent"].tolist() == (["latent_0", "latent_1"] + [None] * 2)[:n_reference]
    assert found["sign"].tolist() == [1, 1, 0, 0][:n_reference]


def test_masks_can_be_aligned_as_well():
    masks = random_run(3).masks
    found = align_latents(masks.iloc[:, ::-1], masks)
    assert found["latent"].tolist() == masks.columns.tolist()
    assert (found["sign"] == 1).all()


def test_effects_that_are_not_finite_are_refused():
    broken = table([X, [1, np.nan, 0, 0]])
    for pair in ((broken, table([X])), (table([X]), broken)):
        with pytest.raises(SAMSError, match="not finite"):
            align_latents(*pair)


def test_two_runs_by_hand():
    # Active: A0 C0 B1 D1 A2.
    first = run_of(X, Y, [5, 0, 0, 0])
    # -Y, then X without C but with D: it shares A, and leaves one latent of the first run alone.
    second = run_of(np.negative(Y), [1, 0, 0, 1])
    stability = mask_stability([first, second])
    # [1, 0, 0, 1] has a cosine of 1/sqrt(2) with the third latent and 1/sqrt(10) with X.
    assert stability.latents["cosine"].tolist() == pytest.approx([0, 1, 2**-0.5])
    assert stability.latents["n_active"].tolist() == [2, 2, 1]
    # A: {0, 2} and {2}; B: {1} and {1}; C: {0} and {}; D: {1} and {1, 2}.
    assert stability.perturbations["jaccard"].tolist() == pytest.approx([1 / 2, 1, 0, 1 / 2])
    assert stability.perturbations["n_active"].tolist() == [1.5, 1, 0.5, 1.5]
    pair = stability.pairs.iloc[0]
    assert len(stability.pairs) == 1
    assert pair[["first", "second"]].tolist() == [0, 1]
    assert pair["jaccard"] == pytest.approx(3 / 6)
    assert pair["cosine"] == pytest.approx((10 + 5) / np.sqrt((5 + 10 + 25) * (10 + 2)))
    # Groups by the strongest: {A} {B, D} {C} and {A} {B, D} with C alone, as it has none.
    # D: -1 of Y is mirrored to 1, as strong as its 1 in the other latent; the first one counts.
    assert pair["adjusted_rand_index"] == 1


def test_perturbations_without_an_active_latent_are_one_group():
    first = run_of(X, [0, 0, 0, 0])
    second = run_of(X, [0, 3, 0, 3])
    # Groups {A, C} {B, D: none} and {A, C} {B, D}; the same partition for another reason.
    assert mask_stability([first, second]).pairs["adjusted_rand_index"].item() == 1
    third = run_of(X, [0, 3, 0, 0])
    # Contingency of {A, C} {B, D} with {A, C} {B} {D}: sum of pairs 1, expected 2 * 1 / 6,
    # maximum (2 + 1) / 2; (1 - 1/3) / (3/2 - 1/3) = 4/7.
    found = mask_stability([first, third]).pairs["adjusted_rand_index"].item()
    assert found == pytest.approx(4 / 7)


def test_the_strongest_latent_is_sought_among_active_ones():
    effects = table([[1, 1, 0, 0], [9, 0, 2, 2]]).astype(float)
    masks = effects.ne(0) * 0.98 + 0.01
    masks.iloc[0, 1] = 0.01
    # A is grouped with B, although its inactive effect is the strongest.
    found = mask_stability([FixedRun(masks, effects), run_of([1, 1, 0, 0], [0, 0, 2, 2])])
    assert found.pairs["adjusted_rand_index"].item() == 1
    assert found.pairs["jaccard"].item() == 1


def test_the_same_run_in_another_order_agrees_completely():
    run = random_run(1)
    assert (run.masks > 0.5).any().all()
    stability = mask_stability([run, shuffled(run, 1), shuffled(run, 2)])
    assert stability.pairs[["first", "second"]].to_numpy().tolist() == [[0, 1], [0, 2], [1, 2]]
    np.testing.assert_allclose(stability.pairs[["jaccard", "cosine", "adjusted_rand_index"]], 1)
    np.testing.assert_allclose(stability.perturbations["jaccard"], 1)
    np.testing.assert_allclose(stability.latents["cosine"], 1)
    assert stability.perturbations.index.tolist() == run.masks.index.tolist()


def test_agreement_of_a_pair_does_not_depend_on_its_order_nor_on_how_latents_are_named():
    one, other = random_run(1), random_run(2, n_latent=7)
    with pytest.warns(UserWarning, match="not reproducible"):
        there = mask_stability([one, other])
    with pytest.warns(UserWarning, match="not reproducible"):
        back = mask_stability([shuffled(other), shuffled(one)])
    values = ["jaccard", "cosine", "adjusted_rand_index"]
    np.testing.assert_allclose(there.pairs[values], back.pairs[values])
    pd.testing.assert_frame_equal(
        there.perturbations, back.perturbations.loc[there.perturbations.index]
    )


def test_latents_that_move_nothing_have_no_cosine_and_take_no_partner_away():
    # Noise in the second latent that is closer to the first of the other run than what it found.
    noise = np.array([1e-3, 0, 3e-3, 2e-3])
    masks, effects = run_of(X, ZERO)
    effects = effects.assign(latent_1=noise)
    other_effects = table([[1, 0, 1, 1], ZERO]).astype(float)
    other_effects["latent_1"] = [1e-3, 0, 2e-3, 0]
    other_masks = run_of([1, 0, 1, 1], ZERO).masks
    stability = mask_stability([FixedRun(masks, effects), FixedRun(other_masks, other_effects)])
    assert align_latents(other_effects, effects)["latent"].tolist() == ["latent_1", "latent_0"]
    assert stability.pairs["jaccard"].item() == pytest.approx(2 / 3)
    assert stability.latents["cosine"].iloc[0] == pytest.approx(3 / np.sqrt(15))
    assert np.isnan(stability.latents["cosine"].iloc[1])


def test_latents_that_move_the_same_perturbation_are_told_apart_by_what_is_not_active():
    masks = table([[0.99, 0.01, 0.01, 0.01], [0.99, 0.01, 0.01, 0.01]])
    effects = table([[5, 0.3, 0, 0], [2, 0, -0.1, 0]])
    run = FixedRun(masks, effects)
    turned = FixedRun(masks, -effects[["latent_1", "latent_0"]].set_axis(masks.columns, axis=1))
    pd.testing.assert_frame_equal(consensus_masks([run, turned]).effects, effects)


def test_runs_of_the_same_truth_agree_and_runs_of_chance_do_not():
    rng = np.random.default_rng(5)
    truth = random_run(4, n_perturbations=40, n_latent=6)

    def noisy(seed):
        noise = np.random.default_rng(seed)
        masks = truth.effects.ne(0) * 0.95 + 0.02
        masks = masks.mask(noise.random(masks.shape) < 0.05, 0.3)
        return FixedRun(masks, truth.effects + noise.normal(0, 0.1, masks.shape))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alike = mask_stability([noisy(0), shuffled(noisy(1)), shuffled(noisy(2))])
    # Each run misses 5 % of the active entries: 0.95^2 / (1 - 0.05^2) are shared.
    np.testing.assert_allclose(alike.pairs["jaccard"], 0.905, atol=0.06)
    # The square of a latent's length is that of its effects and 40 times that of the noise.
    squares = (truth.effects**2).sum()
    np.testing.assert_allclose(alike.latents["cosine"], squares / (squares + 0.4), atol=0.04)
    scrambled = truth.masks.sample(frac=1, random_state=rng).index
    chance = FixedRun(*(t.set_axis(scrambled) for t in truth))
    with pytest.warns(UserWarning, match="not reproducible"):
        unlike = mask_stability([truth, chance])
    assert unlike.pairs["jaccard"].item() < 0.4
    assert abs(unlike.pairs["adjusted_rand_index"].item()) < 0.2


def test_the_warning_names_the_number_and_the_worst_perturbations():
    # [0, 4, 4, 0] is closer to Y than [0, 0, 0, 3], which is left alone: only A and B are shared.
    first, second = run_of(X, Y), run_of([1, 0, 0, 0], [0, 0, 0, 3], [0, 4, 4, 0])
    with pytest.warns(UserWarning, match="not reproducible") as caught:
        mask_stability([first, second])
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "share 0.33 of their active entries" in message
    assert "It is lowest for C (0.00), D (0.00). " in message
    assert "consensus_masks" in message
    assert caught[0].filename == __file__


def test_one_bad_run_of_several_is_named():
    good = [random_run(4, n_perturbations=20), shuffled(random_run(4, n_perturbations=20))]
    bad = random_run(9, n_perturbations=20)
    with pytest.warns(UserWarning, match="Run 1 differs from the others") as caught:
        stability = mask_stability([good[0], bad, good[1], good[0]])
    of_pair = stability.pairs.set_index(["first", "second"])["jaccard"]
    assert of_pair[0, 2] == of_pair[0, 3] == of_pair[2, 3] == 1
    with_bad = [of_pair[0, 1], of_pair[1, 2], of_pair[1, 3]]
    assert max(with_bad) < 0.5
    expected = [(2 + with_bad[0]) / 3, np.mean(with_bad)]
    np.testing.assert_allclose(stability.runs["jaccard"].iloc[:2], expected)
    assert stability.runs["n_active"].tolist() == [
        int(active_at_fdr(run.masks).sum().sum()) for run in (good[0], bad, good[1], good[0])
    ]
    message = str(caught[0].message)
    assert f"it shares {np.mean(with_bad):.2f} of the active entries with them" in message
    assert "they share 1.00 with one another" in message
    assert caught[0].filename == __file__
    # Of two runs nobody can say which is the bad one.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mask_stability([good[0], bad])
    assert not any("differs from the others" in str(warning.message) for warning in caught)


def test_runs_that_find_nothing_agree_but_the_user_is_told():
    nothing = run_of(ZERO, ZERO)
    with pytest.warns(UserWarning, match=r"No run has an active mask entry .* 0\.05") as caught:
        stability = mask_stability([nothing, nothing])
    assert caught[0].filename == __file__
    assert stability.pairs["jaccard"].item() == 1
    assert (stability.perturbations["jaccard"] == 1).all()
    assert stability.latents["cosine"].isna().all()


def test_the_rate_decides_what_is_active():
    masks = table([[0.99, 0.85, 0.01, 0.01]])
    effects = table([[1.0, 1.0, 0.0, 0.0]])
    runs = [run_of([1, 0, 0, 0]), FixedRun(masks, effects)]
    assert mask_stability(runs).pairs["jaccard"].item() == 1
    assert mask_stability(runs, fdr=0.1).pairs["jaccard"].item() == 0.5


def test_consensus_by_hand():
    first = run_of(X, Y)
    # Mirrored and swapped, with B sure of nothing.
    masks = table([[0.01, 0.6, 0.01, 0.99], [0.99, 0.01, 0.99, 0.01]])
    second = FixedRun(masks, table([[0, -3, 0, 1], [2, 0, 4, 0]]).astype(float))
    # Without a partner for X.
    third = run_of(Y)
    found = consensus_masks([first, second, third])
    np.testing.assert_allclose(found.masks["latent_0"], [0.66, 0.02 / 3, 0.66, 0.02 / 3])
    np.testing.assert_allclose(found.masks["latent_1"], [0.01, (0.6 + 1.98) / 3, 0.01, 0.99])
    np.testing.assert_allclose(found.effects["latent_0"], [1, 0, 2, 0])
    np.testing.assert_allclose(found.effects["latent_1"], [0, 3, 0, -1])
    np.testing.assert_allclose(found.support["latent_0"], [2 / 3, 0, 2 / 3, 0])
    np.testing.assert_allclose(found.support["latent_1"], [0, 2 / 3, 0, 1])
    loose = consensus_masks([first, second, third], fdr=0.15)
    np.testing.assert_allclose(loose.support["latent_1"], [0, 1, 0, 1])


def test_consensus_in_the_latents_of_another_run():
    runs = [random_run(1), shuffled(random_run(1)), shuffled(random_run(1), 7)]
    for reference, run in enumerate(runs):
        found = consensus_masks(runs, reference=reference)
        names = runs[0].masks.index
        pd.testing.assert_frame_equal(found.masks, run.masks.loc[names])
        pd.testing.assert_frame_equal(found.effects, run.effects.loc[names])
        active = active_at_fdr(run.masks).astype(float)
        pd.testing.assert_frame_equal(found.support, active.loc[names])


def test_a_latent_that_moves_nothing_stays_in_the_consensus_with_the_share_of_its_run():
    runs = [run_of(X, ZERO), run_of(X, Y), run_of(X)]
    found = consensus_masks(runs)
    np.testing.assert_allclose(found.masks["latent_1"], 0.01 / 3)
    assert (found.support["latent_1"] == 0).all()


def test_consensus_finds_the_truth_better_than_single_runs():
    truth = random_run(6, n_perturbations=30, n_latent=5)

    def noisy(seed):
        rng = np.random.default_rng(seed)
        wrong = rng.random(truth.masks.shape) < 0.15
        masks = truth.masks.where(~wrong, 1 - truth.masks)
        effects = truth.effects + np.where(wrong, rng.normal(0, 0.3, wrong.shape), 0)
        return shuffled(FixedRun(masks, effects), seed)

    runs = [truth, *(noisy(seed) for seed in range(6))]
    support = consensus_masks(runs).support
    agreed = (support > 0.5) == truth.effects.ne(0)
    assert agreed.to_numpy().mean() > 0.97


@pytest.mark.parametrize("compare", [mask_stability, consensus_masks])
def test_what_cannot_be_compared_is_refused(compare):
    run = run_of(X, Y)
    for few in ([], [run]):
        with pytest.raises(SAMSError, match=f"there is {len(few)}"):
            compare(few)
    other = run_of(X, Y, names=["A", "B", "C", "X"])
    with pytest.raises(UnknownPerturbationError, match=r"'D', 'X' \(2 in all\) .* run 1"):
        compare([run, other])
    with pytest.raises(SAMSError, match="above 0 and below 1"):
        compare([run, run], fdr=1)


@pytest.mark.parametrize("reference", [2, -1])
def test_a_reference_that_is_no_run_is_refused(reference):
    with pytest.raises(SAMSError, match="one of the 2 models"):
        consensus_masks([run_of(X), run_of(X)], reference=reference)


def test_aligning_different_perturbations_is_refused():
    with pytest.raises(UnknownPerturbationError, match="'D', 'X'"):
        align_latents(table([X], ["A", "B", "C", "X"]), table([X]))


def mirrored_copy(model, order, signs):
    """A trained model that is the same up to the order and the sign of its latents."""
    SAMSVAE.setup_anndata(model.adata)
    copy = train_small(model.adata, spread=False, max_epochs=1, correlated_effects=False)
    with torch.no_grad():
        copy.module.masks.logits.copy_(model.module.masks.logits[:, order])
        copy.module.effects.loc.copy_(model.module.effects.loc[:, order] * torch.tensor(signs))
        copy.module.effects.log_scale.copy_(model.module.effects.log_scale[:, order])
    return copy


def test_trained_models_that_differ_by_order_and_sign_only_agree():
    model = train_small(small_screen(), correlated_effects=False)
    # Sure of some entries, as after a long training.
    with torch.no_grad():
        model.module.masks.logits.mul_(6)
    copy = mirrored_copy(model, [2, 0, 3, 1], [1.0, -1.0, -1.0, 1.0])
    before = set(model.adata.uns)
    stability = mask_stability([model, copy])
    assert stability.perturbations["n_active"].sum() > 0
    assert stability.pairs["jaccard"].item() == 1
    assert stability.pairs["adjusted_rand_index"].item() == 1
    live = stability.latents["n_active"] > 0
    np.testing.assert_allclose(stability.latents["cosine"][live], 1, rtol=1e-5)
    consensus = consensus_masks([copy, model], reference=1)
    columns = stability.latents.index[live]
    masks, effects = model.get_perturbation_masks(key_added=None), consensus.effects[columns]
    pd.testing.assert_frame_equal(consensus.masks[columns], masks[columns], check_dtype=False)
    np.testing.assert_allclose(
        effects, model.get_perturbation_effects(key_added=None).mean[columns], atol=1e-5
    )
    assert set(model.adata.uns) == before


def test_trained_models_of_other_seeds_and_sizes():
    adata = small_screen()
    runs = []
    for seed, n_latent in enumerate((4, 6)):
        SAMSVAE.setup_anndata(adata)
        torch.manual_seed(seed)
        model = SAMSVAE(adata, n_latent, n_hidden=16, effect_n_hidden=8)
        model.train(max_epochs=1, **TRAINING)
        runs.append(model)
    with pytest.warns(UserWarning, match="No run has an active mask entry"):
        found = mask_stability(runs)
    assert found.latents.index.tolist() == [f"latent_{i}" for i in range(4)]
    support = consensus_masks(runs, reference=1, fdr=0.7).support
    assert support.shape == (4, 6)
    # Every inclusion probability is close to what training starts with, so all pass this rate.
    assert (support.to_numpy() >= 0.5).all()
