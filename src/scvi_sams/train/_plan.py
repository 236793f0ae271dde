"""The training plan: plate counts, optimiser, and a monitor that does not flatter."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from typing import Annotated, Any, Literal, NoReturn

import torch
from lightning.pytorch import Callback
from scvi.module.base import LossOutput
from scvi.train import TrainingPlan
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from scvi_sams import _torch as _devices
from scvi_sams._checks import check_choice
from scvi_sams._torch import fixed_seed
from scvi_sams.exceptions import InvalidArgumentError, TrainingDivergedError
from scvi_sams.module._perturbation_module import PerturbationModule
from scvi_sams.module._settings import NotNegative, check_settings, given, number
from scvi_sams.train._checkpoint import ResumableCheckpoint, keep_state, restore_state
from scvi_sams.train._dense_phase import end_dense_phase
from scvi_sams.train._direct_effects import fit_direct_effects_of
from scvi_sams.train._epoch_log import EpochLogPlan
from scvi_sams.train._held_out import HeldOutCells
from scvi_sams.train._identity import Identity, data_identity, plain_settings
from scvi_sams.train._interruption import (
    GoodWeights,
    StopOnInterrupt,
    diverged_weights,
    forget_best_states,
    forget_stopping_score,
)
from scvi_sams.train._length import Stage
from scvi_sams.train._responses import begin_responses, fit_responses_of, same_order
from scvi_sams.train._statistics import training_statistics, warn_of_dominant_genes

logger = logging.getLogger("scvi.sams")

_VALIDATION_SEED = 20231
_BEFORE_RESPONSES = 0.75
"""Share of a planned dense phase after which cells may respond or not."""
_STEPS_BETWEEN_LOOKS = 50
"""After which an accelerator is waited for, to see whether training diverged."""


class PerturbationTrainingPlan(EpochLogPlan):
    """Training plan of scvi-tools with defaults that suit global latent variables.

    Besides what scvi-tools logs, ``history`` has every divergence, and for models with masks, per
    epoch, ``"dense_phase"`` (1 while all masks are on, else 0) and ``"active_masks"`` (share of
    masks with an inclusion probability above .5), and where held-out cells decide how long training
    takes, ``"learning_rate"`` (of the networks).

    Parameters
    ----------
    module
        A :class:`~scvi_sams.module.PerturbationModule`.
    lr
        Learning rate of the networks (paper: 3e-4, with ten times the steps).
    table_lr
        Learning rate of parameters that are no weights of a network: mask logits, mean-field
        effects and embeddings (a row per perturbation), dispersions (one per gene). Their scale is
        of order one, so at the networks' rate they would still be on their way when training ends.
        Raise it if ``"active_masks"`` in ``history`` still changes at the end.
    lr_schedule
        ``"cosine"``: both rates fall to zero over the planned steps, which averages out the noise
        of the drawn masks and mini-batches at the end. ``"constant"``: as in the paper. A schedule
        asked for with ``reduce_lr_on_plateau`` takes its place. ``"held_out"``, which ``train``
        without ``max_epochs`` asks for: no planned steps. Validation cells say when full rates, and
        then half of them, bring no more; so do they with masks. At last rates fall to zero over .4
        times the steps so far. Each stage goes on from the best weights of the one before
        (:doc:`in detail </settings>`). ``max_epochs`` is then a ceiling, half of which is for the
        dense phase.
    dense_fraction
        Share of the epochs that train with all masks on, before the latent space is rotated so that
        effects are sparse and masks are trained (see ``scvi_sams.module.sparsest_rotation``). 0
        trains masks from the start, as in the paper; any other value is the same to a training
        whose length held-out cells decide. Only a model's first training has this phase.
        Early stopping does not end it, and "best" scores and checkpoints are of what comes after:
        the bound is worse once masks have a price.
    max_curvature
        After the rotation, a latent dimension is switched off if the squares of the others predict
        more than this share of it: it is curved, no mechanism, and its masks would
        only repeat that a perturbation is strong. Half of it is enough where the effects on a
        dimension follow the size of the effects on the others. Where one is curved, dimensions
        that tell less of a cell are switched off with it, as they would take its place; the decoder
        then learns the curve. Nothing is switched off where that would be half of what is known of
        cells, or more. On simulated screens curved ones had .20 to .41, or .12 to .14 and such
        effects; mechanisms at most .14 and no such effects; on the screen of Papalexi et al.
        2021 no dimension exceeded .06. ``None`` leaves all on.
    eps
        Of Adam. The default of scvi-tools, 0.01, exceeds the gradients of masks and effects, which
        then hardly move (the paper: 1e-8).
    weight_decay
        Of the networks; tables have priors instead.
    n_epochs_kl_warmup, n_steps_kl_warmup
        No warm-up by default: the mask posterior would wander off while its prior is silent.
    checkpoint_path
        See :meth:`scvi_sams.SAMSVAE.train`.
    checkpoint_of
        What a checkpoint has to agree with besides data and settings of the plan, by name.
    **kwargs
        See :class:`~scvi.train.TrainingPlan`.

    Raises
    ------
    InvalidArgumentError
        If an argument is unknown, of the wrong type or out of range.
    """

    def __init__(
        self,
        module: PerturbationModule,
        *,
        lr: NotNegative = 2e-3,
        table_lr: NotNegative = 1e-2,
        lr_schedule: Literal["cosine", "constant", "held_out"] = "cosine",
        dense_fraction: Annotated[float, number(at_least=0, at_most=1)] = 0.5,
        max_curvature: NotNegative | None = 0.17,
        eps: NotNegative = 1e-8,
        weight_decay: NotNegative = 1e-6,
        n_epochs_kl_warmup: int | None = None,
        n_steps_kl_warmup: int | None = None,
        checkpoint_path: str | os.PathLike[str] | None = None,
        checkpoint_of: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        settings = given(locals())
        check_settings(PerturbationTrainingPlan.__init__, settings)
        _check_names(kwargs, module)
        check_choice("optimizer", kwargs.get("optimizer", "Adam"), ("Adam", "AdamW", "Custom"))
        super().__init__(
            module,
            lr=lr,
            eps=eps,
            weight_decay=weight_decay,
            n_epochs_kl_warmup=n_epochs_kl_warmup,
            n_steps_kl_warmup=n_steps_kl_warmup,
            **kwargs,
        )
        self.table_lr = table_lr
        self.lr_schedule = lr_schedule
        self.dense_fraction = dense_fraction
        self.max_curvature = max_curvature
        self.checkpoint_path = checkpoint_path
        for name in ("module", "checkpoint_path", "checkpoint_of", "kwargs"):
            settings.pop(name)
        self._identity: Identity = {
            **(checkpoint_of or {}),
            **plain_settings("plan", settings | kwargs),
        }
        self.is_interrupted = False
        self._rotation_epoch: int | None = None
        self._responses_epoch = 0
        self._held_out: HeldOutCells | None = None

    def setup(self, stage: str) -> None:
        """Count training cells per perturbation, once the split is known, before the optimiser."""
        super().setup(stage)
        self._good_weights = GoodWeights(self.module)
        n_dense = round(self.dense_fraction * (self.trainer.max_epochs or 0))
        if n_dense and self.module.has_dense_phase and not self.module.is_initialised:
            self._rotation_epoch = n_dense
            self._responses_epoch = round(_BEFORE_RESPONSES * n_dense)
            self.module.begin_dense_phase()
        data = self.trainer.datamodule
        counts = self.module.likelihood.is_count_likelihood
        statistics = training_statistics(data.adata_manager, data.train_idx, counts=counts)
        if counts and not self.module.is_initialised:
            warn_of_dominant_genes(data.adata_manager, statistics)
        self.module.set_training_statistics(statistics)
        if self.checkpoint_path is not None:
            self._identity |= data_identity(data.adata_manager)
        if self.lr_schedule == "held_out":
            if self._rotation_epoch is not None:
                self._rotation_epoch = self.trainer.max_epochs  # until held-out cells decide
            first: Stage = "steady" if self._rotation_epoch is None else "dense"
            self._held_out = HeldOutCells(self.module, self.trainer, first)

    def configure_callbacks(self) -> list[Callback]:
        """Let Ctrl-C end training as early stopping does, and write what a killed one needs."""
        if self.checkpoint_path is None:
            return [StopOnInterrupt()]
        return [StopOnInterrupt(), ResumableCheckpoint(self.checkpoint_path)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the phase, the random state, and what decides about the length of training."""
        keep_state(checkpoint, self.trainer, self._rotation_epoch, self._identity)
        if self._held_out is not None:
            self._held_out.save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on in the phase, and with the random state, of the checkpoint."""
        self._rotation_epoch = restore_state(checkpoint, self.trainer, self._identity)
        if self._held_out is not None:
            self._held_out.load(checkpoint)

    def on_train_start(self) -> None:
        """Hold weights of a checkpoint for good, as it was written after a good epoch."""
        if self.current_epoch > 0 and self._rotation_epoch is None:
            self._good_weights.keep(self.module, self.current_epoch - 1)

    def on_train_epoch_start(self) -> None:
        """At the end of the dense phase, turn to sparse axes and forget the old axes' momenta."""
        super().on_train_epoch_start()
        if self._cells_may_escape:
            begin_responses(self.module, self.trainer)
        if self._rotation_epoch is None:
            return
        forget_stopping_score(self.trainer)
        if self.current_epoch == self._rotation_epoch:
            self._end_dense_phase()
            if self._held_out is not None:
                # Nothing of the dense phase is to come back, whenever training ends.
                self._held_out.begin_with(self.module, self.current_epoch - 1)
            forget_best_states(self.trainer)
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()

    @property
    def _cells_may_escape(self) -> bool:
        """Whether effects have formed, so that cells can be told to have them or not."""
        if self._held_out is not None:
            return self._held_out.length.stage != "dense"
        return self.current_epoch >= self._responses_epoch

    def on_train_epoch_end(self) -> None:
        """Log how the module stands, to ``history``."""
        super().on_train_epoch_end()
        name = diverged_weights(self.module)
        if name is not None:
            self._stop(f"the weights {name} are not finite")
        if self._rotation_epoch is None:
            self._good_weights.keep(self.module, self.current_epoch)
        self.log_dict(self.module.diagnostics(), sync_dist=self.use_sync_dist)
        if self._held_out is not None:
            networks = self.trainer.optimizers[0].param_groups[0]
            self.log("learning_rate", networks["lr"], sync_dist=self.use_sync_dist)
            if self._held_out.judge(self.module, self.trainer) == "settling":
                self._rotation_epoch = self.current_epoch + 1

    def on_validation_end(self) -> None:
        """Note that there is a score; it is judged once the epoch has been logged."""
        if self._held_out is not None:
            self._held_out.is_scored = not self.trainer.sanity_checking

    def on_train_end(self) -> None:
        """End with the best weights where they are kept, with masks, and with latents in order."""
        super().on_train_end()
        self.module.likelihood.largest_counts = None  # they are of these cells alone
        if self._held_out is not None:
            self._held_out.restore_best(self.module)
        if self._cells_may_escape:  # the best weights may be those from before they could
            begin_responses(self.module, self.trainer)
        if self._rotation_epoch is not None:
            self._end_dense_phase()
        self.module.order_latents()
        with same_order(self.module):
            fit_responses_of(self.module, self.trainer)
        fit_direct_effects_of(self.module, self.trainer)
        self._warn_of_masks_that_say_nothing()

    @property
    def ending(self) -> str:
        """Why training ended, in words."""
        reasons = [] if self._held_out is None else list(self._held_out.length.reasons)
        if self.is_interrupted:
            reasons.append("Interrupted.")
        elif not reasons:
            reasons.append(
                "Stopped early." if self.trainer.should_stop else "All planned epochs were trained."
            )
        return " ".join(reasons)

    def _warn_of_masks_that_say_nothing(self) -> None:
        share = self.module.diagnostics().get("active_masks")
        if share == 0:
            logger.warning(
                "All masks are off: the model has found no effect of any perturbation. Whether "
                "cells differ from control cells at all says `model.test_perturbations()`. If they "
                "do, train for more epochs, with a higher `mask_prior_probability` or "
                "`evidence_cells`; if not, check that labels and cells belong together."
            )
        elif share == 1:
            logger.warning(
                "All masks are on: they tell no perturbation from another. Train with a lower "
                "`mask_prior_probability` or `evidence_cells`, or more latent dimensions."
            )

    def _end_dense_phase(self) -> None:
        with same_order(self.module):
            end_dense_phase(self.module, self.trainer, self.max_curvature)
        self._rotation_epoch = None

    def get_optimizer_creator(self) -> Callable[[Iterable], torch.optim.Optimizer]:
        """Give tables their own learning rate; a custom optimiser creator is left as it is."""
        create = super().get_optimizer_creator()
        if self.optimizer_name == "Custom":
            return create
        tables = self.module.table_parameters()
        identities = {id(table) for table in tables}
        networks = [p for p in self.module.parameters() if id(p) not in identities]
        # Fused, an update is one pass over the parameters: a fifth of the time, a tenth of a step.
        groups = [
            {"params": networks, "fused": True},
            {"params": tables, "fused": True, "lr": self.table_lr, "weight_decay": 0.0},
        ]
        return lambda _: create(groups)

    def configure_optimizers(self) -> dict[str, Any]:
        """Add the schedule of the learning rate."""
        configuration = super().configure_optimizers()
        if self.reduce_lr_on_plateau or self.lr_schedule == "constant":
            return configuration
        optimizer = configuration["optimizer"]
        schedule: LRScheduler
        if self.lr_schedule == "cosine":
            n_steps = int(self.trainer.estimated_stepping_batches)
            schedule = CosineAnnealingLR(optimizer, T_max=n_steps)
        else:
            schedule = LambdaLR(optimizer, self._rate)
        configuration["lr_scheduler"] = {"scheduler": schedule, "interval": "step"}
        return configuration

    def _rate(self, step: int) -> float:
        return 1.0 if self._held_out is None else self._held_out.length.rate(step)

    def compute_and_log_metrics(
        self, loss_output: LossOutput, metrics: dict[str, Any], mode: str
    ) -> None:
        """Log every divergence too, to ``history``.

        Not as extra metrics, which scvi-tools logs in inference mode: processes cannot then be
        averaged over.
        """
        looks = (
            not _devices.is_accelerator(self.device) or self.global_step % _STEPS_BETWEEN_LOOKS == 0
        )
        diverged = diverged_term(loss_output) if mode == "train" and looks else None
        if diverged is not None:
            self._stop("the term {} is {}".format(*diverged))
        super().compute_and_log_metrics(loss_output, metrics, mode)
        for name, divergence in loss_output.kl_local.items():
            self.log(
                f"{name}_{mode}",
                divergence.detach().mean(),
                on_step=self.on_step,
                on_epoch=self.on_epoch,
                batch_size=loss_output.n_obs_minibatch,
                sync_dist=self.use_sync_dist,
            )

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Take a step; if it fails because weights are no numbers any more, say so."""
        try:
            return super().training_step(batch, batch_idx)
        except TrainingDivergedError:
            raise
        except (ValueError, RuntimeError):
            name = diverged_weights(self.module)
            if name is None:
                raise
            self._stop(f"the weights {name} are not finite")

    def _stop(self, reason: str) -> NoReturn:
        """Raise an error, after the module has got its last good weights again."""
        weights = self._good_weights.restore(self.module)
        if self._good_weights.epoch is not None:
            self.module.order_latents()
        raise TrainingDivergedError(
            f"Training diverged at step {self.global_step + 1} (epoch {self.current_epoch + 1}): "
            f"{reason}. The weights are {weights}. Train with lower learning rates (they were "
            f"lr={self.lr:g} and table_lr={self.table_lr:g}, in `plan_kwargs`), and look for "
            "extreme values among counts, doses, covariates and size factors."
        )

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Score with the same random numbers in every epoch.

        A monitor that draws anew each time has lucky epochs, and early stopping would pick them.
        """
        with fixed_seed(_VALIDATION_SEED + batch_idx):
            super().validation_step(batch, batch_idx)


def diverged_term(output: LossOutput) -> tuple[str, float] | None:
    """Name and value of the first term of the objective that is not finite; ``None`` if all are."""
    if torch.isfinite(output.loss):
        return None
    terms: dict[str, torch.Tensor] = {**output.reconstruction_loss, **output.kl_local}
    for name, values in terms.items():
        mean = values.mean()
        if not torch.isfinite(mean):
            return name, mean.item()
    return "loss", output.loss.item()


def _check_names(names: Iterable[str], module: PerturbationModule) -> None:
    """Raise an error if an argument is known neither to the plans nor to the module's loss.

    scvi-tools would pass it to the loss, where it fails after training has begun.
    """
    known = {*signature(TrainingPlan.__init__).parameters, *signature(module.loss).parameters}
    own = signature(PerturbationTrainingPlan.__init__).parameters
    for name in names:
        if name not in known:
            similar = difflib.get_close_matches(name, [*own, *known], n=3)
            hint = " or ".join(f"`{near}`" for near in dict.fromkeys(similar))
            raise InvalidArgumentError(
                f"The training plan has no argument `{name}`"
                + (f"; did you mean {hint}?" if hint else ".")
            )
