"""Settings of models, and arguments of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from bad_input.cases import Case, legal, refused
from bad_input.situation import Situation, trains_alike
from scvi_sams import SAMSVAE, ConditionalVAE, SVAEPlus
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidSplitError,
    RegistrationError,
    TrainingDivergedError,
)

WHOLE = ("n_latent", "n_hidden", "n_layers", "n_particles", "effect_n_hidden", "effect_n_layers")
POSITIVE = ("effect_prior_scale", "mask_temperature", "mask_prior_concentration", "evidence_cells")
SHARES = ("mask_prior_probability", "mask_initial_probability")


def built(name: str, value: object) -> Callable[[Situation], Any]:
    return lambda situation: situation.build(**{name: value})


def trained(**training: Any) -> Callable[[Situation], Any]:
    return lambda situation: situation.train(**training)


def planned(**plan: Any) -> Callable[[Situation], Any]:
    return trained(plan_kwargs=plan)


def divided(*parts: Any) -> Callable[[Situation], Any]:
    return trained(datasplitter_kwargs={"external_indexing": list(parts)})


def other_model(model_cls: Any, **settings: Any) -> Callable[[Situation], Any]:
    def act(situation: Situation) -> None:
        model_cls.setup_anndata(situation.adata)
        situation.is_registered = True
        model_cls(situation.adata, **settings)

    return act


def wrong(name: str, value: object, wanted: str, act: Callable[[Situation], Any]) -> Case:
    shown = "nan" if isinstance(value, float) and np.isnan(value) else repr(value)
    return refused(f"`{name}` is {shown}", act, InvalidArgumentError, f"`{name}`", wanted, shown)


def is_whole_split(situation: Situation, model: Any) -> None:
    assert list(model.train_indices) == list(range(20))
    assert list(model.test_indices) == [20, 21, 22, 23]


SETTINGS: list[Case] = [
    refused(
        "an unregistered AnnData",
        lambda situation: SAMSVAE(situation.adata),
        RegistrationError,
        "SAMSVAE.setup_anndata",
    ),
    refused(
        "no AnnData",
        lambda situation: SAMSVAE(None),
        RegistrationError,
        "`adata` must be an AnnData",
    ),
    *(
        refused(
            f"an unknown model setting: `{name}`",
            built(name, 3),
            InvalidArgumentError,
            f"SAMSVAE has no setting `{name}`",
            advice,
        )
        for name, advice in (
            ("n_latnt", "Did you mean `n_latent`?"),
            ("batch_key", "SAMSVAE.setup_anndata: batch_key=..."),
            ("max_epochs", "train(max_epochs=...)"),
            ("lr", "train(plan_kwargs={'lr': ...})"),
            ("zzz", "Its settings are n_latent, "),
        )
    ),
    refused(
        "positional settings",
        lambda situation: SAMSVAE(situation.adata, 3, 8),
        InvalidArgumentError,
        "too many positional arguments",
        "n_latent=20",
    ),
    *(
        wrong(
            "gene_likelihood", value, "['nb', 'poisson', 'normal']", built("gene_likelihood", value)
        )
        for value in ("zinb", None)
    ),
    wrong("kl_estimator", "exact", "closed_form", built("kl_estimator", "exact")),
    *(
        wrong(name, value, "a whole number of at least 1", built(name, value))
        for name in WHOLE
        for value in (0, 2.5)
    ),
    *(
        wrong("n_latent", value, "a whole number", built("n_latent", value))
        for value in (-1, "3", None, True)
    ),
    *(
        wrong(name, value, "a number above 0", built(name, value))
        for name in POSITIVE
        for value in (0, -1.0, np.nan, np.inf, "2")
    ),
    *(
        wrong(name, value, "above 0 and below 1", built(name, value))
        for name in SHARES
        for value in (0, 1, -0.1, np.nan, "x")
    ),
    *(
        wrong("global_kl_weight", value, "of at least 0", built("global_kl_weight", value))
        for value in (-1, np.nan, "x")
    ),
    *(
        wrong(name, "yes", "True or False", built(name, "yes"))
        for name in ("correlated_basal", "direct_effects", "stacking")
    ),
    *(
        wrong("mask_prior_beta", value, "above 1", other_model(SVAEPlus, mask_prior_beta=value))
        for value in (1, "5")
    ),
    wrong("n_latent", 0.0, "a whole number", other_model(ConditionalVAE, n_latent=0.0)),
]


def alone(situation: Situation) -> Any:
    return situation.train(datasplitter_kwargs={"external_indexing": [np.arange(20)]})


def explosive(situation: Situation) -> Any:
    plan = {"lr": 1e10, "dense_fraction": 0.0}
    return situation.train(plan_kwargs=plan, max_epochs=30)


TRAIN: list[Case] = [
    *(
        wrong("max_epochs", value, "a whole number of at least 1", trained(max_epochs=value))
        for value in (0, -1, 1.5, "10")
    ),
    *(
        wrong("batch_size", value, "a whole number of at least 1", trained(batch_size=value))
        for value in (0, -1, 2.5, "10")
    ),
    legal(
        "`batch_size` is above the number of cells", trained(batch_size=10**6), "one step per epoch"
    ),
    *(
        refused(
            f"`train_size` is {value}",
            trained(train_size=value),
            InvalidSplitError,
            "training, validation and test cells",
            str(float(value)),
        )
        for value in (0, -0.1, 1.5)
    ),
    wrong("train_size", "most", "a number", trained(train_size="most")),
    refused(
        "proportions of training and validation cells above 1",
        trained(train_size=0.9, validation_size=0.5),
        InvalidSplitError,
        "(0.9, 0.5, -0.4)",
    ),
    refused("no training cells", divided([]), InvalidSplitError, "no training cells"),
    refused("a cell twice in the split", divided([0, 0, 1]), InvalidSplitError, "more than once"),
    refused(
        "a cell in two parts of the split",
        divided([0, 1, 2], [2, 3]),
        InvalidSplitError,
        "position 2",
    ),
    refused(
        "a cell in the split that does not exist", divided([0, 99]), InvalidSplitError, "99", "24"
    ),
    refused(
        "a negative position in the split", divided([-1, 2]), InvalidSplitError, "-1", "0 to 23"
    ),
    refused(
        "fractional positions in the split",
        divided([0.5, 1.0]),
        InvalidArgumentError,
        "`external_indexing`",
        "0.5",
    ),
    refused(
        "names of cells in the split",
        divided(["c0", "c1"]),
        InvalidArgumentError,
        "`external_indexing`",
        "c0",
        "get_indexer",
    ),
    refused(
        "text instead of a split",
        trained(datasplitter_kwargs={"external_indexing": "random"}),
        InvalidSplitError,
        "`external_indexing` must be a list",
        "'random'",
    ),
    refused(
        "four parts of a split",
        divided([0], [1], [2], [3]),
        InvalidSplitError,
        "4 parts",
    ),
    legal(
        "a split that leaves cells out",
        alone,
        "the remaining cells are the test set",
        is_whole_split,
    ),
    refused(
        "`early_stopping` without validation cells",
        trained(early_stopping=True),
        InvalidSplitError,
        "`early_stopping`",
        "`train_size`",
    ),
    refused(
        "`check_val_every_n_epoch` without validation cells",
        trained(check_val_every_n_epoch=1),
        InvalidSplitError,
        "`check_val_every_n_epoch`",
        "`train_size`",
    ),
    refused(
        "`lr_schedule` is 'held_out' without validation cells",
        planned(lr_schedule="held_out"),
        InvalidSplitError,
        "`train_size`",
        "`lr_schedule`",
    ),
    refused(
        "a `datamodule` that is not one",
        trained(datamodule=3),
        InvalidArgumentError,
        "`datamodule`",
        "StreamingDataModule",
    ),
    *(
        wrong(name, value, "a number of at least 0", planned(**{name: value}))
        for name in ("lr", "table_lr", "weight_decay")
        for value in (-1, np.nan, "fast")
    ),
    *(
        wrong("dense_fraction", value, "at most 1", planned(dense_fraction=value))
        for value in (2, -1, np.nan)
    ),
    wrong("max_curvature", -1, "at least 0", planned(max_curvature=-1)),
    wrong(
        "lr_schedule", "linear", "['cosine', 'constant', 'held_out']", planned(lr_schedule="linear")
    ),
    wrong("optimizer", "SGD", "['Adam', 'AdamW', 'Custom']", planned(optimizer="SGD")),
    refused(
        "an unknown argument of the training plan",
        planned(table_rate=0.1),
        InvalidArgumentError,
        "`table_rate`",
        "`table_lr`",
    ),
    *(
        wrong(name, 3, "a dict", trained(**{name: 3}))
        for name in ("plan_kwargs", "datasplitter_kwargs", "plan_config", "trainer_config")
    ),
    *(
        refused(
            f"`train` with the unknown argument `{name}`",
            trained(**{name: 1}),
            InvalidArgumentError,
            name,
            advice,
        )
        for name, advice in (
            ("lr", "plan_kwargs={'lr': ...}"),
            ("weight_decay", "plan_kwargs={'weight_decay': ...}"),
            ("n_epochs", "`max_epochs`"),
            ("use_gpu", "accelerator="),
            ("seed", "scvi.settings.seed"),
            ("external_indexing", "datasplitter_kwargs={'external_indexing': ...}"),
            ("n_latent", "SAMSVAE(adata, n_latent=...)"),
            ("early_stoping", "`early_stopping`"),
            ("nonsense", "`train` has no argument"),
        )
    ),
    refused(
        "an unknown argument of the split",
        trained(datasplitter_kwargs={"num_worker": 1}),
        InvalidArgumentError,
        "`datasplitter_kwargs`",
        "'num_worker'",
        "`num_workers`",
    ),
    refused(
        "the batch size in `datasplitter_kwargs`",
        trained(datasplitter_kwargs={"batch_size": 8}),
        InvalidArgumentError,
        "`batch_size`",
        "`train` itself",
    ),
    *(
        refused(
            f"`{name}` is 'quantum'",
            trained(**{name: "quantum"}),
            InvalidArgumentError,
            f"`{name}`",
            "'quantum'",
        )
        for name in ("accelerator", "devices")
    ),
    wrong("checkpoint_path", "", "the path of a file", trained(checkpoint_path="")),
    wrong("data_on_device", "yes", "True or False", trained(data_on_device="yes")),
    legal(
        "numpy numbers instead of Python numbers",
        trained(
            max_epochs=np.int64(2),
            batch_size=np.int32(8),
            train_size=np.float32(1),
            log_every_n_steps=np.int64(1),
            devices=np.int64(1),
            shuffle_set_split=np.bool_(True),
            plan_kwargs={"lr": np.float32(2e-3), "dense_fraction": np.float64(0.5)},
        ),
        "identical training",
        trains_alike,
    ),
    legal(
        "pandas booleans instead of positions in the split",
        lambda situation: situation.train(
            datasplitter_kwargs={
                "external_indexing": [pd.Series([True] * 20 + [False] * 4, dtype="boolean")]
            }
        ),
        "the cells where they are true",
        is_whole_split,
    ),
    refused(
        "a learning rate so large that training diverges",
        explosive,
        TrainingDivergedError,
        "step",
        "epoch",
        "lr=1e+10",
        "The weights are",
    ),
]
CASES = [*SETTINGS, *TRAIN]
