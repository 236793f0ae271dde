"""What an experiment of the SAMS-VAE paper is, and what all three share.

Bereket & Karaletsos, NeurIPS 2023, arXiv 2311.02794. Models, objective and optimiser are those of
``scvi_sams.paper_settings``, which says what is assumed of them. Here too a comment that begins
with "Assumed" marks what could not be learned from the text of the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from scvi_sams.evaluation import Split


@dataclass(frozen=True)
class Model:
    """A row of the table: a model class and its arguments."""

    model_class: type
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Scoring:
    """How many samples the two scores rest on."""

    n_importance_samples: int
    n_ate_draws: int


@dataclass(frozen=True)
class Published:
    """A row of the paper's table; ``None`` where there is no number to stand beside."""

    model: str
    fraction: float | None
    iwelbo: float | None
    ate_pearson: float | None


@dataclass(frozen=True)
class Experiment:
    """An experiment: everything but the data, which the user brings.

    ``split`` takes labels, ``seed``, ``control``, ``delimiter`` and, unless ``fractions`` is
    ``None``, a ``fraction``. Where there is a ``reference``, the published IWELBOs are differences
    to that of this model and fraction.
    """

    models: Mapping[str, Model]
    split: Callable[..., Split]
    fractions: tuple[float, ...] | None
    delimiter: str | None
    published: tuple[Published, ...]
    reference: tuple[str, float] | None
    seeds: tuple[int, ...]
    n_steps: int
    scoring: Scoring


# Assumed: that all three experiments took as many steps, and that the last one is scored.
N_STEPS = 30_000

SCORING = Scoring(n_importance_samples=100, n_ate_draws=2500)

# Assumed: the number of runs, and that each has its own split and initial weights.
SEEDS = (0, 1, 2)
