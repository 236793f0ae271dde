"""Models whose effects may differ between contexts: what users get, decoded by hand."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy.special import softmax

from model.builders import (
    N_LATENT,
    SHIFTS_ONLY,
    VARIANTS,
    copy_without_registration,
    decode,
    decode_shares,
    make_decoder_linear,
    small_screen,
    train_small,
)
from scvi_sams import SAMSVAE
from scvi_sams.exceptions import InvalidArgumentError, SAMSError
from scvi_sams.model import _noise
from scvi_sams.model._counterfactual import drawn_effects, encode_requested

LINES = ["K", "M", "T"]
CONTEXTS = {"context_key": "line"}
N_SAMPLES = {"n_samples": 60, "n_posterior_samples": 6}


def screen_in_lines(**changes: Any) -> AnnData:
    """A small screen in three lines; P003 was not perturbed in the first, nor P004 in two."""
    adata = small_screen(**changes)
    rng = np.random.default_rng(8)
    line = rng.choice(LINES, adata.n_obs, p=[0.5, 0.3, 0.2])
    labels = adata.obs["perturbation"].astype(str)
    line[labels.str.contains("P003") & (line == "K")] = "M"
    line[labels.str.contains("P004")] = "T"
    adata.obs["line"] = line
    return adata


def is_measured(adata: AnnData, name: str, line: str) -> bool:
    return bool((adata.obs["perturbation"].str.contains(name) & (adata.obs["line"] == line)).any())


def be_certain(model: SAMSVAE, seed: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Give both parts of mean-field effects means that are certain.

    Returns
    -------
    What contexts share, (T, L), and what is their own, (T, C, L), 0 of perturbations that were
    not measured in all.
    """
    rng = np.random.default_rng(seed)
    module = model.module
    shared = rng.normal(size=module.effects.loc.shape).astype(np.float32)
    own = rng.normal(size=module.contexts.effects.loc.shape).astype(np.float32)
    # Where a pair was not measured others stand in for it, by chance: they have nothing.
    owners = module.effect_rows.perturbation_of(module.effect_rows.measured)
    own[(torch.bincount(owners)[owners] < len(LINES)).numpy()] = 0
    with torch.no_grad():
        for part, loc in ((module, shared), (module.contexts, own)):
            part.masks.logits.fill_(40.0)
            part.effects.loc.copy_(torch.as_tensor(loc))
            part.effects.log_scale.fill_(-30.0)
        module.contexts.prior.set_to(1e-7, 1e-7)
    return shared, own_table(model, own)


