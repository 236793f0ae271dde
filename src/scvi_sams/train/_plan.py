"""The training plan: plate counts, optimiser, and comparable validation scores."""

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
"""Fraction of a planned dense phase after which cells may or may not respond."""
_STEPS_BETWEEN_LOOKS = 50
"""Steps after which an accelerator is synchronised, to detect divergence."""


class PerturbationTrainingPlan(EpochLogPlan):
    """Training plan of scvi-tools with defaults for global latent variables.

    In addition to what scvi-tools logs, ``history`` contains every divergence and, for models with
    masks, per epoch ``"dense_phase"`` (1 while all masks are on, otherwise 0) and
    ``"active_masks"`` (proportion of masks with an inclusion probability above 0.5), and if
    held-out cells decide how long training takes, ``"learning_rate"`` (of the networks).

    Parameters
    ----------
    module
        A :class:`~scvi_sams.module.PerturbationModule`.
    lr
        Learning rate of the networks (paper: 3e-4, with ten times the steps).
    table_lr
        Learning rate of parameters that are not weights of a network: mask logits, mean-field
        effects and embeddings (a row per perturbation), dispersions (one per gene). Their scale is
        of order one, so that with the rate of the networks they would not converge. Raise it if
        ``"active_masks"`` in ``history`` still changes at the end.
    lr_schedule
        ``"cosine"``: both rates decay to zero over the planned steps, which averages out the noise
        of sampled masks and mini-batches at the end. ``"constant"``: as in the paper. A schedule
        requested with ``reduce_lr_on_plateau`` replaces it. ``"held_out"``, used by ``train``
        without ``max_epochs``: no planned steps. Validation cells decide when full rates, and then
        half of them, bring no further improvement, and the same with masks. Then rates decay to
        zero over 0.4 times the steps so far. Each stage continues from the best weights of the
        previous one (:doc:`details </settings>`). ``max_epochs`` is then an upper limit, half of
        which is for the dense phase.
    dense_fraction
        Fraction of epochs with all masks on, before the latent space is rotated so that effects are
        sparse and masks are trained (see ``scvi_sams.module.sparsest_rotation``). 0 trains masks
        from the start, as in the paper; if held-out cells decide the length of training, all other
        values are the same. Only the first training of a model has this phase. Early stopping does
        not end it, and "best" scores and checkpoints are from later epochs: the bound is worse once
        it includes the KL term of masks.
    max_curvature
        After the rotation, a latent dimension is switched off if the squares of the others predict
        more than this proportion of it: it is curved, not a mechanism, and its masks would only
        show that a perturbation is strong. Half of it is sufficient if the effects on a dimension
        follow the norm of the effects on the others. With a curved dimension, dimensions with less
        information about cells are switched off too, because one would take its place; the decoder
        then learns the curvature. Nothing is switched off if that would remove half or more of the
        information about cells. On simulated screens curved dimensions had 0.20 to 0.41, or 0.12 to
        0.14 and such effects; mechanisms at most 0.14 and no such effects; on the screen of
        Papalexi et al. 2021 no dimension exceeded 0.06. ``None`` keeps all on.
    eps
        Parameter of Adam. The default of scvi-tools, 0.01, exceeds the gradients of masks and
        effects, which then hardly move (paper: 1e-8).
    weight_decay
        Weight decay of the networks; tables have priors instead.
    n_epochs_kl_warmup, n_steps_kl_warmup
        No warm-up by default: masks would drift while their prior has no weight.
    checkpoint_path
        See :meth:`scvi_sams.SAMSVAE.train`.
    checkpoint_of
        What a checkpoint must match besides data and settings of the plan, by name.
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
        """Count training cells per perturbation, when the split is known, before the optimiser."""
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
        """Let Ctrl-C end training like early stopping, and write checkpoints to resume from."""
        if self.checkpoint_path is None:
            return [StopOnInterrupt()]
        return [StopOnInterrupt(), ResumableCheckpoint(self.checkpoint_path)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the phase, the random state, and the state that determines the length of training."""
        keep_state(checkpoint, self.trainer, self._rotation_epoch, self._identity)
        if self._held_out is not None:
            self._held_out.save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue in the phase, and with the random state, of the checkpoint."""
        self._rotation_epoch = restore_state(checkpoint, self.trainer, self._identity)
        if self._held_out is not None:
            self._held_out.load(checkpoint)

    def on_train_start(self) -> None:
        """Treat weights of a checkpoint as good, because it was written after a good epoch."""
        if self.current_epoch > 0 and self._rotation_epoch is None:
            self._good_weights.keep(self.module, self.current_epoch - 1)

    def on_train_epoch_start(self) -> None:
        """At the end of the dense phase, rotate to sparse axes and reset the optimiser."""
        super().on_train_epoch_start()
        if self._cells_may_escape:
            begin_responses(self.module, self.trainer)
        if self._rotation_epoch is None:
            return
        forget_stopping_score(self.trainer)
        if self.current_epoch == self._rotation_epoch:
            self._end_dense_phase()
            if self._held_out is not None:
                # Nothing of the dense phase may be restored, whenever training ends.
                self._held_out.begin_with(self.module, self.current_epoch - 1)
            forget_best_states(self.trainer)
            for optimizer in self.trainer.optimizers:
                optimizer.state.clear()

    @property
    def _cells_may_escape(self) -> bool:
        """Whether effects have formed, so that responses can be identified."""
        if self._held_out is not None:
            return self._held_out.length.stage != "dense"
        return self.current_epoch >= self._responses_epoch

    def on_train_epoch_end(self) -> None:
        """Log the state of the module to ``history``."""
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
        """Note that there is a score; it is used once the epoch has been logged."""
        if self._held_out is not None:
            self._held_out.is_scored = not self.trainer.sanity_checking

    def on_train_end(self) -> None:
        """End with the best weights if they are stored, with masks, and with ordered latents."""
        super().on_train_end()
        self.module.likelihood.largest_counts = None  # they belong to these cells only
        if self._held_out is not None:
            self._held_out.restore_best(self.module)
        if self._cells_may_escape:  # the best weights may be older than this stage
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
        """Reason why training ended, as text."""
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
                "All masks are off: the model has found no effect of any perturbation. "
                "`model.test_perturbations()` tests whether cells differ from control cells. If "
                "they do, train for more epochs, with a higher `mask_prior_probability` or "
                "`evidence_cells`; if not, check that labels and cells belong together."
            )
        elif share == 1:
            logger.warning(
                "All masks are on: they do not distinguish perturbations. Train with a lower "
                "`mask_prior_probability` or `evidence_cells`, or more latent dimensions."
            )

    def _end_dense_phase(self) -> None:
        with same_order(self.module):
            end_dense_phase(self.module, self.trainer, self.max_curvature)
        self._rotation_epoch = None

    def get_optimizer_creator(self) -> Callable[[Iterable], torch.optim.Optimizer]:
        """Give tables their own learning rate; a custom optimiser creator is unchanged."""
        create = super().get_optimizer_creator()
        if self.optimizer_name == "Custom":
            return create
        tables = self.module.table_parameters()
        identities = {id(table) for table in tables}
        networks = [p for p in self.module.parameters() if id(p) not in identities]
        # A fused update is one pass over the parameters: a fifth of the time, a tenth of a step.
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
        """Log every divergence to ``history`` as well.

        Not as extra metrics, which scvi-tools logs in inference mode: they could not be averaged
        over processes.
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
        """Take a step; name the cause if it fails because weights are not finite."""
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
        """Raise an error, after restoring the last good weights of the module."""
        weights = self._good_weights.restore(self.module)
        if self._good_weights.epoch is not None:
            self.module.order_latents()
        raise TrainingDivergedError(
            f"Training diverged at step {self.global_step + 1} (epoch {self.current_epoch + 1}): "
            f"{reason}. The weights are {weights}. Train with lower learning rates (they were "
            f"lr={self.lr:g} and table_lr={self.table_lr:g}, in `plan_kwargs`), and look for "
            "extreme values in counts, doses, covariates and size factors."
        )

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Score with the same random numbers in every epoch.

        With other random numbers each time some epochs would score better by chance, and early
        stopping would select them.
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
    """Raise if an argument is known neither to the plans nor to the module's loss.

    scvi-tools would pass it to the loss, which fails after training has begun.
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
