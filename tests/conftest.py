import os

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


@pytest.fixture(scope="module", autouse=True)
def no_seed_is_left():
    """Cells are split by the global seed: what a module sets is not for the next one."""
    yield
    scvi.settings.seed = None
