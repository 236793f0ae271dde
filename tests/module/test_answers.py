"""Rows of tables that effects which no cell shows have while they are asked for."""

import copy

import numpy as np
import pytest
import torch

from module.builders import CODES, DOSES, N_GENES
from module.test_direct_effects import N_PERTURBATIONS, random_tables
from scvi_sams.module._direct_effects import Residuals
from scvi_sams.module._unmeasured import UnmeasuredEffects

ASKED = torch.tensor([6, 9, 12])
"""Rows of effects of perturbations without cells, of which there are many."""


def random_answers(n_rows, seed=3):
    rng = np.random.default_rng(seed)
    mean, *others = (rng.normal(size=(n_rows, N_GENES)) for _ in range(5))
    genes = np.broadcast_to(np.arange(N_GENES, dtype=np.int32), mean.shape)
    floats = (torch.as_tensor(part).float() for part in (rng.uniform(size=n_rows), mean, *others))
    spread, *tables = floats
    return Residuals(spread, torch.as_tensor(genes.copy()), *tables)


def asked_tables():
    direct = random_tables()
    answers = random_answers(3)
    direct.answer(ASKED, answers)
    return direct, answers


def cells():
    codes = torch.tensor([*CODES, [0, 9, -1], [12, 6, -1], [7, -1, -1]])
    doses = torch.tensor([*DOSES, [2, 0.5, 0], [1, 3, 0], [1, 0, 0]]).float()
    return codes, doses


@pytest.mark.parametrize("is_accelerator", [False, True])
def test_cells_add_up_what_was_asked_for(is_accelerator, monkeypatch):
    monkeypatch.setattr("scvi_sams._torch.is_accelerator", lambda device: is_accelerator)
    direct, answers = asked_tables()
    codes, doses = cells()
    found = direct.summed(*direct.rows_of_cells(codes, doses, codes), "mean")
    expected = np.zeros((len(codes), N_GENES))
    for cell in range(len(codes)):
        for code, dose in zip(codes[cell].tolist(), doses[cell].tolist(), strict=True):
            if 0 <= code < N_PERTURBATIONS:
                expected[cell] += dose * direct.mean[code].numpy()
            elif code in ASKED.tolist():
                expected[cell] += dose * answers.mean[ASKED.tolist().index(code)].numpy()
    # 7 was not asked for, and adds nothing.
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_spread_and_numbers_are_those_of_the_row():
    direct, answers = asked_tables()
    codes = torch.tensor([2, 12, 7, 6])
    spread = direct.spread_of(codes, codes)
    expected = [direct.spread[2], answers.spread[2], 1.0, answers.spread[0]]
    np.testing.assert_allclose(spread, expected, rtol=1e-6)
    rows = torch.tensor([0, 4, N_PERTURBATIONS + 2, N_PERTURBATIONS])
    numbers = direct.numbers_of(rows).tolist()
    # The same, whatever else is asked for.
    assert numbers == [0, 4, N_PERTURBATIONS + 12, N_PERTURBATIONS + 6]
    direct.answer(ASKED[2:], Residuals(*(part[2:] for part in direct.of_asked)))
    assert direct.numbers_of(torch.tensor([N_PERTURBATIONS])).tolist() == [N_PERTURBATIONS + 12]
    direct.forget()
    assert direct.numbers_of(rows[:2]).tolist() == [0, 4]


def test_predictions_that_are_not_stacked_are_of_the_model_alone():
    direct, answers = asked_tables()
    rows = torch.tensor([N_PERTURBATIONS + 1])
    mean, sd = direct.in_predictions(rows)
    np.testing.assert_allclose(mean[0], answers.mean[1] + answers.correction[1], rtol=1e-5)
    np.testing.assert_allclose(sd[0], answers.uncertainty[1], rtol=1e-5)
    direct.stacked.fill_(False)
    mean, sd = direct.in_predictions(rows)
    np.testing.assert_allclose(mean[0], answers.mean[1], rtol=1e-5)
    np.testing.assert_allclose(sd[0], answers.sd[1], rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda direct: direct.measure(torch.tensor([[0], [1]]), torch.ones(2, 1)),
        lambda direct: direct.load_state_dict(random_tables().state_dict()),
        lambda direct: direct.to("meta"),
    ],
    ids=["training", "weights", "device"],
)
def test_what_other_weights_said_is_forgotten(change):
    direct, _ = asked_tables()
    change(direct)
    assert not len(direct.asked)
    assert direct.asked.device == direct.weights.device
    assert direct.of_asked is None


def test_answers_are_no_part_of_the_state():
    direct, _ = asked_tables()
    # Processes would pass buffers to one another, and each is asked for others.
    names = {*direct.state_dict(), *(name for name, _ in direct.named_buffers())}
    assert names == set(random_tables().state_dict())
    again = copy.deepcopy(direct)
    assert again.asked.tolist() == ASKED.tolist()


def test_tables_of_any_length_are_read_from_a_state():
    saved, read = UnmeasuredEffects(), UnmeasuredEffects()
    rng = np.random.default_rng(0)
    tables = {
        "states": rng.normal(size=(2, 5, 3)),
        "codes": np.array([4, 7]),
        "elsewhere": rng.normal(size=(2, N_GENES)),
        "weights": np.array([0.2, 0.3, 0.4]),
    }
    saved.fill(**{name: torch.as_tensor(values) for name, values in tables.items()})
    assert not read.is_fitted
    read.load_state_dict(saved.state_dict())
    for name, values in tables.items():
        np.testing.assert_allclose(getattr(read, name), values, rtol=1e-6)
    assert read.codes.dtype == torch.int64
    assert read.is_fitted
    assert read.knows_features
    # A model of an earlier version knows nothing of it.
    older = UnmeasuredEffects()
    older.load_state_dict({})
    assert not older.is_fitted
    assert older.stacking is None