def own_table(model: SAMSVAE, own: np.ndarray) -> np.ndarray:
    rows = model.module.effect_rows.measured.numpy()
    table = np.zeros((len(model.perturbations), len(LINES), own.shape[1]), np.float32)
    table[rows // (len(LINES) + 1), rows % (len(LINES) + 1)] = own
    return table


def shift(model, parts, label, line=None):
    """Sum by hand the shifts of the perturbations of a label in a line, or of what lines share."""
    shared, own = parts
    names = [name for name in label.split("+") if name != "control"]
    codes = [model.perturbations.index(name) for name in names]
    total = shared[codes].sum(axis=0)
    return total if line is None else total + own[codes, LINES.index(line)].sum(axis=0)


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def any_variant(request):
    return train_small(screen_in_lines(), CONTEXTS, **VARIANTS[request.param])


@pytest.fixture(scope="module")
def default():
    return train_small(screen_in_lines(), CONTEXTS, **SHIFTS_ONLY)


@pytest.fixture(scope="module")
def certain():
    model = train_small(screen_in_lines(), CONTEXTS, **VARIANTS["mean field"])
    return model, be_certain(model)


@pytest.fixture(scope="module")
def linear():
    """Expression is ``weight @ shift`` more, by effects that are certain."""
    setup = CONTEXTS | {"layer": "normalised"}
    adata = screen_in_lines()
    model = train_small(adata, setup, gene_likelihood="normal", **VARIANTS["mean field"])
    weight = np.random.default_rng(6).normal(size=(adata.n_vars, N_LATENT))
    make_decoder_linear(model, weight, np.linspace(-1, 1, adata.n_vars))
    return model, be_certain(model), weight


def one_hot(line: str | None) -> np.ndarray:
    """How networks read a line; of an unknown one, the average of all."""
    return np.array([line == name for name in LINES], float) if line else np.full(3, 1 / 3)


# Effects in a context -----------------------------------------------------------------------------


def test_effects_and_masks_in_a_context_by_hand(certain):
    model, parts = certain
    for line in LINES:
        found = model.get_perturbation_effects(context=line, key_added=None)
        for name in model.perturbations:
            expected = shift(model, parts, name, line)
            np.testing.assert_allclose(found.mean.loc[name], expected, rtol=1e-5, atol=1e-5)
        # A mask of a pair that was not measured is on once in ten thousand times.
        np.testing.assert_allclose(found.sd, 0, atol=0.0201)


def test_effects_over_all_contexts_are_weighted_by_training_cells(certain):
    model, parts = certain
    found = model.get_perturbation_effects(key_added=None)
    obs = model.adata.obs.iloc[model.train_indices]
    for name in model.perturbations:
        lines = obs["line"][obs["perturbation"].str.contains(name)].astype(str)
        expected = np.mean([shift(model, parts, name, line) for line in lines], axis=0)
        np.testing.assert_allclose(found.mean.loc[name], expected, rtol=1e-4, atol=1e-4)


def test_moments_over_all_contexts_are_those_of_samples(any_variant):
    """The posterior of the average over a perturbation's training cells, by draws of it."""
    model = any_variant
    rows, module = model.module.effect_rows.measured, model.module
    with torch.no_grad():
        torch.manual_seed(0)
        draws = module.global_posterior(rows, 20_000).shifts
    owners, counts = module.effect_rows.perturbation_of(rows), module.contexts.n_cells
    found = model.get_perturbation_effects(key_added=None)
    for code in range(len(model.perturbations)):
        weights = torch.where(owners == code, counts, 0.0)
        average = (draws * (weights / weights.sum())[:, None]).sum(dim=1)
        sd = found.sd.iloc[code].to_numpy()
        error = np.abs(average.mean(dim=0).numpy() - found.mean.iloc[code].to_numpy())
        assert (error < 5 * sd / np.sqrt(500) + 1e-3).all()
        np.testing.assert_allclose(average.std(dim=0), sd, rtol=0.15, atol=0.01)


def test_masks_are_the_largest_of_the_contexts_where_a_perturbation_was_measured(default):
    whole = default.get_perturbation_masks(key_added=None)
    each = {line: default.get_perturbation_masks(context=line, key_added=None) for line in LINES}
    for name in default.perturbations:
        measured = [
            each[line].loc[name] for line in LINES if is_measured(default.adata, name, line)
        ]
        np.testing.assert_allclose(whole.loc[name], np.max(measured, axis=0), rtol=1e-6)
    assert not all(each["K"].equals(each[line]) for line in LINES)


def test_a_pair_that_was_not_measured_has_what_contexts_share(certain):
    model, parts = certain
    assert not is_measured(model.adata, "P004", "K")
    found = model.get_perturbation_effects(context="K", key_added=None).mean.loc["P004"]
    np.testing.assert_allclose(found, shift(model, parts, "P004"), rtol=1e-5, atol=1e-5)


# Average effects ----------------------------------------------------------------------------------


@pytest.mark.parametrize("line", LINES)
def test_average_effects_in_a_context_by_hand(linear, line):
    model, parts, weight = linear
    labels = [*model.perturbations, "P001+P002", "P003+P004"]
    found = model.predict_ate(labels, context=line, method="mean", key_added=None, **N_SAMPLES)
    for label in labels:
        expected = weight @ shift(model, parts, label, line)
        np.testing.assert_allclose(found[label].X[0], expected, rtol=1e-4, atol=1e-4)
        measured = all(is_measured(model.adata, name, line) for name in label.split("+"))
        assert found.obs.loc[label, "measured"] == measured
    assert (found.obs["context"] == line).all()
    assert found.uns["ate"]["context"] == line


def test_average_effects_over_contexts_are_weighted_as_control_cells(linear):
    """With as many basal states as control cells each of these is there once."""
    model, parts, weight = linear
    lines = model.adata.obs["line"][model.adata.obs["perturbation"] == "control"]
    samples = {"n_samples": 5 * len(lines), "n_posterior_samples": 5}
    for context in (None, "mean"):
        found = model.predict_ate(method="mean", context=context, key_added=None, **samples)
        assert found.uns["ate"]["context"] == "mean"
        for label in found.obs_names:
            expected = np.mean(
                [weight @ shift(model, parts, label, line) for line in lines], axis=0
            )
            np.testing.assert_allclose(found[label].X[0], expected, rtol=1e-4, atol=1e-4)


def test_few_basal_states_are_nearly_as_frequent_in_contexts_as_control_cells(linear):
    model, parts, weight = linear
    lines = model.adata.obs["line"][model.adata.obs["perturbation"] == "control"]
    found = model.predict_ate(method="mean", key_added=None, n_samples=1000)
    for label in found.obs_names:
        each = np.array([weight @ shift(model, parts, label, line) for line in lines])
        # Of 10 states of 100 samples; at random they would be off by half as much again.
        error = 3 * each.std(axis=0) / np.sqrt(1000)
        assert (np.abs(found[label].X[0] - each.mean(axis=0)) < error + 1e-3).all()


def test_indices_say_which_contexts_effects_are_of(linear):
    model, parts, weight = linear
    obs = model.adata.obs
    chosen = np.flatnonzero(obs["line"] == "T")[:12]
    of_one = model.predict_ate(["P001"], indices=chosen, method="mean", key_added=None, **N_SAMPLES)
    expected = weight @ shift(model, parts, "P001", "T")
    np.testing.assert_allclose(of_one.X[0], expected, rtol=1e-4, atol=1e-4)
    mixed = np.concatenate([chosen[:3], np.flatnonzero(obs["line"] == "M")[:1]])
    samples = {"n_samples": 20, "n_posterior_samples": 5}
    found = model.predict_ate(["P001"], indices=mixed, method="mean", key_added=None, **samples)
    other = weight @ shift(model, parts, "P001", "M")
    np.testing.assert_allclose(found.X[0], 0.75 * expected + 0.25 * other, rtol=1e-4, atol=1e-4)
    within = model.predict_ate(
        ["P001"], indices=mixed, context="M", method="mean", key_added=None, **N_SAMPLES
    )
    np.testing.assert_allclose(within.X[0], other, rtol=1e-4, atol=1e-4)
    is_chosen = np.isin(np.arange(len(obs)), chosen)
    by_mask = model.predict_ate(
        ["P001"], indices=is_chosen, method="mean", key_added=None, **N_SAMPLES
    )
    np.testing.assert_allclose(by_mask.X, of_one.X, rtol=1e-4, atol=1e-4)
    with pytest.raises(InvalidArgumentError, match="None of the cells"):
        model.predict_ate(["P001"], indices=chosen, context="M", method="mean")


@pytest.mark.parametrize("basal", ["prior", "control"])
def test_states_are_decoded_in_their_context(certain, basal):
    """By hand at the mean of the basal states: shares with and without a perturbation."""
    model, parts = certain
    cells = np.flatnonzero((model.adata.obs["perturbation"] == "control").to_numpy())
    with (
        mock.patch.object(_noise.CellNoise, "normals", _zeros),
        mock.patch("scvi_sams.model._basal_states._chosen", _first),
    ):
        for line in LINES:
            within = cells[(model.adata.obs["line"] == line).to_numpy()[cells]]
            z = model.get_latent_representation(indices=within[:1], key_added=None)[0]
            z = np.zeros_like(z) if basal == "prior" else z
            found = model.predict_ate(
                ["P001"],
                context=line,
                method="mean",
                target_sum=1.0,
                basal=basal,
                n_samples=4,
                n_posterior_samples=2,
                key_added=None,
            )
            treated, control = (
                decode_shares(model, z + s, one_hot(line))
                for s in (shift(model, parts, "P001", line), 0.0)
            )
            np.testing.assert_allclose(found.X[0], treated - control, rtol=1e-3, atol=1e-5)


def _zeros(noise, place, n_draws, n_columns, first=0):
    return torch.zeros(n_draws, len(place), n_columns)


def _first(model, sources, n_posterior, n_basal):
    return np.zeros(n_posterior * n_basal, dtype=np.int64)


def test_several_contexts_are_one_table(default):
    torch.manual_seed(2)
    found = default.predict_ate(["P001", "P004"], context=["T", "K"], key_added=None, **N_SAMPLES)
    assert list(found.obs_names) == ["P001:T", "P004:T", "P001:K", "P004:K"]
    assert found.obs["context"].tolist() == ["T", "T", "K", "K"]
    assert found.obs["perturbation"].tolist() == ["P001", "P004"] * 2
    assert found.obs["measured"].tolist() == [True, True, True, False]
    assert list(found.uns["ate"]["context"]) == ["T", "K"]
    assert np.isfinite(found.X).all()
    torch.manual_seed(2)
    alone = default.predict_ate(["P001", "P004"], context="T", key_added=None, **N_SAMPLES)
    np.testing.assert_array_equal(found.X[:2], alone.X)
    for name in ("standard_error", "interval_low", "interval_high"):
        np.testing.assert_array_equal(found.layers[name][:2], alone.layers[name])


def test_a_pair_that_was_not_measured_has_a_wider_interval():
    model = train_small(screen_in_lines(), CONTEXTS, **VARIANTS["mean field"])
    be_certain(model)
    model.module.contexts.prior.set_to(0.9, 0.5)
    width = {}
    for line in ("K", "T"):
        found = model.predict_ate(["P004"], context=line, key_added=None, n_samples=1000)
        width[line] = (found.layers["interval_high"] - found.layers["interval_low"]).mean()
    assert width["K"] > 2 * width["T"]


def test_where_own_parts_are_off_contexts_have_the_same_samples():
    """Of shifts: what contexts share is drawn once for all of them."""
    model = train_small(screen_in_lines(), CONTEXTS, **SHIFTS_ONLY)
    with torch.no_grad():
        model.module.contexts.masks.logits.fill_(-60)
    model.module.contexts.prior.set_to(1e-9, 1e-9)
    requested = encode_requested(model, ["P001", "P002+P004"])
    contexts = torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        for drawn in drawn_effects(model.module, requested, 50, 7, contexts):
            assert drawn.shift.shape == (50, 4, N_LATENT)
            assert drawn.shift[:, 0].std(dim=0).max() > 0.1
            for place in (1, 2, 3):
                # A mask of an unknown context is on once in ten thousand times.
                apart = (drawn.shift[:, place] - drawn.shift[:, 0]).abs().amax(dim=1)
                assert (apart < 0.01).sum() >= 49


# Predicted cells ----------------------------------------------------------------------------------


def test_each_cell_is_predicted_in_its_own_context(linear):
    model, parts, weight = linear
    cells = np.random.default_rng(1).permutation(model.adata.n_obs)[:40]
    labels = ["P001", "P003+P004", "control"]
    found = model.predict(labels, indices=cells, output="rate")
    values = found.X.reshape(3, 40, -1)
    lines = model.adata.obs["line"].to_numpy()[cells]
    for place, label in enumerate(labels):
        expected = np.array([weight @ shift(model, parts, label, line) for line in lines])
        apart = values[place] - values[2]
        np.testing.assert_allclose(apart, expected, rtol=1e-3, atol=1e-3)
    assert found.obs["line"].tolist() == [*lines] * 3
    by_default = model.predict(["P001", "control"], output="rate")
    first, second = by_default.X.reshape(2, -1, by_default.n_vars)
    expected = [weight @ shift(model, parts, "P001", line) for line in by_default.obs["line"]]
    np.testing.assert_allclose(first - second, expected[: len(first)], rtol=1e-3, atol=1e-3)


def test_cells_are_decoded_by_hand_in_their_contexts(certain):
    model, parts = certain
    cells = np.arange(30)
    with mock.patch.object(_noise.CellNoise, "normals", _zeros):
        found = model.predict(["P001"], indices=cells, output="rate").X
    z = model.get_latent_representation(indices=cells, key_added=None)
    lines = model.adata.obs["line"].to_numpy()[cells]
    for cell, line in enumerate(lines):
        expected = decode_shares(model, z[cell] + shift(model, parts, "P001", line), one_hot(line))
        np.testing.assert_allclose(found[cell], expected, rtol=1e-3, atol=1e-6)


def test_the_latent_state_of_a_cell_has_the_shift_of_its_context(certain):
    model, parts = certain
    basal = model.get_latent_representation(key_added=None)
    perturbed = model.get_latent_representation(representation="perturbed", key_added=None)
    obs = model.adata.obs
    expected = [
        shift(model, parts, label, line)
        for label, line in zip(obs["perturbation"].astype(str), obs["line"], strict=True)
    ]
    np.testing.assert_allclose(perturbed - basal, expected, rtol=1e-3, atol=1e-4)


def query(adata: AnnData, **obs: Any) -> AnnData:
    other = copy_without_registration(adata)
    for name, values in obs.items():
        other.obs[name] = values
    return other


def test_cells_of_an_unknown_context_have_what_contexts_share(certain, linear):
    model, parts = certain
    lines = np.array(["K", "new", "T", None, "M"] * 30, dtype=object)
    other = query(model.adata, line=lines)
    cells = np.arange(40)
    with mock.patch.object(_noise.CellNoise, "normals", _zeros):
        found = model.predict(["P003"], other, cells, output="rate").X
    z = model.get_latent_representation(other, cells, key_added=None)
    for cell in cells:
        line = lines[cell] if lines[cell] in LINES else None
        expected = decode_shares(model, z[cell] + shift(model, parts, "P003", line), one_hot(line))
        np.testing.assert_allclose(found[cell], expected, rtol=1e-3, atol=1e-6)
    model, parts, weight = linear
    without = query(model.adata)
    del without.obs["line"]
    values = model.predict(["P003", "control"], without, output="rate").X
    apart = np.subtract(*values.reshape(2, without.n_obs, -1))
    expected = np.tile(weight @ shift(model, parts, "P003"), (without.n_obs, 1))
    np.testing.assert_allclose(apart, expected, rtol=1e-3, atol=1e-3)


def test_results_do_not_depend_on_what_else_is_asked_for(any_variant):
    model = any_variant
    cells = np.random.default_rng(2).permutation(model.adata.n_obs)[:50]

    def seeded(ask, *args, **kwargs):
        torch.manual_seed(11)
        return ask(*args, **kwargs)

    labels = ["P004", "P001+P002", "P003"]
    whole = seeded(model.predict, labels, indices=cells, output="rate", batch_size=50)
    values = dict(zip(whole.obs_names, whole.X, strict=True))
    order = np.random.default_rng(3).permutation(50)[:20]
    # Some labels, of some cells, which are not of all contexts, in other batches.
    lines = model.adata.obs["line"].to_numpy()
    few = cells[order][lines[cells[order]] != "K"]
    some = seeded(model.predict, labels[1:2], indices=few, output="rate", batch_size=3)
    np.testing.assert_allclose(
        some.X, [values[name] for name in some.obs_names], rtol=2e-4, atol=1e-7
    )
    ate = seeded(model.predict_ate, labels, context=["M", "K"], key_added=None, **N_SAMPLES)
    one = seeded(model.predict_ate, labels[2:], context="M", key_added=None, **N_SAMPLES)
    np.testing.assert_allclose(one.X[0], ate["P003:M"].X[0], rtol=1e-4, atol=1e-5)
    elbo = seeded(model.get_elbo, return_mean=False, key_added=None, batch_size=150)
    of_few = seeded(model.get_elbo, indices=few, return_mean=False, key_added=None, batch_size=4)
    np.testing.assert_allclose(of_few, elbo[few], rtol=1e-4)


# Files --------------------------------------------------------------------------------------------


def test_saved_and_loaded_models_predict_the_same(any_variant, tmp_path):
    model = any_variant
    model.save(tmp_path / "with", save_anndata=True)
    model.save(tmp_path / "without")
    other = query(model.adata, line=["K", "M", "none"] * 50)
    answers = []
    loaded = [
        SAMSVAE.load(tmp_path / "with", accelerator="cpu"),
        SAMSVAE.load(tmp_path / "without", adata=model.adata, accelerator="cpu"),
    ]
    for each in (model, *loaded):
        assert each.contexts == LINES
        torch.manual_seed(5)
        answers.append(
            [
                each.predict_ate(["P001", "P004"], context=LINES, key_added=None, **N_SAMPLES).X,
                each.predict_ate(["P001"], key_added=None, **N_SAMPLES).X,
                each.predict(["P001"], other, output="rate").X,
            ]
        )
    for answer in answers[1:]:
        for one, other_one in zip(answers[0], answer, strict=True):
            np.testing.assert_array_equal(one, other_one)


def test_models_loaded_without_data_know_their_contexts(any_variant, tmp_path):
    model = any_variant
    model.save(tmp_path / "saved")
    alone = SAMSVAE.load(tmp_path / "saved", adata=False, accelerator="cpu")
    assert alone.contexts == LINES
    with pytest.raises(SAMSError, match="without"):
        alone.predict_ate(["P001"], context="K")
    for context in (None, *LINES):
        for get in ("get_perturbation_masks", "get_perturbation_effects"):
            one, other = (
                getattr(each, get)(context=context, key_added=None) for each in (model, alone)
            )
            if get == "get_perturbation_effects":
                one, other = one.mean, other.mean
            pd.testing.assert_frame_equal(one, other)
    other = query(model.adata, line=["K", "M", "none"] * 50)
    found = []
    for each in (model, alone):
        torch.manual_seed(5)
        found.append(each.predict(["P001"], other, output="rate").X)
    np.testing.assert_array_equal(*found)


def test_contexts_by_the_registered_column_alone(certain):
    """Logits at a given state in numpy, so that nothing else tells lines apart."""
    model, _ = certain
    z = np.random.default_rng(0).normal(size=(3, N_LATENT))
    covariates = np.array([one_hot(line) for line in LINES])
    with torch.no_grad():
        logits = model.module.decode(
            torch.as_tensor(z[None], dtype=torch.float32),
            torch.zeros(1, 3, N_LATENT),
            torch.as_tensor(covariates, dtype=torch.float32),
        )[0]
    expected = decode(model, z, covariates)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    shares = softmax(expected, axis=1)
    assert np.abs(shares[0] - decode_shares(model, z[0], one_hot("M"))).max() > 1e-4


def test_cells_to_start_from_contradict_states_from_the_prior():
    adata = small_screen()
    SAMSVAE.setup_anndata(adata)
    model = SAMSVAE(adata, n_latent=2, n_hidden=4)
    with pytest.raises(InvalidArgumentError, match="Omit one of the two"):
        model.predict_ate(["P001"], indices=[0, 1], basal="prior")
