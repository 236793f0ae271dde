"""Where perturbations act and differ: probabilities by hand, calls, patterns, what is written."""

import itertools
import logging

import numpy as np
import pandas as pd
import pytest
import torch

from model.builders import SHIFTS_ONLY, small_screen, train_small
from scvi_sams import SAMSVAE
from scvi_sams.exceptions import InvalidArgumentError, SAMSError, UnknownPerturbationError
from scvi_sams.interpretation import _contexts, context_effects
from scvi_sams.module._masks import NEVER

NAMES = ["P001", "P002", "P003", "P004"]
TYPES = ["type_1", "type_2", "type_3"]
MISSING = ("P004", "type_3")
ROW, ENTRY = 0.3, 0.2
CONTEXTS = {"context_key": "cell_type"}


def trained():
    """Every pair is measured but one, which has none of the cells; masks are set by hand."""
    adata = small_screen(n_cell_types=3, n_combinations=0)
    is_missing = (adata.obs["perturbation"] == MISSING[0]) & (adata.obs["cell_type"] == MISSING[1])
    model = train_small(
        adata[~is_missing.to_numpy()].copy(), CONTEXTS, correlated_effects=False, **SHIFTS_ONLY
    )
    module = model.module
    with torch.no_grad():
        module.masks.logits.fill_(-4.0)
        module.contexts.masks.logits.fill_(-5.0)
        module.contexts.prior.set_to(ROW, ENTRY)
        shared(model, "P001")[2] = 6.0
        own(model, "P002", "type_2")[1] = 6.0
        own(model, "P002", "type_2")[3] = 1.0
        shared(model, "P003")[0] = 6.0
        own(model, "P003", "type_1")[0] = 5.0
        for effects in (module.effects, module.contexts.effects):
            effects.loc.copy_(torch.linspace(-3, 3, effects.loc.numel()).reshape(effects.loc.shape))
    return model


def shared(model, name):
    """Log-odds of masks that contexts share, to be changed in place."""
    return model.module.masks.logits[NAMES.index(name)]


def own(model, name, context):
    """Log-odds of masks of a context's own, to be changed in place."""
    row = NAMES.index(name) * (len(TYPES) + 1) + TYPES.index(context)
    return model.module.contexts.masks.logits[model.module.effect_rows.places(torch.tensor(row))]


@pytest.fixture(scope="module")
def model():
    return trained()


@pytest.fixture
def tested(monkeypatch):
    """The test on cells: q-values by perturbation and context in place of those of the cells."""
    q_values = pd.DataFrame(1e-9, index=NAMES, columns=TYPES)
    q_values.loc[MISSING] = np.nan
    monkeypatch.setattr(_contexts, "q_values_of_pairs", lambda *_: q_values.to_numpy())
    return q_values


def matrix(table, column):
    return table.pivot(index="perturbation", columns="context", values=column)


def test_a_row_for_every_pair(model, tested):
    table = context_effects(model, key_added=None)
    pairs = list(table[["perturbation", "context"]].itertuples(index=False, name=None))
    assert pairs == list(itertools.product(NAMES, TYPES))
    measured = matrix(table, "is_measured")
    assert not measured.loc[MISSING]
    assert measured.to_numpy().sum() == len(pairs) - 1
    counts = model.adata[model.train_indices].obs.groupby(
        ["perturbation", "cell_type"], observed=True
    )
    for (name, context), cells in counts:
        if name != "control":
            assert matrix(table, "n_cells").loc[name, context] == len(cells)
    assert matrix(table, "n_cells").loc[MISSING] == 0


def test_probabilities_are_those_of_the_likeliest_dimension(model, tested):
    table = context_effects(model, key_added=None)
    p_acts, p_differs = matrix(table, "p_acts"), matrix(table, "p_differs")
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    for name, context in itertools.product(NAMES, TYPES):
        if (name, context) == MISSING:
            continue
        of_own = sigmoid(own(model, name, context).detach().numpy().astype(np.float64))
        assert p_differs.loc[name, context] == pytest.approx(of_own.max(), rel=1e-5)
        masks = model.get_perturbation_masks(context=context, key_added=None).loc[name]
        assert p_acts.loc[name, context] == pytest.approx(masks.max(), rel=1e-6)
    assert p_differs.loc["P002", "type_2"] == pytest.approx(sigmoid(6), rel=1e-5)
    assert p_acts.loc["P001"].min() > 0.99
    assert p_acts.loc["P002", ["type_1", "type_3"]].max() < 0.05


