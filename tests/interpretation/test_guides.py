"""How well guides work: rates, effects by hand, flags where guides are made bad, and errors."""

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import expit

from data.on_disk import write_screen
from model.builders import TRAINING, copy_without_registration, small_screen, train_small
from scvi_sams import SAMSVAE
from scvi_sams.counts._block_reader import is_on_disk
from scvi_sams.data import open_screen
from scvi_sams.datasets import simulate_screen
from scvi_sams.evaluation import observed_ate
from scvi_sams.exceptions import InvalidArgumentError, MissingControlError, SAMSError
from scvi_sams.interpretation import _guides, guide_efficacy

SETUP = {"guide_key": "guide", "batch_key": "lane"}
FEW = {"n_samples": 40, "n_posterior_samples": 4, "key_added": None}
KNOWN = ["effect_size", "effect_standard_error", "effect_low", "effect_high"]


def screen(**changes):
    """Two guides of each of four perturbations, and pairs."""
    return small_screen(guides_per_perturbation=2, cells_per_perturbation=40, **changes)


@pytest.fixture(scope="module")
def responding():
    """Rates are set by hand; the last perturbation does nothing."""
    model = train_small(screen(), SETUP, responses=True)
    responses = model.module.responses
    with torch.no_grad():
        responses.is_on.fill_(True)
        responses.acts.copy_(torch.tensor([True, True, True, False]))
        responses.mean.fill_(0.5)
        responses.of_perturbations.copy_(torch.tensor([0.0, 1.0, -1.0, 0.0]))
        responses.of_guides.copy_(torch.linspace(-2, 2, 8))
        responses.information.copy_(torch.arange(12.0))
    return model


@pytest.fixture
def predicted(responding, monkeypatch):
    """Effects in place of those of the model, perturbations x genes."""
    values = np.random.default_rng(5).normal(size=(4, responding.adata.n_vars))
    monkeypatch.setattr(_guides, "_predicted", lambda *_: values)
    return values


def logged(adata):
    counts = adata.X.toarray().astype(np.float64)
    return np.log2(1 + 1e4 * counts / counts.sum(axis=1, keepdims=True))


def test_rates_are_those_of_the_log_odds(responding):
    table = guide_efficacy(responding, **FEW)
    log_odds = 0.5 + np.repeat([0.0, 1.0, -1.0, 0.0], 2) + np.linspace(-2, 2, 8)
    sd = 1 / np.sqrt(1 + np.arange(4, 12))
    for column, deviations in (("response_rate", 0), ("rate_low", -1.96), ("rate_high", 1.96)):
        expected = expit(log_odds + deviations * sd)
        np.testing.assert_allclose(table[column][:6], expected[:6], rtol=1e-4)
        assert table[column][6:].isna().all()
    assert list(table.index) == [f"P00{i}g{j}" for i in range(1, 5) for j in (1, 2)]
    assert list(table["perturbation"][::2]) == [f"P00{i}" for i in range(1, 5)]


