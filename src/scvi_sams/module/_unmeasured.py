"""Statistics from which effects without cells are predicted.

These are effects of perturbations of which only features are known, and of perturbations in
contexts in which they have no cells. Training stores what is needed to estimate them on request.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

COMPONENTS_OF_UNMEASURED = ("model", "shifts", "genes", "mean of perturbations")
"""Components of predictions for perturbations without cells: the prior of masks and effects,
decoded; shifts by ridge regression on features, decoded; effects on genes by ridge regression; and
the mean of measured perturbations."""


class UnmeasuredEffects(nn.Module):
    """Statistics of the training cells for effects without cells.

    All are buffers of variable length, and empty until training ends. Effects are differences in
    means of ``log2(1 + 1e4 x / size)``, or of values that are not counts. The first axis of
    ``states`` and ``covariates`` is contexts, and last all control cells.

    Attributes
    ----------
    states, covariates
        Basal states of control cells ``(C + 1, S, L)`` and their covariates, ``(C + 1, S, K)``.
    codes, elsewhere, elsewhere_variance
        Perturbations with effects in contexts, ``(R,)``, the mean of these effects, ``(R, G)``, and
        its variance as a prediction for another context.
    mean, mean_features, coefficients
        Mean effect of measured perturbations, ``(G,)``, their mean features, ``(D,)``, and the
        coefficients of features, ``(D, G)``.
    mean_shift, shift_coefficients
        The same for shifts, ``(L,)`` and ``(D, L)``.
    weights
        Weights of the :data:`COMPONENTS_OF_UNMEASURED`, from left-out perturbations.
    variance
        Squared error of left-out perturbations, ``(G,)``.
    target_genes
        Position of the gene that each perturbation targets, ``(T + U,)``, -1 if it is unknown;
        measured perturbations first. Known before training.
    target_change, target_variance
        Change of the log rate of the target gene, and its variance between perturbations, ``(1,)``;
        empty if perturbations do not change the genes that they target.
    """

    states: Tensor
    covariates: Tensor
    codes: Tensor
    elsewhere: Tensor
    elsewhere_variance: Tensor
    mean: Tensor
    mean_features: Tensor
    coefficients: Tensor
    mean_shift: Tensor
    shift_coefficients: Tensor
    weights: Tensor
    variance: Tensor
    target_genes: Tensor
    target_change: Tensor
    target_variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("states", torch.zeros(0, 0, 0))
        self.register_buffer("covariates", torch.zeros(0, 0, 0))
        for name in ("codes", "target_genes"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64))
        tables = ("elsewhere", "elsewhere_variance", "coefficients", "shift_coefficients")
        for name in tables:
            self.register_buffer(name, torch.zeros(0, 0))
        vectors = ("mean", "mean_features", "mean_shift", "weights", "variance")
        for name in (*vectors, "target_change", "target_variance"):
            self.register_buffer(name, torch.zeros(0))

    def fill(self, **tables: Tensor) -> None:
        """Set estimates, by name."""
        for name, values in tables.items():
            like = getattr(self, name)
            setattr(self, name, values.to(device=like.device, dtype=like.dtype))

    @property
    def is_fitted(self) -> bool:
        """Whether training has finished."""
        return len(self.states) > 0

    @property
    def stacking(self) -> dict[str, float] | None:
        """Weights of the :data:`COMPONENTS_OF_UNMEASURED`; ``None`` if there are none."""
        if not self.knows_features:
            return None
        return dict(zip(COMPONENTS_OF_UNMEASURED, self.weights.tolist(), strict=True))

    @property
    def knows_features(self) -> bool:
        """Whether effects of perturbations without cells were estimated from features."""
        return len(self.weights) > 0

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load buffers of any length; a model of an earlier version has none."""
        for name in self._buffers:
            saved = state.setdefault(prefix + name, getattr(self, name))
            if saved.shape != getattr(self, name).shape:
                setattr(self, name, getattr(self, name).new_zeros(saved.shape))
        super()._load_from_state_dict(state, prefix, *args)
