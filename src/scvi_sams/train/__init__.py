"""Training: the plan, and what is computed from the training cells."""

from scvi_sams.train._interruption import weights_kept_on_error
from scvi_sams.train._plan import PerturbationTrainingPlan
from scvi_sams.train._statistics import training_statistics

__all__ = ["PerturbationTrainingPlan", "training_statistics", "weights_kept_on_error"]
