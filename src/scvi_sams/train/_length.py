"""How long training goes on where nobody says: as long as cells that it does not see gain by it.

A training goes through up to three stages, each of which ends by the scores of validation cells::

    dense    full rate      all masks on; the latent space is rotated with its best weights
    steady   half rate      masks in use, from the rotation on
    decay    half to none   from the best weights of the steady stage, to its own best ones

A model without masks, or one that is trained again, has no dense stage and is steady at full rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Stage = Literal["dense", "steady", "decay", "over"]

_FEWEST_STEPS = 30
"""Steps without a better score before a stage ends: at three steps an epoch, one or two epochs
without one say little."""
_FEWEST_SCORES = 3
_PATIENCE = 0.15
"""The same two for the first stage, whose scores go up and down near their best one: scores, and
steps as a share of those so far. The decay makes up for a steady stage that ends at an unlucky
score, so a single one is enough there."""
_RATE_AFTER_DENSE = 0.5
"""Effects are where they belong by then. At the full rate the held-out bound of two screens with
20 cells per perturbation was .1 and .2 nats per cell worse."""
_DECAY = 0.45
"""Steps of the decay, as a share of those that led to the weights it begins with. It averages out
the noise of masks and mini-batches: 2.5 to 5 nats per cell on the benchmark's simulated screen."""


class Outcome(NamedTuple):
    """What follows from a score."""

    is_best: bool
    """Whether to keep the weights, as the best of this stage and (for a decay) the steady one."""
    ended: Stage | None
    """The stage that ends here, if one does; what follows goes on from the weights kept."""


@dataclass
class TrainingLength:
    """Decides after each epoch, by the score of held-out cells, whether a stage of training ends.

    All of its state is plain numbers and text, for checkpoints.

    Parameters
    ----------
    max_epochs
        Ceiling of all stages together. The dense stage gets half of it, and what is left to the
        decay may cut it short.
    stage
        ``"dense"``, or ``"steady"`` for a training without a dense stage.

    Examples
    --------
    >>> length = TrainingLength(max_epochs=100, stage="steady")
    >>> scores = [9.0, 8.0, 8.5, 8.4, 8.3]
    >>> for epoch, score in enumerate(scores, start=1):
    ...     outcome = length.observe(score, epoch, step=epoch * 40)
    >>> outcome.ended, length.best_epoch, length.stage
    ('steady', 2, 'decay')
    >>> length.rate(step=200), length.rate(step=218), length.rate(step=236)
    (1.0, 0.5, 0.0)
    """

    max_epochs: int
    stage: Stage
    after_dense: bool = False
    best_score: float = math.inf
    best_epoch: int = 0
    best_step: int = 0
    n_worse: int = 0
    """Scores since the best one."""
    began_at_step: int = 0
    steps_before: int = 0
    """That led to the weights which the stage began with; others were taken back."""
    n_decay_steps: int = 0
    reasons: list[str] = field(default_factory=list)
    """Why each stage ended, in words."""

    def observe(self, score: float, epoch: int, step: int) -> Outcome:
        """Take the score, which is the better the lower, after so many epochs and steps in all."""
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
        """Share of the learning rates to train with after so many steps in all."""
        full = _RATE_AFTER_DENSE if self.after_dense else 1.0
        if self.stage in ("dense", "steady"):
            return full
        return full * max(0.0, 1 - (step - self.began_at_step) / max(self.n_decay_steps, 1))

    def _why_it_ends(self, epoch: int, step: int) -> str | None:
        if self.stage == "decay":
            if step - self.began_at_step >= self.n_decay_steps:
                return "the learning rates fell to zero"
        elif self._has_waited(step):
            return f"no score of {step - self.best_step} steps was better"
        if epoch >= self._last_epoch(epoch, step):
            return f"it had its share of {self.max_epochs} epochs"
        return None

    def _has_waited(self, step: int) -> bool:
        steps, scores = _FEWEST_STEPS, 1
        if not self.after_dense:
            steps, scores = max(steps, round(_PATIENCE * step)), _FEWEST_SCORES
        return self.n_worse >= scores and step - self.best_step >= steps

    def _last_epoch(self, epoch: int, step: int) -> int:
        """Of the stage, so that what follows has its share of the epochs."""
        if self.stage == "dense":
            return max(self.max_epochs // 2, 1)
        if self.stage == "steady":
            return self.max_epochs - math.ceil(self._decay_steps() * epoch / step)
        return self.max_epochs

    def _decay_steps(self) -> int:
        """How long a decay would be from the best weights."""
        useful = self.steps_before + self.best_step - self.began_at_step
        return max(round(_DECAY * useful), _FEWEST_STEPS)

    def _begin_next(self, epoch: int, step: int) -> None:
        n_useful = self.steps_before + max(self.best_step - self.began_at_step, 0)
        if self.stage == "dense":
            self.stage, self.after_dense = "steady", True
            # Scores with masks, which have a price, are no match for those without.
            self.best_score, self.best_epoch, self.best_step = math.inf, epoch, step
            self.n_worse = 0
        elif self.stage == "steady":
            left = (self.max_epochs - epoch) * step // epoch
            self.n_decay_steps = min(self._decay_steps(), left)
            self.stage = "decay" if left else "over"
        else:
            self.stage = "over"
        self.began_at_step, self.steps_before = step, n_useful
