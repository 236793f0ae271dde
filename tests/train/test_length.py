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


FLAT = {"dense": flat, "settling": flat, "masks": flat, "decay": flat}


def test_each_stage_ends_once_its_best_score_is_old():
    curve = Curve(steps_per_epoch=30).run(
        dense=falling_until(40),
        settling=falling_until(15, to=-50),
        masks=falling_until(10, to=100),
        decay=falling_until(100, to=-100),
    )
    # A single score of at least 30 steps that is no better.
    assert (curve.kept["dense"], curve.ends["dense"]) == (40, 41)
    # A tenth of 62 epochs are 6.2: seven of them.
    assert (curve.kept["settling"], curve.ends["settling"]) == (41 + 15, 41 + 15 + 7)
    assert (curve.kept["masks"], curve.ends["masks"]) == (63 + 10, 63 + 10 + 1)
    # .4 times the 40 + 15 + 10 epochs that led to the weights.
    assert curve.ends["decay"] == 74 + 26
    assert curve.kept["decay"] == curve.ends["decay"]


def test_without_a_rotation_the_first_stage_is_searched_to_its_end():
    curve = Curve(stage="steady").run(steady=falling_until(40), decay=falling_until(100, to=-100))
    # A tenth of 44 epochs is 4.4: five without a better score.
    assert (curve.kept["steady"], curve.ends["steady"]) == (40, 45)
    assert curve.ends["decay"] == 45 + 16


def test_a_longer_rise_is_trained_longer():
    short, long = (
        Curve().run(**FLAT | {"dense": falling_until(n, to=-9)}).n_epochs for n in (20, 60)
    )
    assert long > 2 * short


@pytest.mark.parametrize(("steps_per_epoch", "epochs"), [(3, 10), (30, 1), (1000, 1)])
def test_flat_curves_end_after_30_steps(steps_per_epoch, epochs):
    curve = Curve(steps_per_epoch).run(**FLAT)
    assert curve.ends["dense"] == 1 + epochs
    assert "settling" not in curve.kept
    # There, three scores and a tenth of the steps too.
    assert curve.ends["settling"] - curve.ends["dense"] == max(epochs, 3)
    # The decay has at least as many steps.
    assert curve.ends["decay"] - curve.ends["masks"] == epochs


def test_an_overfitting_decay_keeps_the_best_weights_of_the_stage_before():
    curve = Curve().run(**FLAT | {"masks": falling_until(5, to=1), "decay": lambda n: 2.0})
    assert "decay" not in curve.kept
    assert curve.length.best_epoch == curve.kept["masks"] == curve.ends["settling"] + 5


def test_scores_with_masks_need_not_be_better_than_those_without():
    curve = Curve().run(
        dense=falling_until(20),
        settling=flat,
        masks=falling_until(5, to=50),
        decay=falling_until(30),
    )
    assert "settling" not in curve.kept
    assert curve.kept["masks"] == curve.ends["settling"] + 5
    assert curve.kept["decay"] == curve.ends["decay"]


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_end_a_rise_early(seed):
    """Half a nat of noise, on a curve that gains half a nat in its 16th epoch, .05 in its 39th."""
    noise = np.random.default_rng(seed).normal(scale=0.5, size=1000)
    length, epoch = TrainingLength(400, "dense"), 0
    while length.stage in ("dense", "settling"):
        epoch += 1
        length.observe(24 * np.exp(-epoch / 10) + noise[epoch], epoch, 30 * epoch)
    assert 20 <= epoch <= 80


def test_a_rise_without_end_stops_at_the_ceiling_with_a_decay():
    length, ends = TrainingLength(100, "dense"), {}
    for epoch in range(1, 101):
        outcome = length.observe(-float(epoch), epoch, 30 * epoch)
        assert outcome.is_best
        if outcome.ended is not None:
            ends[outcome.ended] = epoch
    # 71 epochs at constant rates and .4 times as many of decay are 100.
    assert ends == {"dense": 33, "settling": 50, "masks": 71, "decay": 100}
    assert length.stage == "over"
    assert "share of 100 epochs" in length.reasons[0]


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
    assert ("masks" in stages) is (stage == "dense" and max_epochs > 2)


def test_scores_that_are_no_numbers_are_never_the_best():
    length = TrainingLength(100, "steady")
    outcomes = [length.observe(float("nan"), epoch, 30 * epoch) for epoch in range(1, 4)]
    assert outcomes == [Outcome(False, None), Outcome(False, None), Outcome(False, "steady")]


def test_rates():
    """Full, then half, then falling to nothing; without a rotation from the full ones."""
    length, seen = TrainingLength(400, "dense"), []
    for epoch in range(1, 8):
        seen.append((length.stage, length.rate(30 * epoch)))
        length.observe(flat(epoch), epoch, 30 * epoch)
    assert seen == [
        *[("dense", 1.0)] * 2,
        *[("settling", 0.5)] * 3,
        *[("masks", 0.5)] * 2,
    ]
    assert length.stage == "decay"
    # .4 times the 60 steps that were of use, but at least 30.
    assert [length.rate(step) for step in (210, 225, 240, 270)] == [0.5, 0.25, 0.0, 0.0]


def test_each_reason_says_why_and_what_was_best():
    curve = Curve().run(**FLAT | {"dense": falling_until(20, to=3)})
    dense, settling, _, decay = curve.length.reasons
    assert dense == (
        "The dense stage of training ended after epoch 21, as no score of 30 steps was better; "
        "held-out cells scored best after epoch 20 (3.00 nats per cell)."
    )
    assert "settling" in settling
    assert "best after epoch 20 (3.00" in settling
    assert "as the learning rates fell to zero" in decay


def test_it_goes_on_from_its_state():
    length = TrainingLength(400, "dense")
    for epoch in range(1, 25):
        length.observe(falling_until(15)(epoch), epoch, 30 * epoch)
    copy = TrainingLength(**asdict(length))
    assert copy == length
    for epoch in range(25, 60):
        if length.stage == "over":
            break
        step = 30 * epoch
        assert copy.observe(1.0, epoch, step) == length.observe(1.0, epoch, step)
        assert copy.rate(step) == length.rate(step)
    assert copy == length
    assert copy.stage == "over"
