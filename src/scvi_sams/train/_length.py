"""Length of training by default: as long as held-out cells improve.

Training has several stages, each of which ends by the scores of validation cells and continues from
the best weights of the previous one::

    dense      full rates     all masks on
    responding full rates     the same, and cells may or may not respond, in models with responses
    settling   half of them   the same, until effects are as good as possible; then the rotation
    masks      half of them   masks in use
    decay      falling        to zero

A model without masks, or one that is trained again, begins with a stage "steady", at full rates,
followed by the decay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Stage = Literal["dense", "responding", "settling", "steady", "masks", "decay", "over"]


class Rule(NamedTuple):
    """Rule of a stage with constant rates."""

    rate: float
    """Factor of the learning rates."""
    n_scores: int
    """Number of scores without improvement that ends it."""
    patience: float
    """Smallest number of steps without improvement, relative to all steps so far."""
    next: Stage


_RULES: dict[Stage, Rule] = {
    # If a noisy score ends it too early, the next stage compensates.
    "dense": Rule(1.0, 1, 0.0, "settling"),
    # Effects averaged over escaped cells grow to their full size: with 40 to 50 % escaped cells,
    # slopes of effects were 0.91 to 0.96 with this stage and 0.87 to 0.89 without.
    "responding": Rule(1.0, 1, 0.0, "settling"),
    # The axes are found more accurately from effects without the noise of full rates.
    "settling": Rule(0.5, 3, 0.1, "masks"),
    "steady": Rule(1.0, 3, 0.1, "decay"),
    # Effects have converged. At full rates the held-out bound of two screens with 20 cells per
    # perturbation was 0.1 and 0.2 nats per cell worse.
    "masks": Rule(0.5, 1, 0.0, "decay"),
}
_SLOW = 0.1
"""If the gain of twice as many steps as below is a smaller proportion of the total gain so far, a
dense stage before responses ends. Effects have formed by then, and the rest is learned better with
responses: later starts gave smaller effects of half-escaped screens (slopes 0.90 and 0.89 instead
of 0.94 and 0.92), took longer, and were no better without escape."""
_FEWEST_STEPS = 30
"""Steps without improvement before a stage ends: with three steps per epoch, one or two epochs
without improvement are not informative."""
_DECAY = 0.4
"""Steps of the decay, relative to those that led to its initial weights. It averages out the noise
of masks and mini-batches: 2.5 nats per cell on the benchmark's simulated screen."""


class Outcome(NamedTuple):
    """Consequences of a score."""

    is_best: bool
    """Whether to keep the weights as the best of this stage."""
    ended: Stage | None
    """The stage that ends here, if any; the next one continues from the kept weights."""


