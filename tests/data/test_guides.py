"""Guides of cells: codes, the perturbation of each guide, other data, loaders and files."""

import numpy as np
import pandas as pd
import pytest
import torch
from scvi.dataloaders import AnnDataLoader

from data.on_disk import FORMS, write_screen
from model.builders import TRAINING, small_screen
from scvi_sams import CPAVAE, SAMSVAE, SVAEPlus
from scvi_sams.data import ResidentDataModule, StreamingDataModule, open_screen
from scvi_sams.data._field import registered_labels
from scvi_sams.data._guides import guide_field, registered_guides
from scvi_sams.exceptions import (
    ChangedDataError,
    InvalidArgumentError,
    InvalidPerturbationLabelError,
    MissingKeyError,
    RegistrationError,
)

LABELS = ["control", "A", "A", "B", "B+A", "control", "A", "B"]
GUIDES = ["NTg1", "Ag2", "Ag10", "Bg1", "Bg1|Ag2", np.nan, "Ag10|Ag2", None]
NAMES = ("Ag10", "Ag2", "Bg1")
CODES = [[-1, -1], [1, -1], [0, -1], [2, -1], [1, 2], [-1, -1], [0, 1], [-1, -1]]


def create(adata, model_cls=SAMSVAE, **setup):
    model_cls.setup_anndata(adata, **({"guide_key": "guide"} | setup))
    return model_cls(adata, n_latent=2, n_hidden=4)


def guides_of(adata, **setup):
    return registered_guides(create(adata, **setup).adata_manager)


def owners(make_screen, labels, guides, **setup):
    """Perturbation of each guide, by name."""
    model = create(make_screen(labels, guide=guides), **setup)
    found = registered_guides(model.adata_manager)
    return dict(zip(found.names, [model.perturbations[i] for i in found.perturbation], strict=True))


@pytest.fixture
def screen(make_screen):
    return make_screen(LABELS, guide=pd.Categorical(GUIDES))


def test_codes_and_perturbations_of_guides(screen):
    model = create(screen)
    found = registered_guides(model.adata_manager)
    assert found.names == NAMES
    np.testing.assert_array_equal(found.perturbation, [0, 0, 1])
    np.testing.assert_array_equal(found.codes, CODES)
    assert found.codes.dtype == found.perturbation.dtype == np.int64
    assert screen.obsm["_scvi_guides"].dtype == np.float32
    np.testing.assert_array_equal(screen.obsm["_scvi_guides"], CODES)
    assert model.summary_stats.n_guides == 3
    state = model.adata_manager.get_state_registry("guides")
    assert state["cells_per_guide"].tolist() == [2, 3, 2]


def test_the_table_of_guides(screen):
    model = create(screen)
    state = model.adata_manager.get_state_registry("guides")
    table = guide_field(model.adata_manager).view_state_registry(state)
    assert [list(column.cells) for column in table.columns] == [
        list(NAMES),
        ["A", "A", "B"],
        ["2", "3", "2"],
        ["0", "1", "2"],
    ]


def test_without_a_key_there_is_no_tensor(screen):
    model = create(screen, guide_key=None)
    assert registered_guides(model.adata_manager) is None
    assert "guides" not in model.adata_manager.data_registry
    assert "_scvi_guides" not in screen.obsm
    assert "guides" not in next(iter(model._make_data_loader(screen)))


@pytest.mark.parametrize(
    "written",
    [
        ["Ag1|Bg1", "Ag1", "Bg1"],
        ["Bg1 | Ag1|", " Ag1", "Bg1 "],
        ["Ag1+Bg1", "Ag1", "Bg1"],
        ["Bg1;Ag1", "Ag1", "Bg1"],
        ["Ag1, Bg1", "Ag1", "Bg1"],
        ["Ag1|Bg1|Ag1", "Ag1", "Bg1"],
    ],
)
def test_how_several_guides_are_written(make_screen, written):
    adata = make_screen(["A+B", "A", "B", "control"], guide=[*written, "NT"])
    found = guides_of(adata)
    assert found.names == ("Ag1", "Bg1")
    np.testing.assert_array_equal(found.codes, [[0, 1], [0, -1], [1, -1], [-1, -1]])


def test_several_guides_of_one_gene_may_be_joined_by_the_delimiter(make_screen):
    found = guides_of(make_screen(["A", "A", "control"], guide=["Ag1+Ag2", "Ag2", ""]))
    assert found.names == ("Ag1", "Ag2")
    np.testing.assert_array_equal(found.codes, [[0, 1], [1, -1], [-1, -1]])


