"""Combinations with perturbations that no cell shows."""

import copy

import numpy as np
import pytest
import scvi
import torch

from train.test_unmeasured import copy_with, trained

N_GENES = 24
SILENT = [3, 11]
"""Genes that are hardly expressed."""


@pytest.fixture(scope="module")
def doses():
    return trained({"dosage_key": "dosage", "size_factor_key": "transcriptome"}, dosages=[1.0, 2.0])


@pytest.fixture(scope="module")
def in_contexts():
    return trained({"context_key": "cell_type"}, n_cell_types=2)


@pytest.fixture(scope="module")
def with_sizes():
    return trained({"size_factor_key": "transcriptome"})


def with_mean(model, mean, sd=0.0, *, is_silent=True):
    """Copy in which unmeasured perturbations have some mean effect, and some genes are silent."""
    changed = copy_with(
        model,
        weights=np.array([0, 0, 0, 1.0]),
        mean=np.full(N_GENES, mean),
        variance=np.full(N_GENES, sd**2),
    )
    if is_silent:
        with torch.no_grad():
            changed.module.decoder.to_genes.bias[SILENT] -= 10
    return changed


def predicted(model, labels, **arguments):
    scvi.settings.seed = 0
    arguments = {"n_samples": 6_400, "n_posterior_samples": 200, "key_added": None} | arguments
    return model.predict_ate(labels, **arguments)


@pytest.mark.parametrize("sd", [0.0, 0.3])
def test_effects_of_unmeasured_perturbations_add_up_where_log_rates_would_multiply(with_sizes, sd):
    model = with_mean(with_sizes, 0.3, sd)
    labels = ["U1", "U2", "U1+U2", "P001", "P001+U1", "P001+P002", "P001+P002+U3", "U3"]
    ate = predicted(model, labels)
    of = dict(zip(labels, ate.X, strict=True))
    np.testing.assert_allclose(of["U1"], 0.3, atol=0.03)
    for label, parts in {
        "U1+U2": ["U1", "U2"],
        "P001+U1": ["P001", "U1"],
        "P001+P002+U3": ["P001+P002", "U3"],
    }.items():
        expected = np.sum([of[part] for part in parts], axis=0)
        np.testing.assert_allclose(of[label], expected, atol=0.08 + 0.1 * sd)
    # Sums of log rates: from next to nothing, twice the same factor is far more than twice as much.
    direct = model.module.direct
    rows = torch.arange(2) + direct.n_rows
    twice = direct.in_predictions(rows)[0].sum(dim=0)[SILENT]
    once = direct.in_predictions(
        direct.n_rows
        + direct.answers.place_of_combinations(torch.tensor([[13, 12]]), torch.ones(1, 2))
    )[0][0, SILENT]
    assert (twice > once + 1.0).all()


def test_errors_of_parts_add_up(with_sizes):
    model = with_mean(with_sizes, 0.6, 0.4)
    ate = predicted(model, ["U1", "U2", "U1+U2"])
    width = ate.layers["interval_high"] - ate.layers["interval_low"]
    expected = np.sqrt(np.square(width[:2]).sum(axis=0))
    is_expressed = model.adata.X.toarray().mean(axis=0) > 5
    is_expressed[SILENT] = False
    assert is_expressed.sum() > 5
    ratio = (width[2] / expected)[is_expressed]
    assert np.median(ratio) == pytest.approx(1, abs=0.15)


def test_doses_of_parts(doses):
    model = with_mean(doses, 0.3, is_silent=False)
    labels = ["U1", "P001", "U1+P001"]
    ate = predicted(model, labels, dosages=[2, 1, "2+1"])
    np.testing.assert_allclose(ate.X[2], ate.X[0] + ate.X[1], atol=0.1)
    other = predicted(model, ["U1+P001"], dosages=["1+1"])
    assert np.linalg.norm(ate.X[2] - other.X[0]) > 0.3


def test_in_each_context(in_contexts):
    model = with_mean(in_contexts, 0.3)
    for context in ("type_1", "type_2"):
        ate = predicted(model, ["U1", "P001", "U1+P001"], context=context)
        np.testing.assert_allclose(ate.X[2], ate.X[0] + ate.X[1], atol=0.1)
    cells = model.predict(["U1+P001", "control"], output="rate")
    assert np.isfinite(cells.X).all()


@pytest.mark.parametrize("fixture", ["with_sizes", "in_contexts"])
def test_they_do_not_depend_on_what_else_was_asked_for(fixture, request):
    model = with_mean(request.getfixturevalue(fixture), 0.3, 0.2)
    alone = predicted(model, ["U2+P001"])
    model.module.direct.forget()
    others = ["P003+U1", "U1", "U2+U1", "U3+P001+U2"]
    predicted(model, others)
    together = predicted(model, ["P001+U2", *others])
    np.testing.assert_allclose(together.X[0], alone.X[0], rtol=1e-5, atol=1e-6)
    for name in ("interval_low", "interval_high"):
        np.testing.assert_allclose(together.layers[name][0], alone.layers[name][0], atol=1e-5)


def test_each_is_estimated_once_and_few_are_kept(with_sizes, monkeypatch):
    model = with_mean(with_sizes, 0.3)
    direct = model.module.direct
    predicted(model, ["U1+P001", "U2+P001"], n_samples=200)
    before = direct.answers
    assert len(before.combinations.codes) == 2
    predicted(model, ["U2+P001"], n_samples=200)
    assert direct.answers is before
    path = "scvi_sams.train._unmeasured_combinations.MOST_ENTRIES"
    monkeypatch.setattr(path, 3 * N_GENES)
    predicted(model, ["U3+P001"], n_samples=200)
    assert len(direct.answers.combinations.codes) == 3
    # One more than are kept: the others are dropped, but not those that were requested again.
    predicted(model, ["U3+P002", "U1+P001"], n_samples=200)
    assert len(direct.answers.combinations.codes) == 2
    assert len(direct.answers.effects) == 3


def test_without_stacking_shifts_add_up(with_sizes):
    model = with_mean(with_sizes, 0.3)
    model.stacking = False
    predicted(model, ["U1+P001"], n_samples=200)
    assert not len(model.module.direct.answers.combinations.codes)


def test_interactions_with_unmeasured_perturbations_are_unknown(with_sizes):
    model = with_mean(with_sizes, 0.3, 0.3)
    found = model.predict_interactions(["U1+P001"], n_samples=6_400, n_posterior_samples=200)
    assert np.abs(found.X).max() < 0.25
    assert (found.layers["interval_low"] < 0).mean() > 0.9
    assert (found.layers["interval_high"] > 0).mean() > 0.9


def test_a_copy_says_the_same(with_sizes):
    model = with_mean(with_sizes, 0.3, 0.3)
    before = predicted(model, ["U1+P001"])
    np.testing.assert_array_equal(predicted(copy.deepcopy(model), ["U1+P001"]).X, before.X)