def test_pairs_without_cells_have_what_is_shared_and_the_prior(model, tested):
    """By summing over all masks of the row."""
    table = context_effects(model, key_added=None)
    n = model.module.n_latent
    any_on = 0.0
    for row_has_masks, masks in itertools.product((0, 1), itertools.product((0, 1), repeat=n)):
        on = ENTRY if row_has_masks else NEVER
        chance = np.prod([on if mask else 1 - on for mask in masks])
        any_on += (ROW if row_has_masks else 1 - ROW) * chance * any(masks)
    p_differs = matrix(table, "p_differs").loc[MISSING]
    assert p_differs == pytest.approx(any_on, rel=1e-5)
    of_shared = 1 / (1 + np.exp(4.0))
    p_acts = matrix(table, "p_acts").loc[MISSING]
    assert p_acts == pytest.approx(1 - (1 - of_shared) * (1 - any_on), rel=1e-5)


def test_nothing_is_called_of_pairs_without_cells(model, tested):
    tested.loc[MISSING] = 1e-9
    with torch.no_grad():
        model.module.contexts.prior.set_to(0.999, 0.9)
    table = context_effects(model, key_added=None)
    with torch.no_grad():
        model.module.contexts.prior.set_to(ROW, ENTRY)
    row = table[(table["perturbation"] == MISSING[0]) & (table["context"] == MISSING[1])].iloc[0]
    assert row["p_differs"] > 0.99
    assert not row["acts"]
    assert not row["differs"]


def test_sizes_are_norms_of_posterior_means(model, tested):
    table = context_effects(model, key_added=None)
    for context in TYPES:
        mean = model.get_perturbation_effects(context=context, key_added=None).mean
        expected = np.sqrt((mean**2).sum(axis=1))
        np.testing.assert_allclose(matrix(table, "effect")[context], expected, rtol=1e-5)
    contexts = model.module.contexts
    place = int(model.module.effect_rows.places(torch.tensor(5)))  # P002 in type_2
    on = torch.sigmoid(contexts.masks.logits[place])
    size = (on * contexts.effects.loc[place]).norm().item()
    assert matrix(table, "own_effect").loc["P002", "type_2"] == pytest.approx(size, rel=1e-5)
    # P004 in type_3 was not measured: as in type_1, as in type_2 or as in none, equally likely.
    places = model.module.effect_rows.places(torch.tensor([12, 13]))
    means = torch.sigmoid(contexts.masks.logits[places]) * contexts.effects.loc[places]
    size = (means.sum(dim=0) / 3).norm().item()
    assert matrix(table, "own_effect").loc[MISSING] == pytest.approx(size, rel=1e-5)


def test_calls_are_those_that_the_rate_allows(model, tested):
    """Sorted by hand: the mean of one less the probabilities of all that are called."""
    for fdr, column in itertools.product((0.001, 0.01, 0.1, 0.6), ("acts", "differs")):
        table = context_effects(model, fdr=fdr, key_added=None)
        measured = table[table["is_measured"]].sort_values(f"p_{column}", ascending=False)
        probability = measured[f"p_{column}"]
        false = (1 - probability).expanding().mean()
        false = false.groupby(probability).transform("last")  # equal ones are called alike
        n_called = int((false <= fdr).sum())
        assert measured[column].sum() == n_called
        assert measured[column].iloc[:n_called].all()
        expected = table.attrs["expected_false"][column]
        assert expected == pytest.approx(false.iloc[n_called - 1] if n_called else 0)
        assert expected <= fdr


def test_a_pair_acts_only_if_its_cells_differ(model, tested):
    tested.loc["P001", "type_2"] = 0.2
    acts = matrix(context_effects(model, key_added=None), "acts")
    assert acts.loc["P001"].tolist() == [True, False, True]
    assert matrix(context_effects(model, fdr=0.3, key_added=None), "acts").loc["P001"].all()
    tested.loc["P001"] = np.nan
    assert not matrix(context_effects(model, key_added=None), "acts").loc["P001"].any()


def test_a_perturbation_differs_only_if_cells_differ_in_some_context(model, tested):
    tested.loc["P002"] = [0.9, 0.9, 0.01]
    assert matrix(context_effects(model, key_added=None), "differs").loc["P002", "type_2"]
    tested.loc["P002"] = 0.9
    assert not matrix(context_effects(model, key_added=None), "differs").loc["P002"].any()