@pytest.mark.parametrize(
    ("delimiter", "guides"),
    [
        ("_", ["STAT1_1", "STAT1_2", "IRF1_1", "STAT1_1|IRF1_1", "NT_1"]),
        ("+", ["S_+_17.2", "S_-_17.3", "I_+_29.1", "S_+_17.2|I_+_29.1", "N_+_3"]),
        ("+", ["S,1", "S,2", "I,1", "S,1|I,1", "NT,1"]),
    ],
)
def test_a_delimiter_that_is_part_of_names_does_not_split_them(make_screen, delimiter, guides):
    labels = ["STAT1", "STAT1", "IRF1", delimiter.join(["STAT1", "IRF1"]), "control"]
    found = owners(make_screen, labels, guides, delimiter=delimiter)
    expected = {guides[2]: "IRF1", guides[0]: "STAT1", guides[1]: "STAT1"}
    assert found == expected


def test_a_delimiter_that_is_part_of_names_without_combinations(make_screen):
    labels, guides = ["STAT1", "STAT1", "IRF1", "control"], ["STAT1_1", "STAT1_2", "IRF1_1", "NT_1"]
    assert owners(make_screen, labels, guides, delimiter="_") == {
        "IRF1_1": "IRF1",
        "STAT1_1": "STAT1",
        "STAT1_2": "STAT1",
    }


def test_names_of_guides_need_not_be_those_of_genes(make_screen):
    """Protospacers: cells say to which perturbation each belongs."""
    labels = ["A", "B", "A+B", "B+A", "C+B", "control"]
    guides = ["ACGT", "TTGA", "ACGT+CCCC", "TTGA+GGGG", "CCCC+ATAT", "GATC"]
    assert owners(make_screen, labels, guides) == {
        "ACGT": "A",
        "GGGG": "A",  # TTGA has B
        "CCCC": "B",  # of A+B and B+C
        "TTGA": "B",
        "ATAT": "C",  # CCCC has B
    }


def test_guides_that_are_in_combinations_only(make_screen):
    """The name decides, the longest first; then what the others leave over, in rounds."""
    labels = ["AARS+AARS2", "AARS+AARS2", "X+AARS", "X+Y", "control"]
    guides = ["AARSg1|AARS2g1", "AARSg2|AARS2g1", "u|AARSg1", "u|v", "NT"]
    assert owners(make_screen, labels, guides) == {
        "AARSg1": "AARS",
        "AARSg2": "AARS",
        "AARS2g1": "AARS2",
        "u": "X",
        "v": "Y",
    }


def test_names_in_control_are_no_guides_wherever_they_are(make_screen):
    """The second guide of a vector with two, as in screens of genetic interactions."""
    labels = ["A", "A+B", "B", "NT", "NT"]
    guides = ["a1|NT_1", "a1|b1", "NT_2|b1", "NT_1|NT_2", "NT_1|NT_3"]
    adata = make_screen(labels, guide=guides)
    found = guides_of(adata, control=["NT", "NT_*"])
    assert found.names == ("a1", "b1")
    np.testing.assert_array_equal(found.codes, [[0, -1], [0, 1], [1, -1], [-1, -1], [-1, -1]])
    with pytest.raises(InvalidPerturbationLabelError, match=r"control=\['NT', 'NT_1'\]"):
        create(make_screen(labels, guide=guides), control="NT")


@pytest.mark.parametrize(
    "values",
    [
        [7, 12, 7, 5, 3],
        [7.0, 12.0, 7.0, 5.0, np.nan],
        pd.array([7, 12, 7, 5, None], dtype="Int64"),
        ["7", "12", "7", "5", " "],
        pd.Categorical([7.0, 12.0, 7.0, 5.0, np.nan]),
    ],
)
def test_numbers_are_read_as_text(make_screen, values):
    found = guides_of(make_screen(["A", "A", "A", "B", "control"], guide=values))
    assert found.names == ("12", "7", "5")
    np.testing.assert_array_equal(found.codes.ravel(), [1, 0, 1, 2, -1])


def test_long_names_and_doses(make_screen):
    long = "A" * 3000
    adata = make_screen(
        ["A", "A+B", "B", "control"], guide=[long, f"{long}|b1", "b1", "NT"], dose=[2.0, 1, 3, 0]
    )
    found = guides_of(adata, dosage_key="dose")
    assert found.names == (long, "b1")
    np.testing.assert_array_equal(found.codes, [[0, -1], [0, 1], [1, -1], [-1, -1]])


