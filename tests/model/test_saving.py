"""A saved model gives the same results: with the same data, other data, in another process."""

import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from model.builders import (
    COVARIATES,
    TRAINING,
    VARIANTS,
    assert_within_error,
    small_screen,
    train_small,
)
from scvi_sams import SAMSVAE
from scvi_sams.exceptions import (
    MissingKeyError,
    SAMSError,
    SavingError,
    UnknownPerturbationError,
    UnreadableDataError,
)

LABELS = ["P001", "P002+P004"]
SETUPS = {
    "plain": (None, {}),
    "mean field": (None, VARIANTS["mean field"]),
    "covariates": (COVARIATES, {}),
    "size factor": ({"size_factor_key": "transcriptome"}, {"gene_likelihood": "poisson"}),
    "normal": ({"layer": "normalised"}, {"gene_likelihood": "normal"}),
    "beta prior": (None, {"mask_prior_concentration": 2.0, "n_layers": 2}),
    "guides": ({"guide_key": "perturbation"}, {}),
    "several controls": ({"control": ["P004", "control"]}, {}),
}
# The same computation in this process and in another.
RESULTS = """
import numpy as np
import torch


def results(model, labels):
    torch.manual_seed(0)
    effects = model.get_perturbation_effects(key_added=None)
    return {
        "latent": model.get_latent_representation(representation="perturbed", key_added=None),
        "masks": model.get_perturbation_masks(key_added=None).to_numpy(),
        "effects": effects.mean.to_numpy(),
        "sd": effects.sd.to_numpy(),
        "ate": model.predict_ate(labels, method="mean", key_added=None).X,
        "elbo": model.get_elbo(return_mean=False, key_added=None),
        "iwelbo": model.get_iwelbo(return_mean=False, key_added=None, n_samples=5),
        "counts": model.predict(labels, output="rate").X,
    }
"""
IN_ANOTHER_PROCESS = """
import sys
import anndata as ad
from scvi_sams import SAMSVAE

adata = ad.read_h5ad(sys.argv[1] + "/screen.h5ad")
model = SAMSVAE.load(sys.argv[1] + "/model", adata, accelerator="cpu")
np.savez(sys.argv[1] + "/results.npz", **results(model, sys.argv[2:]))
"""
_namespace: dict = {}
exec(RESULTS, _namespace)
results = _namespace["results"]


def assert_same(found, expected, rtol=1e-5):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=rtol, atol=1e-5, err_msg=name)


def load(folder, adata, **kwargs):
    return SAMSVAE.load(folder, adata, accelerator="cpu", **kwargs)


def without_registration(adata):
    adata = adata.copy()
    for slot in (adata.obs, adata.obsm, adata.uns):
        for key in [key for key in slot if key.startswith("_scvi")]:
            del slot[key]
    return adata


