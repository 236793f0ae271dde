"""When cells may begin to escape, of which perturbations, and trainings that are cut short."""

import json
import re
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from lightning.pytorch import Callback

from scvi_sams import SAMSVAE
from scvi_sams._group_tests import group_tests
from scvi_sams.exceptions import SAMSError
from scvi_sams.labels._parsing import encode_labels
from scvi_sams.labels._spelling import Spelling
from scvi_sams.train._length import TrainingLength
from scvi_sams.train._responses import (
    evidence_of_cells,
    perturbations_that_act,
    warn_of_rare_responses,
)
from train.screens import SMALL_MODEL, make_screen

pytestmark = pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")

STAGES = ["dense", "responding", "settling", "masks", "decay"]
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "devices": 1, "train_size": 0.8}


@pytest.fixture(autouse=True)
def no_seed_afterwards():
    yield
    scvi.settings.seed = None


# Which perturbations cells can respond to --------------------------------------------------------


def states_of(labels, effects, n_latent=4, seed=0):
    """Latent states of cells: normal, and moved along the first dimension by label."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(len(labels), n_latent)) @ rng.normal(size=(n_latent, n_latent))
    direction = np.linalg.cholesky(np.cov(states.T))[:, 0]
    return states + np.outer([effects.get(label, 0.0) for label in labels], direction)


def compared(labels, states, strata=None):
    labels = encode_labels(pd.Series(labels), spelling=Spelling.of("control", "+"))
    strata = np.zeros(len(labels), dtype=int) if strata is None else strata
    return group_tests(states, labels, strata)


def screen_of_labels(n_perturbations, n_each, n_controls):
    names = [f"P{i:02d}" for i in range(n_perturbations)]
    return np.array(["control"] * n_controls + np.repeat(names, n_each).tolist())


def test_distances_are_those_of_mahalanobis():
    labels = screen_of_labels(3, 300, 600)
    states = states_of(labels, {"P00": 0.8, "P01": 2.0})
    found = compared(labels, states)
    controls = states[labels == "control"]
    for place, name in enumerate(["P00", "P01", "P02"]):
        cells = states[labels == name]
        within = np.cov(controls.T) * 599 + np.cov(cells.T) * 299
        apart = cells.mean(axis=0) - controls.mean(axis=0)
        distance = apart @ np.linalg.solve(within / 898, apart)
        chance = 4 * (1 / 300 + 1 / 600)
        assert found.squared_distance[place] == pytest.approx(distance - chance, rel=0.02, abs=1e-3)
    np.testing.assert_allclose(np.sqrt(found.squared_distance[:2]), [0.8, 2.0], atol=0.25)
    assert found.n_features.tolist() == [4, 4, 4]
    np.testing.assert_allclose(found.size, 300 * 600 / 900)


def test_distances_within_batches_of_other_proportions():
    """A batch moves states by far more than the perturbation, which most of its cells carry."""
    labels = screen_of_labels(1, 400, 400)
    rng = np.random.default_rng(1)
    batch = (rng.random(800) < np.where(labels == "control", 0.2, 0.8)).astype(int)
    states = states_of(labels, {"P00": 1.0}) + 5.0 * batch[:, None]
    found = compared(labels, states, batch)
    assert np.sqrt(found.squared_distance[0]) == pytest.approx(1.0, abs=0.15)
    n = [[(labels[batch == b] == name).sum() for name in ("P00", "control")] for b in (0, 1)]
    assert found.size[0] == pytest.approx(sum(a * b / (a + b) for a, b in n))


def test_few_cells_are_no_further_apart_than_many():
    """The test then looks at fewer dimensions, by which the distance is counted."""
    labels = screen_of_labels(40, 20, 40)
    states = states_of(labels, {}, n_latent=30)
    states[:, 0] += 1.5 * (labels != "control") * states[:, 0].std()
    found = compared(labels, states)
    assert found.n_features.tolist() == [5] * 40
    assert 0.5 < np.median(np.sqrt(np.maximum(found.squared_distance, 0))) < 2.2


def test_permuted_labels_have_no_perturbation_that_acts():
    labels = screen_of_labels(20, 40, 200)
    states = states_of(labels, {})
    rng = np.random.default_rng(2)
    called = [perturbations_that_act(compared(rng.permutation(labels), states)) for _ in range(20)]
    assert np.mean([found.any() for found in called]) <= 0.15


def test_those_that_act_are_found_and_small_effects_are_not():
    labels = screen_of_labels(20, 150, 500)
    effects = {f"P{i:02d}": size for i, size in enumerate([1.0] * 5 + [0.25] * 5)}
    acts = perturbations_that_act(compared(labels, states_of(labels, effects)))
    assert acts.tolist() == [True] * 5 + [False] * 15


def test_without_cells_nothing_acts():
    labels = np.array(["control"] * 30 + ["A"] * 30)
    encoded = encode_labels(pd.Series(labels), spelling=Spelling.of("control", "+"))
    alone = encoded[np.flatnonzero(labels == "A")]
    found = group_tests(states_of(labels, {"A": 5.0})[labels == "A"], alone, np.zeros(30, int))
    assert np.isnan(found.statistic).all()
    assert found.squared_distance.tolist() == [0.0]
    assert perturbations_that_act(found).tolist() == [False]


# When ---------------------------------------------------------------------------------------------


def test_the_responding_stage_follows_the_dense_one():
    for has_responses, stages in [(True, STAGES), (False, [s for s in STAGES if s[0] != "r"])]:
        length, seen = TrainingLength(400, "dense", has_responses), []
        for epoch in range(1, 200):
            if not seen or seen[-1] != length.stage:
                seen.append(length.stage)
            length.observe(5.0, epoch, 30 * epoch)
            if length.stage == "over":
                break
        assert seen == stages
    again = TrainingLength(400, "steady", True)
    assert again.observe(1.0, 1, 1000).ended is None
    assert again.stage == "steady"


def screen(**changes):
    settings = {
        "n_controls": 200,
        "cells_per_perturbation": 80,
        "mask_probability": 0.8,
        "effect_scale": 4.0,
        "library_size": 1000.0,
        "escape_rate": 0.3,
        "guides_per_perturbation": 2,
    }
    return make_screen(**(settings | changes))


@pytest.fixture(scope="module")
def escaping():
    return screen()


def untrained(adata, setup=None, **changes):
    scvi.settings.seed = 3
    adata = adata.copy()
    SAMSVAE.setup_anndata(adata, **(setup or {}))
    return SAMSVAE(adata, **(SMALL_MODEL | {"responses": True} | changes))


def train(model, path=None, *callbacks, max_epochs=8, **changes):
    settings = QUIET | {"batch_size": 32, "plan_kwargs": {"lr": 1e-2}} | changes
    model.train(max_epochs, checkpoint_path=path, callbacks=list(callbacks), **settings)
    return model


def train_until_held_out_cells_say(model, path=None, *callbacks):
    plan = {"lr": 1e-2, "lr_schedule": "held_out"}
    return train(model, path, *callbacks, max_epochs=16, plan_kwargs=plan)


class Watch(Callback):
    """Whether cells may escape in each epoch, and whether all masks are on."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, plan, batch, batch_idx):
        if batch_idx == 0:
            module = plan.module
            assert module.has_branches == bool(module.responses.is_on)
            held_out = plan._held_out
            stage = None if held_out is None else held_out.length.stage
            self.seen.append((stage, module.has_branches, module.masks.all_on))


