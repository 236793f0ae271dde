"""Rows of tables that effects which no cell shows have while they are asked for."""

import copy

import numpy as np
import pytest
import torch

from module.builders import CODES, DOSES, N_GENES
from module.test_direct_effects import N_PERTURBATIONS, random_tables
from scvi_sams.module._combinations import Combinations
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
    order = torch.tensor([2, 0, 1])
    direct.answers = direct.answers.with_effects(ASKED[order], rows_of(answers, order))
    return direct, answers


def rows_of(tables, rows):
    return Residuals(*(part[rows] for part in tables))


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
    direct.forget()
    direct.answers = direct.answers.with_effects(ASKED[2:], rows_of(answers, slice(2, None)))
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
    effects, combinations, tables = direct.answers
    assert not len(effects)
    assert not len(combinations.codes)
    assert effects.device == combinations.doses.device == direct.weights.device
    assert tables is None


def test_answers_are_no_part_of_the_state():
    direct, _ = asked_tables()
    # Processes would pass buffers to one another, and each is asked for others.
    names = {*direct.state_dict(), *(name for name, _ in direct.named_buffers())}
    assert names == set(random_tables().state_dict())
    again = copy.deepcopy(direct)
    assert again.answers.effects.tolist() == ASKED.tolist()


COMBINATIONS = [((12, 2), (1, 0.5)), ((9, 6, 0), (2, 1, 1)), ((9, 3), (1, 1))]


def of_labels(labels):
    codes, doses = (torch.full((len(labels), 3), -1), torch.zeros(len(labels), 3))
    for row, (perturbations, given) in enumerate(labels):
        codes[row, : len(perturbations)] = torch.tensor(perturbations)
        doses[row, : len(given)] = torch.tensor(given)
    return codes, doses


@pytest.mark.parametrize("calls", [[[0, 1, 2]], [[2], [0, 1]], [[1], [2], [0]]])
def test_combinations_that_were_asked_for_have_rows_of_their_own(calls):
    direct, _ = asked_tables()
    tables = random_answers(3, seed=8)
    for rows in calls:
        codes, doses = of_labels([COMBINATIONS[row] for row in rows])
        direct.answers = direct.answers.with_combinations(
            Combinations.of_cells(codes, doses), rows_of(tables, rows)
        )
    # In any order; another dose, or one perturbation more or less, is another combination.
    cells = [((2, 12), (0.5, 1)), ((0, 9, 6), (1, 2, 1)), ((3, 9), (1, 1))]
    codes, doses = of_labels([*cells, ((9, 6), (2, 1)), ((12, 2), (1, 1))])
    rows, weights = direct.rows_of_cells(codes, doses, codes)
    mean, sd = direct.in_predictions(rows[:3, 0])
    np.testing.assert_allclose(mean, tables.mean + tables.correction, rtol=1e-5)
    np.testing.assert_allclose(sd, tables.uncertainty, rtol=1e-5)
    assert (rows[:3, 1:] == -1).all()
    assert weights[:3].tolist() == [[1, 0, 0]] * 3
    first = direct.n_rows
    assert rows[3:].tolist() == [[first + 1, first, -1], [first + 2, 2, -1]]
    # Noise is that of the last perturbation.
    assert direct.numbers_of(rows[:3, 0]).tolist() == [first + 12, first + 9, first + 9]
    # Effects that are asked for later leave combinations as they are.
    direct.answers = direct.answers.with_effects(torch.tensor([7]), random_answers(1))
    rows, _ = direct.rows_of_cells(codes, doses, codes)
    np.testing.assert_array_equal(direct.in_predictions(rows[:3, 0])[0], mean)
    direct.answers = direct.answers.without_combinations()
    rows, _ = direct.rows_of_cells(codes, doses, codes)
    assert rows[0].tolist() == [2, first + 3, -1]
    assert len(direct.answers.tables.mean) == 4


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