def patterns(table):
    return table.drop_duplicates("perturbation").set_index("perturbation")["pattern"]


def test_patterns_sum_up_calls(model, tested):
    table = context_effects(model, key_added=None)
    assert patterns(table).to_dict() == {
        "P001": "shared",
        "P002": "only in: type_2",
        "P003": "differs in: type_1",
        "P004": "none",
    }
    # The call is missing for want of cells, not of probability.
    tested.loc["P001", "type_2"] = 0.2
    assert patterns(context_effects(model, key_added=None))["P001"] == "shared"


def test_a_difference_that_is_not_called_is_unclear(tested):
    model = trained()
    with torch.no_grad():
        own(model, "P003", "type_1")[0] = -5.0
        own(model, "P002", "type_2")[1] = 2.2
        own(model, "P002", "type_2")[3] = -5.0
    table = context_effects(model, fdr=0.05, key_added=None)
    assert matrix(table, "acts").loc["P002"].tolist() == [False, True, False]
    assert not table["differs"].any()
    assert patterns(table)["P002"] == "unclear"
    assert (table["own_latents"] == "").all()


def test_dimensions_of_a_difference_are_named(model, tested):
    names = matrix(context_effects(model, key_added=None), "own_latents")
    assert names.loc["P002"].tolist() == ["", "latent_1, latent_3", ""]
    assert names.loc["P003"].tolist() == ["latent_0", "", ""]


def test_what_is_asked_for_is_called_as_in_the_whole_screen(model, tested):
    everything = context_effects(model, key_added=None)
    some = context_effects(model, ["P003", "P001"], key_added=None)
    expected = pd.concat(
        [everything[everything["perturbation"] == name] for name in ("P003", "P001")]
    )
    pd.testing.assert_frame_equal(some, expected.reset_index(drop=True))
    pd.testing.assert_frame_equal(
        context_effects(model, "P003", key_added=None), some.iloc[: len(TYPES)]
    )


def test_the_test_on_cells_is_one_within_contexts():
    """Effects in one of two cell types that themselves differ; two perturbations do nothing."""
    adata = small_screen(
        n_cell_types=2, n_combinations=0, cells_per_perturbation=60, n_null_perturbations=2,
        cell_type_specific_share=1.0, effect_scale=6.0, n_controls=150, library_size=3000.0,
    )  # fmt: skip
    model = train_small(adata, CONTEXTS, **SHIFTS_ONLY)
    table = context_effects(model, key_added=None)
    acts_in = pd.DataFrame(
        adata.uns["simulation"]["true_response"],
        index=adata.uns["simulation"]["perturbations"],
        columns=adata.uns["simulation"]["cell_types"],
    )
    q_value = matrix(table, "q_value").loc[acts_in.index, acts_in.columns].to_numpy()
    is_null = ~acts_in.to_numpy() | ~adata.uns["simulation"]["true_masks"].any(axis=1)[:, None]
    assert (~is_null).sum() == 2
    assert (q_value[~is_null] < 1e-3).all()
    assert (q_value[is_null] > 0.01).all()


def test_the_table_is_written(model, tested, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="scvi.sams"):
        table = context_effects(model)
    assert "3 of 4 perturbations act in some context and 2 differ" in caplog.text
    pd.testing.assert_frame_equal(model.adata.uns["sams_context_effects"], table)
    assert "sams_context_effects" in model.adata.uns["sams_provenance"]
    model.adata.write_h5ad(tmp_path / "screen.h5ad")
    del model.adata.uns["sams_context_effects"], model.adata.uns["sams_provenance"]
    context_effects(model, key_added=None)
    assert "sams_context_effects" not in model.adata.uns


def test_errors_say_what_to_do(model, tmp_path):
    with pytest.raises(SAMSError, match=r"setup_anndata\(context_key="):
        context_effects(train_small(small_screen()))
    with pytest.raises(UnknownPerturbationError, match="P9"):
        context_effects(model, ["P9"])
    with pytest.raises(InvalidArgumentError, match="`perturbations` is empty"):
        context_effects(model, [])
    with pytest.raises(InvalidArgumentError, match="`fdr`"):
        context_effects(model, fdr=1.5)
    model.save(str(tmp_path / "model"))
    with pytest.raises(SAMSError, match="loaded without data"):
        context_effects(SAMSVAE.load(str(tmp_path / "model"), adata=False))
