"""setup_anndata as users call it: what is registered, reported, kept and read again."""

import logging

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from model.builders import small_screen, train_small
from scvi_sams import SAMSVAE
from scvi_sams._constants import REGISTRY_KEYS
from scvi_sams.data._field import registered_labels, unpack_perturbations
from scvi_sams.exceptions import (
    InvalidCountsError,
    MissingKeyError,
    SAMSError,
    UnknownPerturbationError,
)

LABELS = ["control", "A", "B", "B+A"] * 6
SLOT = "_scvi_perturbations"


def make_screen(labels, n_genes=4, seed=0, **columns):
    counts = 1 + np.random.default_rng(seed).poisson(3, (len(labels), n_genes))
    return AnnData(
        sparse.csr_matrix(counts, dtype=np.float32),
        obs=pd.DataFrame(
            {"perturbation": labels, **columns}, index=[f"c{i}" for i in range(len(labels))]
        ),
        var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]),
    )


def create(adata, gene_likelihood="nb", **arguments):
    SAMSVAE.setup_anndata(adata, **arguments)
    return SAMSVAE(
        adata, n_latent=3, n_hidden=8, effect_n_hidden=4, gene_likelihood=gene_likelihood
    )


def train(model, **arguments):
    arguments = {"max_epochs": 1, "train_size": 1.0} | arguments
    model.train(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **arguments,
    )
    return model


def encoded(adata):
    return unpack_perturbations(adata.obsm[SLOT])


@pytest.fixture(scope="module")
def model():
    """Read-only: do not train it or register its data again."""
    return train(create(make_screen(LABELS)))


# What is registered


def test_defaults_read_labels_joined_by_plus_and_counts_in_x(model):
    labels = registered_labels(model.adata_manager)
    codes, doses = labels.codes, labels.doses
    np.testing.assert_array_equal(codes[:4], [[-1, -1], [0, -1], [1, -1], [0, 1]])
    np.testing.assert_array_equal(doses[:4], [[0, 0], [1, 0], [1, 0], [1, 1]])
    x = model.adata_manager.get_from_registry(REGISTRY_KEYS.X)
    np.testing.assert_array_equal(x.toarray(), model.adata.X.toarray())
    assert model.perturbations == ["A", "B"]


def test_every_slot_reaches_the_mini_batch():
    adata = make_screen(
        LABELS,
        dose=["0", "0.5", "2", "3+4"] * 6,
        batch=["y", "x"] * 12,
        donor=["q"] * 12 + ["p"] * 12,
        plate=["s", "r", "t"] * 8,
        age=np.arange(24.0),
        share=np.linspace(0, 1, 24),
        size=100.0 + np.arange(24),
    )
    adata.layers["counts"] = adata.X * 2
    model = create(
        adata,
        dosage_key="dose",
        layer="counts",
        batch_key="batch",
        categorical_covariate_keys=["donor", "plate"],
        continuous_covariate_keys=["age", "share"],
        size_factor_key="size",
    )
    tensors = next(iter(model._make_data_loader(adata, indices=[3, 13], batch_size=2)))
    expected = {
        REGISTRY_KEYS.X: adata.layers["counts"][[3, 13]].toarray(),
        REGISTRY_KEYS.PERTURBATIONS: [[0, 1, 4, 3], [0, -1, 0.5, 0]],
        REGISTRY_KEYS.BATCH: [[0], [0]],
        REGISTRY_KEYS.CATEGORICAL_COVARIATES: [[1, 1], [0, 0]],
        REGISTRY_KEYS.CONTINUOUS_COVARIATES: [[3, 3 / 23], [13, 13 / 23]],
        REGISTRY_KEYS.SIZE_FACTOR: [[103], [113]],
    }
    assert set(tensors) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(tensors[key].numpy(), value, rtol=1e-6, err_msg=key)


