"""Properties of models: finite bounds, probabilities, and no dependence on names and order."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus
from scvi_sams.train import training_statistics

NAMES = ["A", "B", "C"]
MODELS = [SAMSVAE, CPAVAE, SVAEPlus, ConditionalVAE]
TABLES = ("masks.logits", "effects.loc", "effects.log_scale", "means", "cells_per_perturbation")
"""Tensors with a row per perturbation, where effects are mean-field."""
N_GENES = 5


def make_adata(counts, labels, **obs):
    n_cells = len(labels)
    return AnnData(
        sparse.csr_matrix(counts, dtype=np.float32),
        obs=pd.DataFrame({"perturbation": labels, **obs}, index=[f"c{i}" for i in range(n_cells)]),
        var=pd.DataFrame(index=[f"g{i}" for i in range(counts.shape[1])]),
    )


def make_model(model_cls, adata, seed=0, gene_likelihood="nb", setup=None):
    """A model as it is at the first step, with parameters far apart."""
    model_cls.setup_anndata(adata, **(setup or {}))
    mean_field = {"correlated_effects": False} if model_cls is SAMSVAE else {}
    model = model_cls(adata, n_latent=3, n_hidden=6, gene_likelihood=gene_likelihood, **mean_field)
    counts = gene_likelihood != "normal"
    model.module.set_training_statistics(
        training_statistics(model.adata_manager, np.arange(adata.n_obs), counts=counts)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 2)
    model.is_trained_ = True
    return model


@st.composite
def counts(draw: st.DrawFn, n_cells: int) -> np.ndarray:
    """Counts of libraries from one count to millions, with genes and entries of zero."""
    depth = draw(st.lists(st.floats(0, 6), min_size=n_cells, max_size=n_cells))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shares = rng.dirichlet(np.full(N_GENES, draw(st.sampled_from([0.05, 1.0, 50.0]))), n_cells)
    table = np.stack([rng.multinomial(int(10**d), p) for d, p in zip(depth, shares, strict=True)])
    if draw(st.booleans()):
        table[:, 0] = 0
    table[table.sum(axis=1) == 0, 1] = 1
    return table


labels = st.lists(st.sampled_from(["control", "A", "B", "C", "A+B", "B+C"]), max_size=8).map(
    lambda drawn: [*drawn, "control", *NAMES]
)


@given(st.data())
def test_the_bound_is_finite_for_any_legal_counts_and_doses(data):
    drawn = data.draw(labels)
    table = data.draw(counts(len(drawn)))
    model_cls = data.draw(st.sampled_from(MODELS))
    obs, setup = {}, {}
    if model_cls is not SVAEPlus:
        dose = st.one_of(st.floats(0.001, 20), st.just(1e9), st.just(1e-9))
        obs["dose"] = data.draw(st.lists(dose, min_size=len(drawn), max_size=len(drawn)))
        setup["dosage_key"] = "dose"
    if data.draw(st.booleans()):
        size = st.one_of(st.floats(0.1, 1e5), st.just(1e9), st.just(1e-9))
        obs["size"] = data.draw(st.lists(size, min_size=len(drawn), max_size=len(drawn)))
        setup["size_factor_key"] = "size"
    likelihood = data.draw(st.sampled_from(["nb", "poisson", "normal"]))
    model = make_model(
        model_cls, make_adata(table, drawn, **obs), gene_likelihood=likelihood, setup=setup
    )
    for score in (model.get_elbo, model.get_reconstruction_error, model.get_iwelbo):
        found = score(return_mean=False, key_added=None, n_samples=2)
        assert np.isfinite(found).all()


@given(st.floats(-60, 60, width=32), st.integers(0, 99))
def test_inclusion_probabilities_are_probabilities(logit, seed):
    rng = np.random.default_rng(seed)
    adata = make_adata(1 + rng.poisson(3, (8, N_GENES)), ["control", *NAMES] * 2)
    for model_cls in (SAMSVAE, SVAEPlus):
        model = make_model(model_cls, adata.copy(), seed)
        with torch.no_grad():
            model.module.masks.logits.add_(logit)
        masks = model.get_perturbation_masks(key_added=None).to_numpy()
        assert ((masks >= 0) & (masks <= 1)).all()
        assert (
            np.diff(masks.ravel()[np.argsort(model.module.masks.logits.detach().ravel())]) >= 0
        ).all()


@given(
    st.permutations(NAMES),
    labels,
    st.sampled_from([SAMSVAE, CPAVAE, SVAEPlus]),
    st.integers(0, 999),
)
def test_permuted_perturbations_have_permuted_results(order, drawn, model_cls, seed):
    rng = np.random.default_rng(seed)
    table = 1 + rng.poisson(3, (len(drawn), N_GENES))
    new_name = dict(zip(NAMES, order, strict=True))
    renamed = ["+".join(new_name.get(part, part) for part in x.split("+")) for x in drawn]
    model = make_model(model_cls, make_adata(table, drawn), seed)
    other = make_model(model_cls, make_adata(table, renamed), seed + 1)
    canonical = {
        name: "+".join(sorted(new_name[part] for part in name.split("+")))
        for name in model.perturbations
    }
    rows = [
        model.perturbations.index(old)
        for new in other.perturbations
        for old in model.perturbations
        if canonical[old] == new
    ]
    state = model.module.state_dict()
    other.module.load_state_dict(
        {name: value[rows] if name in TABLES else value for name, value in state.items()}
    )
    for read in (
        lambda m: m.get_perturbation_effects(key_added=None).mean,
        lambda m: m.get_perturbation_effects(key_added=None).sd,
        *([lambda m: m.get_perturbation_masks(key_added=None)] if model_cls is not CPAVAE else []),
    ):
        expected = read(model).rename(index=canonical).loc[other.perturbations]
        pd.testing.assert_frame_equal(read(other), expected, rtol=1e-5, atol=1e-6)
    for representation in ("basal", "perturbed"):
        np.testing.assert_allclose(
            other.get_latent_representation(representation=representation, key_added=None),
            model.get_latent_representation(representation=representation, key_added=None),
            rtol=1e-4,
            atol=1e-5,
        )


@given(labels, st.sampled_from(MODELS), st.randoms(), st.integers(0, 999))
def test_the_order_of_cells_is_the_order_of_results(drawn, model_cls, random, seed):
    rng = np.random.default_rng(seed)
    adata = make_adata(1 + rng.poisson(3, (len(drawn), N_GENES)), drawn)
    model = make_model(model_cls, adata, seed)
    order = random.sample(range(len(drawn)), len(drawn))
    shuffled = make_adata(adata.X[order], [drawn[i] for i in order])
    np.testing.assert_allclose(
        model.get_latent_representation(shuffled, key_added=None),
        model.get_latent_representation(key_added=None)[order],
        rtol=1e-4,
        atol=1e-5,
    )


@settings(max_examples=20)
@given(st.data(), st.sampled_from(MODELS))
def test_single_and_double_precision_agree(data, model_cls):
    drawn = data.draw(labels)
    model = make_model(model_cls, make_adata(data.draw(counts(len(drawn))), drawn))
    cells = next(model._read(None, range(len(drawn)), 64).cells())[1]
    scores = []
    for dtype in (torch.float32, torch.float64):
        module = model.module.to(dtype)
        batch = cells._replace(
            x=cells.x.to(dtype), doses=cells.doses.to(dtype), size=cells.size.to(dtype)
        )
        shift = torch.zeros(1, len(drawn), module.n_shift, dtype=dtype)
        qz = module.encode(batch.x, shift, None)
        logits = module.decode(qz.loc, shift, None)
        scores.append(module.likelihood.log_prob(batch.x, logits, batch.size).detach().double())
    # Relative to the largest of the sums that cancel: x log x of the cell.
    scale = (cells.x * cells.x.clamp(min=1).log()).sum(1).double() + cells.x.sum(1).double() + 10
    assert ((scores[0] - scores[1]).abs() / scale).max() < 1e-4
