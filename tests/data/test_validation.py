"""Checks of expression values, and the guard that undoes half-done registrations."""

import anndata
import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

from scvi_sams.counts import _validation
from scvi_sams.counts._validation import unchanged_on_error, validate_expression
from scvi_sams.exceptions import InvalidCountsError

COUNTS = np.array([[1, 0, 3], [0, 2, 0], [4, 0, 0], [0, 0, 7]], dtype=np.float32)
IN_MEMORY = {
    "dense": np.asarray,
    "fortran": np.asfortranarray,
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "csr array": sparse.csr_array,
}
BACKED = ("dense", "csr")


@pytest.fixture
def stored_as(tmp_path):
    """Hold values in memory, or in a file that is read as it is needed."""
    opened = []

    def build(values, form):
        if not form.startswith("backed "):
            return IN_MEMORY[form](values)
        AnnData(IN_MEMORY[form.removeprefix("backed ")](values)).write_h5ad(tmp_path / "x.h5ad")
        opened.append(anndata.read_h5ad(tmp_path / "x.h5ad", backed="r"))
        return opened[-1].X

    yield build
    for adata in opened:
        adata.file.close()


@pytest.fixture(params=[*IN_MEMORY, *(f"backed {form}" for form in BACKED)])
def form(request):
    return request.param


def check(values, *, counts=True):
    validate_expression(values, counts=counts, location="adata.layers['counts']")


def changed(value, row=2, column=0):
    values = COUNTS.copy()
    values[row, column] = value
    return values


def test_counts_are_counts(stored_as, form):
    check(stored_as(COUNTS, form))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int8, np.int32, np.int64, np.uint64, float])
@pytest.mark.parametrize("matrix", [np.asarray, sparse.csr_matrix])
def test_counts_of_any_type_are_counts(matrix, dtype):
    check(matrix(COUNTS.astype(dtype)))


def test_large_counts_of_small_types_do_not_overflow_into_empty_cells():
    check(np.full((2, 2), 128, dtype=np.uint8))
    check(sparse.csr_matrix(np.full((2, 4), 64, dtype=np.int8)))


@pytest.mark.parametrize(("value", "shown"), [(-1, "-1"), (-0.5, "-0.5")])
def test_negative_values_are_named(stored_as, form, value, shown):
    with pytest.raises(InvalidCountsError, match="negative") as error:
        check(stored_as(changed(value), form))
    message = str(error.value)
    assert f"such as {shown})" in message
    assert "adata.layers['counts']" in message
    assert "`layer`" in message
    assert "gene_likelihood='normal'" in message


def test_negative_integers_are_named():
    with pytest.raises(InvalidCountsError, match="such as -3"):
        check(sparse.csr_matrix(changed(-3).astype(np.int16)))


def test_fractional_values_are_named(stored_as, form):
    with pytest.raises(InvalidCountsError, match="fractional") as error:
        check(stored_as(changed(2.5), form))
    message = str(error.value)
    assert "such as 2.5)" in message
    assert "adata.layers['counts']" in message
    assert "`layer`" in message
    assert "gene_likelihood='normal'" in message


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted_whatever_the_likelihood(
    stored_as, form, value, counts
):
    with pytest.raises(InvalidCountsError, match=r"1 value .*NaN or infinite") as error:
        check(stored_as(changed(value), form), counts=counts)
    assert "adata.layers['counts']" in str(error.value)


def test_cells_without_counts_are_counted_and_placed(stored_as, form):
    values = COUNTS.copy()
    values[[1, 3]] = 0
    with pytest.raises(InvalidCountsError, match="2 cells have no counts") as error:
        check(stored_as(values, form))
    assert "position 1." in str(error.value)
    assert "filter_cells" in str(error.value)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_cells_of_explicit_zeros_are_empty(dtype):
    matrix = sparse.csr_matrix((np.array([1, 0], dtype=dtype), [0, 1], [0, 1, 2]), shape=(2, 2))
    with pytest.raises(InvalidCountsError, match=r"1 cell .* position 1"):
        check(matrix)


@pytest.mark.parametrize("matrix", [np.asarray, sparse.csr_matrix])
def test_normalised_values_may_be_anything_finite(matrix):
    values = matrix(np.array([[-1.5, 0.25], [0, 0]]))
    check(values, counts=False)


@pytest.mark.parametrize("matrix", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_all_chunks_of_rows_are_checked(monkeypatch, matrix):
    monkeypatch.setattr(_validation, "_ROWS_PER_CHUNK", 3)
    values = np.ones((10, 2))
    check(matrix(values))
    values[7] = 0
    with pytest.raises(InvalidCountsError, match="position 7"):
        check(matrix(values))
    values[9, 1] = 0.5
    values[7] = 1
    with pytest.raises(InvalidCountsError, match=r"such as 0\.5"):
        check(matrix(values))


def test_no_cells_and_no_entries_are_no_error():
    check(np.zeros((0, 3)))
    check(sparse.csr_matrix((0, 3)))
    check(sparse.csr_matrix((2, 3)), counts=False)


# The guard


def test_without_an_error_the_guard_does_nothing(make_screen):
    adata = make_screen(["control", "A"])
    with unchanged_on_error(adata):
        adata.obs["_scvi_batch"] = 0
        adata.uns["_scvi_uuid"] = "x"
    assert "_scvi_batch" in adata.obs
    assert adata.uns["_scvi_uuid"] == "x"


def register_half_way(adata, error):
    """Write as scvi-tools does, field by field, and fail before the last one."""
    with unchanged_on_error(adata):
        adata.obs["_scvi_batch"] = np.array([0, 1])
        adata.obs["_scvi_labels"] = 0
        adata.obsm["_scvi_perturbations"] = np.zeros((2, 4))
        adata.obsm["_scvi_extra"] = np.zeros((2, 1))
        adata.uns["_scvi_uuid"] = "second"
        del adata.uns["_scvi_deleted"]
        adata.uns["_scvi_manager_uuid"] = "third"
        raise error("half-way")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_on_an_error_slots_of_scvi_are_as_before(make_screen, assert_unchanged, error):
    adata = make_screen(["control", "A"], batch=["x", "y"])
    adata.obs["_scvi_batch"] = np.array([5, 6])
    adata.obsm["_scvi_perturbations"] = np.array([[1.0], [2.0]])
    adata.uns["_scvi_uuid"] = "first"
    adata.uns["_scvi_deleted"] = "comes back"
    before = adata.copy()
    with pytest.raises(error, match="half-way"):
        register_half_way(adata, error)
    assert_unchanged(adata, before)


def test_a_view_stays_a_view_after_an_error(make_screen):
    adata = make_screen(["control", "A"])
    adata.obs["_scvi_batch"] = 0
    adata.uns["_scvi_uuid"] = "first"
    view = adata[:1]
    with pytest.raises(ValueError, match="half-way"), unchanged_on_error(view):
        raise ValueError("half-way")
    assert view.is_view
