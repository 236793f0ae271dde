"""Results from where they are stored are those of the model, after a round through a file too."""

import anndata as ad
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scvi

from interpretation.builders import train_until_called
from model.builders import small_screen, train_small
from scvi_sams import ConditionalVAE, pl, tl
from scvi_sams.datasets import simulate_screen
from scvi_sams.exceptions import MissingKeyError, SAMSError
from scvi_sams.interpretation._stored import ATE, result_of

FEW = {"n_samples": 200, "n_posterior_samples": 20}


@pytest.fixture(scope="module")
def model():
    """Trained long enough for something to be called."""
    return train_until_called(n_combinations=3, cells_per_combination=40)


@pytest.fixture(scope="module")
def stored(model, tmp_path_factory):
    """The screen as a file has it, with every result in its slot."""
    model.get_perturbation_masks()
    model.get_perturbation_effects()
    model.get_latent_programs()
    model.get_direct_effects()
    model.test_perturbations()
    model.predict_ate(["P001", "P002", "P001+P002"], method="lograte", **FEW)
    tl.guide_efficacy(model, **FEW)
    tl.context_effects(model)
    tl.genetic_interactions(model, **FEW)
    path = tmp_path_factory.mktemp("stored") / "results.h5ad"
    model.adata.write_h5ad(path)
    return ad.read_h5ad(path)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def same(found, expected):
    pd.testing.assert_frame_equal(
        found, expected, check_dtype=False, check_index_type=False, check_column_type=False
    )


def test_tables_of_latents(model, stored):
    masks = model.get_perturbation_masks(key_added=None)
    effects = model.get_perturbation_effects(key_added=None).mean
    programs = model.get_latent_programs(key_added=None)
    for source in (stored, model):
        same(
            tl.latent_perturbations(source, effects=source),
            tl.latent_perturbations(masks, effects=effects),
        )
        same(tl.top_genes(source, 5), tl.top_genes(programs, 5))
        ranking = tl.gene_ranking(source, "latent_1")
        expected = tl.gene_ranking(programs, "latent_1")
        assert ranking.index.tolist() == expected.index.tolist()
        np.testing.assert_allclose(ranking, expected)
        same(tl.perturbation_similarity(source), tl.perturbation_similarity(effects))
        same(
            tl.perturbation_similarity(source, metric="jaccard"),
            tl.perturbation_similarity(masks, metric="jaccard"),
        )


def test_calls_need_the_stored_tables_only(model, stored):
    before = set(stored.uns)
    same(tl.entry_q_values(stored), tl.entry_q_values(model, key_added=None))
    called, expected = tl.called_masks(stored), tl.called_masks(model)
    same(called, expected)
    assert called.to_numpy().any()
    assert called.attrs["expected_false"] == pytest.approx(expected.attrs["expected_false"])
    assert set(stored.uns) == before


def test_effects_are_the_table_that_was_predicted(model, stored):
    scvi.settings.seed = 0
    expected = model.predict_ate(
        ["P001", "P001+P002"], method="lograte", context=["type_1", "type_2"], **FEW
    )
    restored = result_of(model.adata, ATE)
    assert restored.obs_names.tolist() == expected.obs_names.tolist()
    assert restored.obs["context"].tolist() == expected.obs["context"].tolist()
    np.testing.assert_array_equal(restored.X, expected.X)
    assert set(restored.layers) >= {"standard_error", "interval_low", "interval_high"}
    assert restored.uns["ate"]["units"] == expected.uns["ate"]["units"]
    kept = result_of(stored, ATE)
    assert kept.obs_names.tolist() == ["P001", "P002", "P001+P002"]
    assert kept.uns["ate"]["method"] == "lograte"
    assert kept.uns["ate"]["n_posterior_samples"] == 20


def test_doses_are_in_the_names_of_restored_effects():
    model = train_small(
        simulate_screen(
            n_genes=20, n_controls=40, n_perturbations=3, n_combinations=0, dosages=[0.5, 1.0]
        ),
        {"dosage_key": "dosage"},
    )
    expected = model.predict_ate(["P001", "P001", "P002"], dosages=[0.5, 1.0, 1.0], **FEW)
    restored = result_of(model.adata, ATE)
    assert restored.obs_names.tolist() == ["P001@0.5", "P001@1", "P002"]
    same(restored.obs[["dosage"]], expected.obs[["dosage"]])


