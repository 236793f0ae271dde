import os
from pathlib import Path

import pytest
import scvi


@pytest.fixture(scope="session")
def data_dir():
    """Ask for the published files: in SCVI_SAMS_DATA_DIR, or downloaded where they are required."""
    folder = os.environ.get("SCVI_SAMS_DATA_DIR")
    if not folder and os.environ.get("SCVI_SAMS_REQUIRE_DATA") != "1":
        pytest.skip(
            "needs published data: set SCVI_SAMS_DATA_DIR to a folder for it, or "
            "SCVI_SAMS_REQUIRE_DATA=1 to download it into the cache folder"
        )
    return folder


@pytest.fixture(scope="session")
def converted_file(data_dir):
    """Find a file that is converted in R, and cannot be downloaded; an error if it is required."""

    def find(name):
        path = Path(data_dir or "") / name
        if not path.is_file():
            missing = f"needs {name} in SCVI_SAMS_DATA_DIR: it is converted in R"
            if os.environ.get("SCVI_SAMS_REQUIRE_DATA") == "1":
                pytest.fail(missing)
            pytest.skip(missing)
        return path

    return find


@pytest.fixture(scope="module", autouse=True)
def no_seed_is_left():
    """Cells are split by the global seed: what a module sets is not for the next one."""
    yield
    scvi.settings.seed = None