@dataclass
class TrainingLength:
    """Decides after each epoch, by the score of held-out cells, whether a stage of training ends.

    Its state consists of plain numbers and text, for checkpoints.

    Parameters
    ----------
    max_epochs
        Upper limit for all stages together. Stages before the rotation get half of it, and the
        remainder may cut the decay short.
    stage
        ``"dense"``, or ``"steady"`` for training without a rotation.
    has_responses
        Whether there is a stage ``"responding"``.

    Examples
    --------
    >>> length = TrainingLength(max_epochs=100, stage="steady")
    >>> scores = [9.0, 8.0, 8.5, 8.4, 8.3]
    >>> for epoch, score in enumerate(scores, start=1):
    ...     outcome = length.observe(score, epoch, step=epoch * 50)
    >>> outcome.ended, length.best_epoch, length.stage
    ('steady', 2, 'decay')
    >>> length.rate(step=250), length.rate(step=270), length.rate(step=290)
    (1.0, 0.5, 0.0)
    """

    max_epochs: int
    stage: Stage
    has_responses: bool = False
    """Whether cells may or may not respond, from the end of the dense stage on."""
    full_rate: float = 1.0
    """Factor of the learning rates at the beginning of a decay."""
    best_score: float = math.inf
    best_epoch: int = 0
    best_step: int = 0
    n_worse: int = 0
    """Number of scores since the best one, in this stage."""
    began_at_step: int = 0
    steps_before: int = 0
    """Steps that led to the initial weights of the stage; later ones were discarded."""
    n_decay_steps: int = 0
    scores: list[tuple[int, float]] = field(default_factory=list)
    """Steps, and the best score until then, in a dense stage before responses."""
    reasons: list[str] = field(default_factory=list)
    """Reasons why each stage ended, as text."""

    def observe(self, score: float, epoch: int, step: int) -> Outcome:
        """Take the score (lower is better) after this total number of epochs and steps."""
        is_best = score < self.best_score
        if is_best:
            self.best_score, self.best_epoch, self.best_step = score, epoch, step
        self.n_worse = 0 if is_best else self.n_worse + 1
        ended = self.stage
        why = self._why_it_ends(epoch, step)
        if why is None:
            return Outcome(is_best, None)
        self.reasons.append(
            f"The {ended} stage of training ended after epoch {epoch}, as {why}; held-out cells "
            f"scored best after epoch {self.best_epoch} ({self.best_score:.2f} nats per cell)."
        )
        self._begin_next(epoch, step)
        return Outcome(is_best, ended)

    def rate(self, step: int) -> float:
        """Factor of the learning rates after this total number of steps."""
        if self.stage in _RULES:
            return _RULES[self.stage].rate
        share = (step - self.began_at_step) / max(self.n_decay_steps, 1)
        return self.full_rate * max(0.0, 1 - share)

    def _why_it_ends(self, epoch: int, step: int) -> str | None:
        if self.stage == "decay":
            if step - self.began_at_step >= self.n_decay_steps:
                return "the learning rates fell to zero"
        else:
            if self.stage == "dense" and self.has_responses and self._is_slow(step):
                return f"{2 * _FEWEST_STEPS} steps gained little"
            rule = _RULES[self.stage]
            n_steps = step - max(self.best_step, self.began_at_step)
            enough = max(_FEWEST_STEPS, round(rule.patience * step))
            if self.n_worse >= rule.n_scores and n_steps >= enough:
                return f"no score of {n_steps} steps was better"
        if epoch >= self._last_epoch(epoch, step):
            return f"it had its share of {self.max_epochs} epochs"
        return None

    def _is_slow(self, step: int) -> bool:
        """Record the best score, and return whether it has hardly improved recently."""
        self.scores.append((step, self.best_score))
        before = [score for at, score in self.scores if at <= step - 2 * _FEWEST_STEPS]
        gained = self.scores[0][1] - self.best_score
        return bool(before) and before[-1] - self.best_score < _SLOW * gained

    def _last_epoch(self, epoch: int, step: int) -> int:
        """Last epoch of the stage, so that later stages have their share of the epochs."""
        if self.stage == "dense":
            return max(self.max_epochs // 3, 1)
        if self.stage == "responding":
            return max(5 * self.max_epochs // 12, 1)
        if self.stage == "settling":
            return max(self.max_epochs // 2, 1)
        if self.stage == "decay":
            return self.max_epochs
        return self.max_epochs - math.ceil(self._decay_steps() * epoch / step)

    def _useful_steps(self) -> int:
        """Steps that led to the best weights."""
        return self.steps_before + max(self.best_step - self.began_at_step, 0)

    def _decay_steps(self) -> int:
        """Length of a decay from the best weights."""
        return max(round(_DECAY * self._useful_steps()), _FEWEST_STEPS)

    def _begin_next(self, epoch: int, step: int) -> None:
        n_useful, n_decay_steps = self._useful_steps(), self._decay_steps()
        if self.stage == "decay":
            self.stage = "over"
            return
        _, _, _, following = rule = _RULES[self.stage]
        if self.stage == "dense" and self.has_responses:
            following = "responding"
        if following == "masks":
            # Scores with masks, which include their KL term, are not comparable with earlier ones.
            self.best_score, self.best_epoch = math.inf, epoch
        elif following == "decay":
            left = (self.max_epochs - epoch) * step // epoch
            self.n_decay_steps, self.full_rate = min(n_decay_steps, left), rule.rate
            following = following if left else "over"
        self.stage, self.n_worse = following, 0
        self.began_at_step, self.steps_before = step, n_useful
