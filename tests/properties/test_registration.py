"""Registration of anything: it works, or says why not; nothing else, and nothing half done."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pandas as pd
from anndata import AnnData
from hypothesis import event, given
from hypothesis import strategies as st
from scipy import sparse

from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus
from scvi_sams.exceptions import SAMSError

GENES = 3
COLUMNS = ["perturbation", "dose", "batch", "donor", "age", "size"]
usual_labels = st.sampled_from(["control", "A", "B", "A+B", "B + A", "control+A"])
odd_values = st.one_of(
    st.none(),
    st.just(np.nan),
    st.just(pd.NA),
    st.just(pd.NaT),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=4),
    st.binary(max_size=2),
    st.datetimes(),
    st.timedeltas(),
    st.lists(st.integers(0, 2), max_size=2),
    st.tuples(st.integers(0, 2)),
    st.sampled_from(
        ["+", "A+", "A+A", "nan", "1+2", "1e400", "-1", "0x10", "\u0661", "1_0", "inf"]
    ),
)
numbers = st.one_of(st.floats(0, 3), st.floats(), st.just(1.0))
usual_values = {
    "perturbation": usual_labels,
    "dose": st.floats(0, 10),
    "batch": st.sampled_from(["x", "y"]),
    "donor": st.integers(0, 2),
    "age": st.floats(-2, 2),
    "size": st.floats(0.5, 50),
}


@st.composite
def columns(draw: st.DrawFn, name: str, n_cells: int) -> object:
    """A column: mostly usual values, a few odd ones, in some type of pandas."""
    usual = usual_values[name]
    kind = draw(st.sampled_from(["usual"] * 9 + ["some odd", "odd", "numbers"]))
    values = {
        "usual": usual,
        "some odd": st.one_of(usual, usual, usual, odd_values),
        "odd": odd_values,
        "numbers": numbers,
    }[kind]
    column = pd.Series(draw(st.lists(values, min_size=n_cells, max_size=n_cells)), dtype=object)
    dtype = draw(st.sampled_from(["object", "category", "infer", "string", "Float64", "bool"]))
    with contextlib.suppress(TypeError, ValueError, OverflowError):  # then it stays as it is
        column = column.infer_objects() if dtype == "infer" else column.astype(dtype)
    return column.to_numpy() if dtype == "infer" else column.array


@st.composite
def matrices(draw: st.DrawFn, shape: tuple[int, int], usual: st.SearchStrategy) -> object:
    """A matrix: mostly usual values, some odd ones, in some container."""
    odd = st.one_of(usual, st.sampled_from([np.nan, np.inf, -1.0, 0.5, 1e8, 1e30, 1e300, 0.0]))
    values = draw(st.sampled_from([usual, usual, usual, odd]))
    flat = draw(st.lists(values, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    dense = np.array(flat, dtype=float).reshape(shape)
    with np.errstate(all="ignore"):
        dense = dense.astype(draw(st.sampled_from(["f4", "f8", "i4", "u1", "?", "f2", "c16"])))
    container = draw(st.sampled_from([np.asarray, np.asfortranarray, "csr", "csc", "object"]))
    if container == "object":
        return dense.astype(object)
    if container in ("csr", "csc") and dense.dtype != np.float16:
        return sparse.csr_matrix(dense).asformat(container)
    return dense


@st.composite
def adatas(draw: st.DrawFn) -> AnnData:
    n_cells = draw(st.integers(0, 12))
    obs = {name: draw(columns(name, n_cells)) for name in COLUMNS if draw(st.integers(0, 9)) != 0}
    unique = ["g0", "g1", "g2"]
    gene_names = draw(st.sampled_from([unique] * 8 + [["g0", "g0", "g1"], [0, 1, 2]]))
    cells = draw(st.sampled_from([[f"c{i}" for i in range(n_cells)], ["c"] * n_cells]))
    counts = st.integers(1, 40).map(float)
    adata = AnnData(
        draw(matrices((n_cells, GENES), counts)),
        obs=pd.DataFrame(obs, index=cells),
        var=pd.DataFrame(index=pd.Index(gene_names).astype(str)),
    )
    adata.layers["counts"] = draw(matrices((n_cells, GENES), counts))
    n_columns = draw(st.integers(0, 3))
    zero_or_dose = st.sampled_from([0.0, 0.0, 1.0, 2.5])
    doses = draw(matrices((n_cells, n_columns), zero_or_dose))
    if draw(st.booleans()):
        given_names = [draw(odd_values) for _ in range(n_columns)]
        dense = doses.toarray() if sparse.issparse(doses) else doses
        adata.uns["names"] = [str(name) for name in given_names]
        doses = pd.DataFrame(dense, index=cells, columns=list("ABC")[:n_columns])
    adata.obsm["doses"] = doses
    return adata[: n_cells // 2] if draw(st.integers(0, 19)) == 0 else adata


def one_of(*usual: object) -> st.SearchStrategy:
    """Usual values, and once in a hundred something else."""
    return st.sampled_from([*usual] * (495 // len(usual)) + [None, 3, ["A"], "nope", 0.5])


argument_sets = st.fixed_dictionaries(
    {},
    optional={
        "perturbation_key": one_of("perturbation"),
        "control": one_of(*["control", ["control", "A"]] * 9, [], np.nan, True, 0),
        "delimiter": one_of("+", "+", "+", None, "", " "),
        "dosage_key": one_of(None, "dose"),
        "dosage_obsm_key": one_of(None, None, None, "doses"),
        "perturbation_names": one_of(*[None] * 9, "names", ("A", "B", "C"), ["A"]),
        "layer": one_of(None, "counts"),
        "batch_key": one_of(None, "batch"),
        "categorical_covariate_keys": one_of(None, "donor", ("donor", "batch"), ["donor"] * 2),
        "continuous_covariate_keys": one_of(None, "age", ("age", "size")),
        "size_factor_key": one_of(None, "size"),
        "guide_key": one_of(*[None] * 7, "perturbation", "batch", "donor"),
        "context_key": one_of(*[None] * 5, "perturbation", "batch", "donor"),
    },
)


def registered_slots(adata: AnnData) -> dict:
    slots = {"obs": adata.obs, "obsm": adata.obsm, "uns": adata.uns}
    return {
        name: [key for key in slot if str(key).startswith("_scvi")] for name, slot in slots.items()
    }


@given(
    adatas(),
    argument_sets,
    st.sampled_from([SAMSVAE, SAMSVAE, CPAVAE, SVAEPlus, ConditionalVAE]),
    st.sampled_from(["nb", "poisson", "normal"]),
)
def test_registration_works_or_says_why_not(adata, arguments, model_cls, gene_likelihood):
    before = registered_slots(adata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model_cls.setup_anndata(adata, **arguments)
        except SAMSError as error:
            event(f"refused: {type(error).__name__}")
            refused = True
        else:
            refused = False
        if refused:
            assert registered_slots(adata) == before
            return
        try:
            model = model_cls(adata, n_latent=2, n_hidden=4, gene_likelihood=gene_likelihood)
        except SAMSError as error:
            event(f"refused values: {type(error).__name__}")
            return
        event("accepted")
        found = model.get_elbo(return_mean=False, key_added=None, n_samples=1)
    assert np.isfinite(found).all()
