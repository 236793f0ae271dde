"""With a seed, what is said of a cell or label does not depend on what else is asked for."""

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scipy import stats

from model.builders import small_screen, train_small
from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus
from scvi_sams._torch import fixed_seed
from scvi_sams.model import _noise
from scvi_sams.model._noise import CellNoise, by_blocks, keys_of_cells, new_seed
from scvi_sams.module._effect_rows import EffectRows

MODELS = {
    "default": (SAMSVAE, {}),
    "mean field": (SAMSVAE, {"correlated_effects": False, "correlated_basal": False}),
    "Monte Carlo": (SAMSVAE, {"kl_estimator": "monte_carlo", "mask_prior_concentration": 2.0}),
    "normal": (SAMSVAE, {"gene_likelihood": "normal"}),
    "Poisson": (SAMSVAE, {"gene_likelihood": "poisson"}),
    "CPAVAE": (CPAVAE, {}),
    "SVAEPlus": (SVAEPlus, {}),
    "ConditionalVAE": (ConditionalVAE, {}),
}
GETTERS = {
    "get_latent_representation": {"give_mean": False, "key_added": None},
    "get_normalized_expression": {"return_numpy": True, "n_samples": 2},
    "get_elbo": {"return_mean": False, "key_added": None},
    "get_reconstruction_error": {"return_mean": False, "key_added": None},
    "get_iwelbo": {"return_mean": False, "key_added": None, "n_samples": 7},
    "posterior_predictive_sample": {"n_samples": 2},
}
CELLS = np.array([40, 3, 77, 12, 149, 5, 100, 101, 60])


@pytest.fixture(autouse=True)
def no_seed_afterwards():
    yield
    scvi.settings.seed = None


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS)
def model(request):
    model_class, settings = request.param
    is_normal = settings.get("gene_likelihood") == "normal"
    setup = {"layer": "normalised"} if is_normal else {}
    return train_small(small_screen(), setup, model_cls=model_class, **settings)


@pytest.fixture
def blocks_of_two(monkeypatch):
    monkeypatch.setattr(_noise, "_PERTURBATIONS_PER_BLOCK", 2)


def seeded(function, *arguments, seed=5, **settings):
    scvi.settings.seed = seed
    return function(*arguments, **settings)


@pytest.mark.parametrize("name", GETTERS)
@pytest.mark.usefixtures("blocks_of_two")
def test_a_cell_has_one_answer(model, name):
    """In mini-batches of any size, in any order, with all cells or some."""
    getter, settings = getattr(model, name), GETTERS[name]
    expected = seeded(getter, **settings)[CELLS]
    scale = np.abs(expected).max()

    def assert_same(found):
        # Products of other shapes are rounded otherwise, by which a count may move on by one.
        is_same = np.isclose(found, expected, rtol=1e-4, atol=1e-5 * scale)
        assert is_same.mean() > (0.999 if name == "posterior_predictive_sample" else 1 - 1e-9)

    assert_same(seeded(getter, batch_size=17, **settings)[CELLS])
    assert_same(seeded(getter, indices=CELLS, batch_size=4, **settings))
    assert_same(seeded(getter, indices=CELLS[::-1], **settings)[::-1])
    assert_same(seeded(getter, model.adata[CELLS].copy(), **settings))
    other = seeded(getter, indices=CELLS, seed=6, **settings)
    assert not np.isclose(other, expected, rtol=1e-4, atol=1e-5 * scale).all()


@pytest.mark.usefixtures("blocks_of_two")
def test_a_predicted_cell_has_one_answer(model):
    outputs = ["rate", "counts"] if model.module.likelihood.is_count_likelihood else ["rate"]
    for output in outputs:
        assert_one_answer(model, output)


