"""What a trained model is asked for: perturbations, doses, draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from bad_input.cases import Case, legal, refused
from bad_input.situation import Situation
from scvi_sams import evaluation, pl, tl
from scvi_sams.exceptions import (
    InvalidArgumentError,
    InvalidDosageError,
    InvalidPerturbationLabelError,
    MissingKeyError,
    SAMSError,
    UnknownPerturbationError,
)

FEW: dict[str, Any] = {"n_samples": 4, "n_posterior_samples": 2}
TAKE_PERTURBATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "predict_ate": lambda model, names: model.predict_ate(names, **FEW),
    "predict": lambda model, names: model.predict(names),
    "predict_dose_response": lambda model, names: model.predict_dose_response(names, **FEW),
    "predict_interactions": lambda model, names: model.predict_interactions(names, **FEW),
    "rank_unseen_pairs": lambda model, names: model.rank_unseen_pairs(names, **FEW),
    "differential_expression(group1=...)": lambda model, names: model.differential_expression(
        group1=names, n_samples=4
    ),
    "get_direct_effects": lambda model, names: model.get_direct_effects(names, key_added=None),
    "get_perturbation_masks": lambda model, names: model.get_perturbation_masks(
        names, key_added=None
    ),
    "get_perturbation_effects": lambda model, names: model.get_perturbation_effects(
        names, key_added=None
    ),
}
KNOW_SINGLES = (
    "predict_dose_response",
    "get_direct_effects",
    "get_perturbation_masks",
    "get_perturbation_effects",
)
DRAW = ("predict_ate", "predict_dose_response", "predict_interactions", "rank_unseen_pairs")
SCORE = ("get_elbo", "get_reconstruction_error", "get_iwelbo")
READ_CELLS = (
    "get_latent_representation",
    "get_normalized_expression",
    "posterior_predictive_sample",
    *SCORE,
)


def asked(method: str, /, *args: Any, **kwargs: Any) -> Callable[[Situation], Any]:
    return lambda situation: getattr(situation.shared, method)(*args, **kwargs)


def wrong(method: str, name: str, value: object, wanted: str, /, **others: Any) -> Case:
    shown = "nan" if isinstance(value, float) and np.isnan(value) else repr(value)
    return refused(
        f"`{method}`: `{name}` is {shown}",
        asked(method, **{name: value}, **others),
        InvalidArgumentError,
        f"`{name}`",
        wanted,
        shown,
    )


def set_stacking(model: Any, value: object) -> None:
    model.stacking = value


def no_rows(situation: Situation, found: Any) -> None:
    assert found.shape[0] == 0


def finite_effects(situation: Situation, found: Any) -> None:
    assert np.isfinite(found.X).all()


def interactions_without_doses(situation: Situation) -> Any:
    model = situation.train()
    situation.built = None
    return tl.genetic_interactions(model, combinations=["A+Q"])


UNKNOWN: list[Case] = [
    refused(
        "`tl.genetic_interactions`: an unknown perturbation",
        interactions_without_doses,
        UnknownPerturbationError,
        "'Q'",
    ),
    *(
        refused(
            f"`{name}`: an unknown perturbation",
            lambda situation, take=take: take(situation.shared, ["A+Q", "B+Q"]),
            UnknownPerturbationError,
            "'A+Q'" if name in KNOW_SINGLES else "'Q'",
        )
        for name, take in TAKE_PERTURBATIONS.items()
        if name != "rank_unseen_pairs"
    ),
    refused(
        "`tl.observed_interactions`: a combination that no cell carries",
        lambda situation: tl.observed_interactions(situation.adata, ["A+Q"]),
        UnknownPerturbationError,
        "'A+Q'",
    ),
    refused(
        "`tl.observed_interactions`: a number instead of combinations",
        lambda situation: tl.observed_interactions(situation.adata, 3),
        InvalidArgumentError,
        "`combinations` must be names, not 3",
    ),
    *(
        refused(
            f"`tl.perturbation_hits`: `{name}` is {value!r}",
            lambda situation, name=name, value=value: tl.perturbation_hits(
                situation.shared, **{name: value}
            ),
            InvalidArgumentError,
            f"`{name}`",
            repr(value),
        )
        for name, value in (("key_added", 3), ("n_genes", 2.5), ("min_cells", "few"), ("fdr", 2))
    ),
    refused(
        "`tl.decoy_check`: decoys that would take most of the control cells",
        lambda situation: tl.decoy_check(situation.shared, n_decoys=500),
        InvalidArgumentError,
        "500 decoys",
        "`n_decoys`",
    ),
    refused(
        "`tl.called_masks`: tests of other perturbations",
        lambda situation: tl.called_masks(
            situation.shared, tests=pd.DataFrame({"q_value": [0.1]}, index=["Q"])
        ),
        MissingKeyError,
        "`tests` has no perturbation",
    ),
    *(
        refused(
            f"`tl.target_knockdown`: {what}",
            lambda situation, targets=targets: tl.target_knockdown(
                situation.shared, target_genes=targets
            ),
            error,
            *named,
        )
        for what, targets, error, named in (
            ("no perturbation is a gene", None, MissingKeyError, ("'A', 'B'", "`target_genes`")),
            ("the gene of an unknown one", {"Q": "g0"}, UnknownPerturbationError, ("'Q'",)),
            ("a list of genes", ["g0"], InvalidArgumentError, ("`target_genes`", "['g0']")),
        )
    ),
    refused(
        "`pl.direct_effects`: one of the tables instead of all",
        lambda situation: pl.direct_effects(
            situation.shared.get_direct_effects(key_added=None).mean
        ),
        InvalidArgumentError,
        "`effects`",
        "model.get_direct_effects()",
        "DataFrame",
    ),
    *(
        refused(
            f"`tl.guide_efficacy`: `{name}` is {value!r}",
            lambda situation, name=name, value=value: tl.guide_efficacy(
                situation.shared, **{name: value}
            ),
            InvalidArgumentError,
            f"`{name}`",
            repr(value),
        )
        for name, value in (("fdr", 2), ("interval", 0), ("key_added", 3))
    ),
    refused(
        "`tl.context_interactions`: a column that is not there",
        lambda situation: tl.context_interactions(situation.shared, ["tissue"]),
        MissingKeyError,
        "'tissue'",
        "adata.obs has no column",
    ),
    refused(
        "`tl.guide_efficacy`: no guides are registered",
        lambda situation: tl.guide_efficacy(situation.shared),
        SAMSError,
        "No guides are registered",
        "guide_key",
    ),
    *(
        refused(
            f"`tl.context_effects`: `{name}` is {value!r}",
            lambda situation, name=name, value=value: tl.context_effects(
                situation.shared, **{name: value}
            ),
            InvalidArgumentError,
            f"`{name}`",
            repr(value),
        )
        for name, value in (("fdr", 0), ("key_added", 3))
    ),
    refused(
        "`tl.context_effects`: no contexts are registered",
        lambda situation: tl.context_effects(situation.shared),
        SAMSError,
        "has no contexts",
        "context_key",
    ),
    refused(
        "`pl.context_effects`: an AnnData without stored results",
        lambda situation: pl.context_effects(situation.adata),
        MissingKeyError,
        "'sams_context_effects'",
        "tl.context_effects(model)",
    ),
    refused(
        "`pl.context_effects`: another table",
        lambda situation: pl.context_effects(situation.adata.obs),
        MissingKeyError,
        "'context'",
        "tl.context_effects(model)",
    ),
    refused(
        "`pl.guide_efficacy`: an AnnData without stored results",
        lambda situation: pl.guide_efficacy(situation.adata),
        MissingKeyError,
        "'sams_guides'",
        "tl.guide_efficacy(model)",
    ),
    refused(
        "`pl.guide_efficacy`: another table",
        lambda situation: pl.guide_efficacy(situation.adata.obs),
        MissingKeyError,
        "'acts'",
        "tl.guide_efficacy(model)",
    ),
    refused(
        "`get_direct_effects` of a model made with `direct_effects=False`",
        lambda situation: situation.build(direct_effects=False).get_direct_effects(),
        SAMSError,
        "direct_effects=False",
    ),
    refused(
        "`model.stacking = True`, of a model made with `stacking=False`",
        lambda situation: set_stacking(situation.build(stacking=False), True),
        SAMSError,
        "stacking=False",
    ),
    refused(
        "`model.stacking` is set to 0.5",
        lambda situation: set_stacking(situation.shared, 0.5),
        InvalidArgumentError,
        "`stacking`",
        "0.5",
    ),
    refused(
        "`tl.genetic_interactions`: `key_added` is a list",
        lambda situation: tl.genetic_interactions(situation.shared, key_added=["mine"]),
        InvalidArgumentError,
        "`key_added`",
        "['mine']",
    ),
    refused(
        "`tl.top_genes`: an array instead of the programs",
        lambda situation: tl.top_genes(np.ones((3, 2))),
        InvalidArgumentError,
        "`programs` must be a DataFrame, not ndarray",
    ),
    refused(
        "`tl.top_genes`: text among the programs",
        lambda situation: tl.top_genes(situation.adata.obs[["perturbation"]]),
        InvalidArgumentError,
        "`programs` must be a table of numbers",
        "'perturbation'",
    ),
    *(
        refused(
            f"`pl.latent`: `{name}` is {value!r}",
            lambda situation, name=name, value=value: pl.latent(situation.adata, **{name: value}),
            error,
            *named,
        )
        for name, value, error, named in (
            ("basis", [], InvalidArgumentError, ("`basis` is empty",)),
            ("basis", "X_none", MissingKeyError, ("'X_none'", "get_latent_representation")),
            ("color", 3, MissingKeyError, ("no column 3",)),
            ("highlight", 5, InvalidArgumentError, ("`highlight`", "5")),
        )
    ),
    refused(
        "`evaluation.observed_ate`: a matrix instead of the AnnData",
        lambda situation: evaluation.observed_ate(situation.adata.X),
        InvalidArgumentError,
        "`adata` must be an AnnData",
    ),
    refused(
        "`evaluation.mmd`: cells with other genes",
        lambda situation: evaluation.mmd(np.ones((3, 2)), np.ones((3, 4))),
        InvalidArgumentError,
        "`predicted` has 2 and `observed` has 4",
    ),
    refused(
        "`pl.effect_volcano`: an unknown perturbation",
        lambda situation: pl.effect_volcano(
            situation.shared.predict_ate(method="mean", key_added=None, **FEW), "Q"
        ),
        MissingKeyError,
        "'Q'",
    ),
    refused(
        "`rank_unseen_pairs`: an unknown perturbation",
        asked("rank_unseen_pairs", ["A", "Q"]),
        UnknownPerturbationError,
        "'Q'",
    ),
    refused(
        "`differential_expression(group2=...)`: an unknown perturbation",
        asked("differential_expression", group1="A", group2="Q"),
        UnknownPerturbationError,
        "'Q'",
    ),
    refused(
        "an unknown perturbation with a name similar to a known one",
        asked("predict_ate", ["a"]),
        UnknownPerturbationError,
        "'a'",
        "did you mean 'A'?",
    ),
    *(
        refused(
            f"`{name}`: a number instead of perturbations",
            lambda situation, take=take: take(situation.shared, 3),
            InvalidArgumentError,
            "must be names, not 3",
        )
        for name, take in TAKE_PERTURBATIONS.items()
    ),
    refused(
        "`predict`: None instead of perturbations",
        asked("predict", None),
        InvalidArgumentError,
        "`perturbations`",
    ),
    refused(
        "an empty name",
        asked("predict_ate", [""]),
        InvalidPerturbationLabelError,
        "empty name",
    ),
    legal(
        "an empty list of perturbations",
        asked("predict_ate", [], **FEW, key_added=None),
        "an empty table",
        no_rows,
    ),
    refused(
        "`predict_interactions`: a single perturbation",
        asked("predict_interactions", ["A"]),
        SAMSError,
        "'A' is not a combination",
    ),
    refused(
        "`rank_unseen_pairs`: one perturbation",
        asked("rank_unseen_pairs", ["A"]),
        SAMSError,
        "at least two",
    ),
    refused(
        "`rank_unmeasured`: a model without features of perturbations",
        asked("rank_unmeasured"),
        SAMSError,
        "`perturbation_features`",
    ),
    wrong("rank_unmeasured", "top", 0, "at least 1"),
    wrong("rank_unmeasured", "objective", "norm", "one of"),
    refused(
        "fewer doses than labels",
        asked("predict_ate", ["A", "B"], dosages=[1.0]),
        InvalidDosageError,
        "1 dosage was",
        "2 labels",
    ),
    refused(
        "one number as doses",
        asked("predict_ate", ["A"], dosages=1.0),
        InvalidArgumentError,
        "`dosages`",
    ),
    *(
        refused(
            f"`{name}`: dose {dose} is requested",
            asked(name, ["A"], **{argument: [dose]}),
            InvalidDosageError,
            str(dose),
        )
        for name, argument in (
            ("predict_ate", "dosages"),
            ("predict", "dosages"),
            ("predict_dose_response", "doses"),
        )
        for dose in (-1, np.nan, 1e30)
    ),
    legal(
        "`predict_ate`: a dose larger than those measured",
        asked("predict_ate", ["A"], dosages=[50.0], key_added=None, **FEW),
        "extrapolated, with a warning",
        finite_effects,
        warns=("outside the measured range", "A at 50"),
    ),
    refused(
        "`predict_dose_response`: text as doses",
        asked("predict_dose_response", ["A"], doses=["high"]),
        InvalidDosageError,
        "'high'",
    ),
]


DRAWS: list[Case] = [
    *(
        wrong(method, "n_samples", value, "at least 1")
        for method in (*DRAW, *READ_CELLS)
        for value in (0, 2.5)
    ),
    *(wrong("predict_ate", "n_samples", value, "at least 1") for value in (-1, None, "many")),
    *(wrong(method, "n_posterior_samples", 1, "at least 2") for method in DRAW),
    *(
        wrong("predict_ate", "interval", value, "above 0 and below 1")
        for value in (0, 1, np.nan, "wide")
    ),
    wrong("predict_interactions", "interval", None, "above 0 and below 1"),
    *(
        wrong("predict_ate", name, value, "above 0")
        for name in ("library_size", "target_sum")
        for value in (0, -1, np.nan, "x")
    ),
    wrong("predict_ate", "method", "median", "['lognorm', 'lograte', 'mean']"),
    wrong("predict_ate", "basal", "posterior", "['prior', 'control']"),
    wrong("predict", "output", "logits", "counts", perturbations=["A"]),
    wrong("predict", "target_sum", -1, "above 0", perturbations=["A"]),
    wrong("predict_dose_response", "n_doses", 1, "at least 2"),
    wrong("get_latent_representation", "representation", "raw", "['basal', 'perturbed']"),
    wrong("get_normalized_expression", "library_size", "latent", "above 0"),
    wrong("get_latent_programs", "n_cells", 0, "at least 1"),
    wrong("get_latent_programs", "target_sum", 0, "above 0"),
    *(
        wrong("differential_expression", name, value, wanted, group1="A")
        for name, value, wanted in (
            ("n_samples", 0, "at least 1"),
            ("delta", -1, "at least 0"),
            ("fdr_target", 2, "below 1"),
            ("pseudocounts", -1, "at least 0"),
            ("mode", "both", "['vanilla', 'change']"),
        )
    ),
    refused(
        "`differential_expression`: no groups",
        asked("differential_expression", group1=[]),
        InvalidArgumentError,
        "`group1`",
    ),
    refused(
        "`differential_expression`: no groups for a column",
        asked("differential_expression", groupby="batch", group1=[]),
        InvalidArgumentError,
        "`group1` is empty",
    ),
    refused(
        "`differential_expression`: a column with one group",
        lambda situation: situation.shared.differential_expression(
            situation.shared.adata[situation.shared.adata.obs["batch"] == "x"].copy(),
            groupby="batch",
        ),
        SAMSError,
        "All cells are in one group, 'x'",
    ),
    refused(
        "`differential_expression`: a column that does not exist",
        asked("differential_expression", groupby="lane"),
        MissingKeyError,
        "'lane'",
    ),
    refused(
        "`differential_expression`: a group without cells",
        asked("differential_expression", groupby="batch", group1="z"),
        UnknownPerturbationError,
        "'z'",
        "'x', 'y'",
    ),
]