def test_planned_responses_begin_before_the_dense_phase_ends(escaping):
    watch = Watch()
    model = train(untrained(escaping), None, watch)
    # Half of eight epochs are dense, a quarter of them with responses.
    assert [on for _, on, _ in watch.seen] == [False] * 3 + [True] * 5
    assert [dense for _, _, dense in watch.seen] == [True] * 4 + [False] * 4
    assert "kl_responses_train" in model.history
    assert model.module.responses.acts.any()


@pytest.fixture(scope="module")
def whole(escaping):
    watch = Watch()
    model = train_until_held_out_cells_say(untrained(escaping), None, watch)
    scvi.settings.seed = None
    return model, watch


def test_held_out_cells_decide_when_they_begin(whole):
    model, watch = whole
    stages = list(dict.fromkeys(stage for stage, _, _ in watch.seen))
    assert stages == STAGES
    for stage, is_on, dense in watch.seen:
        assert is_on == (stage != "dense")
        assert dense == (stage in STAGES[:3])
    ending = model.trainings_[-1]["ending"]
    assert re.findall(r"The (\w+) stage", ending) == STAGES
    assert model.module.responses.acts.any()
    assert bool(model.module.responses.is_on)


def test_without_responses_there_are_none(escaping):
    model = train(untrained(escaping, responses=False), max_epochs=2)
    assert model.module.responses is None
    assert not model.module.has_branches
    assert not [name for name in model.module.state_dict() if "responses" in name]
    assert "kl_responses_train" not in model.history


