"""Checks of what is asked of the training plan, before anything is trained."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from inspect import signature

from scvi.train import TrainingPlan

from scvi_sams._checks import check_choice, check_number
from scvi_sams.exceptions import InvalidArgumentError
from scvi_sams.module._perturbation_module import PerturbationModule

OWN_ARGUMENTS = ("lr", "table_lr", "lr_schedule", "dense_fraction", "max_curvature")


def validate_plan(
    *,
    lr: object,
    table_lr: object,
    lr_schedule: object,
    dense_fraction: object,
    max_curvature: object,
    eps: object,
    weight_decay: object,
) -> None:
    """Raise an error that names the first argument which is of the wrong type or out of range."""
    check_number(at_least=0, lr=lr, table_lr=table_lr, eps=eps, weight_decay=weight_decay)
    check_number(at_least=0, at_most=1, dense_fraction=dense_fraction)
    check_choice("lr_schedule", lr_schedule, ("cosine", "constant"))
    if max_curvature is not None:
        check_number(at_least=0, max_curvature=max_curvature)


def check_argument_names(names: Iterable[str], module: PerturbationModule) -> None:
    """Raise an error if an argument is known neither to the plans nor to the module's loss.

    scvi-tools would pass it to the loss, where it fails after training has begun.
    """
    known = {*signature(TrainingPlan.__init__).parameters, *signature(module.loss).parameters}
    for name in names:
        if name not in known:
            similar = difflib.get_close_matches(name, [*OWN_ARGUMENTS, *known], n=3)
            hint = " or ".join(f"`{near}`" for near in similar)
            raise InvalidArgumentError(
                f"The training plan has no argument `{name}`"
                + (f"; did you mean {hint}?" if hint else ".")
            )
