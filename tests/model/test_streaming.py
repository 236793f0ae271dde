"""Models trained from disk, against models trained in memory."""

import logging

import anndata
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback

from data.on_disk import FORMS, fingerprint, write_screen
from model.builders import COVARIATES, N_LATENT, SHIFTS_ONLY, TRAINING, small_screen
from scvi_sams import SAMSVAE
from scvi_sams.counts._block_reader import is_on_disk
from scvi_sams.data import StreamingDataModule, open_screen
from scvi_sams.data._block_loader import BlockLoader
from scvi_sams.exceptions import (
    InvalidSplitError,
    MissingKeyError,
    RegistrationError,
    UnreadableDataError,
)

BLOCKS = {"batch_size": 32, "block_size": 8, "blocks_per_buffer": 6}


@pytest.fixture(scope="module")
def screen():
    adata = small_screen()
    adata.layers["counts"] = adata.X.copy()
    return adata


@pytest.fixture(scope="module")
def path(screen, tmp_path_factory):
    return write_screen(screen, tmp_path_factory.mktemp("screen"))


def make(adata, seed=0, settings=None, **setup):
    SAMSVAE.setup_anndata(adata, **setup)
    torch.manual_seed(seed)
    return SAMSVAE(adata, n_latent=N_LATENT, n_hidden=16, effect_n_hidden=8, **(settings or {}))


def fit(adata, setup=None, *, stream=None, **train):
    """Train; ``stream`` are arguments of a data module, ``None`` leaves the choice to the model."""
    model = make(adata, **(setup or {}))
    if stream is not None:
        train["datamodule"] = StreamingDataModule(model.adata_manager, **stream)
    model.train(**{"max_epochs": 3, **TRAINING, **train})
    return model


def assert_same_state(model, other):
    for name, value in other.module.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], value), name


@pytest.mark.parametrize("form", FORMS)
def test_where_the_cells_are_plays_no_part(screen, form, tmp_path):
    """The same cells in the same order give the same model, bit for bit."""
    path = write_screen(screen, tmp_path, form)
    before = fingerprint(path)
    options = {"setup": COVARIATES, "stream": BLOCKS, "plan_kwargs": {}, "max_epochs": 4}
    expected = fit(screen.copy(), **options)
    for layer in (None, "counts"):
        setup = {**COVARIATES, "layer": layer}
        opened = open_screen(path)
        model = fit(opened, **{**options, "setup": setup})
        assert_same_state(model, expected)
        torch.manual_seed(1)
        elbo = model.get_elbo(return_mean=False)
        torch.manual_seed(1)
        np.testing.assert_array_equal(expected.get_elbo(return_mean=False), elbo)
        assert is_on_disk(opened.X)
    assert fingerprint(path) == before


