"""Training: the plan, and closed-form estimates from the training cells."""

from scvi_sams.train._interruption import interrupts_raise, weights_kept_on_error
from scvi_sams.train._plan import PerturbationTrainingPlan
from scvi_sams.train._statistics import training_statistics

__all__ = [
    "PerturbationTrainingPlan",
    "interrupts_raise",
    "training_statistics",
    "weights_kept_on_error",
]
