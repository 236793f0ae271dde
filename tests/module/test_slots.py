"""Sums over the perturbations of cells, against dense one-hot matrices."""

import numpy as np
import pytest
import torch

from module.builders import CODES, DOSES
from scvi_sams.module import perturbations_of_batch, positions_in, sum_over_slots


def dense_dosages(codes, doses, n_perturbations):
    """Cells x perturbations."""
    dense = np.zeros((len(codes), n_perturbations))
    for cell, (row, amounts) in enumerate(zip(codes, doses, strict=True)):
        for code, amount in zip(row, amounts, strict=True):
            if code >= 0:
                dense[cell, code] += amount
    return dense


def random_codes(n_cells, n_slots, n_perturbations, seed):
    rng = np.random.default_rng(seed)
    codes = np.stack([rng.permutation(n_perturbations)[:n_slots] for _ in range(n_cells)])
    codes[rng.random(codes.shape) < 0.4] = -1
    doses = np.where(codes >= 0, rng.uniform(0.1, 3, size=codes.shape), 0)
    return codes, doses


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n_slots", [1, 2, 4])
def test_dosed_sums_are_a_matrix_product(seed, n_slots):
    codes, doses = random_codes(30, n_slots, 50, seed)
    table = np.random.default_rng(seed).normal(size=(3, 50, 4))
    rows, slots = perturbations_of_batch(torch.as_tensor(codes), 50)
    of_batch = torch.as_tensor(table)[:, rows]
    actual = sum_over_slots(of_batch, slots, torch.as_tensor(doses))
    np.testing.assert_allclose(actual, dense_dosages(codes, doses, 50) @ table, atol=1e-12)
    counted = sum_over_slots(of_batch, slots)
    np.testing.assert_allclose(counted, dense_dosages(codes, codes >= 0, 50) @ table, atol=1e-12)


def test_example_by_hand():
    rows, slots = perturbations_of_batch(torch.tensor([[7, -1], [-1, -1], [3, 7]]), 9)
    assert rows.tolist() == [3, 7]
    assert slots.tolist() == [[1, 2], [2, 2], [0, 1]]
    table = torch.tensor([[[1.0, 10.0], [2.0, 20.0]]])
    doses = torch.tensor([[0.5, 0], [0, 0], [3, 1]])
    assert sum_over_slots(table, slots, doses).tolist() == [[[1, 10], [0, 0], [5, 50]]]
    assert sum_over_slots(table, slots).tolist() == [[[2, 20], [0, 0], [3, 30]]]


def test_rows_are_the_perturbations_of_the_batch_once_and_ascending():
    codes, _ = random_codes(40, 3, 1000, seed=9)
    rows, slots = perturbations_of_batch(torch.as_tensor(codes), 1000)
    assert rows.tolist() == sorted(set(codes[codes >= 0].tolist()))
    given = codes >= 0
    np.testing.assert_array_equal(rows[slots[torch.as_tensor(given)]], codes[given])
    assert (slots[torch.as_tensor(~given)] == len(rows)).all()


def test_positions_among_more_perturbations_than_the_batch_has():
    codes, doses = random_codes(20, 3, 12, seed=3)
    rows = torch.arange(12)
    table = torch.as_tensor(np.random.default_rng(0).normal(size=(2, 12, 4)))
    slots = positions_in(rows, torch.as_tensor(codes))
    actual = sum_over_slots(table, slots, torch.as_tensor(doses))
    np.testing.assert_allclose(actual, dense_dosages(codes, doses, 12) @ table.numpy(), atol=1e-12)
    some = torch.tensor([2, 5, 9])
    assert positions_in(some, torch.tensor([[9, -1], [2, 5]])).tolist() == [[2, 3], [0, 1]]


def test_positions_agree_with_those_of_the_batch():
    codes = torch.tensor(CODES)
    rows, slots = perturbations_of_batch(codes, 5)
    assert torch.equal(positions_in(rows, codes), slots)


def test_a_batch_of_controls_sums_to_zero():
    codes = torch.full((4, 2), -1)
    rows, slots = perturbations_of_batch(codes, 5)
    assert rows.numel() == 0
    assert torch.equal(sum_over_slots(torch.zeros(3, 0, 5), slots), torch.zeros(3, 4, 5))
    assert torch.equal(positions_in(rows, codes), slots)


def test_a_batch_of_controls_still_reaches_the_parameters():
    # Of several processes, one may see controls only: it has to hand in gradients all the same.
    parameter = torch.ones(6, 5, requires_grad=True)
    rows, slots = perturbations_of_batch(torch.full((4, 2), -1), 6)
    sum_over_slots(parameter[None, rows], slots).sum().backward()
    assert torch.equal(parameter.grad, torch.zeros(6, 5))


@pytest.mark.parametrize("of_table", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_doses", [torch.float32, torch.float64])
def test_neither_doses_nor_table_lose_precision_beside_the_other(of_table, of_doses):
    dose = 1 + 2**-20
    table = torch.full((1, 1, 1), 3.0, dtype=of_table)
    doses = torch.tensor([[dose]], dtype=of_doses)
    assert sum_over_slots(table, torch.tensor([[0]]), doses).item() == 3 * dose


def test_gradients_are_the_dosages():
    codes, doses = torch.tensor(CODES), torch.tensor(DOSES, dtype=torch.float64)
    rows, slots = perturbations_of_batch(codes, 5)
    table = torch.zeros(1, len(rows), 1, dtype=torch.float64, requires_grad=True)
    sum_over_slots(table, slots, doses).sum().backward()
    expected = dense_dosages(CODES, DOSES, 5).sum(axis=0)
    np.testing.assert_allclose(table.grad[0, :, 0], expected)