def test_train_streams_by_itself(path, caplog):
    """With the split of training in memory, whose plates therefore hold as well."""
    expected = fit(anndata.read_h5ad(path), train_size=0.7, validation_size=0.2)
    model = fit(open_screen(path), train_size=0.7, validation_size=0.2)
    assert isinstance(model.trainer.datamodule, StreamingDataModule)
    assert isinstance(model.trainer.train_dataloader, BlockLoader)
    assert len(model.trainer.train_dataloader) == -(-len(model.train_indices) // 64)
    for part in ("train_indices", "validation_indices", "test_indices"):
        np.testing.assert_array_equal(getattr(model, part), getattr(expected, part))
    for name in ("cells_per_perturbation", "input_mean", "input_sd"):
        assert torch.equal(getattr(model.module, name), getattr(expected.module, name)), name
    assert list(model.history) == list(expected.history)
    assert len(model.history["elbo_validation"]) == 3


def test_a_file_that_anndata_opened_is_streamed(screen, path):
    backed = anndata.read_h5ad(path, backed="r")
    before = fingerprint(path)
    model = fit(backed, COVARIATES)
    assert isinstance(model.trainer.datamodule, StreamingDataModule)
    assert_same_state(model, fit(open_screen(path), COVARIATES))
    cells = np.array([90, 3, 41, 5, 77, 0])
    latent = model.get_latent_representation(indices=cells)
    expected = model.get_latent_representation(screen.copy(), indices=cells)
    np.testing.assert_allclose(latent, expected, rtol=1e-5, atol=1e-6)
    backed.file.close()
    assert fingerprint(path) == before


def test_elbo_is_that_of_training_in_memory(tmp_path):
    """Cells sorted by perturbation, where a block holds one.

    From seed to seed the score varies by 1; training gains 6. It is that of the paper's model:
    after so few epochs the basal states still hold what direct effects would add once more.
    """
    adata = small_screen(
        n_genes=60,
        n_controls=300,
        cells_per_perturbation=60,
        cells_per_combination=40,
        library_size=3000.0,
    )
    order = np.argsort(adata.obs["perturbation"].astype(str).to_numpy(), kind="stable")
    path = write_screen(adata[order].copy(), tmp_path)

    def score(open_file, seed, max_epochs=10):
        model = make(open_file(path), seed, SHIFTS_ONLY)
        options = {**TRAINING, "plan_kwargs": {"lr": 5e-3, "dense_fraction": 0.0}}
        if is_on_disk(model.adata.X):
            blocks = {**BLOCKS, "blocks_per_buffer": 16}
            options["datamodule"] = StreamingDataModule(model.adata_manager, **blocks)
        model.train(**{**options, "batch_size": 32, "max_epochs": max_epochs})
        return model.get_elbo(indices=model.validation_indices, n_samples=50)

    in_memory = np.mean([score(anndata.read_h5ad, seed) for seed in range(2)])
    from_disk = np.mean([score(open_screen, seed) for seed in range(2)])
    assert abs(from_disk - in_memory) < 2.5
    assert score(anndata.read_h5ad, 0, max_epochs=1) < in_memory - 5


def test_epochs_differ_and_training_repeats(path):
    def record(**stream):
        seen = []
        age = "extra_continuous_covs"

        def on_batch(trainer, plan, outputs, batch, number):
            seen.append((trainer.current_epoch, batch[age].ravel().tolist()))

        callback = LambdaCallback(on_train_batch_end=on_batch)
        model = fit(
            open_screen(path), COVARIATES, stream={**BLOCKS, **stream}, callbacks=[callback]
        )
        epochs = [
            [value for epoch, values in seen for value in values if epoch == n] for n in range(3)
        ]
        cells = model.adata.obs["age"].to_numpy(dtype=np.float32)[model.train_indices]
        for epoch in epochs:
            np.testing.assert_array_equal(np.sort(epoch), np.sort(cells))
        return epochs

    first = record()
    assert first[0] != first[1] != first[2] != first[0]
    assert record() == first
    assert record(seed=1)[0] != first[0]


def test_a_saved_model_goes_on_from_disk(path, tmp_path):
    model = fit(open_screen(path), COVARIATES)
    model.save(tmp_path / "model")
    loaded = SAMSVAE.load(tmp_path / "model", adata=open_screen(path), accelerator="cpu")
    assert is_on_disk(loaded.adata.X)
    assert_same_state(loaded, model)
    np.testing.assert_array_equal(
        loaded.get_latent_representation(), model.get_latent_representation()
    )
    np.testing.assert_array_equal(loaded.train_indices, model.train_indices)
    loaded.train(max_epochs=1, **TRAINING)
    assert isinstance(loaded.trainer.datamodule, StreamingDataModule)


@pytest.mark.parametrize("form", ["h5ad csr", "zarr dense"])
def test_results_are_those_in_memory(screen, form, tmp_path):
    """What reads cells, from disk and from memory with one model."""
    opened = open_screen(write_screen(screen, tmp_path, form))
    model = fit(opened, COVARIATES)
    cells = np.array([90, 3, 3, 41, 5, 77, 0])

    def results(adata):
        torch.manual_seed(4)
        return [
            model.get_latent_representation(adata, indices=cells),
            model.get_latent_representation(
                adata, representation="perturbed", give_mean=False, n_samples=2
            ),
            model.get_elbo(adata, indices=cells, return_mean=False),
            model.get_reconstruction_error(adata, return_mean=False),
            model.get_iwelbo(adata, n_samples=5, return_mean=False),
            model.predict(["control"], adata, cells, output="counts").X.toarray(),
        ]

    for from_disk, from_memory in zip(results(opened), results(screen.copy()), strict=True):
        np.testing.assert_allclose(from_disk, from_memory, rtol=1e-5, atol=1e-5)
    assert "X_sams" in opened.obsm
    assert opened.obs["sams_elbo"].notna().sum() == len(set(cells))
    effects = model.predict_ate(n_samples=100, n_posterior_samples=20, basal="control")
    assert np.isfinite(effects.X).all()
    assert is_on_disk(opened.X)


def test_a_view_is_read_into_memory(path):
    opened = open_screen(path)
    model = fit(opened)
    chosen = np.flatnonzero(opened.obs["lane"] == "lane_a")
    np.testing.assert_allclose(
        model.get_latent_representation(opened[chosen].copy()),
        model.get_latent_representation(indices=chosen),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_batches_are_densified_on_the_device(path):
    options = {"batch_size": 32, "accelerator": "cpu"}
    model = fit(open_screen(path), load_sparse_tensor=True, **options)
    assert model.trainer.datamodule.train_dataloader()._load_sparse_tensor
    assert_same_state(model, fit(open_screen(path), **options))


# What goes wrong ---------------------------------------------------------------------------------


def test_rows_that_become_unreadable_are_named(path, monkeypatch):
    from scvi_sams.counts._block_reader import BlockReader

    model = make(open_screen(path))
    read_sparse = BlockReader._read_sparse

    def fail(self, start, stop, pointers):
        if start <= 100 < stop and stop - start <= 8:
            raise OSError("the disk went away")
        return read_sparse(self, start, stop, pointers)

    monkeypatch.setattr(BlockReader, "_read_sparse", fail)
    stream = StreamingDataModule(
        model.adata_manager,
        external_indexing=[np.arange(model.adata.n_obs)],
        **BLOCKS,
    )
    message = r"Rows 96 to 103 of adata\.X.*screen\.h5ad.*the disk went away"
    with pytest.raises(UnreadableDataError, match=message):
        model.train(datamodule=stream, max_epochs=1, **TRAINING)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ([np.arange(0)], "no training cells"),
        ([np.array([1, 2, 2])], r"1 cell more than once.*position 2"),
        ([np.arange(10), np.array([9])], r"1 cell more than once.*position 9"),
        ([np.array([3, 150])], "names position 150, but there are 150 cells"),
        ([np.array([3, -1])], "names position -1"),
    ],
)
def test_splits_that_are_none(path, split, message):
    model = make(open_screen(path))
    with pytest.raises(InvalidSplitError, match=message):
        StreamingDataModule(model.adata_manager, external_indexing=split)