def assert_one_answer(model, output):
    controls = np.flatnonzero(model.adata.obs["perturbation"] == "control")
    arguments = {"output": output, "indices": controls}

    def values(prediction):
        return np.asarray(prediction.X.todense() if output == "counts" else prediction.X)

    alone = values(seeded(model.predict, ["P003"], **arguments))
    with_others = values(seeded(model.predict, ["P001", "P003", "control"], **arguments))
    np.testing.assert_array_equal(with_others[len(alone) : 2 * len(alone)], alone)
    few = values(seeded(model.predict, ["P003"], output=output, indices=controls[5:0:-1]))
    assert np.isclose(few, alone[5:0:-1], rtol=1e-4, atol=1e-6).mean() > 0.995


def test_a_cell_that_is_named_twice_is_drawn_twice(model):
    cells = [7, 3, 7]
    settings = GETTERS["get_latent_representation"]
    states = seeded(model.get_latent_representation, indices=cells, **settings)
    assert np.abs(states[0] - states[2]).min() > 1e-6
    counts = seeded(model.posterior_predictive_sample, indices=cells)
    assert (counts[0] != counts[2]).any()


@pytest.mark.usefixtures("blocks_of_two")
def test_a_label_has_one_effect(model):
    arguments = {"n_samples": 40, "n_posterior_samples": 20, "method": "mean", "key_added": None}
    alone = seeded(model.predict_ate, ["P003"], **arguments)
    others = seeded(model.predict_ate, ["P002", "control", "P003", "P001"], **arguments)
    for layer in (None, "standard_error", "interval_low", "interval_high"):
        of_alone, of_others = (
            table.X if layer is None else table.layers[layer] for table in (alone, others)
        )
        np.testing.assert_array_equal(of_others[2], of_alone[0])


@pytest.mark.usefixtures("blocks_of_two")
def test_a_pair_has_one_interaction(monkeypatch):
    model = train_small(small_screen())
    arguments = {"n_samples": 40, "n_posterior_samples": 20, "method": "mean"}
    pairs = ["P001+P002", "P002+P003", "P001+P004"]
    together = seeded(model.predict_interactions, pairs, **arguments)
    monkeypatch.setattr("scvi_sams.model._counterfactual._PAIRS_PER_CHUNK", 1)
    in_parts = seeded(model.predict_interactions, pairs, **arguments)
    np.testing.assert_array_equal(in_parts.X, together.X)
    alone = seeded(model.predict_interactions, pairs[2:], **arguments)
    np.testing.assert_array_equal(alone.X[0], together.X[2])
    arguments |= {"by": "effect"}
    every, some = (
        seeded(model.rank_unseen_pairs, names, **arguments).set_index("combination")["effect_norm"]
        for names in (None, ["P002", "P003", "P004"])
    )
    np.testing.assert_allclose(some, every[some.index], rtol=1e-5)


def test_what_needs_no_random_numbers_takes_none(model):
    before = torch.get_rng_state()
    model.get_latent_representation(key_added=None)
    assert torch.equal(torch.get_rng_state(), before)


# The numbers themselves --------------------------------------------------------------------------


def test_numbers_of_cells_are_standard_normal_and_independent():
    n_cells = 20_000
    noise = CellNoise(3, np.arange(n_cells), torch.device("cpu"))
    values = noise.normals(np.arange(n_cells), 2, 5).double().numpy()
    assert stats.kstest(values.ravel(), "norm").pvalue > 0.01
    columns = np.moveaxis(values, 1, 0).reshape(n_cells, 10)
    correlation = np.corrcoef(columns.T) - np.eye(10)
    assert np.abs(correlation).max() < 5 / n_cells**0.5
    neighbours = np.corrcoef(columns[:-1].ravel(), columns[1:].ravel())[0, 1]
    assert abs(neighbours) < 5 / columns.size**0.5
    squares = np.corrcoef((columns**2).T) - np.eye(10)
    assert np.abs(squares).max() < 5 / n_cells**0.5


