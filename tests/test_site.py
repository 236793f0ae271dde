"""Pages of the documentation that have to name all there is."""

import json
import re
from pathlib import Path

import pytest

from scvi_sams import pl

DOCS = Path(__file__).parents[1] / "docs"
TUTORIALS = sorted(path.stem for path in (DOCS.parent / "tutorials").glob("*.ipynb"))


@pytest.mark.parametrize("page", ["index.md", "tutorials.md"])
def test_every_tutorial_is_on_the_page(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    named = set(re.findall(r"^(?::link: )?tutorials/(\w+)$", text, flags=re.MULTILINE))
    assert sorted(named) == TUTORIALS


def test_every_page_is_in_the_table_of_contents():
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    trees = "\n".join(re.findall(r"```\{toctree\}(.*?)```", text, flags=re.DOTALL))
    named = set(re.findall(r"^(?:.* <)?([\w/]+)>?$", trees, flags=re.MULTILINE))
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    assert pages <= named


def test_every_plot_has_a_picture_on_its_page():
    pictures = {
        path.stem.removeprefix("gallery_") for path in (DOCS / "figures").glob("gallery_*.png")
    }
    assert set(pl.__all__) == pictures


def test_versions_to_switch_between():
    versions = json.loads((DOCS / "_static" / "switcher.json").read_text(encoding="utf-8"))
    assert [entry for entry in versions if set(entry) < {"version", "url"}] == []
    assert "latest" in {entry["version"] for entry in versions}
    assert sum(entry.get("preferred", False) for entry in versions) <= 1