def test_a_matrix_of_doses_in_place_of_labels(make_screen):
    adata = make_screen(["-"] * 5, guide=["Bg1", "Ag1|Bg1", "Ag2", "NT", None])
    adata.obsm["doses"] = np.array([[1, 0], [1, 2], [0, 1], [0, 0], [0, 1.0]])
    model = create(adata, dosage_obsm_key="doses", perturbation_names=["B", "A"])
    found = registered_guides(model.adata_manager)
    assert model.perturbations == ["B", "A"]
    assert found.names == ("Bg1", "Ag1", "Ag2")
    np.testing.assert_array_equal(found.perturbation, [0, 1, 1])
    np.testing.assert_array_equal(found.codes, [[0, -1], [0, 1], [2, -1], [-1, -1], [-1, -1]])


def test_simulated_guides():
    adata = small_screen(guides_per_perturbation=3)
    model = create(adata)
    found = registered_guides(model.adata_manager)
    assert found.names == tuple(adata.uns["simulation"]["guides"].ravel())
    np.testing.assert_array_equal(found.perturbation, np.repeat(np.arange(4), 3))
    of_cells = ["+".join(found.names[i] for i in row if i >= 0) for row in found.codes]
    assert of_cells == adata.obs["guide"].astype(str).replace("control", "").tolist()
    of_guides = np.where(found.codes >= 0, found.perturbation[found.codes], -1)
    np.testing.assert_array_equal(of_guides, registered_labels(model.adata_manager).codes)


ERRORS = {
    "of two perturbations": (
        ["x", "Ag1", "x", "NT"],
        [r"'x' is in 1 cell of 'A' \(such as 'c0'\), 1 cell of 'B' \(such as 'c2'\)"],
    ),
    "shared with controls": (
        ["x", "Ag1", "Bg1", "x"],
        [r"'x' is in 1 control cell and in 1 cell of 'A' \(such as 'c0'\)", "NaN"],
    ),
    "none": ([None, "", "control", "NT"], ["No perturbed cell has a guide"]),
    "a list": ([["Ag1"], "Ag1", "Bg1", "NT"], [r"\['Ag1'\], which is neither text"]),
}