@pytest.mark.parametrize("covariate", ["continuous", "batch"])
def test_covariates_do_not_hide_what_acts(escaping, covariate):
    adata = escaping.copy()
    rng = np.random.default_rng(0)
    adata.obs["age"] = rng.normal(size=adata.n_obs)
    adata.obs["lane"] = pd.Categorical(rng.choice(["a", "b"], adata.n_obs))
    setup = (
        {"continuous_covariate_keys": ["age"]}
        if covariate == "continuous"
        else {"batch_key": "lane"}
    )
    model = train(untrained(adata, setup), max_epochs=12)
    assert model.module.responses.acts.any()


def test_where_labels_mean_nothing_no_cell_escapes(escaping, caplog):
    adata = escaping.copy()
    order = np.random.default_rng(0).permutation(adata.n_obs)
    adata.obs["perturbation"] = adata.obs["perturbation"].to_numpy()[order]
    model = train(untrained(adata))
    responses = model.module.responses
    assert not responses.acts.any()
    assert (responses.rates == 1).all()
    assert np.isnan(model.get_response_probability()).all()
    assert "cells of no perturbation differ enough" in caplog.text


# Training that is cut short -----------------------------------------------------------------------


class Stop(Callback):
    """Fail in an epoch (from 0), in the middle of its steps."""

    def __init__(self, epoch):
        self.epoch = epoch

    def stop(self):
        raise ZeroDivisionError

    def on_train_batch_start(self, trainer, plan, batch, batch_idx):
        if trainer.current_epoch == self.epoch and batch_idx == 1:
            self.stop()


class PressCtrlC(Stop):
    def stop(self):
        signal.raise_signal(signal.SIGINT)


def assert_same_weights(found, expected):
    """Up to rounding, which was not always the same for the same step in another process."""
    for name, value in expected.module.state_dict().items():
        torch.testing.assert_close(
            found.module.state_dict()[name], value, rtol=2e-3, atol=2e-3, msg=name
        )


@pytest.mark.parametrize("stage", STAGES)
def test_it_goes_on_from_any_stage_to_the_same_weights(whole, escaping, tmp_path, stage):
    expected, watch = whole
    epochs = [i for i, (of, _, _) in enumerate(watch.seen) if of == stage]
    path = tmp_path / "run.ckpt"
    with pytest.raises(ZeroDivisionError):
        train_until_held_out_cells_say(untrained(escaping), path, Stop(max(epochs[0], 1)))
    resumed = untrained(escaping)
    torch.manual_seed(99)
    train_until_held_out_cells_say(resumed, path)
    assert_same_weights(resumed, expected)


@pytest.mark.parametrize("epoch", [3, 4])
def test_it_goes_on_from_where_responses_or_masks_begin(escaping, tmp_path, epoch):
    expected = train(untrained(escaping))
    path = tmp_path / "run.ckpt"
    with pytest.raises(ZeroDivisionError):
        train(untrained(escaping), path, Stop(epoch))
    resumed = train(untrained(escaping), path)
    assert_same_weights(resumed, expected)