def test_effect_sizes_by_hand(responding, predicted):
    """Weighted regressions, one guide and gene after the other, and errors by cells."""
    adata = responding.adata
    values, lane = logged(adata), adata.obs["lane"].to_numpy()
    label, guide = (adata.obs[key].to_numpy().astype("U20") for key in ("perturbation", "guide"))
    is_control = label == "control"
    table = guide_efficacy(responding, **FEW)
    left = values.copy()
    for one in np.unique(lane):
        left[lane == one] -= values[is_control & (lane == one)].mean(axis=0)
    groups = np.where(is_control, lane.astype("U20"), guide)
    used = is_control | (np.char.count(guide, "+") == 0)
    within = pd.DataFrame(values[used]).groupby(groups[used])
    squares = (within.var() * (within.size() - 1).to_numpy()[:, None]).sum()
    weight = 1 / (squares / (used.sum() - within.ngroups)).to_numpy()
    for row, name in enumerate(table.index[:6]):
        effect = predicted[row // 2]
        loading = weight * effect / (weight * effect**2).sum()
        shown = left @ loading
        own = guide == name
        assert table.loc[name, "n_cells"] == own.sum()
        assert table.loc[name, "effect_size"] == pytest.approx(shown[own].mean(), rel=1e-6)
        share = np.array([(lane[own] == one).mean() for one in np.unique(lane)])
        n = np.array([(is_control & (lane == one)).sum() for one in np.unique(lane)])
        of_controls = (shown[is_control] ** 2).sum() / (is_control.sum() - 2)
        variance = shown[own].var(ddof=1) / own.sum() + of_controls * (share**2 / n).sum()
        error = table.loc[name, "effect_standard_error"]
        assert error == pytest.approx(np.sqrt(variance), rel=1e-6)
        width = table.loc[name, "effect_high"] - table.loc[name, "effect_low"]
        assert width == pytest.approx(2 * 1.959964 * error, rel=1e-5)


def test_of_perturbations_that_do_nothing_nothing_is_known(responding):
    table = guide_efficacy(responding, **FEW)
    assert list(table["acts"]) == [True] * 6 + [False] * 2
    known = table.columns.difference(["perturbation", "n_cells", "acts"])
    flags = ["does_nothing", "differs_from_siblings"]
    assert table.loc[~table["acts"], known.difference(flags)].isna().all(axis=None)
    assert not table.loc[~table["acts"], flags].any(axis=None)
    assert table.loc[table["acts"], [*KNOWN, "p_value"]].notna().all(axis=None)


def test_models_in_which_all_cells_respond_have_no_rates(monkeypatch):
    model = train_small(screen(), SETUP)
    q_values = pd.DataFrame({"q_value": [0.001, 0.2, np.nan, 0.04]})
    monkeypatch.setattr(model, "test_perturbations", lambda **_: q_values)
    table = guide_efficacy(model, **FEW)
    assert table[["response_rate", "rate_low", "rate_high"]].isna().all(axis=None)
    assert list(table["acts"][::2]) == [True, False, False, True]
    assert table.loc[table["acts"], KNOWN].notna().all(axis=None)
    strict = guide_efficacy(model, fdr=0.01, **FEW)
    assert list(strict["acts"][::2]) == [True, False, False, False]


def test_only_cells_alone_at_the_largest_dose_speak():
    adata = screen(dosages=[0.5, 1.0])
    model = train_small(adata, {"guide_key": "guide", "dosage_key": "dosage"})
    table = guide_efficacy(model, **FEW)
    is_full = adata.obs["dosage"].astype(str) == "1.0"
    expected = adata.obs["guide"][is_full].astype(str).value_counts()
    assert table["n_cells"].to_dict() == expected[table.index].to_dict()


def test_cells_on_disk_give_the_same_table(responding, predicted, tmp_path):
    opened = open_screen(write_screen(copy_without_registration(responding.adata), tmp_path))
    SAMSVAE.setup_anndata(opened, **SETUP)
    model = SAMSVAE(opened, n_latent=4, n_hidden=16, effect_n_hidden=8, responses=True)
    model.module.load_state_dict(responding.module.state_dict())
    model.is_trained_, model.largest_doses_ = True, responding.largest_doses_
    expected = guide_efficacy(responding, **FEW)
    pd.testing.assert_frame_equal(guide_efficacy(model, **FEW), expected, rtol=1e-6)
    assert is_on_disk(opened.X)


def bad_guides(seed, monkeypatch):
    """A screen in which P001g1 does what the strongest perturbation does, and P003g1 nothing.

    What the model predicts is what the other guides show.
    """
    adata = simulate_screen(
        n_genes=150,
        n_controls=800,
        n_perturbations=6,
        cells_per_perturbation=400,
        n_combinations=0,
        n_latent=6,
        mask_probability=0.4,
        effect_scale=3.0,
        guides_per_perturbation=4,
        escape_rate=0.2,
        seed=seed,
    )
    original = adata.obs["guide"].astype(str).to_numpy()
    labels, guides = adata.obs["perturbation"].astype(str).to_numpy(), original.copy()
    nothing = np.flatnonzero(labels == "control")[:100]
    labels[nothing], guides[nothing] = "P003", "P003g1"
    truth = adata.uns["simulation"]
    norms = np.linalg.norm(truth["true_masks"] * truth["true_effects"], axis=1)
    norms[[0, 2]] = 0
    off_target = original == f"{truth['perturbations'][norms.argmax()]}g1"
    labels[off_target], guides[off_target] = "P001", "P001g1"
    adata.obs["perturbation"], adata.obs["guide"] = labels, guides
    adata = adata[~np.isin(original, ["P001g1", "P003g1"])].copy()
    is_good = ~adata.obs["guide"].isin(["P001g1", "P003g1"]).to_numpy()
    effects = np.asarray(observed_ate(adata[is_good].copy()).X)
    monkeypatch.setattr(_guides, "_predicted", lambda *_: effects)
    SAMSVAE.setup_anndata(adata, guide_key="guide")
    model = SAMSVAE(adata, n_latent=4, n_hidden=16)
    model.train(max_epochs=1, **TRAINING)
    return model


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bad_guides_are_found_and_others_are_not(seed, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, logger="scvi.sams"):
        table = guide_efficacy(bad_guides(seed, monkeypatch), **FEW)
    assert table["differs_from_siblings"]["P001g1"]
    assert table["differs_from_siblings"].sum() <= 2  # a false one at most
    assert table.index[table["does_nothing"]].tolist() == ["P003g1"]
    assert table.loc["P001g1", "agreement"] < 0.9
    assert table["agreement"].drop(["P001g1", "P003g1"]).median() > 0.95
    assert abs(table.loc["P003g1", "effect_size"]) < 4 * table.loc["P003g1", KNOWN[1]]
    assert "another effect than its" in caplog.text
    assert "1 guide has almost no effect, unlike its siblings: 'P003g1'" in caplog.text


def test_guides_split_at_random_are_not_flagged():
    """Each cell has one of four names by chance; p-values are uniform, whatever cells do."""
    adata = screen(n_perturbations=12, effect_scale=3.0, n_controls=200, n_combinations=0)
    p_values = []
    rng = np.random.default_rng(0)
    for _ in range(4):
        other = copy_without_registration(adata)
        label = other.obs["perturbation"].astype(str)
        number = pd.Series(rng.integers(1, 4, other.n_obs).astype(str), index=label.index)
        other.obs["guide"] = (label + "g" + number).where(label != "control", "control")
        table = guide_efficacy(train_small(other, {"guide_key": "guide"}, max_epochs=1), **FEW)
        assert not table["differs_from_siblings"].any()
        p_values.append(table["p_value"].dropna())
    found = np.concatenate(p_values)
    assert len(found) > 80
    assert (found <= 0.05).mean() < 0.12
    assert 0.35 < found.mean() < 0.65


def test_the_table_is_written_and_survives_a_file(responding, tmp_path):
    table = guide_efficacy(responding, **FEW | {"key_added": "sams_guides"})
    responding.adata.write_h5ad(tmp_path / "screen.h5ad")
    written = ad.read_h5ad(tmp_path / "screen.h5ad").uns
    responding.adata.uns.pop("sams_guides")
    pd.testing.assert_frame_equal(written["sams_guides"], table, check_dtype=False)
    assert "sams_guides" in written["sams_provenance"]


def test_what_is_needed_is_named(responding, tmp_path):
    with pytest.raises(SAMSError, match=r"No guides are registered.*guide_key"):
        guide_efficacy(train_small(small_screen()))
    for name in ("fdr", "interval"):
        with pytest.raises(InvalidArgumentError, match=f"`{name}`"):
            guide_efficacy(responding, **{name: 1.5})
    with pytest.raises(InvalidArgumentError, match="`n_posterior_samples`"):
        guide_efficacy(responding, n_posterior_samples=1)
    assert "sams_guides" not in responding.adata.uns
    responding.save(str(tmp_path / "model"))
    with pytest.raises(SAMSError, match="loaded without data"):
        guide_efficacy(SAMSVAE.load(str(tmp_path / "model"), adata=False))
    adata = responding.adata
    perturbed = adata[adata.obs["perturbation"] != "control"].copy()
    with pytest.raises(MissingControlError, match="but there are none"):
        guide_efficacy(SAMSVAE.load(str(tmp_path / "model"), perturbed))
