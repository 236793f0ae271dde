"""Tutorials, which lie at the top of the repository: copied below ``docs``, with thumbnails."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ConfigError

FOLDER = "tutorials"


def copy_tutorials(app: Sphinx, config: Config) -> None:
    """Copy all notebooks anew, and write the pictures that ``tutorial_thumbnails`` names."""
    source, copy = Path(app.srcdir).parent / FOLDER, Path(app.srcdir) / FOLDER
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    thumbnails = copy / "thumbnails"
    thumbnails.mkdir()
    for name, number in config.tutorial_thumbnails.items():
        pictures = pictures_of(copy / f"{name}.ipynb")
        if number >= len(pictures):
            raise ConfigError(
                f"tutorial_thumbnails asks for picture {number} of {name}.ipynb, "
                f"which has {len(pictures)}"
            )
        (thumbnails / f"{name}.png").write_bytes(pictures[number])


def pictures_of(notebook: Path) -> list[bytes]:
    """PNG files among the outputs of a notebook, in order."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    outputs = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    encoded = [data["image/png"] for data in outputs if "image/png" in data]
    return [base64.b64decode("".join(lines)) for lines in encoded]


def setup(app: Sphinx) -> dict[str, bool]:
    """Copy before Sphinx looks for pages."""
    app.add_config_value("tutorial_thumbnails", {}, "env", types=[dict])
    app.connect("config-inited", copy_tutorials)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