@pytest.fixture
def ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_the_responding_stage_keeps_responses(whole, escaping, ctrl_c):
    """Also in its first epoch, before any score: the best weights are those of the dense stage."""
    first = [of for of, _, _ in whole[1].seen].index("responding")
    model = train_until_held_out_cells_say(untrained(escaping), None, PressCtrlC(first))
    assert model.trainings_[-1]["ending"].endswith("Interrupted.")
    assert model.module.has_branches
    assert not model.module.masks.all_on
    assert (model.module.responses.rates <= 1).all()
    assert np.isfinite(model.predict_ate(n_samples=100, among="all").X).all()
    probability = model.get_response_probability()
    assert np.isfinite(probability[~np.isnan(probability)]).all()


def test_ctrl_c_before_it_leaves_a_model_that_says_so(escaping, ctrl_c):
    model = train(untrained(escaping), None, PressCtrlC(1))
    assert not model.module.has_branches
    with pytest.raises(SAMSError, match="ended before the stage of responses"):
        model.get_response_probability()
    train(model)
    assert model.module.has_branches
    assert len(model.get_response_probability()) == escaping.n_obs


def test_a_second_training_goes_on_with_responses(escaping):
    model, watch = train(untrained(escaping)), Watch()
    before = model.module.responses.acts.clone()
    train(model, None, watch, max_epochs=2)
    assert [on for _, on, _ in watch.seen] == [True, True]
    assert torch.equal(model.module.responses.acts & before, model.module.responses.acts)
    assert model.module.responses.n_cells.item() == len(model.train_indices)


def test_log_odds_end_at_the_mode_of_what_the_trained_model_says(whole):
    """One more step of expectation-maximisation changes nothing."""
    model, _ = whole
    responses, module = model.module.responses, model.module
    tensors = next(
        iter(model._make_data_loader(model.adata, batch_size=10_000, indices=model.train_indices))
    )
    cells = module.read_batch(tensors)
    with torch.no_grad():
        found = evidence_of_cells(module, responses, [cells])
    before = responses.log_odds().detach().clone()
    with torch.no_grad():
        responses.improve(found, lambda sums: sums)
    after = responses.log_odds().detach().clone()
    torch.testing.assert_close(after, before, rtol=0, atol=5e-3)


# Several processes --------------------------------------------------------------------------------

SCRIPT = """
import json
import os
import sys

import anndata
import scvi
import torch

from scvi_sams import SAMSVAE

folder = sys.argv[1]
rank = int(os.environ.get("LOCAL_RANK", 0))
scvi.settings.seed = 3
adata = anndata.read_h5ad(folder + "/screen.h5ad")
SAMSVAE.setup_anndata(adata, guide_key="guide")
model = SAMSVAE(
    adata, n_latent=3, n_hidden=8, effect_n_hidden=6, effect_n_layers=1, responses=True
)
torch.manual_seed(100 + rank)
model.train(
    max_epochs=10, batch_size=16, train_size=0.9, plan_kwargs={"lr": 1e-2},
    accelerator="cpu", devices=2, strategy="ddp", enable_progress_bar=False, logger=False,
)
state = {name: value.tolist() for name, value in model.module.state_dict().items()}
with open(f"{folder}/rank{rank}.json", "w") as file:
    json.dump(state, file)
"""


def test_two_processes_agree_on_responses(escaping, tmp_path):
    escaping.write_h5ad(tmp_path / "screen.h5ad")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{i}.json").read_text()) for i in (0, 1))
    assert first == second
    assert first["responses.is_on"] is True
    assert any(first["responses.acts"])
    assert any(abs(value) > 0.05 for value in first["responses.of_guides"])
    acting = [
        r for r, a in zip(first["responses.rates"], first["responses.acts"], strict=True) if a
    ]
    assert all(0 < rate < 1 for rate in acting)


@pytest.mark.parametrize(
    ("rates", "named"), [([0.09, 0.5, 0.02], "'a', 'c'"), ([0.1, 0.5, 1], None)]
)
def test_perturbations_to_which_hardly_any_cell_responds_are_named(rates, named, caplog):
    warn_of_rare_responses(torch.tensor(rates), ("a", "b", "c"))
    if named is None:
        assert not caplog.text
    else:
        assert f"Fewer than 10% of the cells of {named} seem to respond" in caplog.text