def test_parts_of_a_split_may_be_left_out(path):
    rows = np.arange(40)
    model = make(open_screen(path))
    for split in ([rows], [rows, None, None], [rows, [], []]):
        stream = StreamingDataModule(model.adata_manager, external_indexing=split)
        assert (stream.n_train, stream.n_val, len(stream.test_idx)) == (40, 0, 0)
        assert stream.val_dataloader() is None
        assert stream.test_dataloader() is None


def test_untrained_perturbations_and_epochs_of_a_data_module(path, caplog):
    """What train() does for its own split it does for that of the data module."""
    model = make(open_screen(path))
    controls = np.flatnonzero(model.adata.obs["perturbation"] == "control")
    stream = StreamingDataModule(model.adata_manager, external_indexing=[controls])
    scvi_logger = logging.getLogger("scvi.sams")
    scvi_logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING, logger="scvi.sams"):
        model.train(datamodule=stream, **{**TRAINING, "max_steps": 2})
    scvi_logger.removeHandler(caplog.handler)
    assert "4 perturbations have no training cells" in caplog.text
    assert model.trainer.max_epochs == 100


@pytest.mark.parametrize("difference", ["perturbations", "genes", "batches"])
def test_a_data_module_of_other_registrations_is_refused(path, difference):
    """It would number perturbations, genes or batches otherwise; nothing would look wrong."""
    model = make(open_screen(path))
    others = anndata.read_h5ad(path)
    setup = {}
    if difference == "perturbations":
        others = others[others.obs["perturbation"] != model.perturbations[0]].copy()
    elif difference == "genes":
        others = others[:, ::-1].copy()
    else:
        others.obs["plate"] = ["a", "b"] * (others.n_obs // 2)
        setup["batch_key"] = "plate"
    stream = StreamingDataModule(make(others, **setup).adata_manager)
    with pytest.raises((RegistrationError, MissingKeyError), match=r"differ|otherwise"):
        model.train(datamodule=stream, **TRAINING)
    assert not model.is_trained


def test_a_data_module_of_the_same_registration_is_accepted(path):
    model = make(open_screen(path))
    stream = StreamingDataModule(make(open_screen(path)).adata_manager)
    model.train(datamodule=stream, **{**TRAINING, "max_steps": 2})
    assert model.is_trained
