"""One model trained and scored as the paper does, and what no model is needed for."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import anndata as ad
import numpy as np
import scvi
from experiment import Model, Scoring
from screen import Screen

from scvi_sams import evaluation, paper_settings
from scvi_sams.evaluation import Split
from scvi_sams.train import interrupts_raise

_LABELS_AT_A_TIME = 50
"""Each is drawn 2,500 times, for every latent dimension and hidden unit of the effects."""


def fit_and_score(
    screen: Screen,
    fingerprint: str,
    split: Split,
    model: Model,
    n_steps: int,
    scoring: Scoring,
    seed: int,
) -> dict[str, float]:
    """Train a model and return its scores.

    ``fingerprint`` (of the screen and the package) is not read: results are kept under it.
    """
    scvi.settings.seed = seed
    started = time.perf_counter()
    fitted = fit(screen, split, model, n_steps)
    seconds = time.perf_counter() - started
    # Scores draw random numbers too, which must not depend on how many training took.
    scvi.settings.seed = seed
    iwelbo = fitted.get_iwelbo(
        indices=split.test, n_samples=scoring.n_importance_samples, key_added=None
    )
    predicted = predict_ate(fitted, tested_labels(screen, split), scoring.n_ate_draws)
    return {
        "iwelbo": float(iwelbo),
        **ate_scores(screen, split, predicted),
        "n_steps": fitted.trainer.global_step,
        "training_seconds": seconds,
    }


def fit(screen: Screen, split: Split, model: Model, n_steps: int) -> Any:
    """Register the screen and train for a number of steps."""
    model.model_class.setup_anndata(screen.adata, **screen.registration)  # type: ignore[attr-defined]
    fitted = model.model_class(screen.adata, **model.arguments)
    # scvi-tools wants every cell in one of the three parts, and never reads the last one.
    rest = np.setdiff1d(np.arange(screen.adata.n_obs), [*split.train, *split.validation])
    with interrupts_raise():  # what is kept was trained to its end
        fitted.train(
            **paper_settings(model.model_class, n_steps=n_steps).train,
            datasplitter_kwargs={"external_indexing": [split.train, split.validation, rest]},
            check_val_every_n_epoch=n_steps,  # nothing is chosen by it
            enable_progress_bar=False,
        )
    return fitted


def predict_ate(fitted: Any, labels: Sequence[str], n_draws: int) -> ad.AnnData:
    """Predict effects as the paper does: each draw has its own masks, effects and basal state."""
    tables = [
        fitted.predict_ate(
            labels[start : start + _LABELS_AT_A_TIME],
            method="lognorm",
            n_samples=n_draws,
            n_posterior_samples=n_draws,
            basal="prior",
            key_added=None,
        )
        for start in range(0, len(labels), _LABELS_AT_A_TIME)
    ]
    return ad.concat(tables, uns_merge="same")


def ate_scores(screen: Screen, split: Split, predicted: ad.AnnData) -> dict[str, float]:
    """Compare predicted effects with those of all cells (paper) and of held-out cells (honest)."""
    labels = tested_labels(screen, split)
    scores: dict[str, float] = {}
    for name, cells in (("all_cells", None), ("held_out_cells", held_out_cells(screen, split))):
        compared = (
            evaluation.compare_ate(
                predicted, screen.observed_ate(labels, cells), delimiter=screen.delimiter
            )
            .loc["all"]
            .to_dict()
        )
        scores |= {
            f"ate_pearson_{name}": compared["pearson"],
            f"ate_pearson_top20_{name}": compared["pearson_top"],
            f"ate_r2_{name}": compared["r2"],
            "n_labels_without_prediction": compared["missing"],
        }
    return scores


def baseline_scores(screen: Screen, split: Split) -> dict[str, dict[str, float]]:
    """Score predictions that need no model, from training and validation cells.

    ``"additive"``: the sum of the observed effects of the single perturbations. A combination one
    of whose perturbations has no cells of its own has no prediction, which is scored as no effect.
    ``"mean"``: the mean effect of all perturbations in training.
    """
    known = np.concatenate([split.train, split.validation])
    control = screen.control[0]
    trained = screen.observed_ate(sorted(set(screen.labels[known]) - {control}), known)
    tested = tested_labels(screen, split)
    predictable = [
        label for label in tested if set(_parts(label, screen)) <= set(trained.obs_names)
    ]
    return {
        "no model: additive": ate_scores(
            screen,
            split,
            evaluation.additive_ate(trained, predictable, delimiter=screen.delimiter),
        ),
        "no model: mean": ate_scores(screen, split, evaluation.mean_ate(trained, tested)),
    }


def tested_labels(screen: Screen, split: Split) -> list[str]:
    """Labels of the test cells, control left out."""
    return sorted(set(screen.labels[split.test]) - {screen.control[0]})


def held_out_cells(screen: Screen, split: Split) -> np.ndarray:
    """Test cells, with validation controls where controls are never tested."""
    is_control = screen.labels == screen.control[0]
    if is_control[split.test].any():
        return split.test
    return np.union1d(split.test, split.validation[is_control[split.validation]])


def _parts(label: str, screen: Screen) -> list[str]:
    return [label] if screen.delimiter is None else label.split(screen.delimiter)