def test_registration_writes_slots_of_scvi_only():
    adata = make_screen(LABELS, batch=["x", "y"] * 12, age=np.arange(24.0))
    before = adata.copy()
    SAMSVAE.setup_anndata(adata, batch_key="batch", continuous_covariate_keys=["age"])
    new = {
        slot: [key for key in getattr(adata, slot) if not key.startswith("_scvi")]
        for slot in ("obs", "obsm", "uns")
    }
    assert new == {"obs": ["perturbation", "batch", "age"], "obsm": [], "uns": []}
    pd.testing.assert_frame_equal(adata.obs[new["obs"]], before.obs)
    np.testing.assert_array_equal(adata.X.toarray(), before.X.toarray())


@pytest.mark.parametrize("control", [0, [0], "0", ["0"]])
def test_integer_labels_may_have_an_integer_control(control):
    adata = make_screen([0, 1, 2])
    SAMSVAE.setup_anndata(adata, control=control)
    np.testing.assert_array_equal(encoded(adata)[0], [[-1], [0], [1]])


def test_guide_pairs_of_a_crispr_screen():
    adata = make_screen(["KLF1_MAP2K6", "NT1", "NT2_KLF1", "NT1_NT2"] * 3)
    adata.obs = adata.obs.rename(columns={"perturbation": "gene_target"})
    adata.obs["gene_target"] = adata.obs["gene_target"].astype("category")
    model = create(adata, perturbation_key="gene_target", control=["NT1", "NT2"], delimiter="_")
    assert model.perturbations == ["KLF1", "MAP2K6"]
    np.testing.assert_array_equal(encoded(adata)[0][:4], [[0, 1], [-1, -1], [0, -1], [-1, -1]])


# What is reported


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def summaries():
    logger, handler = logging.getLogger("scvi.sams"), Records()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.messages
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_the_summary_is_logged_once_with_the_right_numbers(summaries):
    # A: 2 + 2 + 1 cells, B: 2 + 1, C: 1; the combinations A+B and A+C.
    labels = ["control"] * 3 + ["A"] * 2 + ["B+A", "A+B", "C+A"] + ["B"] + ["control+control"]
    SAMSVAE.setup_anndata(make_screen(labels))
    assert len(summaries) == 1
    for words in (
        "10 cells x 4 genes",
        "3 perturbations",
        "1 / 3 / 5 cells",
        "2 combinations",
        "4 control cells",
    ):
        assert words in summaries[0]


def test_nothing_is_printed(summaries, capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("scvi"), "handlers", [])
    SAMSVAE.setup_anndata(make_screen(LABELS))
    assert capsys.readouterr().out == ""
    assert len(summaries) == 1


def test_a_refused_registration_logs_no_summary(summaries):
    with pytest.raises(MissingKeyError):
        SAMSVAE.setup_anndata(make_screen(LABELS), batch_key="batch")
    assert summaries == []


def test_view_anndata_setup_shows_arguments_and_perturbations(model, capsys):
    model.view_anndata_setup()
    shown = capsys.readouterr().out
    assert "SAMSVAE.setup_anndata" in shown
    assert "'perturbation_key': 'perturbation'" in shown
    words = [line.replace("│", " ").split() for line in shown.splitlines()]
    assert ["perturbations", f"adata.obsm['{SLOT}']"] in words
    for row in (["control", "6", "none"], ["A", "12", "0"], ["B", "12", "1"]):
        assert row in words


def test_view_anndata_setup_of_other_data_shows_its_own_cells(model, capsys):
    other = make_screen(["B", "B", "A"])
    model.get_latent_representation(other)
    model.view_anndata_setup(other)
    words = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    for row in (["control", "0", "none"], ["A", "1", "0"], ["B", "2", "1"]):
        assert row in words


# Counts and other values


@pytest.mark.parametrize("layer", [None, "counts"])
def test_the_place_of_values_that_are_no_counts_is_named(layer):
    adata = make_screen(LABELS)
    adata.layers["counts"] = adata.X.copy()
    values = adata.X if layer is None else adata.layers["counts"]
    values.data[5] = 0.25
    place = r"adata\.X" if layer is None else r"adata\.layers\['counts'\]"
    with pytest.raises(InvalidCountsError, match=rf"{place} contains fractional values.*0\.25"):
        create(adata, layer=layer)


