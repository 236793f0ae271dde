"""Numbers in messages agree with their words."""

import numpy as np
import pytest

from scvi_sams._plurals import counted, plural


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 cells"), (1, "1 cell"), (2, "2 cells"), (1500, "1,500 cells"), (np.int64(1), "1 cell")],
)
def test_only_one_is_singular(number, words):
    assert counted(number, "cell") == words


def test_words_that_do_not_end_with_s():
    assert counted(1, "entry is", "entries are") == "1 entry is"
    assert counted(3, "entry is", "entries are") == "3 entries are"
    assert [plural(n, "has", "have") for n in (0, 1, 2)] == ["have", "has", "have"]