def test_draws_in_parts_are_those_at_once():
    keys = np.array([4, 9, 5])
    noise = CellNoise(3, keys, torch.device("cpu"))
    whole = noise.normals(np.arange(3), 5, 2)
    parts = [noise.normals(np.array([2, 0]), 2, 2, first=3), noise.normals(np.array([1]), 3, 2)]
    assert torch.equal(whole[3:, [2, 0]], parts[0])
    assert torch.equal(whole[:3, [1]], parts[1])
    assert not torch.equal(whole[:, 0], whole[:, 2])
    other = CellNoise(4, keys, torch.device("cpu")).normals(np.arange(3), 5, 2)
    assert (other != whole).all()


def test_cells_of_one_name_and_cells_named_twice_have_numbers_of_their_own():
    names = pd.Index(["a", "b", "a", "c"])
    keys = keys_of_cells(names, np.array([0, 2, 0, 3, 1]))
    assert len(set(keys)) == 5
    assert keys_of_cells(names, np.array([2])) == keys[1]
    assert keys_of_cells(pd.Index(["c", "b"]), np.array([1, 0])).tolist() == keys[[4, 3]].tolist()


def test_seeds_of_cells_differ_by_cell_and_number():
    noise = CellNoise(3, np.arange(500), torch.device("cpu"))
    seeds = [seed for number in (0, 1, 2) for seed in noise.seeds(np.arange(500), number)]
    assert len(set(seeds)) == 1500
    assert min(seeds) >= 0


@pytest.mark.usefixtures("blocks_of_two")
def test_perturbations_are_drawn_in_blocks():
    asked = []

    def draw(rows):
        asked.append(rows.tolist())
        source = torch.Generator().manual_seed(new_seed())
        return [torch.rand(3, len(rows), 2, generator=source), rows[None].float()]

    values, names = by_blocks(draw, torch.tensor([1, 4]), EffectRows(5), seed=7)
    assert asked == [[0, 1], [4]]
    assert names.tolist() == [[1, 4]]
    every, _ = by_blocks(draw, torch.arange(5), EffectRows(5), seed=7)
    assert torch.equal(values, every[:, [1, 4]])
    assert (every[:, 0] != every[:, 2]).all()


@pytest.mark.usefixtures("blocks_of_two")
def test_a_perturbation_is_in_one_block_in_all_contexts():
    asked = []

    def draw(rows):
        asked.append(rows.tolist())
        return [rows[None].float()]

    rows = torch.tensor([1, 3, 7, 11])
    (found,) = by_blocks(draw, rows, EffectRows(4, 2, range(8)), seed=7)
    assert asked == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert found.tolist() == [[1, 3, 7, 11]]


def test_a_fixed_seed_leaves_the_random_numbers_of_others_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with fixed_seed(9):
        first = new_seed()
    with fixed_seed(9):
        assert new_seed() == first
    assert torch.equal(torch.rand(3), expected)


def test_a_comparison_of_cells_has_one_answer():
    """Alone or beside others, in mini-batches of any size, from cells in any order."""
    model = train_small(small_screen())
    given = {"groupby": "perturbation", "group2": "control", "n_samples_overall": 40}

    def compared(adata=None, **settings):
        table = seeded(model.differential_expression, adata, **given | settings)
        return table[table["group1"] == "P002"].sort_index()[["lfc_mean", "proba_de"]]

    expected = compared(group1=["P001", "P002"])
    for found in (
        compared(group1="P002", batch_size=7),
        compared(model.adata[::-1].copy(), group1="P002"),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    mixed = {"use_permutation": True, "m_permutation": 50}
    np.testing.assert_allclose(
        compared(group1="P002", **mixed), compared(group1=["P001", "P002"], **mixed), rtol=1e-4
    )
    np.random.seed(3)  # noqa: NPY002
    before = np.random.get_state()[1]  # noqa: NPY002
    scvi.settings.seed = None
    model.differential_expression(**given, group1="P002")
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
