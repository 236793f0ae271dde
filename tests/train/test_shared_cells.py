"""Perturbations that stand together only: what is whose, by hand."""

import numpy as np
import torch

from scvi_sams.train._gene_sums import Cells
from scvi_sams.train._shared_cells import effects_of_others, together_only


def cells_of_groups(rows):
    """Cells as :class:`Cells` has them: group, then codes with its own first, then doses."""
    groups, codes, doses = zip(*rows, strict=True)
    codes = torch.tensor(codes)
    doses = torch.tensor(doses, dtype=torch.float32)
    nothing = torch.zeros(len(rows), 0)
    contexts = torch.zeros(len(rows), dtype=torch.long)
    groups = torch.tensor(groups)
    return Cells(groups, codes, codes, doses, contexts, nothing, torch.ones(len(rows)))


def test_perturbations_whose_cells_carry_others_stand_together():
    cells = cells_of_groups(
        [
            (0, [0, 1], [1, 1]),
            (1, [1, 0], [1, 1]),
            (2, [2, -1], [1, 0]),
            (4, [-1, -1], [0, 0]),
            (3, [3, 2], [1, 1]),
        ]
    )
    assert together_only(cells, 4).tolist() == [True, True, False, True]


def test_what_a_partner_with_cells_of_its_own_does_is_taken_off():
    """P0 at dose 2 stands with P1 at dose 0.5 or, in a third of its cells, at dose 1."""
    cells = cells_of_groups(
        [(0, [0, 1], [2, 0.5]), (0, [0, 1], [2, 0.5]), (0, [0, 1], [2, 1]), (1, [1, -1], [1, 0])]
    )
    known = np.array([[np.nan, np.nan], [3.0, -6.0]])
    found = effects_of_others(cells, np.array([True, False]), np.array([[9.0, 5.0]]), known)
    np.testing.assert_allclose(found, [[2.0, -4.0]])


def test_two_that_always_stand_together_share_evenly():
    cells = cells_of_groups([(0, [0, 1], [1, 1]), (1, [1, 0], [1, 1])])
    lacking = np.array([[4.0, -2.0], [4.0, -2.0]])
    found = effects_of_others(cells, np.array([True, True]), lacking, np.zeros((2, 2)))
    np.testing.assert_allclose(found, lacking / 2)


def test_all_pairs_of_several_tell_each_of_them():
    effects = np.random.default_rng(0).normal(size=(5, 3))
    rows, lacking = [], np.zeros((5, 3))
    for one in range(5):
        for other in range(5):
            if one != other:
                rows.append((one, [one, other], [1, 1]))
                lacking[one] += (effects[one] + effects[other]) / 4
    found = effects_of_others(cells_of_groups(rows), np.full(5, True), lacking, np.zeros((5, 3)))
    np.testing.assert_allclose(lacking - found, effects, atol=1e-4)
