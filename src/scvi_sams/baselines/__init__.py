"""Predictions without a model, or with a very small one: what any model has to beat."""

from scvi_sams.baselines._ate import additive_ate, mean_ate
from scvi_sams.baselines._base import BaselineMethod
from scvi_sams.baselines._linear import PCARidge
from scvi_sams.baselines._networks import LatentAdditive, LinearAdditive
from scvi_sams.baselines._simple import (
    Additive,
    ControlMean,
    MatchingMean,
    PerturbationMean,
    TrainingMean,
    split_half,
)

__all__ = [
    "Additive",
    "BaselineMethod",
    "ControlMean",
    "LatentAdditive",
    "LinearAdditive",
    "MatchingMean",
    "PCARidge",
    "PerturbationMean",
    "TrainingMean",
    "additive_ate",
    "mean_ate",
    "split_half",
]