@pytest.mark.parametrize("likelihood", ["nb", "poisson"])
def test_only_count_likelihoods_need_counts(likelihood):
    adata = make_screen(LABELS)
    adata.X = np.log1p(adata.X.toarray()) - 1
    adata.X[0] = 0
    with pytest.raises(InvalidCountsError):
        create(adata, gene_likelihood=likelihood)
    assert np.isfinite(
        train(create(adata, gene_likelihood="normal")).get_latent_representation()
    ).all()


def test_data_read_from_a_file_give_the_same_results(model, tmp_path):
    adata = model.adata.copy()
    adata.write_h5ad(tmp_path / "screen.h5ad")
    backed = anndata.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    np.testing.assert_allclose(
        model.get_latent_representation(backed), model.get_latent_representation(), atol=1e-6
    )
    backed.file.close()


def test_a_file_of_empty_cells_is_refused(tmp_path):
    adata = make_screen(LABELS)
    adata.X[5] = 0
    adata.write_h5ad(tmp_path / "screen.h5ad")
    backed = anndata.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    with pytest.raises(InvalidCountsError, match="position 5"):
        create(backed)
    backed.file.close()


@pytest.mark.parametrize(("train_size", "validation_size"), [(0.9, 0.1), (0.8, 0.2)])
def test_shares_of_training_and_validation_that_sum_to_one_are_accepted(
    train_size, validation_size
):
    model = create(make_screen(["control", "A"] * 10))
    train(model, train_size=train_size, validation_size=validation_size)
    assert len(model.train_indices) == round(20 * train_size)
    assert len(model.validation_indices) == round(20 * validation_size)


# Reading registered data again


@pytest.mark.parametrize("way", ["same", "copy", "h5ad", "view", "unregistered"])
def test_a_model_reads_its_data_in_any_shape(model, tmp_path, way):
    adata = model.adata.copy()
    if way == "h5ad":
        adata.write_h5ad(tmp_path / "screen.h5ad")
        adata = anndata.read_h5ad(tmp_path / "screen.h5ad")
    elif way == "unregistered":
        adata = make_screen(LABELS)
    elif way == "view":
        adata = adata[:]
    elif way == "same":
        adata = model.adata
    np.testing.assert_allclose(
        model.get_latent_representation(adata, key_added=None),
        model.get_latent_representation(key_added=None),
        atol=1e-6,
    )
    np.testing.assert_array_equal(encoded(adata)[0][:4], [[-1, -1], [0, -1], [1, -1], [0, 1]])


def test_a_view_of_some_cells_gives_their_rows_and_leaves_its_parent(model):
    parent = make_screen(LABELS)
    view = parent[parent.obs["perturbation"] == "B+A"]
    latent = model.get_latent_representation(view)
    np.testing.assert_allclose(latent, model.get_latent_representation()[3::4], atol=1e-6)
    np.testing.assert_array_equal(view.obsm["X_sams"], latent)
    np.testing.assert_array_equal(encoded(view)[0], [[0, 1]] * 6)
    assert list(parent.obsm) == list(parent.uns) == []
    assert list(parent.obs) == ["perturbation"]


def test_other_data_with_wider_combinations_than_training():
    model = train(create(make_screen(["control", "A", "B", "C"] * 3)))
    other = make_screen(["C+B+A", "A+C", "control", "B"])
    assert model.get_latent_representation(other).shape == (4, 3)
    codes, _ = encoded(other)
    np.testing.assert_array_equal(codes, [[0, 1, 2], [0, 2, -1], [-1, -1, -1], [1, -1, -1]])
    shift = model.get_latent_representation(
        other, representation="perturbed"
    ) - model.get_latent_representation(other)
    effects = model.get_perturbation_effects().mean.to_numpy()
    np.testing.assert_allclose(shift[0], effects.sum(axis=0), atol=1e-5)
    np.testing.assert_allclose(shift[1], effects[[0, 2]].sum(axis=0), atol=1e-5)
    np.testing.assert_array_equal(shift[2], np.zeros(3))


def test_permuted_columns_of_a_dosage_matrix_give_the_same_cells():
    table = pd.DataFrame(
        [[0.0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0.5, 3]] * 6, columns=["A", "B", "C"]
    )
    adata = make_screen(LABELS)
    adata.obsm["dosage"] = table.set_axis(adata.obs_names)
    model = train(create(adata, dosage_obsm_key="dosage"))
    other = make_screen(LABELS)
    other.obsm["dosage"] = adata.obsm["dosage"][["C", "A", "B"]]
    np.testing.assert_array_equal(
        model.get_latent_representation(other, representation="perturbed"),
        model.get_latent_representation(representation="perturbed"),
    )


