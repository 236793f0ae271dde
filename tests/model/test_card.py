"""The card of a model: what it says, and that the hub of scvi-tools takes it."""

import json
import re
from importlib.metadata import version

import numpy as np
import pytest

from model.builders import small_screen, train_small
from scvi_sams import CPAVAE, SAMSVAE, ConditionalVAE, SVAEPlus


@pytest.fixture(scope="module")
def model():
    return train_small(small_screen())


def blocks(card):
    return [json.loads(text) for text in re.findall(r"```json\n(.*?)\n```", card, re.DOTALL)]


def test_it_says_what_the_model_is_of(model):
    card = model.card(description="Of no cells at all.", license="cc-by-4.0")
    assert card.startswith("---\nlibrary_name: scvi-tools\nlicense: cc-by-4.0\ntags:\n")
    assert f"- scvi_version:{version('scvi-tools')}\n" in card
    assert "\n# SAMSVAE\n\nOf no cells at all.\n" in card
    assert "- 150 cells, 24 genes\n" in card
    labels = model.adata.obs["perturbation"].astype(str).iloc[model.train_indices]
    cells = [sum(name in label.split("+") for label in labels) for name in model.perturbations]
    assert f"{min(cells)} / {int(np.median(cells))} / {max(cells)} (min" in card
    assert f"names: {', '.join(model.perturbations)}\n" in card
    settings, trainings = blocks(card)
    assert settings["model"] == model.provenance["settings"]
    assert settings["setup_anndata"]["perturbation_key"] == "perturbation"
    assert trainings == model.provenance["trainings"]


@pytest.mark.parametrize("model_cls", [SAMSVAE, CPAVAE, SVAEPlus, ConditionalVAE])
def test_every_model_has_one_without_its_data(model_cls, tmp_path):
    trained = train_small(small_screen(), model_cls=model_cls)
    trained.save(tmp_path / "model")
    loaded = model_cls.load(tmp_path / "model", adata=False)
    assert loaded.card() == trained.card()
    assert f"\n# {model_cls.__name__}\n\nNo description was given.\n" in loaded.card()


def test_the_hub_takes_it(model, tmp_path):
    pytest.importorskip("huggingface_hub")
    from scvi.hub import HubMetadata, HubModel

    folder = str(tmp_path / "model")
    model.save(folder, save_anndata=True)
    (tmp_path / "model" / "README.md").write_text(model.card(license="cc-by-4.0"))
    metadata = HubMetadata.from_dir(
        folder, anndata_version=version("anndata"), model_parent_module="scvi_sams"
    )
    hub = HubModel(folder, metadata=metadata)
    hub.save(overwrite=True)
    again = HubModel(folder)
    assert again.model_card.data.license == "cc-by-4.0"
    assert "model_cls_name:SAMSVAE" in again.model_card.data.tags
    assert isinstance(again.model, SAMSVAE)
    np.testing.assert_array_equal(
        again.model.get_perturbation_masks(key_added=None),
        model.get_perturbation_masks(key_added=None),
    )
