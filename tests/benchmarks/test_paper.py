"""The paper's experiments name settings that exist, and run from one command to one table."""

import importlib
import inspect
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scvi

from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus
from scvi_sams.model._perturbation_model import PerturbationModel

FOLDER = Path(__file__).parents[2] / "benchmarks" / "paper"
NAMES = ("replogle-filtered", "norman-ood", "norman-data-efficiency")
CLASSES = (SAMSVAE, CPAVAE, SVAEPlus, ConditionalVAE)
ONE_OF_EACH_CLASS = ("sams-both", "cpa-correlated-basal", "svae-plus", "conditional-vae")
TINY = {
    "n_genes": 30,
    "n_controls": 40,
    "n_perturbations": 5,
    "cells_per_perturbation": 12,
    "n_combinations": 4,
    "cells_per_combination": 12,
    "n_latent": 3,
}


@pytest.fixture
def paper(monkeypatch):
    """Import a module of the experiments, which stand in a folder of scripts."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    scvi.settings.seed = None


@pytest.fixture
def experiments(paper):
    return paper("run").EXPERIMENTS


def run(paper, monkeypatch, folder, *arguments):
    """Run the command on a tiny screen; return the rows that it wrote."""
    monkeypatch.setattr(paper("screen"), "SIMULATED", TINY)
    out = folder / "out.csv"
    common = ["--data", "simulated", "--out", str(out), "--results", str(folder / "results")]
    paper("run").main([*arguments, *common])
    return pd.read_csv(out)


@pytest.mark.parametrize("name", NAMES)
def test_configurations_name_arguments_that_exist(experiments, name):
    experiment = experiments[name]
    assert {model.model_class for model in experiment.models.values()} == set(CLASSES)
    for model in experiment.models.values():
        assert model.arguments.keys() <= inspect.signature(model.model_class).parameters.keys()
    for row in experiment.published:
        assert row.model in experiment.models
        assert row.fraction in (experiment.fractions or (None,))
    if experiment.reference is not None:
        assert experiment.reference[0] in experiment.models
        assert experiment.reference[1] in experiment.fractions


@pytest.mark.parametrize("name", NAMES)
def test_the_objective_is_the_papers(experiments, name):
    experiment = experiments[name]
    for model in experiment.models.values():
        # An argument that is not named would silently take a default of the package.
        assert (model.arguments["n_particles"], model.arguments["kl_estimator"]) == (
            5,
            "monte_carlo",
        )
        if model.model_class is not ConditionalVAE:
            assert model.arguments["evidence_cells"] is None
            assert model.arguments["global_kl_weight"] == 1
        if model.model_class in (SAMSVAE, CPAVAE):
            assert model.arguments["effect_prior_scale"] == 1
        if model.model_class in (SAMSVAE, SVAEPlus):
            assert model.arguments["mask_initial_probability"] == 0.5
            assert model.arguments["mask_temperature"] == 1
    assert experiment.scoring.n_importance_samples == 100
    assert experiment.scoring.n_ate_draws == 2500


def test_one_command_runs_every_class_and_never_runs_it_twice(paper, monkeypatch, tmp_path, capsys):
    command = ["norman-ood", "--quick", "--steps", "3", "--fractions", "0"]
    command += ["--models", *ONE_OF_EACH_CLASS]
    rows = run(paper, monkeypatch, tmp_path, *command)
    printed = capsys.readouterr().out
    models = rows[rows["iwelbo"].notna()]
    assert tuple(models["model"]) == ONE_OF_EACH_CLASS
    assert (models["n_steps"] == 3).all()
    assert (models["iwelbo"] < 0).all()
    assert rows["ate_pearson_held_out_cells"].between(-1, 1).all()
    assert (rows["ate_pearson_held_out_cells"] != rows["ate_pearson_all_cells"]).all()
    assert "0.682" in printed  # the paper's number

    def refuse(*_, **__):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(PerturbationModel, "train", refuse)
    again = run(paper, monkeypatch, tmp_path, *command)
    pd.testing.assert_frame_equal(again, rows)
    with pytest.raises(AssertionError, match="trained again"):
        run(paper, monkeypatch, tmp_path, *command, "--seeds", "1")


@pytest.mark.parametrize("name", ["replogle-filtered", "norman-data-efficiency"])
def test_other_experiments_run(paper, monkeypatch, tmp_path, name):
    command = [name, "--quick", "--steps", "2", "--models", "conditional-vae"]
    rows = run(paper, monkeypatch, tmp_path, *command)
    assert rows.loc[rows["model"] == "conditional-vae", "iwelbo"].notna().all()
    # Every label is tested and known, so no prediction is missing.
    assert (rows["n_labels_without_prediction"] == 0).all()


def test_held_out_cells_are_never_trained_on_and_have_controls(paper, monkeypatch, experiments):
    monkeypatch.setattr(paper("screen"), "SIMULATED", TINY)
    adata, _ = paper("screen").load_cells("simulated")
    for name, experiment in experiments.items():
        screen = paper("screen").Screen(adata, delimiter=experiment.delimiter)
        fraction = {} if experiment.fractions is None else {"fraction": 0.75}
        split = experiment.split(
            screen.labels, control=("control",), delimiter=screen.delimiter, **fraction
        )
        cells = paper("scoring").held_out_cells(screen, split)
        assert not np.intersect1d(cells, split.train).size, name
        assert "control" in screen.labels[cells], name
        assert np.isin(split.test, cells).all(), name


def test_table_takes_the_reference_of_the_same_seed_away(paper, experiments):
    rows = [
        ("sams-both", 0.0, 0, -100.0, 0.5),
        ("conditional-vae", 0.0, 0, -103.0, 0.4),
        ("sams-both", 0.0, 1, -200.0, 0.7),
        ("conditional-vae", 0.0, 1, -201.0, 0.8),
    ]
    columns = ["model", "fraction", "seed", "iwelbo", "ate_pearson_all_cells"]
    results = pd.DataFrame(rows, columns=columns).assign(ate_pearson_held_out_cells=0.25)
    table = paper("table").table(results, experiments["norman-ood"])
    row = table.loc[("conditional-vae", 0.0)]
    assert row["seeds", ""] == 2
    assert row["IWELBO - reference", "ours"] == -2  # the mean of -3 and -1
    assert row["IWELBO - reference", "sd"] == pytest.approx(2**0.5)
    assert row["IWELBO - reference", "paper"] == -2.43
    assert row["ATE Pearson", "all cells"] == pytest.approx(0.6)
    assert row["ATE Pearson", "held-out"] == 0.25
    assert row["ATE Pearson", "paper"] == 0.689


def test_table_has_the_papers_numbers_without_fractions_too(paper, experiments):
    replogle = experiments["replogle-filtered"]
    rows = [("no model: mean", float("nan")), *((name, -1.5) for name in replogle.models)]
    results = pd.DataFrame(rows, columns=["model", "iwelbo"]).assign(
        fraction=None, seed=0, ate_pearson_all_cells=0.5, ate_pearson_held_out_cells=0.25
    )
    table = paper("table").table(results, replogle)
    assert list(table.index) == [(name, "all") for name, _ in rows]
    assert table.loc[("sams-both", "all"), ("IWELBO, test", "paper")] == -1756.27
    assert table.loc[("sams-both", "all"), ("ATE Pearson", "paper")] == 0.765
    assert table[("ATE Pearson", "paper")].isna().sum() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["norman-ood", "--models", "sams-mean-field"], "no model sams-mean-field; there are"),
        (["replogle-filtered", "--fractions", "0.5"], "replogle-filtered has no fractions"),
    ],
)
def test_refuses_what_an_experiment_does_not_have(paper, arguments, message, capsys):
    with pytest.raises(SystemExit):
        paper("run").main([*arguments, "--data", "simulated"])
    assert message in capsys.readouterr().err
