"""Contexts of cells: codes, measured pairs, other data, loaders, files and what is logged."""

import numpy as np
import pandas as pd
import pytest
import torch
from scvi.dataloaders import AnnDataLoader

from data.on_disk import FORMS, write_screen
from model.builders import small_screen
from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus
from scvi_sams.data import ResidentDataModule, StreamingDataModule, open_screen
from scvi_sams.data._contexts import ContextField, context_field, registered_contexts
from scvi_sams.data._field import PerturbationField
from scvi_sams.exceptions import (
    ChangedDataError,
    InvalidArgumentError,
    InvalidCovariateError,
    MissingKeyError,
    RegistrationError,
)
from scvi_sams.model._registration import sizes_for_module

LABELS = ["control", "A", "B", "B+A", "control", "A", "A", "B"]
LINES = ["T", "T", "K", "K", "K", "T", "K", "K"]
CODES = [1, 1, 0, 0, 0, 1, 0, 0]


def create(adata, **setup):
    SAMSVAE.setup_anndata(adata, **({"context_key": "line"} | setup))
    return SAMSVAE(adata, n_latent=2, n_hidden=4)


def state_of(model, adata=None):
    return model.get_anndata_manager(adata or model.adata).get_state_registry("contexts")


def measured(model, adata=None):
    """Cells of each measured pair, by the names of perturbation and context."""
    state, n_contexts = state_of(model, adata), len(model.contexts)
    return {
        (model.perturbations[pair // n_contexts], model.contexts[pair % n_contexts]): n_cells
        for pair, n_cells in zip(state["pairs"], state["cells_per_pair"], strict=True)
    }


def told(caplog, level):
    return [
        r.message for r in caplog.records if r.levelname == level and "context" in r.message.lower()
    ]


@pytest.fixture
def screen(make_screen):
    return make_screen(LABELS, line=pd.Categorical(LINES, categories=["T", "none", "K"]))


def test_codes_and_pairs_of_contexts(screen):
    model = create(screen)
    found = registered_contexts(model.adata_manager)
    assert found.levels == ("K", "T")
    assert model.contexts == ["K", "T"]
    np.testing.assert_array_equal(found.codes, CODES)
    assert found.codes.dtype == np.int64
    assert screen.obsm["_scvi_contexts"].dtype == np.float32
    np.testing.assert_array_equal(screen.obsm["_scvi_contexts"], np.array(CODES)[:, None])
    assert model.summary_stats.n_contexts == 2
    state = state_of(model)
    assert state["pairs"].dtype == np.int64
    np.testing.assert_array_equal(state["pairs"], [0, 1, 2])
    assert measured(model) == {("A", "K"): 2, ("A", "T"): 2, ("B", "K"): 3}
    np.testing.assert_array_equal(state["controls_per_context"], [1, 1])


def test_of_too_many_pairs_those_of_most_cells_are_kept(make_screen, monkeypatch, caplog):
    """Cells of the others are trained on: they show what contexts share."""
    monkeypatch.setattr("scvi_sams.data._contexts.MOST_PAIRS", 2)
    labels = ["control"] * 8 + ["A"] * 6 + ["B"] * 6
    lines = ["K", "T"] * 4 + ["K", "K", "T", "T", "T", "T"] + ["K"] * 6
    model = create(make_screen(labels, line=lines))
    assert measured(model) == {("A", "T"): 4, ("B", "K"): 6}
    assert any("3 pairs" in message for message in told(caplog, "WARNING"))
    model.train(max_epochs=2, accelerator="cpu", devices=1, enable_progress_bar=False)
    assert model.module.contexts.n_cells.sum() <= 10
    found = model.predict_ate(["A"], context=["K", "T"], n_samples=20, n_posterior_samples=5)
    assert found.obs["measured"].tolist() == [False, True]


def test_the_table_of_contexts(screen):
    model = create(screen)
    table = context_field(model.adata_manager).view_state_registry(state_of(model))
    assert [list(column.cells) for column in table.columns] == [
        ["K", "T"],
        ["1", "1"],
        ["2", "1"],
        ["0", "1"],
    ]


def test_modules_are_told_of_contexts_where_there_are_any(screen):
    model = create(screen)
    sizes = sizes_for_module(model.registry_, model.summary_stats)
    assert (sizes["n_contexts"], sizes["pairs_of_contexts"]) == (2, [0, 1, 2])
    plain = create(screen, context_key=None)
    assert not {"n_contexts", "pairs_of_contexts"} & {
        *sizes_for_module(plain.registry_, plain.summary_stats)
    }


def test_without_a_key_there_is_no_tensor(screen):
    model = create(screen, context_key=None)
    assert registered_contexts(model.adata_manager) is None
    assert model.contexts == []
    assert "_scvi_contexts" not in screen.obsm
    assert "contexts" not in next(iter(model._make_data_loader(screen)))


@pytest.mark.parametrize(
    ("values", "levels"),
    [
        ([10, 9, 9, 10, 9, 10, 9, 9], ("10", "9")),
        ([10.0, 9.0, 9.0, 10.0, 9.0, 10.0, 9.0, 9.0], ("10", "9")),
        (pd.Categorical([True, False] * 4), ("False", "True")),
        (["K ", "K", " T", "T", "K", "T", "K", "K"], ("K", "T")),
        (pd.array(LINES, dtype="string"), ("K", "T")),
    ],
)
def test_levels_are_read_as_text(make_screen, values, levels):
    found = registered_contexts(create(make_screen(LABELS, line=values)).adata_manager)
    assert found.levels == levels
    texts = [str(value).strip().removesuffix(".0") for value in values]
    assert [levels[code] for code in found.codes] == texts


def test_a_dosage_matrix_and_doses_of_zero(make_screen):
    adata = make_screen(["-"] * 6, line=["T", "K", "K", "T", "T", "K"])
    adata.obsm["doses"] = np.array([[1, 0], [1, 2], [0, 1], [0, 0], [0, 0.5], [0, 0]])
    model = create(adata, dosage_obsm_key="doses", perturbation_names=["B", "A"])
    assert measured(model) == {("B", "K"): 1, ("B", "T"): 1, ("A", "K"): 2, ("A", "T"): 1}
    np.testing.assert_array_equal(state_of(model)["controls_per_context"], [1, 1])


def test_contexts_may_be_batches_and_covariates_too(screen):
    model = create(screen, batch_key="line", categorical_covariate_keys=["line"])
    np.testing.assert_array_equal(registered_contexts(model.adata_manager).codes, CODES)
    assert model.summary_stats.n_batch == 3  # scvi-tools counts a category that no cell has


ERRORS = {
    "missing": ([np.nan, "T", None, "K"] * 2, r"4 of 8 cells have no value .* 'c0', 'c2'"),
    "empty": (["", "T", " ", "K"] * 2, r"4 of 8 cells have no value .*\(`context_key`\)"),
    "missing in categories": (pd.Categorical(["T", "K", None, "K"] * 2), "2 of 8 cells"),
    "numbers and text": ([1, "T"] * 4, r"'line' mixes text and numbers"),
    "one level": (["T"] * 8, "All cells have the same context, 'T'"),
    "one per cell": ([f"cell {i}" for i in range(8)], "8 levels in 8 cells.*name single cells"),
    "a measurement": (np.linspace(0, 1, 8), "8 levels in 8 cells"),
    "a list": ([["T"], "K"] * 4, r"line contains \['T'\], which is neither text"),
}


@pytest.mark.parametrize(("values", "words"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_contexts(make_screen, values, words, assert_unchanged):
    if isinstance(values, list):
        values = pd.Series(values, dtype=object).array
    adata = make_screen(LABELS, line=values)
    before = adata.copy()
    with pytest.raises(InvalidCovariateError, match=words):
        create(adata)
    assert_unchanged(adata, before)


def test_half_as_many_levels_as_cells_are_accepted(make_screen):
    assert create(make_screen(LABELS, line=["a", "b", "c", "d"] * 2)).contexts == [*"abcd"]
    with pytest.raises(InvalidCovariateError, match="5 levels in 8 cells"):
        create(make_screen(LABELS, line=["a", "b", "c", "d", "e", "a", "b", "c"]))


def test_a_column_that_is_missing_double_or_no_name(screen, assert_unchanged):
    before = screen.copy()
    with pytest.raises(MissingKeyError, match="'donor'"):
        create(screen, context_key="donor")
    with pytest.raises(InvalidArgumentError, match="`context_key`"):
        create(screen, context_key=["line"])
    assert_unchanged(screen, before)
    screen.obs = pd.concat([screen.obs, screen.obs[["line"]]], axis=1)
    with pytest.raises(RegistrationError, match=r"more than one column 'line'"):
        create(screen)


@pytest.mark.parametrize("argument", ["perturbation_key", "dosage_key", "guide_key"])
def test_what_was_done_to_cells_is_no_context(make_screen, argument):
    column = {"perturbation_key": LABELS, "dosage_key": [0.0, 1, 1, 1, 0, 1, 1, 1]}
    adata = make_screen(LABELS, what=column.get(argument, ["NT", *"abc"] * 2))
    with pytest.raises(
        InvalidArgumentError, match=f"`context_key` and `{argument}` are the same column"
    ):
        create(adata, context_key="what", **{argument: "what"})


def test_labels_may_be_contexts_where_doses_say_what_was_done(make_screen):
    adata = make_screen(["T", "K", "K", "T"])
    adata.obsm["doses"] = np.array([[1, 0], [1, 2], [0, 1], [0, 0]])
    setup = {"dosage_obsm_key": "doses", "perturbation_names": ["B", "A"]}
    assert create(adata, context_key="perturbation", **setup).contexts == ["K", "T"]


@pytest.mark.parametrize("model_cls", [CPAVAE, SVAEPlus, ConditionalVAE])
def test_only_models_with_contexts_take_them(screen, model_cls, assert_unchanged):
    before = screen.copy()
    with pytest.raises(InvalidArgumentError, match=r"SAMSVAE.*`categorical_covariate_keys`"):
        model_cls.setup_anndata(screen, context_key="line")
    assert_unchanged(screen, before)
    whole = PerturbationField(
        perturbation_key="perturbation", control="control", delimiter="+", additive=False
    )
    with pytest.raises(InvalidArgumentError, match="combination is a separate perturbation"):
        ContextField("line", whole)


# Other data -------------------------------------------------------------------------------------


def test_other_cells_are_read_by_name(make_screen, screen, caplog):
    model = create(screen)
    model.is_trained_ = True
    other = make_screen(
        ["B", "A", "A+B", "B", "control", "control"], line=["T", "T", "K", "X", "T", None]
    )
    caplog.clear()
    with caplog.at_level("INFO", logger="scvi.sams"):
        model.get_latent_representation(other)
        model.get_latent_representation(other)
    found = registered_contexts(model.get_anndata_manager(other))
    assert found.levels == ("K", "T")
    np.testing.assert_array_equal(found.codes, [1, 1, 0, 2, 1, 2])
    # The pairs stay those of the training data: B was not measured in T.
    assert measured(model, other) == {("A", "K"): 1, ("A", "T"): 1, ("B", "K"): 1}
    np.testing.assert_array_equal(state_of(model, other)["controls_per_context"], [0, 1])
    (warning,) = told(caplog, "WARNING")
    assert "1 context in adata.obs['line'] did not occur in the training data" in warning
    assert "so effects that all contexts share are used there: 'X'" in warning
    (note,) = told(caplog, "INFO")
    assert note.startswith("1 cell has no context in adata.obs['line']")


def test_numbers_in_other_cells_are_those_of_the_training_data(make_screen):
    model = create(make_screen(LABELS, line=[1, 2] * 4))
    model.is_trained_ = True
    other = make_screen(LABELS[:4], line=[2.0, np.nan, 1.0, 3.0])
    model.get_latent_representation(other)
    found = registered_contexts(model.get_anndata_manager(other))
    np.testing.assert_array_equal(found.codes, [1, 2, 0, 2])


def test_other_cells_without_the_column(make_screen, screen, caplog):
    model = create(screen)
    model.is_trained_ = True
    other = make_screen(LABELS[:4])
    caplog.clear()
    with caplog.at_level("INFO", logger="scvi.sams"):
        model.get_latent_representation(other)
    found = registered_contexts(model.get_anndata_manager(other))
    np.testing.assert_array_equal(found.codes, [2] * 4)
    assert measured(model, other) == {("A", "K"): 0, ("A", "T"): 0, ("B", "K"): 0}
    assert told(caplog, "INFO") == [
        "There is no adata.obs['line'], so effects that all contexts share are used there."
    ]
    # A column that comes later is read.
    other.obs["line"] = LINES[:4]
    model.get_latent_representation(other)
    found = registered_contexts(model.get_anndata_manager(other))
    np.testing.assert_array_equal(found.codes, CODES[:4])


@pytest.mark.parametrize("is_view", [False, True])
def test_other_cells_whose_contexts_cannot_be_read(make_screen, screen, assert_unchanged, is_view):
    model = create(screen)
    model.is_trained_ = True
    other = make_screen(LABELS[:3], line=pd.Series([["T"], "K", "K"]).array)
    before = other.copy()
    with pytest.raises(InvalidCovariateError, match=r"\['T'\]"):
        model.get_latent_representation(other[:3] if is_view else other)
    assert_unchanged(other, before)


def test_contexts_that_changed_are_found(screen):
    model = create(screen)
    model.is_trained_ = True
    screen.obs["line"] = ["T", "T", "K", "K", "K", "T", "T", "K"]
    with pytest.raises(ChangedDataError, match=r"adata\.obs\['line'\] changed"):
        model.get_latent_representation()


def test_another_registration_of_the_same_cells(screen, assert_unchanged):
    first = create(screen)
    screen.obs["donor"] = ["x", "y", "z", "y"] * 2
    second = create(screen, context_key="donor")
    before = screen.copy()
    assert first.contexts == ["K", "T"]
    np.testing.assert_array_equal(registered_contexts(first.adata_manager).codes, CODES)
    assert_unchanged(screen, before)
    np.testing.assert_array_equal(
        registered_contexts(second.adata_manager).codes, [0, 1, 2, 1, 0, 1, 2, 1]
    )
    pairs = measured(first)
    first.adata_manager.validate()
    np.testing.assert_array_equal(screen.obsm["_scvi_contexts"].ravel(), CODES)
    assert measured(first) == pairs


# What is logged ---------------------------------------------------------------------------------


@pytest.fixture
def logged(caplog, make_screen):
    """Register labels in contexts; returns the warnings, and what else is said."""

    def register(labels, lines, **setup):
        caplog.clear()
        with caplog.at_level("INFO", logger="scvi.sams"):
            create(make_screen(labels, line=lines), **setup)
        return told(caplog, "WARNING"), told(caplog, "INFO")

    return register


def test_pairs_that_were_not_measured_are_told(logged):
    labels = ["control", "control", "A", "A", "B", "B+A"]
    assert logged(labels, ["K", "T"] * 3) == ([], [])
    assert logged(labels[:-1], ["K", "T", "K", "T", "K"]) == (
        [],
        [
            "1 of 4 pairs of a perturbation and a context (adata.obs['line']) was not measured: "
            "the effect there is predicted from the other contexts."
        ],
    )


def test_contexts_without_control_cells_are_warned_of(logged):
    labels = ["control", "A", "A", "A", "control", "A"]
    (warning,), _ = logged(labels, ["K", "K", "T", "X", "K", "T"])
    assert "2 of 3 contexts in adata.obs['line'] have no control cells: 'T', 'X'." in warning


def test_perturbations_of_one_context_each_are_warned_of(logged):
    labels = ["control", "control", "A", "B"] * 2
    (warning,), (note,) = logged(labels, ["K", "T"] * 4)
    assert "Every perturbation was measured in only one context of adata.obs['line']" in warning
    assert note.startswith("2 of 4 pairs")
    assert logged([*labels, "A"], ["K", "T"] * 4 + ["T"])[0] == []


def test_similar_names_are_warned_of(logged):
    labels = ["control", "control", "A", "A"]
    (warning,), _ = logged(labels, ["K562", "k562"] * 2)
    assert "'K562' and 'k562'" in warning


# Loaders and files ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def larger():
    return small_screen()


def read(loader):
    return torch.cat([batch["contexts"] for batch in loader])


@pytest.mark.parametrize("form", FORMS)
def test_every_loader_has_the_contexts_of_its_cells(larger, form, tmp_path):
    model = create(larger.copy(), context_key="donor")
    levels = np.array(["d1", "d2", "d3"])
    codes = np.searchsorted(levels, larger.obs["donor"].astype(str))[:, None]
    codes = torch.from_numpy(codes).float()
    split = np.split(np.random.default_rng(0).permutation(150), [100])
    in_memory = read(AnnDataLoader(model.adata_manager, indices=split[1], batch_size=7))
    assert in_memory.dtype == torch.float32
    assert torch.equal(in_memory, codes[split[1]])
    on_disk = create(open_screen(write_screen(larger, tmp_path, form)), context_key="donor")
    for module, manager in (
        (ResidentDataModule, model.adata_manager),
        (StreamingDataModule, on_disk.adata_manager),
    ):
        data = module(manager, external_indexing=split, batch_size=16)
        found = read(data.val_dataloader())
        assert found.dtype == torch.float32
        assert torch.equal(found, codes[split[1]])


def test_the_registry_is_saved_and_loaded(larger, tmp_path, caplog):
    model = create(larger.copy(), context_key="donor")
    model.is_trained_ = True
    expected = registered_contexts(model.adata_manager)
    latent = model.get_latent_representation()
    model.save(tmp_path / "model", save_anndata=True)
    is_kept = (larger.obs["donor"] != "d1").to_numpy()
    caplog.clear()
    for adata, kept in (
        (None, slice(None)),
        (larger.copy(), slice(None)),
        (larger[is_kept].copy(), is_kept),
    ):
        loaded = SAMSVAE.load(tmp_path / "model", adata, accelerator="cpu")
        assert loaded.contexts == ["d1", "d2", "d3"]
        found = registered_contexts(loaded.adata_manager)
        np.testing.assert_array_equal(found.codes, expected.codes[kept])
        sizes = sizes_for_module(loaded.registry_, loaded.summary_stats)
        assert sizes["pairs_of_contexts"] == state_of(model)["pairs"].tolist()
        np.testing.assert_allclose(loaded.get_latent_representation(), latent[kept], atol=1e-5)
    assert told(caplog, "WARNING") == []
    without = SAMSVAE.load(tmp_path / "model", adata=False, accelerator="cpu")
    assert without.contexts == ["d1", "d2", "d3"]
    other = larger[:20].copy()
    other.obs["donor"] = ["d3", "d7"] * 10
    without.get_latent_representation(other)
    found = registered_contexts(without.adata_manager)
    np.testing.assert_array_equal(found.codes, [2, 3] * 10)
    assert without.contexts == ["d1", "d2", "d3"]