@pytest.fixture(scope="module")
def saved(default_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    default_model.save(folder)
    return folder


@pytest.mark.parametrize("name", SETUPS)
def test_results_are_the_same_after_loading(tmp_path, name):
    setup, model_kwargs = SETUPS[name]
    model = train_small(small_screen(), setup, **model_kwargs)
    labels = ["P001", "P002+P003"]
    expected = results(model, labels)
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model", without_registration(model.adata))
    assert_same(results(loaded, labels), expected)
    assert loaded.perturbations == model.perturbations
    assert loaded.init_params_ == model.init_params_


def test_results_are_the_same_in_another_process(default_model, tmp_path):
    default_model.save(tmp_path / "model")
    without_registration(default_model.adata).write_h5ad(tmp_path / "screen.h5ad")
    expected = results(default_model, LABELS)
    script = tmp_path / "script.py"
    script.write_text(RESULTS + IN_ANOTHER_PROCESS)
    command = [sys.executable, str(script), str(tmp_path), *LABELS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(tmp_path / "results.npz") as found:
        assert_same(dict(found), expected, rtol=1e-4)


def test_data_saved_with_the_model_is_found(default_model, tmp_path):
    default_model.save(tmp_path / "model", save_anndata=True)
    loaded = load(tmp_path / "model", None)
    assert_same(results(loaded, LABELS), results(default_model, LABELS))


def test_cells_may_be_others_in_another_order_and_spelling(default_model, saved):
    adata = without_registration(default_model.adata)
    order = np.random.default_rng(0).permutation(adata.n_obs)[:60]
    other = adata[order].copy()
    labels = ["+".join(reversed(label.split("+"))) for label in other.obs["perturbation"]]
    other.obs["perturbation"] = labels
    assert "P003+P001" in labels
    loaded = load(saved, other)
    found = loaded.get_latent_representation(representation="perturbed", key_added=None)
    expected = default_model.get_latent_representation(
        indices=order, representation="perturbed", key_added=None
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert loaded.perturbations == default_model.perturbations
    pd.testing.assert_frame_equal(
        loaded.get_perturbation_masks(key_added=None),
        default_model.get_perturbation_masks(key_added=None),
    )
    torch.manual_seed(0)
    ate = loaded.predict_ate(LABELS, method="mean", key_added=None)
    torch.manual_seed(0)
    again = default_model.predict_ate(LABELS, method="mean", key_added=None)
    np.testing.assert_allclose(ate.X, again.X, rtol=1e-5)


def test_other_data_may_lack_perturbations_and_combinations(default_model, saved):
    adata = without_registration(default_model.adata)
    kept = adata.obs["perturbation"].isin(["control", "P004"]).to_numpy()
    loaded = load(saved, adata[kept].copy())
    found = loaded.get_latent_representation(representation="perturbed", key_added=None)
    expected = default_model.get_latent_representation(
        indices=kept, representation="perturbed", key_added=None
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Wider combinations than in training are fine too.
    wide = adata[:4].copy()
    wide.obs["perturbation"] = ["control", "P001+P002+P003", "P004", "P001+P002+P003+P004"]
    shifts = [
        default_model.get_latent_representation(wide, representation=r, key_added=None)
        for r in ("perturbed", "basal")
    ]
    means = default_model.get_perturbation_effects(key_added=None).mean
    np.testing.assert_allclose((shifts[0] - shifts[1])[3], means.sum(), atol=1e-4)


def test_data_that_does_not_fit_is_refused(default_model, saved):
    adata = without_registration(default_model.adata)
    unknown = adata.copy()
    unknown.obs["perturbation"] = ["P9", *unknown.obs["perturbation"][1:]]
    with pytest.raises(UnknownPerturbationError, match="'P9'"):
        load(saved, unknown)
    nameless = adata.copy()
    del nameless.obs["perturbation"]
    with pytest.raises(MissingKeyError, match="'perturbation'"):
        load(saved, nameless)
    with pytest.raises(MissingKeyError, match="gene_0003"):
        default_model.get_latent_representation(adata[:, adata.var_names != "gene_0003"].copy())


def test_a_model_loaded_without_data_takes_data_later(default_model, saved):
    loaded = load(saved, False)
    masks = loaded.get_perturbation_masks(key_added=None)
    pd.testing.assert_frame_equal(masks, default_model.get_perturbation_masks(key_added=None))
    found = loaded.get_latent_representation(
        without_registration(default_model.adata), key_added=None
    )
    expected = default_model.get_latent_representation(key_added=None)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_effects_from_the_prior_need_no_data(default_model, saved):
    loaded = load(saved, False)
    torch.manual_seed(0)
    found = loaded.predict_ate(LABELS, method="mean", n_samples=20_000)
    expected = default_model.predict_ate(
        LABELS, method="mean", n_samples=20_000, basal="prior", key_added=None
    )
    error = np.hypot(found.layers["standard_error"], expected.layers["standard_error"])
    assert_within_error(found.X, expected.X, error)
    assert list(found.var_names) == list(default_model.adata.var_names)


@pytest.mark.parametrize("setup", [None, COVARIATES], ids=["none", "covariates"])
def test_what_needs_data_says_so(tmp_path, setup):
    train_small(small_screen(), setup).save(tmp_path / "model")
    loaded = load(tmp_path / "model", False)
    with pytest.raises(SAMSError, match="data"):
        loaded.predict_ate(["P001"], basal="control")
    with pytest.raises(SAMSError, match="data"):
        loaded.predict(["P001"])
    if setup is not None:
        # Covariates of the predicted cells are those of cells in the data.
        with pytest.raises(SAMSError, match="data"):
            loaded.predict_ate(["P001"])


def test_history_and_split_are_kept(default_model, saved):
    loaded = load(saved, without_registration(default_model.adata))
    assert loaded.history.keys() == default_model.history.keys()
    for key, values in default_model.history.items():
        pd.testing.assert_frame_equal(loaded.history[key], values)
    for name in ("train_indices", "validation_indices", "test_indices"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(default_model, name))
    assert loaded.is_trained


def test_nothing_is_overwritten_unless_asked_for(default_model, saved):
    with pytest.raises(ValueError, match="already exists"):
        default_model.save(saved)
    default_model.save(saved, overwrite=True)
    loaded = load(saved, without_registration(default_model.adata))
    assert_same(results(loaded, LABELS), results(default_model, LABELS))


def test_a_bit_that_changed_is_noticed(saved, default_model, tmp_path):
    content = bytearray((saved / "model.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(UnreadableDataError, match=r"damaged or incomplete .*(checksum|CRC)"):
        SAMSVAE.load(tmp_path, default_model.adata)


def test_a_save_that_fails_half_way_leaves_the_earlier_one(default_model, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    default_model.save(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full_disk(content, path, **kwargs):
        with open(path, "wb") as file:
            file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(SavingError, match="No space left"):
        default_model.save(folder, overwrite=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    with pytest.raises(OSError, match="No space left"):
        default_model.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_another_model_in_the_process_changes_nothing():
    first = train_small(small_screen())
    before = results(first, LABELS)
    other_screen = small_screen(seed=8, n_perturbations=6, n_genes=30)
    other_screen.obs["guide"] = ["X" + str(label) for label in other_screen.obs["perturbation"]]
    second = train_small(
        other_screen, {"perturbation_key": "guide", "control": "Xcontrol", "delimiter": None}
    )
    assert second.perturbations != first.perturbations
    second_results = results(second, second.perturbations[:2])
    assert_same(results(first, LABELS), before)
    # The same AnnData registered otherwise for another model.
    SAMSVAE.setup_anndata(first.adata, control="P001")
    third = SAMSVAE(first.adata, n_latent=2)
    assert "control" in third.perturbations
    assert_same(results(first, LABELS), before)
    assert_same(results(second, second.perturbations[:2]), second_results)


def test_training_goes_on_after_loading(tmp_path):
    model = train_small(small_screen(), spread=False)
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model", without_registration(model.adata))
    before = {name: value.clone() for name, value in loaded.module.state_dict().items()}
    n_cells = loaded.adata.n_obs
    train, rest = np.arange(0, n_cells, 2), np.arange(1, n_cells, 2)
    frozen = {"lr": 0.0, "table_lr": 0.0}
    for plan_kwargs in (frozen, {"lr": 1e-3}):
        loaded.train(
            max_epochs=2,
            datasplitter_kwargs={"external_indexing": [train, rest, np.array([], dtype=int)]},
            **(TRAINING | {"plan_kwargs": plan_kwargs}),
        )
        after = loaded.module.state_dict()
        changed = {name for name in after if not torch.equal(after[name], before[name])}
        if plan_kwargs is frozen:
            # Direct effects are fitted anew at the end of each training, to its own cells.
            tables = ("mean", "sd", "sign_error", "correction", "uncertainty")
            weights = ("weights", "combination_weights")
            fitted = {f"direct.{name}" for name in (*tables, *weights)}
            assert changed == {"cells_per_perturbation", "cell_sizes"} | fitted
    assert {"decoder.to_genes.weight", "masks.logits"} <= changed
    assert not changed & {"input_mean", "input_sd", "is_initialised"}
    labels = loaded.adata.obs["perturbation"].astype(str).iloc[train]
    counts = [sum(name in label.split("+") for label in labels) for name in loaded.perturbations]
    assert after["cells_per_perturbation"].tolist() == counts
    assert len(loaded.history["elbo_train"]) == 2 + 2 + 2


def test_a_saved_model_reads_backed_data(default_model, saved, tmp_path):
    without_registration(default_model.adata).write_h5ad(tmp_path / "screen.h5ad")
    backed = ad.read_h5ad(tmp_path / "screen.h5ad", backed="r")
    loaded = load(saved, backed)
    assert_same(results(loaded, LABELS), results(default_model, LABELS))
    backed.file.close()


def test_data_of_another_model_does_not_stay_in_the_folder(default_model, tmp_path):
    folder = tmp_path / "model"
    default_model.save(folder, save_anndata=True)
    changed = without_registration(default_model.adata)
    changed.X = changed.X[::-1].copy()
    other = train_small(changed)
    default_model.save(folder, prefix="kept_", save_anndata=True, overwrite=True)
    other.save(folder, overwrite=True)
    assert {file.name for file in folder.iterdir()} == {
        "model.pt", "kept_model.pt", "kept_adata.h5ad",
    }  # fmt: skip
    with pytest.warns(UserWarning, match="no saved anndata"):
        assert load(folder, None).adata is None


def test_data_of_the_same_model_stay_when_it_is_saved_again(default_model, tmp_path):
    folder = tmp_path / "model"
    default_model.save(folder, save_anndata=True)
    before = (folder / "adata.h5ad").read_bytes()
    loaded = load(folder, None)
    loaded.save(folder, overwrite=True)
    assert (folder / "adata.h5ad").read_bytes() == before
    assert_same(results(load(folder, None), LABELS), results(default_model, LABELS))


def test_saving_leaves_text_columns_as_they_were(tmp_path):
    adata = small_screen()
    adata.obs["perturbation"] = adata.obs["perturbation"].astype(str).astype(object)
    adata.var["name"] = [f"name {i}" for i in range(adata.n_vars)]
    model = train_small(adata)
    types = [adata.obs.dtypes.to_dict(), adata.var.dtypes.to_dict()]
    model.save(tmp_path / "model", save_anndata=True)
    assert [adata.obs.dtypes.to_dict(), adata.var.dtypes.to_dict()] == types
