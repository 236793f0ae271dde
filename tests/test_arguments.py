"""The checks of arguments that every method shares."""

from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

from scvi_sams._checks import (
    as_cells,
    as_list,
    as_names,
    as_path,
    as_plain,
    as_positions,
    check_bool,
    check_choice,
    check_integer,
    check_key,
    check_number,
)
from scvi_sams.exceptions import InvalidArgumentError


@pytest.mark.parametrize("value", [1, 7, np.int64(3), np.uint8(1)])
def test_whole_numbers_of_any_type_are_accepted(value):
    check_integer(n_samples=value)


@pytest.mark.parametrize("value", [0, -1, 1.0, "1", None, True, np.float64(2), np.nan, [1]])
def test_anything_else_is_refused_by_name_and_value(value):
    with pytest.raises(InvalidArgumentError) as error:
        check_integer(n_epochs=5, n_samples=value)
    assert str(error.value) == f"`n_samples` must be a whole number of at least 1, not {value!r}."


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), Fraction(1, 2), 1e-30])
def test_numbers_of_any_type_are_accepted(value):
    check_number(above=0, below=1, share=value)


@pytest.mark.parametrize("value", [0, 1, 2, -1, np.nan, np.inf, "0.5", None, True, 1j])
def test_numbers_out_of_bounds_are_refused_with_the_bounds(value):
    with pytest.raises(InvalidArgumentError) as error:
        check_number(above=0, below=1, share=value)
    assert str(error.value) == f"`share` must be a number above 0 and below 1, not {value!r}."


def test_bounds_may_be_reached_where_they_say_so():
    check_number(at_least=0, at_most=1, share=0)
    check_number(at_least=0, at_most=1, share=1)
    with pytest.raises(InvalidArgumentError, match=r"of at least 0 and of at most 1, not -0\.1"):
        check_number(at_least=0, at_most=1, share=-0.1)
    with pytest.raises(InvalidArgumentError, match="a number that is finite, not inf"):
        check_number(share=np.inf)


def test_choices_flags_and_keys():
    check_choice("mode", "a", ("a", "b"))
    check_bool(on=True, off=np.bool_(False))
    check_key(layer=None, batch_key="lane")
    with pytest.raises(
        InvalidArgumentError, match=r"`mode` must be one of \['a', 'b'\], not \['a'\]"
    ):
        check_choice("mode", ["a"], ("a", "b"))
    with pytest.raises(InvalidArgumentError, match="`on` must be True or False, not 1"):
        check_bool(on=1)
    with pytest.raises(InvalidArgumentError, match=r"`layer` must be one name .*not 3"):
        check_key(batch_key="lane", layer=3)


def test_one_name_is_a_list_of_one():
    assert as_names("genes", "STAT1") == ["STAT1"]
    assert as_names("genes", np.array(["A", "B"])) == ["A", "B"]
    assert as_names("genes", (1, 2)) == ["1", "2"]
    with pytest.raises(InvalidArgumentError, match="`genes` must be names, not 3"):
        as_names("genes", 3)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([2, 0, -1], [2, 0, 3]),
        (np.array([1, 1], dtype=np.uint8), [1, 1]),
        ([False, True, True, False], [1, 2]),
        ([], []),
    ],
)
def test_positions_of_cells(cells, expected):
    assert as_positions("indices", cells, 4).tolist() == expected


@pytest.mark.parametrize("cells", [[4], [-5], [0.0], ["c0"], [True], 1, [[0, 1]], [None]])
def test_other_positions_are_refused(cells):
    with pytest.raises(InvalidArgumentError, match="`indices`"):
        as_positions("indices", cells, 4)


@pytest.mark.parametrize(
    "mask",
    [
        pd.Series([False, True, False, True], index=list("abcd")),
        pd.array([False, True, False, True], dtype="boolean"),
        pd.Series([False, True, False, True], dtype=object),
        np.array([False, True, False, True]),
    ],
)
def test_masks_of_pandas_are_masks(mask):
    assert as_positions("indices", mask, 4).tolist() == [1, 3]
    assert as_cells("train", mask, 4).tolist() == [1, 3]


@pytest.mark.parametrize("dtype", ["Int64", "int8", object])
def test_positions_of_pandas_are_positions(dtype):
    assert as_positions("indices", pd.Series([3, 0], dtype=dtype), 4).tolist() == [3, 0]


@pytest.mark.parametrize("dtype", ["boolean", "Int64"])
def test_a_mask_with_missing_values_is_neither(dtype):
    with pytest.raises(InvalidArgumentError, match="`train` must be positions"):
        as_cells("train", pd.array([1, None, 0, 1], dtype=dtype), 4)


def test_an_array_without_a_dimension_is_one_name():
    assert as_names("genes", np.array("STAT1")) == ["STAT1"]
    with pytest.raises(InvalidArgumentError, match="`seeds` must be numbers, not array"):
        as_list("seeds", np.array(3), "numbers")


@pytest.mark.parametrize("value", [3, None, "seeds"])
def test_one_value_is_no_list(value):
    with pytest.raises(InvalidArgumentError, match="`seeds` must be numbers, not"):
        as_list("seeds", value, "numbers")
    assert as_list("seeds", (seed for seed in (1, 2)), "numbers") == [1, 2]


@pytest.mark.parametrize("value", [None, 3, ["a"], "", " ", b"a"])
def test_what_names_no_file_is_refused(value):
    with pytest.raises(InvalidArgumentError, match="`folder` must be the path of a file"):
        as_path("folder", value)


def test_numbers_of_numpy_are_plain():
    plain = [as_plain(value) for value in (np.int64(3), np.float32(0.5), np.bool_(True), "a", None)]
    assert plain == [3, 0.5, True, "a", None]
    assert [type(value) for value in plain[:3]] == [int, float, bool]
