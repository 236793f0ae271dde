"""When held-out cells end training, on curves made by hand."""

from dataclasses import asdict

import numpy as np
import pytest

from scvi_sams.train._length import Outcome, TrainingLength


class Curve:
    """Scores of a training: by stage, as functions of the epochs in it."""

    def __init__(self, steps_per_epoch=30, max_epochs=400, stage="dense"):
        self.length = TrainingLength(max_epochs, stage)
        self.steps_per_epoch = steps_per_epoch
        self.ends, self.kept, self.n_epochs = {}, {}, 0

    def run(self, **stages):
        while self.length.stage != "over":
            assert self.n_epochs < self.length.max_epochs
            stage = self.length.stage
            began = max(self.ends.values(), default=0)
            self.n_epochs += 1
            score = stages[stage](self.n_epochs - began)
            step = self.n_epochs * self.steps_per_epoch
            outcome = self.length.observe(score, self.n_epochs, step)
            if outcome.is_best:
                self.kept[stage] = self.n_epochs
            if outcome.ended is not None:
                assert outcome.ended == stage
                self.ends[stage] = self.n_epochs
        return self


def falling_until(epoch, *, to=0.0):
    """Falls by one in each epoch, then rises a little."""
    return lambda n: to + abs(epoch - n) * (1.0 if n < epoch else 0.1)


def flat(n):
    return 5.0


def test_a_stage_ends_once_its_best_score_is_old():
    curve = Curve(steps_per_epoch=30).run(
        dense=falling_until(40), steady=falling_until(10), decay=falling_until(100, to=-100)
    )
    # 15 % of 47 epochs are 7.05, of 48 they are 7.2: eight epochs without a better score.
    assert curve.ends["dense"] == 40 + 8
    assert curve.kept["dense"] == 40
    # With masks, a single one of at least 30 steps.
    assert curve.ends["steady"] == 48 + 10 + 1
    assert curve.kept["steady"] == 48 + 10
    # .45 times the 40 + 10 epochs that led to the weights, which is 22.5.
    assert curve.ends["decay"] == 59 + 23
    assert curve.kept["decay"] == curve.ends["decay"]


def test_a_longer_rise_is_trained_longer():
    short, long = (
        Curve().run(dense=falling_until(n), steady=flat, decay=flat).n_epochs for n in (20, 60)
    )
    assert long > 2.5 * short


@pytest.mark.parametrize(("steps_per_epoch", "epochs"), [(3, 10), (30, 3), (1000, 3)])
def test_flat_curves_end_after_30_steps_and_three_scores(steps_per_epoch, epochs):
    curve = Curve(steps_per_epoch).run(dense=flat, steady=flat, decay=flat)
    assert curve.ends["dense"] == 1 + epochs
    assert curve.kept["dense"] == 1
    # The decay of few steps has at least as many as a score has to wait.
    in_decay = curve.ends["decay"] - curve.ends["steady"]
    assert in_decay == max(round(30 / steps_per_epoch), 1)


def test_an_overfitting_decay_keeps_the_best_weights_of_the_steady_stage():
    curve = Curve().run(dense=falling_until(20), steady=falling_until(5, to=1), decay=lambda n: 2.0)
    assert "decay" not in curve.kept
    assert curve.length.best_epoch == curve.kept["steady"] == curve.ends["dense"] + 5


def test_scores_with_masks_need_not_be_better_than_those_without():
    curve = Curve().run(
        dense=falling_until(20), steady=falling_until(5, to=50), decay=falling_until(30)
    )
    assert curve.kept["steady"] == curve.ends["dense"] + 5
    assert curve.kept["decay"] == curve.ends["decay"]


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_end_a_rise_early(seed):
    """Half a nat of noise, on a curve that gains half a nat in its 20th and .07 in its 40th."""
    noise = np.random.default_rng(seed).normal(scale=0.5, size=1000)
    curve = Curve().run(dense=lambda n: 24 * np.exp(-n / 10) + noise[n], steady=flat, decay=flat)
    assert 25 <= curve.ends["dense"] <= 90
    assert curve.kept["dense"] >= 20


def test_a_rise_without_end_stops_at_the_ceiling_with_a_decay():
    curve = Curve(max_epochs=100).run(
        dense=lambda n: -float(n), steady=lambda n: -float(n), decay=lambda n: -float(n)
    )
    assert curve.ends["dense"] == 50
    # e epochs at constant rates and .45 e of decay are 100.
    assert curve.ends["steady"] == 69
    assert curve.ends["decay"] == curve.n_epochs == 100
    assert "share of 100 epochs" in curve.length.reasons[0]


@pytest.mark.parametrize("max_epochs", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("stage", ["dense", "steady"])
def test_the_lowest_ceilings(max_epochs, stage):
    length = TrainingLength(max_epochs, stage)
    stages = []
    for epoch in range(1, max_epochs + 1):
        stages.append(length.stage)
        length.observe(-float(epoch), epoch, epoch * 5)
    assert stages[0] == stage
    assert "over" not in stages
    assert stages.count("dense") == (max(max_epochs // 2, 1) if stage == "dense" else 0)


def test_scores_that_are_no_numbers_are_never_the_best():
    length = TrainingLength(100, "steady")
    outcomes = [length.observe(float("nan"), epoch, 30 * epoch) for epoch in range(1, 4)]
    assert outcomes == [Outcome(False, None), Outcome(False, None), Outcome(False, "steady")]


def test_rates():
    """Full, then half, then falling to nothing; without a dense stage from the full ones."""
    curve = Curve()
    assert curve.length.rate(0) == curve.length.rate(500) == 1.0
    for epoch in range(1, 5):
        curve.length.observe(flat(epoch), epoch, 30 * epoch)
    assert curve.length.stage == "steady"
    assert curve.length.rate(120) == 0.5
    for epoch in (5, 6):
        curve.length.observe(flat(epoch), epoch, 30 * epoch)
    assert curve.length.stage == "decay"
    # .45 times the 60 steps that were of use, but at least 30.
    assert [curve.length.rate(step) for step in (180, 195, 210, 240)] == [0.5, 0.25, 0.0, 0.0]


def test_each_reason_says_why_and_what_was_best():
    curve = Curve().run(dense=falling_until(20, to=3), steady=flat, decay=flat)
    dense, _, decay = curve.length.reasons
    assert dense == (
        "The dense stage of training ended after epoch 24, as no score of 120 steps was better; "
        "held-out cells scored best after epoch 20 (3.00 nats per cell)."
    )
    assert "as the learning rates fell to zero" in decay


def test_it_goes_on_from_its_state():
    curve = Curve()
    for epoch in range(1, 30):
        curve.length.observe(falling_until(15)(epoch), epoch, 30 * epoch)
    copy = TrainingLength(**asdict(curve.length))
    assert copy == curve.length
    for epoch in range(30, 60):
        step = 30 * epoch
        assert copy.observe(1.0, epoch, step) == curve.length.observe(1.0, epoch, step)
        assert copy.rate(step) == curve.length.rate(step)