@pytest.mark.parametrize(("guides", "words"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_guide_and_its_cells(make_screen, guides, words, assert_unchanged):
    adata = make_screen(["A", "A", "B", "control"], guide=pd.Series(guides, dtype=object).array)
    before = adata.copy()
    for word in words:
        with pytest.raises(InvalidPerturbationLabelError, match=word):
            create(adata)
    assert_unchanged(adata, before)


@pytest.mark.parametrize("guide", ["x", "A_1_B_2", "B_A"])
def test_a_guide_of_combinations_that_nothing_tells_apart(make_screen, guide):
    adata = make_screen(["A+B"] * 3 + ["A", "control"], guide=[guide] * 3 + ["Ag1", "NT"])
    words = rf"'{guide}' is in 3 cells of 'A' and 'B' \(such as 'c0'\): it could belong to any of"
    with pytest.raises(InvalidPerturbationLabelError, match=words):
        create(adata)


def test_several_wrong_guides_are_counted(make_screen):
    adata = make_screen(["A", "B", "A", "B", "control"], guide=["x", "x", "y", "y", "NT"])
    with pytest.raises(InvalidPerturbationLabelError, match=r"'x' .* 1 more guide, such as 'y'"):
        create(adata)


def test_a_column_that_is_missing_double_or_no_name(make_screen, assert_unchanged):
    adata = make_screen(["A", "control"] * 2, guide=["Ag1", "NT"] * 2)
    before = adata.copy()
    with pytest.raises(MissingKeyError, match="'grna'"):
        create(adata, guide_key="grna")
    with pytest.raises(InvalidArgumentError, match="`guide_key`"):
        create(adata, guide_key=["guide"])
    assert_unchanged(adata, before)
    adata.obs = pd.concat([adata.obs, adata.obs[["guide"]]], axis=1)
    with pytest.raises(RegistrationError, match=r"more than one column 'guide'"):
        create(adata)


def test_only_models_that_add_effects_have_guides(screen):
    with pytest.raises(InvalidArgumentError, match="combination is a separate perturbation"):
        create(screen, SVAEPlus)
    found = registered_guides(create(screen, CPAVAE).adata_manager)
    np.testing.assert_array_equal(found.codes, CODES)


def test_cells_without_a_guide_are_logged_once(screen, caplog):
    with caplog.at_level("INFO", logger="scvi.sams"):
        model = create(screen)
        create(screen, guide_key=None)
        assert registered_guides(model.adata_manager).names == NAMES
        model.adata_manager.validate()
    told = [message for message in caplog.messages if "guide" in message]
    assert told == ["1 perturbed cell has no known guide in adata.obs['guide']."]


def test_other_cells_are_read_by_name(make_screen, screen, caplog):
    model = create(screen)
    other = make_screen(
        ["B", "A+B", "A", "A", "control", "A"],
        guide=["Bg1", "Bg1+Ag10", "Ag7", "Ag2|Ag8", "Ag2", "NTg1"],
    )
    model.is_trained_ = True
    with caplog.at_level("INFO", logger="scvi.sams"):
        model.get_latent_representation(other)
        model.get_latent_representation(other)
    found = registered_guides(model.get_anndata_manager(other))
    assert found.names == NAMES
    np.testing.assert_array_equal(found.perturbation, [0, 0, 1])
    np.testing.assert_array_equal(
        found.codes, [[2, -1], [0, 2], [-1, -1], [1, -1], [-1, -1], [-1, -1]]
    )
    (warning,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "3 guides" in warning.message
    assert "'Ag7', 'Ag8', 'NTg1'" in warning.message
    assert sum("2 perturbed cells have no known" in message for message in caplog.messages) == 1


def test_other_cells_without_the_column(make_screen, screen, caplog):
    model = create(screen)
    model.is_trained_ = True
    other = make_screen(LABELS[:4])
    with caplog.at_level("INFO", logger="scvi.sams"):
        model.get_latent_representation(other)
        model.get_latent_representation(other)
    manager = model.get_anndata_manager(other)
    np.testing.assert_array_equal(registered_guides(manager).codes, [[-1]] * 4)
    assert [m for m in caplog.messages if "no column 'guide'" in m] == [
        "adata.obs has no column 'guide': cells are treated as without guides."
    ]
    # A column that comes later is read.
    other.obs["guide"] = GUIDES[:4]
    model.get_latent_representation(other)
    found = registered_guides(model.get_anndata_manager(other))
    np.testing.assert_array_equal(found.codes.ravel(), [-1, 1, 0, 2])


@pytest.mark.parametrize("is_view", [False, True])
def test_other_cells_whose_label_is_not_that_of_their_guide(
    make_screen, screen, assert_unchanged, is_view
):
    model = create(screen)
    model.is_trained_ = True
    other = make_screen(["B", "B", "A"], guide=["Ag2", "Ag2", "Ag2"])
    before = other.copy()
    words = r"'Ag2' belongs to 'A' in the training data, but is in 2 cells of 'B'"
    with pytest.raises(InvalidPerturbationLabelError, match=words):
        model.get_latent_representation(other[:3] if is_view else other)
    assert_unchanged(other, before)


def test_guides_that_changed_are_found(screen):
    model = create(screen)
    model.is_trained_ = True
    screen.obs["guide"] = screen.obs["guide"].astype(object).replace("Ag10", "Ag2")
    with pytest.raises(ChangedDataError, match=r"adata\.obs\['guide'\] changed"):
        model.get_latent_representation()


def test_another_registration_of_the_same_cells(screen, assert_unchanged):
    first = create(screen)
    screen.obs["other"] = ["NT", "A1", "A1", "B1", "B2|A1", "NT", "A1", "B2"]
    second = create(screen, guide_key="other")
    before = screen.copy()
    np.testing.assert_array_equal(registered_guides(first.adata_manager).codes, CODES)
    assert registered_guides(first.adata_manager).names == NAMES
    assert_unchanged(screen, before)
    assert registered_guides(second.adata_manager).names == ("A1", "B1", "B2")
    first.adata_manager.validate()
    np.testing.assert_array_equal(screen.obsm["_scvi_guides"], CODES)


def test_training_data_that_are_read_again_have_the_same_codes(make_screen):
    """Whatever separates guides: here the training data decide that ``"+"`` is part of names."""
    labels = ["A", "A", "B", "A+B", "control"]
    for guides in (
        ["A+1", "A+2", "B+1", "A+1|B+1", "NT"],
        ["Ag1+Ag2", "Ag1", "Bg1", "Ag1+Bg1", "NT"],
        ["p", "q", "r", "p,r", "NT"],
    ):
        model = create(make_screen(labels, guide=guides))
        model.is_trained_ = True
        again = make_screen(labels, guide=guides)
        model.get_latent_representation(again)
        found = registered_guides(model.get_anndata_manager(again))
        np.testing.assert_array_equal(
            found.codes, registered_guides(model.adata_manager).codes, err_msg=str(guides)
        )


@pytest.fixture(scope="module")
def larger():
    adata = small_screen(guides_per_perturbation=2)
    unknown = np.flatnonzero(adata.obs["perturbation"] != "control")[:5]
    guides = adata.obs["guide"].astype(object)
    guides.iloc[unknown] = np.nan
    adata.obs["guide"] = pd.Categorical(guides)  # as files have it
    return adata


def read(loader):
    return torch.cat([batch["guides"] for batch in loader])


@pytest.mark.parametrize("form", FORMS)
def test_every_loader_has_the_guides_of_its_cells(larger, form, tmp_path):
    model = create(larger.copy())
    codes = torch.from_numpy(registered_guides(model.adata_manager).codes).float()
    assert codes.shape == (150, 2)
    assert sorted(set(codes.ravel().tolist())) == [-1, 0, 1, 2, 3, 4, 5, 6, 7]
    split = np.split(np.random.default_rng(0).permutation(150), [100])
    in_memory = read(AnnDataLoader(model.adata_manager, indices=split[1], batch_size=7))
    assert in_memory.dtype == torch.float32
    assert torch.equal(in_memory, codes[split[1]])
    on_disk = create(open_screen(write_screen(larger, tmp_path, form)))
    for module, manager in (
        (ResidentDataModule, model.adata_manager),
        (StreamingDataModule, on_disk.adata_manager),
    ):
        data = module(manager, external_indexing=split, batch_size=16)
        found = read(data.val_dataloader())
        assert found.dtype == torch.float32
        assert torch.equal(found, codes[split[1]])
        shuffled = read(data.train_dataloader()).tolist()
        assert sorted(shuffled) == sorted(codes[split[0]].tolist())


@pytest.mark.parametrize("datamodule", [None, ResidentDataModule, StreamingDataModule])
def test_a_model_is_trained_saved_and_loaded(larger, tmp_path, datamodule):
    model = create(larger.copy())
    data = datamodule and datamodule(model.adata_manager, batch_size=64)
    training = {k: v for k, v in TRAINING.items() if data is None or k != "batch_size"}
    model.train(max_epochs=2, datamodule=data, **training)
    expected = registered_guides(model.adata_manager)
    latent = model.get_latent_representation()
    model.save(tmp_path / "model", save_anndata=True)
    fresh = larger.copy()
    some = larger[larger.obs["guide"] != "P001g1"].copy()
    for adata, kept in (
        (None, slice(None)),
        (fresh, slice(None)),
        (some, larger.obs["guide"] != "P001g1"),
    ):
        loaded = SAMSVAE.load(tmp_path / "model", adata, accelerator="cpu")
        found = registered_guides(loaded.adata_manager)
        assert found.names == expected.names
        np.testing.assert_array_equal(found.perturbation, expected.perturbation)
        np.testing.assert_array_equal(found.codes, expected.codes[kept])
        np.testing.assert_allclose(loaded.get_latent_representation(), latent[kept], atol=1e-5)
    without = SAMSVAE.load(tmp_path / "model", adata=False, accelerator="cpu")
    np.testing.assert_allclose(without.get_latent_representation(fresh), latent, atol=1e-5)


def test_the_guides_of_a_published_screen(data_dir):
    from scvi_sams.datasets import papalexi21

    adata = papalexi21()
    model = create(adata, size_factor_key="total_counts")
    found = registered_guides(model.adata_manager)
    expected = adata.obs[adata.obs["perturbation"] != "control"]
    expected = expected.drop_duplicates("guide").set_index("guide")["perturbation"]
    assert len(found.names) == len(expected) == 97  # 3 or 4 of each of 25 genes
    assert [model.perturbations[i] for i in found.perturbation] == expected[
        list(found.names)
    ].tolist()
    assert not any(name.startswith("NT") for name in found.names)
    assert found.codes.shape == (19619, 1)
    is_control = (adata.obs["perturbation"] == "control").to_numpy()
    np.testing.assert_array_equal(found.codes.ravel() == -1, is_control)
    of_cells = np.array(found.names)[found.codes[~is_control].ravel()]
    np.testing.assert_array_equal(of_cells, adata.obs["guide"][~is_control])
