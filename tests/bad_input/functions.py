"""A valid call of every public function of ``tl``, ``pl``, ``evaluation`` and ``features``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from bad_input.situation import SIZES, TRAINING
from scvi_sams import SAMSVAE, evaluation, features, pl, tl
from scvi_sams.model._direct_effects import DirectEffectTables

Call = tuple[Callable[..., Any], dict[str, Any]]

FEW = {"n_samples": 4, "n_posterior_samples": 2}
NAMES = ["A", "B", "C"]
LABELS = ["control", "A", "B", "C", "A+B", "A+C"] * 12
GENES = [f"g{i}" for i in range(4)]


def counts() -> ad.AnnData:
    x = 1 + np.random.default_rng(0).poisson(4, (len(LABELS), len(GENES)))
    return ad.AnnData(
        x.astype(np.float32),
        obs=pd.DataFrame(
            {
                "perturbation": LABELS,
                "line": ["x", "x", "y", "y", "x", "y", "y", "x"] * 9,
                "guide": [label.replace("+", "1+") + "1" for label in LABELS],
            },
            index=[f"c{i}" for i in range(len(LABELS))],
        ),
        var=pd.DataFrame(index=GENES),
    )


def table(rows: list[str], columns: list[str], seed: int = 0) -> pd.DataFrame:
    values = np.random.default_rng(seed).uniform(0.05, 1, (len(rows), len(columns)))
    return pd.DataFrame(values, index=rows, columns=columns)


def trained(adata: ad.AnnData) -> Any:
    SAMSVAE.setup_anndata(adata, guide_key="guide")
    model = SAMSVAE(adata, **SIZES)
    model.train(**TRAINING)
    return model


def trained_in_contexts(adata: ad.AnnData) -> Any:
    SAMSVAE.setup_anndata(adata, context_key="line")
    model = SAMSVAE(adata, direct_effects=False, stacking=False, **SIZES)
    model.train(**TRAINING)
    return model


def trained_with_features(adata: ad.AnnData) -> Any:
    SAMSVAE.setup_anndata(adata)
    model = SAMSVAE(adata, perturbation_features=table(NAMES, ["x", "y"]), **SIZES)
    model.train(**TRAINING)
    return model


def calls() -> dict[str, Call]:
    adata = counts()
    model = trained(adata)
    of_results = tables_of_models(model) | figures(model) | effects(adata)
    return of_results | metrics() | splits(adata) | of_features()


def tables_of_models(model: Any) -> dict[str, Call]:
    latents = [f"latent_{i}" for i in range(3)]
    programs, masks = table(GENES, latents), table(NAMES, latents)
    pairs = {"combinations": ["A+B"]}
    direction = model.predict_interactions(["A+B"], method="lognorm", **FEW)
    models = {"models": [model, model]}
    return {
        "tl.top_genes": (tl.top_genes, {"programs": programs}),
        "tl.gene_ranking": (tl.gene_ranking, {"programs": programs, "latent": "latent_0"}),
        "tl.latent_perturbations": (tl.latent_perturbations, {"masks": masks, "effects": masks}),
        "tl.perturbation_similarity": (tl.perturbation_similarity, {"table": masks}),
        "tl.hierarchical_order": (tl.hierarchical_order, {"similarity": np.eye(3)}),
        "tl.cell_counts": (tl.cell_counts, {"model": model}),
        "tl.called_masks": (tl.called_masks, {"model": model}),
        "tl.entry_q_values": (tl.entry_q_values, {"model": model, "key_added": None}),
        "tl.decoy_check": (tl.decoy_check, {"model": model, "n_decoys": 2, "n_cells": 2}),
        "tl.perturbation_hits": (tl.perturbation_hits, {"model": model, **FEW}),
        "tl.context_interactions": (tl.context_interactions, {"model": model}),
        "tl.target_knockdown": (
            tl.target_knockdown,
            {"model": model, "target_genes": {"A": "g0"}, **FEW},
        ),
        "tl.context_effects": (
            tl.context_effects,
            {"model": trained_in_contexts(counts()), "perturbations": ["A"]},
        ),
        "tl.feature_importance": (
            tl.feature_importance,
            {"model": trained_with_features(counts())},
        ),
        "tl.guide_efficacy": (tl.guide_efficacy, {"model": model, **FEW}),
        "tl.genetic_interactions": (
            tl.genetic_interactions,
            {"model": model, **pairs, **FEW, "indices": np.arange(72)},
        ),
        "tl.observed_interactions": (
            tl.observed_interactions,
            {"adata": model.adata, **pairs, "direction": direction},
        ),
        "evaluation.basal_leakage": (evaluation.basal_leakage, {"model": model}),
        "evaluation.mask_stability": (evaluation.mask_stability, models),
        "evaluation.consensus_masks": (evaluation.consensus_masks, models),
    }


def figures(model: Any) -> dict[str, Call]:
    latents = [f"latent_{i}" for i in range(3)]
    programs, masks = table(GENES, latents), table(NAMES, latents)
    predicted = model.predict_ate(NAMES, key_added=None, **FEW)
    scores = pd.DataFrame(
        {
            "method": np.repeat(["additive", "mean of perturbations"], 2),
            "seed": 0,
            "perturbation": ["A", "B"] * 2,
            "mode": "perturbench",
            "metric": "rmse_average",
            "value": [1.0, 2.0, 3.0, 4.0],
            "higher_is_better": False,
            "status": "ok",
            "message": "",
            "chance": np.nan,
            "n_cells": 3,
        }
    )
    both = pd.concat([scores, scores.assign(metric="rank_rmse_average")], ignore_index=True)
    summary = evaluation.BenchmarkResult(both, pd.DataFrame(), {}).summary()
    curves = ad.AnnData(
        np.ones((2, 4)),
        obs=pd.DataFrame(
            {"perturbation": "A", "dosage": [1.0, 2.0], "is_measured_range": True}, index=["0", "1"]
        ),
        var=pd.DataFrame(index=GENES),
        layers={"interval_low": np.zeros((2, 4)), "interval_high": np.full((2, 4), 2.0)},
    )
    importance = pd.DataFrame(
        {"feature": NAMES, "latent": "latent_0", "part": "effect", "weight": 1.0, "lfsr": 0.1}
    )
    pairs = pd.DataFrame({"score": [1.0, -1.0], "other": [0.5, 0.1]}, index=["A+B", "A+C"])
    curve = pd.DataFrame(
        {
            "method": ["A", "A"],
            "cells_per_perturbation": [10, 20],
            "n_cells": [10.0, 20.0],
            "pearson": [0.5, 0.7],
        }
    )
    bounds = dict.fromkeys(["rate_low", "rate_high", "effect_low", "effect_high"], 0.5)
    flags = {"acts": True, "does_nothing": False, "differs_from_siblings": False}
    rates = {"perturbation": ["A", "A"], "response_rate": 0.5, "effect_size": 0.5}
    guides = pd.DataFrame(rates | bounds | flags, index=["A1", "A2"])
    in_contexts = {"context": ["x", "y"], "is_measured": True, "acts": True, "differs": False}
    in_contexts |= {"perturbation": "A", "effect": 1.0, "pattern": "shared"}
    history = {"elbo_train": pd.DataFrame({"elbo_train": [2.0, 1.0]})}
    calibration = evaluation.mask_calibration(masks, masks > 0.5)
    return {
        "pl.ate_scatter": (
            pl.ate_scatter,
            {"predicted": predicted, "observed": evaluation.observed_ate(model.adata)[:3].copy()},
        ),
        "pl.benchmark_metric": (
            pl.benchmark_metric,
            {"summary": summary, "metric": "rmse_average"},
        ),
        "pl.benchmark_specificity": (pl.benchmark_specificity, {"summary": summary}),
        "pl.benchmark_perturbations": (
            pl.benchmark_perturbations,
            {"scores": both, "method": "additive"},
        ),
        "pl.context_effects": (
            pl.context_effects,
            {"effects": pd.DataFrame(in_contexts), "perturbations": ["A"]},
        ),
        "pl.direct_effects": (
            pl.direct_effects,
            {"effects": DirectEffectTables(*(table(NAMES, GENES, i) for i in range(3)))}
            | {"max_lfsr": 0.9},
        ),
        "pl.dose_response": (pl.dose_response, {"curves": curves, "perturbation": "A"}),
        "pl.effect_volcano": (pl.effect_volcano, {"ate": predicted, "perturbation": "A"}),
        "pl.feature_importance": (
            pl.feature_importance,
            {"importance": importance, "max_lfsr": 0.9},
        ),
        "pl.guide_efficacy": (pl.guide_efficacy, {"guides": guides, "value": "effect_size"}),
        "pl.interaction_matrix": (
            pl.interaction_matrix,
            {"interactions": pairs, "lower": "other"},
        ),
        "pl.learning_curve": (pl.learning_curve, {"curve": curve}),
        "pl.mask_calibration": (pl.mask_calibration, {"calibration": calibration}),
        "pl.masks": (pl.masks, {"masks": masks, "effects": masks, "threshold": 0.5}),
        "pl.program_genes": (pl.program_genes, {"programs": programs, "latent": "latent_0"}),
        "pl.similarity": (
            pl.similarity,
            {"similarity": pd.DataFrame(np.eye(3), index=NAMES, columns=NAMES)},
        ),
        "pl.training_curves": (pl.training_curves, {"history": history}),
    }


def effects(adata: ad.AnnData) -> dict[str, Call]:
    normalised = adata.copy()
    normalised.X = np.log1p(normalised.X)
    singles = evaluation.observed_ate(adata, perturbations=NAMES)
    predictions = evaluation.Additive().fit(normalised).predict(["A+B", "A+C"])
    both = {"predicted": singles, "observed": singles}
    pairs = ["A+B"]
    return {
        "evaluation.observed_ate": (evaluation.observed_ate, {"adata": adata}),
        "evaluation.additive_ate": (
            evaluation.additive_ate,
            {"singles": singles, "combinations": pairs},
        ),
        "evaluation.mean_ate": (evaluation.mean_ate, {"ate": singles, "perturbations": pairs}),
        "evaluation.align_ate": (evaluation.align_ate, both),
        "evaluation.compare_ate": (evaluation.compare_ate, both),
        "evaluation.split_half": (evaluation.split_half, {"test_adata": normalised}),
        "evaluation.score_predictions": (
            evaluation.score_predictions,
            {"predicted": predictions, "observed": normalised, "modes": ["sams", "perturbench"]},
        ),
    }


def metrics() -> dict[str, Call]:
    latents = [f"latent_{i}" for i in range(3)]
    masks = table(NAMES, latents)
    truth = {"masks": masks, "true_masks": masks > 0.5}
    cells = np.random.default_rng(0).normal(size=(6, 3))
    both = {"predicted": cells, "observed": cells + 1}
    return {
        "evaluation.active_at_fdr": (evaluation.active_at_fdr, {"masks": masks}),
        "evaluation.align_latents": (
            evaluation.align_latents,
            {"effects": masks, "reference": masks},
        ),
        "evaluation.mask_calibration": (evaluation.mask_calibration, truth),
        "evaluation.mask_recovery": (evaluation.mask_recovery, truth),
        "evaluation.match_latents": (evaluation.match_latents, truth),
        "evaluation.mean_correlation_coefficient": (
            evaluation.mean_correlation_coefficient,
            {"latents": cells, "true_latents": cells + 1},
        ),
        "evaluation.energy_distance": (evaluation.energy_distance, both),
        "evaluation.mmd": (evaluation.mmd, both),
        "evaluation.median_bandwidth": (evaluation.median_bandwidth, {"cells": cells}),
        "evaluation.centroid_accuracy": (evaluation.centroid_accuracy, both),
    }


def splits(adata: ad.AnnData) -> dict[str, Call]:
    labels = {"labels": adata.obs["perturbation"]}
    split = evaluation.random_cells(adata.obs["perturbation"])
    parts = {part: getattr(split, part) for part in ("train", "validation", "test")}
    half = {"fraction": 0.5}
    return {
        "evaluation.canonical_labels": (evaluation.canonical_labels, labels),
        "evaluation.hold_out_combinations": (
            evaluation.hold_out_combinations,
            {**labels, "n_held_out": 1},
        ),
        "evaluation.split_cells": (evaluation.split_cells, {**labels, "held_out": ["A+B"]}),
        "evaluation.random_cells": (evaluation.random_cells, labels),
        "evaluation.norman_ood": (evaluation.norman_ood, {**labels, **half}),
        "evaluation.norman_data_efficiency": (
            evaluation.norman_data_efficiency,
            {**labels, **half},
        ),
        "evaluation.combination_hold_out": (evaluation.combination_hold_out, {**labels, **half}),
        "evaluation.single_hold_out": (evaluation.single_hold_out, {**labels, "fraction": 0.7}),
        "evaluation.perturbation_hold_out": (
            evaluation.perturbation_hold_out,
            {**labels, "fraction": 0.5},
        ),
        "evaluation.covariate_transfer": (
            evaluation.covariate_transfer,
            {**labels, "covariate": adata.obs["line"], **half},
        ),
        "evaluation.make_split": (
            evaluation.make_split,
            {**labels, **parts, "name": "mine", "covariate": adata.obs["line"]},
        ),
        "evaluation.check_split": (evaluation.check_split, {"split": split, **labels}),
    }


def of_features() -> dict[str, Call]:
    values = table(NAMES, GENES)
    return {
        "features.as_feature_table": (
            features.as_feature_table,
            {"features": "mine", "uns": {"mine": values}},
        ),
        "features.match_genes": (
            features.match_genes,
            {"table": values, "perturbations": NAMES, "aliases": {"a": "A"}},
        ),
        "features.svd": (features.svd, {"table": values, "n_components": 2}),
    }
