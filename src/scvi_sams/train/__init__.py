"""Training: the plan, and what is computed from the training cells."""

from scvi_sams.train._plan import PerturbationTrainingPlan
from scvi_sams.train._statistics import training_statistics

__all__ = ["PerturbationTrainingPlan", "training_statistics"]
