"""Rows of effects: perturbations, or pairs of a perturbation and a context, by hand."""

import pytest
import torch

from scvi_sams.module._effect_rows import EffectRows

PAIRS = [0, 2, 4, 5, 9]
"""Of two contexts: P0 and P1 in the first, P2 in both, P4 in the second."""


def test_without_contexts_a_row_is_a_perturbation():
    rows = EffectRows(3)
    codes = torch.tensor([[2, -1], [0, 1]])
    assert len(rows) == 3
    assert rows.measured.tolist() == [0, 1, 2]
    assert rows.of_cells(codes, None).tolist() == codes.tolist()
    assert rows.perturbation_of(torch.tensor([0, 2])).tolist() == [0, 2]
    assert rows.places(torch.tensor([2, 0])).tolist() == [2, 0]


def test_rows_of_cells_in_contexts():
    rows = EffectRows(5, 2, PAIRS)
    codes = torch.tensor([[0, -1], [0, 3], [-1, -1], [4, 2], [1, -1]])
    contexts = torch.tensor([0, 1, 1, 2, 0])  # 2: none of these
    assert len(rows) == 15
    found = rows.of_cells(codes, contexts)
    assert found.tolist() == [[0, -1], [1, 10], [-1, -1], [14, 8], [3, -1]]
    assert rows.perturbation_of(found[found >= 0]).tolist() == [0, 0, 3, 4, 2, 1]
    assert rows.of_cells(codes[:2], None).tolist() == [[2, -1], [2, 11]]


def test_measured_rows_and_their_places():
    rows = EffectRows(5, 2, PAIRS)
    assert rows.measured.tolist() == [0, 3, 6, 7, 13]
    assert rows.places(torch.arange(15)).tolist() == [
        *(0, -1, -1),
        *(1, -1, -1),
        *(2, 3, -1),
        *(-1, -1, -1),
        *(-1, 4, -1),
    ]


@pytest.mark.parametrize("n_contexts", [1, 2, 7])
def test_every_pair_has_a_row_of_its_own(n_contexts):
    rows = EffectRows(4, n_contexts, range(4 * n_contexts))
    codes = torch.arange(4).repeat_interleave(n_contexts + 1)[:, None]
    contexts = torch.arange(n_contexts + 1).repeat(4)
    assert rows.of_cells(codes, contexts)[:, 0].tolist() == list(range(len(rows)))
    is_measured = rows.places(torch.arange(len(rows))) >= 0
    assert is_measured.view(4, -1)[:, :-1].all()
    assert not is_measured.view(4, -1)[:, -1].any()