def image(ax):
    return np.ma.filled(ax.images[0].get_array(), np.nan)


def test_figures_are_those_of_the_tables(model, stored):
    masks = model.get_perturbation_masks(key_added=None)
    effects = model.get_perturbation_effects(key_added=None)
    np.testing.assert_allclose(
        image(pl.masks(stored, effects=stored)), image(pl.masks(masks, effects=effects.mean))
    )
    direct = model.get_direct_effects(key_added=None)
    np.testing.assert_allclose(
        image(pl.direct_effects(stored, max_lfsr=1)), image(pl.direct_effects(direct, max_lfsr=1))
    )
    np.testing.assert_allclose(
        image(pl.similarity(stored)), image(pl.similarity(tl.perturbation_similarity(effects.mean)))
    )
    table = tl.context_effects(model, key_added=None)
    options = {"perturbations": ["P001", "P002"]}
    np.testing.assert_allclose(
        image(pl.context_effects(stored, **options)), image(pl.context_effects(table, **options))
    )
    interactions = image(pl.interaction_matrix(stored, "observed_relative"))
    expected = stored.uns["sams_interactions"]
    assert np.isfinite(interactions).sum() == 2 * expected["observed_relative"].notna().sum()


def test_volcanoes_programs_and_guides(model, stored):
    ax = pl.effect_volcano(stored, "P001+P002", label_top=0)
    effect = result_of(stored, ATE)["P001+P002"].to_df().loc["P001+P002"]
    np.testing.assert_allclose(
        np.sort(ax.collections[0].get_offsets()[:, 0]), np.sort(effect), rtol=1e-6
    )
    widths = [bar.get_width() for bar in pl.program_genes(stored, "latent_0", n_genes=5).patches]
    programs = model.get_latent_programs(key_added=None)["latent_0"]
    strongest = programs.loc[programs.abs().nlargest(5).index]
    np.testing.assert_allclose(np.sort(widths), np.sort(strongest), rtol=1e-5)
    named = ["P001", "P002"]
    labels = [
        [text.get_text() for text in pl.guide_efficacy(one, perturbations=named).get_yticklabels()]
        for one in (stored, stored.uns["sams_guides"])
    ]
    assert labels[0] == labels[1]
    assert len(labels[0]) == 4


@pytest.mark.parametrize(
    ("use", "key", "call"),
    [
        (lambda a: pl.masks(a), "sams_masks", "model.get_perturbation_masks()"),
        (lambda a: tl.called_masks(a), "sams_masks", "model.get_perturbation_masks()"),
        (lambda a: tl.top_genes(a), "sams_programs", "model.get_latent_programs()"),
        (lambda a: pl.program_genes(a, "x"), "sams_programs", "model.get_latent_programs()"),
        (lambda a: pl.direct_effects(a), "sams_direct_effects", "model.get_direct_effects()"),
        (lambda a: pl.guide_efficacy(a), "sams_guides", "scvi_sams.tl.guide_efficacy(model)"),
        (lambda a: pl.context_effects(a), "sams_context_effects", "tl.context_effects(model)"),
        (lambda a: pl.interaction_matrix(a), "sams_interactions", "tl.genetic_interactions(model)"),
        (lambda a: pl.effect_volcano(a, "x"), "sams_ate", "model.predict_ate()"),
    ],
    ids=["masks", "calls", "genes", "program", "direct", "guides", "contexts", "pairs", "volcano"],
)
def test_a_slot_that_is_missing_is_named_with_the_call_that_writes_it(use, key, call):
    adata = small_screen()
    adata.uns["sams_hits"] = pd.DataFrame()
    with pytest.raises(MissingKeyError) as error:
        use(adata)
    assert f"has no {key!r}" in str(error.value)
    assert call in str(error.value)


def test_a_model_that_learns_nothing_of_the_kind_says_so():
    model = train_small(small_screen(), model_cls=ConditionalVAE)
    with pytest.raises(SAMSError, match="ConditionalVAE has no get_perturbation_masks"):
        pl.masks(model)