def test_other_genes_are_refused(model):
    with pytest.raises(MissingKeyError, match="genes"):
        model.get_latent_representation(make_screen(LABELS, n_genes=5))


# Saving and loading


@pytest.mark.parametrize("names", [list, np.array, pd.Index])
def test_a_saved_model_reads_other_data_by_name(tmp_path, names):
    adata = make_screen(LABELS)
    adata.obsm["dosage"] = np.array([[0.0, 0], [1, 0], [0, 2], [3, 4]] * 6)
    model = train(
        create(
            adata, dosage_obsm_key="dosage", perturbation_names=names(["A", "B"]), control=("c",)
        )
    )
    model.save(tmp_path / "model")
    other = make_screen(["x"] * 3)
    other.obsm["dosage"] = pd.DataFrame({"B": [5.0, 0, 0], "A": [6.0, 7, 0]}, index=other.obs_names)
    loaded = SAMSVAE.load(tmp_path / "model", adata=other, accelerator="cpu")
    assert loaded.perturbations == ["A", "B"]
    np.testing.assert_array_equal(encoded(other)[0], [[0, 1], [0, -1], [-1, -1]])
    np.testing.assert_array_equal(encoded(other)[1], [[6, 5], [7, 0], [0, 0]])
    np.testing.assert_array_equal(
        loaded.get_latent_representation(), model.get_latent_representation(other.copy())
    )


def test_a_saved_model_keeps_its_vocabulary_whatever_data_it_is_loaded_with(model, tmp_path):
    model.save(tmp_path / "model")
    other = make_screen(["B", "B+A", "B"])
    loaded = SAMSVAE.load(tmp_path / "model", adata=other, accelerator="cpu")
    assert loaded.perturbations == ["A", "B"]
    np.testing.assert_array_equal(encoded(other)[0], [[1, -1], [0, 1], [1, -1]])
    pd.testing.assert_frame_equal(loaded.get_perturbation_masks(), model.get_perturbation_masks())


def test_loading_with_an_unknown_perturbation_leaves_the_data_as_they_were(model, tmp_path):
    model.save(tmp_path / "model")
    other = make_screen(["B", "Q"])
    with pytest.raises(UnknownPerturbationError, match="'Q'"):
        SAMSVAE.load(tmp_path / "model", adata=other, accelerator="cpu")
    assert list(other.obs) == ["perturbation"]
    assert list(other.obsm) == list(other.uns) == []


@pytest.mark.parametrize("key", ["size_factor_key", "continuous_covariate_keys"])
@pytest.mark.parametrize(
    "form", [np.asarray, lambda text: pd.Categorical(text), lambda text: pd.array(text, "string")]
)
def test_numbers_written_as_text_are_numbers_everywhere(key, form):
    adata = small_screen()
    numbers = np.random.default_rng(0).integers(1, 4, adata.n_obs)
    results = []
    for values in (numbers.astype(float), form(numbers.astype(str).tolist())):
        adata.obs["number"] = values
        model = train_small(adata.copy(), {key: "number"})
        torch.manual_seed(0)
        carriers = (adata.obs["perturbation"] == "P001").to_numpy()
        table = model.differential_expression(idx1=carriers, n_samples=20)
        results += [model.get_latent_representation(adata.copy()), table["lfc_mean"].to_numpy()]
    np.testing.assert_allclose(results[2], results[0], rtol=1e-5)
    np.testing.assert_allclose(results[3], results[1], rtol=1e-4, atol=1e-6)


def test_another_precision_than_the_models_is_refused(model):
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(SAMSError, match=r"torch.float64.*set_default_dtype"):
            SAMSVAE(model.adata, n_latent=2)
        with pytest.raises(SAMSError, match=r"torch.float64.*set_default_dtype"):
            model.train(max_epochs=1)
    finally:
        torch.set_default_dtype(torch.float32)
